"""What the linear maps of a model are given, and what backpropagation says of their answers, between two steps."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MAPS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that multiply their input, a convolution each patch of it, by a weight [out, in, ...]."""


class Captured(NamedTuple):
    """What one weight has been given since the last step: sum of x x^T [in, in], over so many rows; where a rule
    needs them, the pairs themselves, errors at the output [n, out] and inputs [n, in]. Of a convolution a row is a
    patch, in = channels times the kernel's size."""

    gram: Tensor
    rows: int = 0
    errors: tuple[Tensor, ...] = ()
    inputs: tuple[Tensor, ...] = ()


_NOTHING = Captured(0.0, 0)  # type: ignore[arg-type]


@contextmanager
def captured_into(seen: dict[Tensor, Captured], module: nn.Module, pairs: bool) -> Iterator[None]:
    """While open, forward passes of the module's maps are noted, once backward() comes back to their outputs: what no
    gradient is of is not counted, and what activation checkpoints compute twice is counted once."""
    layers = [m for m in module.modules() if isinstance(m, MAPS) and getattr(m, "groups", 1) == 1]
    note = _note_pairs if pairs else _note_gram
    # known by their weights of now: inside a sharded forward pass a layer has others
    hooks = [layer.register_forward_hook(partial(note, seen, layer.weight)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _note_gram(
    seen: dict[Tensor, Captured], weight: Tensor, layer: Any, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    if not output.requires_grad:
        return
    with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
        x = _rows(layer, inputs[0])
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        gram, number = x.mT @ x, x.shape[0]

    def add(_: Tensor) -> None:
        old = seen.get(weight, _NOTHING)
        seen[weight] = Captured(old.gram + gram, old.rows + number)

    output.register_hook(add)


def _note_pairs(
    seen: dict[Tensor, Captured], weight: Tensor, layer: Any, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    if not output.requires_grad:
        return
    x = _rows(layer, inputs[0].detach().to(output.dtype))  # as autocast has made it: what the weight was given

    def add(error: Tensor) -> None:
        old = seen.get(weight, _NOTHING)
        channels = -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)
        rows = error.detach().movedim(channels, -1).reshape(-1, weight.shape[0])
        seen[weight] = Captured(old.gram, old.rows + x.shape[0], (*old.errors, rows), (*old.inputs, x))

    output.register_hook(add)


def _rows(layer: Any, x: Tensor) -> Tensor:
    """The inputs [n, in] that the weight, as a matrix [out, in], is multiplied with."""
    x = x.detach()
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    sizes, dilations, strides = layer.kernel_size, layer.dilation, layer.stride
    dims = len(sizes)
    x = x if x.dim() == dims + 2 else x.unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = nn.functional.pad(x, _padding(layer), mode=mode)
    for dim, (size, dilation, stride) in enumerate(zip(sizes, dilations, strides, strict=True)):
        x = x.unfold(2 + dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    patches = x.movedim(1, 1 + dims)  # [b, *positions, channels, *kernel]
    return patches.reshape(-1, math.prod(patches.shape[1 + dims :]))


def _padding(layer: Any) -> list[int]:
    """What is put before and after each dim, the last dim first; more after than before where it is uneven."""
    both: list[int] = []
    for dim in reversed(range(len(layer.kernel_size))):
        if isinstance(layer.padding, str):
            total = layer.dilation[dim] * (layer.kernel_size[dim] - 1) if layer.padding == "same" else 0
            both += [total // 2, total - total // 2]
        else:
            both += [layer.padding[dim]] * 2
    return both


def as_the_gradient_is(name: str, known: Captured, gradient: Tensor) -> Captured:
    """The pairs with their errors scaled as the gradient has been since backward(): by a scaler, by clipping. Raises
    ValueError where their sum is no multiple of it."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    errors, inputs = (torch.cat(rows) for rows in (known.errors, known.inputs))
    coarse = max((gradient.dtype, errors.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    total, errors, inputs = gradient.flatten(1).to(wide), errors.to(wide), inputs.to(wide)
    summed = errors.mT @ inputs
    size = summed.abs().max().clamp(min=torch.finfo(wide).tiny)
    unit = summed / size
    times = (unit * total).sum() / unit.square().sum().clamp(min=torch.finfo(wide).tiny)
    # rounding: of the gradient to its dtype, and of long sums that cancel
    rounded = 16 * torch.finfo(coarse).eps * total.norm()
    cancelled = 16 * torch.finfo(wide).eps * errors.norm() * inputs.norm() * (times / size).abs()
    if not bool((total - times * unit).norm() <= rounded + cancelled):
        raise ValueError(
            f"the pairs captured for {name} do not sum to a multiple of its gradient, as something else has changed "
            "it (an average over processes, clipping of each entry, a loss beside the layer's output, a backward() "
            "outside of capture): leave the gradient to backward(), scalers and clipping of norms"
        )
    return known._replace(errors=(errors * (times / size),), inputs=(inputs,))

"""Is a configuration the known model that it should be?"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from nestling.models import Decoder, ModelConfig
from nestling.sequence import Mixer
from nestling.sequence.named import FAR, Model, error
from nestling.sequence.zoo import zoo

from .bench import SAME, apart, sealed
from .options import WIDTH, build
from .report import Finding, skip

_HOW = ("chunk", "projection_chunk", "checkpoint", "way")  # an oracle is told, or it must not matter
_LENGTH, _CHUNK = 40, 16


@sealed()
def named_model(model: Any, *, seed: int = 0) -> Finding:
    """A mixer that is a named model's is that model: its reads, what it keeps and all gradients are those of the
    paper's recurrence, written out token by token (`nestling.zoo`), in chunks of at most 16. It may differ in chunk
    sizes, and in the way it is run. Measured: the largest relative difference; `seed` changes nothing."""
    mixer: Any = model.config.mixer if isinstance(model, Decoder) else model
    for name, row in zoo.items():
        if _is(mixer, row):
            fewer = dataclasses.replace(mixer, chunk=min(mixer.chunk, _CHUNK)) if hasattr(mixer, "chunk") else mixer
            with torch.enable_grad():
                far = error(dataclasses.replace(row, mixer=fewer), getattr(mixer, "way", ""), length=_LENGTH)
            return Finding("named_model", far <= FAR, far, f"<= {FAR:g}", f"{name}, over {_LENGTH} tokens")
    return skip("named_model", "its mixer has no name in nestling.zoo")


def _is(mixer: Any, row: Model) -> bool:
    if type(mixer) is not type(row.mixer) or row.oracle is None or getattr(mixer, "way", row.ways[0]) not in row.ways:
        return False
    how = {name: getattr(mixer, name) for name in _HOW if hasattr(mixer, name)}
    try:
        return bool(dataclasses.replace(row.mixer, **how) == mixer)  # type: ignore[type-var]
    except ValueError:  # this row cannot be run so
        return False


@sealed()
def special_case(one: Mixer | ModelConfig, known: Mixer | ModelConfig, *, seed: int = 0) -> Finding:
    """Two expressions are one model: with the same parameters they have the same output and the same gradients.

    Parameters are matched by name and moved from their start; tokens or inputs are random. Measured: the largest
    difference, in float64. Raises ValueError where one has a parameter that the other has not, by name and shape.
    """
    ours, theirs = (build(expression, seed)[0] for expression in (one, known))
    shapes, wanted = ({name: list(p.shape) for name, p in module.named_parameters()} for module in (ours, theirs))
    for name in sorted(shapes.keys() | wanted.keys()):
        if shapes.get(name) != wanted.get(name):
            first, second = (told.get(name, "nothing of this name") for told in (wanted, shapes))
            raise ValueError(f"of {name} the known model has {first}, the other {second}")
    theirs.load_state_dict(ours.state_dict(), strict=False)
    far = max(apart(a, b) for a, b in zip(_told(ours), _told(theirs), strict=True))
    return Finding("special_case", far <= SAME, far, f"<= {SAME:g}")


def _told(module: nn.Module) -> list[Tensor]:
    """The output and the gradient of every parameter."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(module, Decoder):
        given = torch.randint(module.config.vocabulary, (2, _LENGTH), generator=generator)
    else:
        given = torch.randn(2, _LENGTH, WIDTH, dtype=torch.float64, generator=generator)
    parameters = list(module.parameters())
    with torch.enable_grad():
        y = module(given)[0]
        direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        found = torch.autograd.grad(y, parameters, direction, allow_unused=True)
    gradients = (torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True))
    return [y.detach(), *gradients]

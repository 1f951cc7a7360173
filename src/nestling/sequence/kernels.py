"""The linear family on a GPU: by flash-linear-attention's Triton kernels, where somebody asks for them.

`way="kernels"` of `linear_memory` and of the functions under the field's names ends here. What both sides call the
same is handed over as it is: q, k, v, gates [b, t, h, .], the log of the retention, step sizes as they multiply, a
scale of the reads; nothing is normalised on either side. What differs: states are [b, h, k, v] there.
"""

import importlib
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

LEAST = -60.0  # of a log gate: the kernels take differences of sums of them, where -inf would be no number


class Kernel(NamedTuple):
    """name: in `fla.ops`. takes: what is given beside q, k and v, and what it is called there. always: what else the
    function is told. narrow: it refuses float32."""

    name: str
    takes: dict[str, str] = {}  # noqa: RUF012
    always: dict[str, Any] = {}  # noqa: RUF012
    narrow: bool = False


_DELTA = {"step_size": "beta", "log_retention": "g"}

KERNELS: dict[str, Kernel] = {
    "linear_attention": Kernel("chunk_linear_attn", always={"normalize": False}),
    "gated_linear_attention": Kernel("chunk_simple_gla", {"log_retention": "g"}),
    "gated_linear_attention by channel": Kernel("chunk_gla", {"log_retention": "g"}),
    "delta_rule": Kernel("chunk_delta_rule", {"step_size": "beta"}, narrow=True),
    "gated_delta_rule": Kernel("chunk_gated_delta_rule", _DELTA),
    "kda": Kernel("chunk_kda", _DELTA),
    "comba": Kernel("chunk_comba", {"p": "p", **_DELTA}),
    "linear_memory": Kernel("chunk_dplr_delta_rule", {"log_retention": "gk", "less_erase": "a", "erase_along": "b"}),
}
"""From our forms to flash-linear-attention's functions. "linear_memory" is any recurrence that erases."""


def run_kernel(
    form: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *others: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    read: str = "after",
    chunk: int = 64,
    way: str = "kernels",
) -> tuple[Tensor, Tensor]:
    """y [b, t, h, v] in the dtype of v and the final state [b, h, v, k] in float32, as of the function `form`.

    q, k and v are handed over in the dtype of q, which decides how exactly the kernel multiplies; others: what `takes`
    names, in its order. A log gate below -60 counts as -60. `chunk` is the kernel's own. First derivatives only: the
    second raise RuntimeError. Raises ValueError where the package is missing, tensors lie on a CPU (but under Triton's
    interpreter, TRITON_INTERPRET=1), or the kernel has no such read or dtype. Source: flash-linear-attention 0.6.
    Oracle: the same function with way="chunked", in tests/test_kernels.py.
    """
    kernel = KERNELS[form]
    _check(kernel, q, read)
    b, t, h, _ = q.shape
    start = v.new_zeros(b, h, v.shape[-1], q.shape[-1], dtype=torch.float32) if initial_state is None else initial_state
    if 0 in (b, t, h):  # no kernel starts on nothing
        return v.clone(), start.float()
    told = {"q": q, "k": k.to(q.dtype), "v": v.to(q.dtype), "initial_state": start.float().mT.contiguous()}
    for (name, theirs), x in zip(kernel.takes.items(), others, strict=True):
        told[theirs] = x.float().clamp(min=LEAST) if name == "log_retention" else x
    told = dict(zip(told, FirstDerivative.apply(*told.values()), strict=True))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    y, state = _find(kernel)(**told, scale=scale, output_final_state=True, **kernel.always)
    return y.to(v.dtype), state.mT.contiguous()


def _check(kernel: Kernel, q: Tensor, read: str) -> None:
    if read != "after":
        raise ValueError(f"way='kernels' reads after a token's own write, got read={read!r}; use way='chunked'")
    if q.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("way='kernels' is for tensors on a GPU, got some on a CPU; use way='chunked'")
    allowed = (torch.bfloat16, torch.float16) if kernel.narrow else (torch.bfloat16, torch.float16, torch.float32)
    if q.dtype not in allowed:
        known = ", ".join(str(dtype) for dtype in allowed)
        raise ValueError(f"way='kernels': {kernel.name} takes q in one of {known}, got {q.dtype}")


def _find(kernel: Kernel) -> Any:
    try:
        return getattr(importlib.import_module("fla.ops"), kernel.name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"way='kernels' needs {kernel.name} of flash-linear-attention: pip install 'nestling[gpu]' ({error})"
        ) from None


class FirstDerivative(Function):
    """Tensors as they are. The kernels' gradients have no graph of their own: asking for one is an error here, and
    would silently be a part of the second derivative behind it."""

    @staticmethod
    def forward(ctx: Any, *tensors: Any) -> Any:
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("way='kernels' has first derivatives only; way='chunked' has the second too")
        return grads

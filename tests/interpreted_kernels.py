"""flash-linear-attention's kernels beside this library's chunk form: python tests/interpreted_kernels.py.

Started by tests/test_kernels.py, in a process of its own. On a GPU as they are; elsewhere the same programs in Triton's
interpreter, which has to be told three things: there is nothing to tune for, a number that a loop counts with is asked
for its type, and `gather` is the interpreter's. Prints how far answers, states and gradients are apart, relative to
their size.
"""

import os
import sys
import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from test_linear import FAMILIES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, H, WIDTH, STEPS = 1, 2, 16, 2
SLOW = ("gated delta rule by channel", "kda with an erase gate", "rwkv7", "gla")  # in the interpreter
LEFT_OUT = ("kda, gates that forget", "rwkv7, gates that forget", "gla, gates that forget", "longhorn by channel")


class Index(int):
    def to(self, dtype: object) -> "Index":
        return self


def interpret() -> None:
    """Before Triton is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.simplefilter("ignore")
    from triton.runtime.autotuner import Autotuner

    Autotuner.do_bench = staticmethod(lambda call, quantiles=None: [0.0, 0.0, 0.0])
    import fla.ops  # noqa: F401
    import triton.language as tl

    for name, module in list(sys.modules.items()):
        if name.startswith("fla."):
            module.range = lambda *ends: map(Index, range(*map(int, ends)))
            if hasattr(module, "gather"):
                module.gather = lambda *given, **how: tl.gather(*given, **how)


def draw(t: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    each = (B, t, H)
    drawn = {
        **{name: torch.randn(*each, WIDTH) for name in ("q", "v")},
        **{name: F.normalize(torch.randn(*each, WIDTH), dim=-1) for name in ("k", "p", "r")},
        "ks": F.normalize(torch.randn(B, t, STEPS, H, WIDTH), dim=-1),
        "vs": torch.randn(B, t, STEPS, H, WIDTH),
        "b": torch.rand(*each),
        "bs": 2 * torch.rand(B, t, STEPS, H),
        **{name: torch.rand(*each, WIDTH) for name in ("bk", "e")},
        "log": -0.3 * torch.rand(*each),
        "logk": -0.3 * torch.rand(*each, WIDTH),
        "rate": 0.3 * torch.randn(H),
        "d": torch.randn(H),
        "s": torch.randn(B, H, WIDTH, WIDTH),
    }
    return {name: x.to(DEVICE) for name, x in drawn.items()}


def compare(family: str, names: tuple[str, ...], fast: object, t: int, dtype: torch.dtype) -> float:
    given = {name: x.to(dtype).float() for name, x in draw(t).items() if name in (*names, "s")}
    found = []
    for way in ("chunked", "kernels"):
        leaves = {name: given[name].clone().requires_grad_() for name in (*names, "s")}
        low = [x if name in ("b", "bs", "log", "logk", "rate", "d") else x.to(dtype) for name, x in leaves.items()]
        out = fast(*low[:-1], initial_state=leaves["s"], way=way)
        torch.manual_seed(1)
        loss = sum((y.float() * torch.randn(y.shape, device=DEVICE)).sum() for y in out)
        found.append([*out, *torch.autograd.grad(loss, list(leaves.values()))])
    pairs = [(a.float(), b.float()) for a, b in zip(*found, strict=True)]
    return max(float((a - b).norm() / a.norm()) for a, b in pairs)


def main() -> None:
    if DEVICE == "cpu":
        interpret()
    for family, (names, fast, _) in FAMILIES.items():
        if family in LEFT_OUT:
            continue
        dtype = torch.float16 if family in ("delta rule", "delta product without decay", "longhorn") else torch.float32
        t = 20 if family in SLOW and DEVICE == "cpu" else 70
        print(f"{family}\t{compare(family, names, fast, t, dtype)}", flush=True)


if __name__ == "__main__":
    main()

"""Mixers: what stands in a block where a Transformer has attention. Here their common parts and expressions."""

import math
from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nestling.memory.part import Part
from nestling.memory.structure import Weights

from .compiled import walked
from .elementwise import Gated


class Mixer(Part, family=True):
    """The expression of a mixer: what it is made of, without its weights. choices: Miras' four (structure, attentional
    bias, retention, learning algorithm) in words, where they cannot be read off the parts."""

    choices: tuple[str, str, str, str] | None = None

    @abstractmethod
    def build(self, dim: int, heads: int, generator: torch.Generator | None = None) -> "MixerModule":
        """The module for a model of width `dim` with `heads` heads, initialised from the generator."""


class MixerModule(nn.Module):
    """A mixer with its weights: y, state = mixer(x, state). The state is all that it remembers. step_options: what
    torch.compile is given for its chunks' step, once it was asked to `compile`."""

    step_options: dict[str, Any] | None = None

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "forward" in vars(cls):
            cls.forward = walked(cls.forward)  # type: ignore[method-assign]

    def compile(self, **options: Any) -> None:
        """`compile_steps` of this mixer, in the place of nn.Module's own, which would trace the walk over chunks."""
        compile_steps(self, **options)

    def init_state(self, batch: int) -> Any:
        """The state at the start of a document, for `batch` rows."""
        raise NotImplementedError

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: Any = None,
        *,
        reset: Bool[Tensor, "b t"] | None = None,
        valid: Bool[Tensor, "b t"] | None = None,
    ) -> tuple[Float[Tensor, "b t d"], Any]:
        """x [b, t, d] and the state so far -> y [b, t, d] and the state after it. `reset` marks the tokens that
        start a document; tokens that are not `valid` are padding: they change nothing, and their y is void."""
        raise NotImplementedError

    def standing(self, state: Any) -> Weights:
        """The weights [b, h, out, in] of the memory as they stand, for those who read it without writing. Raises
        ValueError where there is no memory with weights."""
        raise ValueError(f"{type(self).__name__} has no memory whose weights could be read")


def compile_steps(module: nn.Module, **options: Any) -> None:
    """From now on the mixers in `module` that go through chunks with a memory take whole chunks by torch.compile.

    options: torch.compile's. Shapes are fixed unless `dynamic` says otherwise; it keeps 8 forms of a step
    (`recompile_limit`), one for each batch size, twice with and without gradients, and all else runs as before, with
    the same numbers but for rounding. The first call takes a minute or more, and a C++ compiler on a CPU. There are no
    second derivatives. What is compiled: `SequenceMemory`, alone, in `mac`, `mag`, `mal` and `tnt`; `SelfModifying`.
    """
    for mixer in module.modules():
        if isinstance(mixer, MixerModule):
            mixer.step_options = {"dynamic": False, **options}


def linear(
    rows: int, columns: int, generator: torch.Generator | None, *, bias: bool = False, gain: float = 1.0
) -> nn.Linear:
    """A linear map columns -> rows with weights of standard deviation gain / sqrt(columns), bias 0."""
    layer = nn.Linear(columns, rows, bias=bias)
    with torch.no_grad():
        layer.weight.normal_(generator=generator).mul_(gain / math.sqrt(columns))
        if bias:
            layer.bias.zero_()
    return layer


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[b, t, h * k] -> [b, h, t, k], contiguous: batched products would copy it at every use."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2).contiguous()


def merge_heads(x: Tensor) -> Tensor:
    """[b, h, t, k] -> [b, t, h * k]."""
    return x.transpose(1, 2).flatten(-2)


class Output(nn.Module):
    """RMS norm by head, a SiLU gate from the layer's input, and the output projection (Titans 4.4)."""

    def __init__(self, dim: int, heads: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(dim))
        self.gate = linear(dim, dim, generator)
        self.project = linear(dim, dim, generator)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """y [b, h, t, k] and the layer's input x [b, t, d] -> [b, t, d]."""
        return self.project(Gated.apply(y, self.gate(x).to(y.dtype), self.norm))


def step_bound(chunk: int, key_dim: int, safety: float = 1.5) -> float:
    """The largest step that the gate allows: safety / (1 + C/d + 2 sqrt(C/d)), the inverse of the largest
    eigenvalue expected of a sum of C random unit keys' outer products, times `safety` (spec: memory 5.2)."""
    ratio = chunk / key_dim
    return safety / (1.0 + ratio + 2.0 * math.sqrt(ratio))


def check_width(dim: int, heads: int) -> None:
    if heads < 1 or dim % heads:
        raise ValueError(f"dim {dim} is not a multiple of heads {heads}")

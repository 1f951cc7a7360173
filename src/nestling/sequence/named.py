"""What a named model is: an expression, where it is from, what it is held against; and what can be read off it."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nestling.memory.rule import retain, retain_first
from nestling.memory.state import flatten

from .mixer import Mixer
from .oracles import LayerOracle, Oracle, layer_error, memory_error
from .scan import Memory
from .self_modifying import self_modifying
from .tnt import tnt

FAR = 1e-9  # of a model from its oracle, in float64


@dataclass(frozen=True)
class Model:
    """A named model: its mixer, the recurrence, where it is from, and its oracle. note: where the layer is not the
    paper's."""

    mixer: Mixer
    equation: str
    source: str
    oracle: Oracle | LayerOracle | None = None
    note: str = ""

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways in which it can be run, its own first."""
        own = getattr(self.mixer, "way", None)
        if own is None:
            return ("its own",)
        others = (way for way in ("chunked", "recurrent") if way != own and own != "stepped")
        return (own, *(way for way in others if _legal(self.mixer, way)))

    @property
    def choices(self) -> tuple[str, str, str, str]:
        """Miras' four: structure, attentional bias, retention, learning algorithm."""
        return _choices(self.mixer)


def _legal(mixer: Any, way: str) -> bool:
    """Can it be built, and read one token? Some rules only say at a chunk that they have no form for one."""
    try:
        dataclasses.replace(mixer, way=way).build(4, 1, torch.Generator().manual_seed(0))(torch.zeros(1, 1, 4))
    except ValueError:
        return False
    return True


def _choices(mixer: Mixer) -> tuple[str, str, str, str]:
    if mixer.choices is not None:
        return mixer.choices
    if not isinstance(mixer, Memory):
        if isinstance(mixer, tnt):
            return _choices(mixer.parts().mixers[0])
        inner = [getattr(mixer, field.name) for field in dataclasses.fields(mixer)]  # type: ignore[arg-type]
        found = next((_choices(part) for part in inner if isinstance(part, Mixer)), ("", "", "", ""))
        return found
    rule, kept = mixer.rule, "none"
    if isinstance(mixer.rule, retain):
        rule, kept = mixer.rule.of, f"{mixer.rule.retention}"
    elif isinstance(mixer.rule, retain_first):
        rule, kept = mixer.rule.of, f"{mixer.rule.retention} first"
    told = f"{rule}" + (f" over {mixer.window} pairs" if mixer.window > 1 else "")
    steps = getattr(mixer, "steps", 1)
    told += f", {steps} steps a token" if steps > 1 else ""
    return f"{mixer.structure}", f"{mixer.attentional_bias}", kept, told


class Size(NamedTuple):
    """Of a mixer with one head of 64: numbers in its state, without convolution tails and what only repeats it; and
    products counted in a forward pass of 256 tokens, projections included, a token. A state that grows is counted
    after them."""

    state: int
    flops: int


def size(mixer: Mixer, dim: int = 64, length: int = 256) -> Size:
    """What a mixer costs, measured on itself."""
    module = mixer.build(dim, 1, torch.Generator().manual_seed(0))
    module = module.double()  # whose operations are all counted
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        _, state = module(torch.zeros(1, length, dim, dtype=torch.float64))
    told = flatten(state)
    counted = {name: x.numel() for name, x in told.items() if x.is_floating_point() and "anchor" not in name}
    tails = sum(count for name, count in counted.items() if name.split(".")[-1] == "tail")
    return Size(sum(counted.values()) - tails, counter.get_total_flops() // length)


def error(model: Model, way: str, length: int = 40, width: int = 6) -> float:
    """How far a row is from its oracle, run in this way: `memory_error`, or `layer_error` where the mixer is more than
    a memory. Raises ValueError where the row has no oracle."""
    if model.oracle is None:
        raise ValueError(f"{model.mixer} has no oracle here to be held against")
    mixer = dataclasses.replace(model.mixer, way=way) if way in _WAYS else model.mixer  # type: ignore[type-var]
    if isinstance(mixer, Memory) and not isinstance(mixer, self_modifying):
        return memory_error(mixer, model.oracle, length, width)  # type: ignore[arg-type]
    return layer_error(mixer, model.oracle, length, width)  # type: ignore[arg-type]


_WAYS = ("chunked", "recurrent", "stepped")

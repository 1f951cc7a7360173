"""What every check stands on: a copy of the model to handle, tokens to show it, and how far two results are apart."""

import copy
import dataclasses
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nestling.memory import Part
from nestling.models import Decoder

EXACT = 1e-12  # the same operations in the same order, or nearly
SAME = 1e-10  # the same mathematics in another order

_SPAN = 16  # tokens; where a model does not tell its chunk


@runtime_checkable
class SequenceModel(Protocol):
    """What the kit needs of a model: tokens [b, t] and a state -> logits [b, t, V] and the state after them.

    A state is tensors and numbers in nested tuples, lists, mappings or dataclasses. `reset` [b, t] is used where
    the call takes it, levels where the model has them.
    """

    def parameters(self) -> Iterable[nn.Parameter]: ...
    def __call__(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]: ...


class LogitsOnly(nn.Module):
    """A model whose call returns logits [b, t, V] alone, or an object with `logits`, as one of the protocol: its
    state is None, which checks that need one skip."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        answer = self.model(tokens)
        return getattr(answer, "logits", answer), None


def sequence_model(model: Any) -> Any:
    """The model as the checks call it. Raises ValueError where a call on tokens does not answer with logits."""
    answer = model(torch.zeros(1, 2, dtype=torch.int64, device=device_of(model)))
    if isinstance(answer, tuple) and not hasattr(answer, "logits"):
        return model
    logits = getattr(answer, "logits", answer)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != (1, 2):
        told = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model answers tokens [1, 2] with {told}; needed are logits [1, 2, V]")
    return LogitsOnly(model)


@contextmanager
def sealed() -> Iterator[None]:
    """No gradients, and the global random state as it was before; what is random inside is the same each time."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
        torch.manual_seed(0)
        yield


@dataclass(frozen=True)
class Bench:
    """A copy of a model in float64 and in eval mode, none of whose parameters is at a neutral start.

    span: tokens of the model's largest chunk or window; lengths are told in spans.
    """

    model: Any
    vocabulary: int
    span: int
    generator: torch.Generator

    def tokens(self, rows: int, length: int) -> Tensor:
        """Uniform random tokens [rows, length]."""
        drawn = torch.randint(self.vocabulary, (rows, length), generator=self.generator)
        return drawn.to(device_of(self.model))

    def other(self, tokens: Tensor) -> Tensor:
        """Tokens all of which differ from those given."""
        shift = torch.randint(1, max(2, self.vocabulary), tokens.shape, generator=self.generator)
        return (tokens + shift.to(tokens.device)) % self.vocabulary

    @property
    def takes_reset(self) -> bool:
        call = self.model.forward if isinstance(self.model, nn.Module) else self.model.__call__
        parameters = inspect.signature(call).parameters.values()
        return any(p.name == "reset" or p.kind is p.VAR_KEYWORD for p in parameters)

    def in_pieces(self, tokens: Tensor, sizes: Iterable[int], reset: Tensor | None = None) -> tuple[Tensor, Any]:
        """Logits and the last state of tokens given in pieces of these sizes, the rest in one."""
        logits, state, start = [], None, 0
        for size in [*sizes, tokens.shape[1]]:
            at = slice(start, start + size)
            if tokens[:, at].shape[1]:
                more = {} if reset is None else {"reset": reset[:, at]}
                y, state = self.model(tokens[:, at], state, **more)
                logits.append(y)
            start += size
        return torch.cat(logits, 1), state


def bench(model: Any, seed: int) -> Bench:
    """The bench for one check; the model given is only copied."""
    handled = copy.deepcopy(model)
    if isinstance(handled, nn.Module):
        handled = handled.double().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in handled.parameters():
        parameter.data = parameter.data.double()
        spread = float(parameter.data.square().mean().sqrt()) or 0.1
        noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        parameter.data += 0.1 * spread * noise.to(parameter.device)
        parameter.grad = None
    return Bench(handled, vocabulary_of(model), span_of(model), generator)


def fresh(model: Any, seed: int) -> Any:
    """An untrained model of the same kind: a Decoder is built anew from its configuration by its own class, any
    other model is copied as it is."""
    if isinstance(model, Decoder):
        return type(model)(model.config, seed=seed).to(device_of(model))
    return copy.deepcopy(model)


def device_of(model: Any) -> torch.device:
    return next(iter(model.parameters())).device


def vocabulary_of(model: Any) -> int:
    if isinstance(model, Decoder):
        return model.config.vocabulary
    asked = copy.deepcopy(model)  # it may keep what it is shown
    return int(asked(torch.zeros(1, 1, dtype=torch.int64, device=device_of(model)))[0].shape[-1])


def span_of(model: Any) -> int:
    if not isinstance(model, Decoder):
        return _SPAN
    return max(_spans(model.config.mixer), default=_SPAN)


def _spans(part: Any) -> Iterator[int]:
    """Every chunk, window and segment of an expression and of the parts in it."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if field.name in ("chunk", "projection_chunk", "window", "segment", "shard") and value is not None:
            yield value
        for inner in value if isinstance(value, tuple) else (value,):
            if isinstance(inner, Part):
                yield from _spans(inner)


def snapshot(thing: Any) -> dict[str, Tensor]:
    """Copies of everything in a state, or of what a module saves, by name: a cache that it does not save may change,
    if no answer does."""
    if isinstance(thing, nn.Module):
        named = dict(thing.state_dict())
    elif hasattr(thing, "parameters"):
        named = {str(index): parameter for index, parameter in enumerate(thing.parameters())}
    else:
        named = dict(_walk(thing))
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def apart(one: Any, two: Any) -> float:
    """How far two states (or tensors) are apart: the largest |a - b| / (1 + max |a|) over their tensors; inf where
    they differ in what tensors they have, in a shape, or in where a number is not finite."""
    first, second = dict(_walk(one)), dict(_walk(two))
    if first.keys() != second.keys():
        return math.inf
    return max((_distance(first[name], second[name]) for name in first), default=0.0)


def _distance(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return math.inf
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    a, b = a.double(), b.double()
    usual = a.isfinite()
    if not torch.equal(usual, b.isfinite()) or not torch.equal(a[~usual].nan_to_num(), b[~usual].nan_to_num()):
        return math.inf
    a, b = a[usual], b[usual]
    return float((a - b).abs().max() / (1.0 + a.abs().max())) if a.numel() else 0.0


def _walk(thing: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor and number of a nested state with its dotted name."""
    if isinstance(thing, Tensor):
        yield name, thing
    elif isinstance(thing, int | float):
        yield name, torch.tensor(thing, dtype=torch.float64)
    elif isinstance(thing, Mapping):
        for key, part in thing.items():
            yield from _walk(part, f"{name}.{key}")
    elif isinstance(thing, tuple | list):
        for index, part in enumerate(thing):
            yield from _walk(part, f"{name}.{index}")
    elif dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        for field in dataclasses.fields(thing):
            yield from _walk(getattr(thing, field.name), f"{name}.{field.name}")

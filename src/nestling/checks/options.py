"""Is every option of an expression alive? An option that changes nothing is a promise that the code does not keep."""

import dataclasses
import math
import typing
from collections.abc import Collection, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nestling.levels import Level, Reader, level, local, spectrum
from nestling.memory import (
    Part,
    clip,
    dampen,
    hold_back,
    huber_norm,
    lift,
    momentum,
    odd_power,
    retain,
    retain_first,
    slow_down,
    value_shift,
)
from nestling.models import Decoder, ModelConfig
from nestling.sequence import Mixer, caching

from .bench import SAME, apart, sealed
from .report import Finding, skip

WIDTH = 8  # of mixers that stand alone
_SMALL: dict[str, Any] = {"dim": WIDTH, "heads": 2, "blocks": 1, "vocabulary": 7}
_SMALL |= {"chunk": 4, "projection_chunk": 4, "window": 4, "segment": 8, "persistent": 2, "slots": 2, "top": 1}
_SMALL |= {"shard": 8, "local": (2, 4)}
_SMALL |= {"bound": 0.001, "retention": 0.9}  # tight enough to bind, or nothing could tell them from no bound
_EXAMPLES = {"clip": clip(bound=0.0002), "huber_norm": huber_norm(0.0001)}  # of parts; others as they are by default
_EXAMPLES |= {"lift": lift(kind=odd_power(3))}  # of the identity it is nothing
_EXAMPLES |= {"hold_back": hold_back(share=0.5), "slow_down": slow_down(rate=0.5)}


class Variant(NamedTuple):
    """An expression with one option changed. number: one of several other values of an option, of which one has
    to make a difference; else each has to. neutral: it must not."""

    path: str
    value: Any
    expression: Any
    number: bool
    neutral: bool


@sealed()
def options_live(model: Any, *, neutral: Collection[str] = (), seed: int = 0) -> Finding:
    """Every option of the expression of a mixer, a `ModelConfig` or a Decoder's configuration changes the numbers.

    Option by option, also inside the parts (structure, rule, retention, levels): every other choice has to change
    the output, and of a number one of some other values. The expression is made small first: widths, chunks,
    periods, bounds. A variant has the base's parameters where their names and shapes agree, else it is built anew.
    Levels are judged by the losses of reading with learning. What must change nothing, beyond 1e-10, is `way` where
    neither is "stepped", `checkpoint`, `chunk` where gradients are taken at every token, and options whose path
    is in `neutral`. Options without another legal value, and those that a level's rule does not use, are named in
    `detail` and not judged. Measured: how many options break this.
    """
    expression = model.config if isinstance(model, Decoder) else model
    if not isinstance(expression, Mixer | ModelConfig):
        return skip("options_live", "the model has no nestling expression")
    base = small(expression)
    built, start = build(base, seed)
    expected = _measure(built)
    effects: dict[tuple[str, str], list[float]] = {}
    faults = []
    for variant in variants(base):
        inert = variant.neutral or variant.path in neutral
        if variant.number and not inert and max(effects.get((variant.path, ""), [0.0])) > SAME:
            continue  # already seen to be live
        try:
            other, other_start = build(variant.expression, seed, built)
            found = _measure(other, reading=not variant.path.startswith("mixer."))
            difference = apart(expected[: len(found)], found)
        except ValueError:
            continue  # not legal here
        if difference <= SAME and apart(start, other_start) > 0.0:
            difference = math.inf  # it acts on how a model starts
        if not inert:
            told = "" if variant.number else f"={variant.value!r}"
            effects.setdefault((variant.path, told), []).append(difference)
        else:
            effects[variant.path, ""] = [math.inf]
            if difference > SAME:
                faults.append(f"{variant.path}={variant.value!r} must change nothing, changes {difference:.1e}")
    faults += [f"{path}{told} changes nothing" for (path, told), all_found in effects.items() if max(all_found) <= SAME]
    judged = {path for path, _ in effects}
    rest = [path for path in _paths(base) if path not in judged]
    notes = [f"not judged: {', '.join(rest)}"] if rest else []
    return Finding("options_live", not faults and bool(judged), len(faults), "0", "; ".join(faults + notes))


def small(part: Any) -> Any:
    """The same expression at the size of a test."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if field.name in _SMALL and isinstance(value, int | float):
            changes[field.name] = min(value, _SMALL[field.name])
        elif field.name in _SMALL and isinstance(value, tuple) and value:
            changes[field.name] = _SMALL[field.name]
        elif isinstance(value, Part):
            changes[field.name] = small(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], Level):
            changes[field.name] = tuple(_quick(block, 4 * 2**i) for i, block in enumerate(value))
    return dataclasses.replace(part, **changes)


def _quick(block: Level, period: int) -> Level:
    """A block of the continuum with ticks that come soon, and steps below one: Reptile's whole step toward where
    learning ended leaves a level where it is, as no start at all does."""
    if isinstance(block, level | spectrum):
        block = dataclasses.replace(block, step_size=min(block.step_size, 0.5))
    if isinstance(block, local):
        return local(_quick(block.of, period), small(block.attentional_bias))  # type: ignore[arg-type]
    if isinstance(block, spectrum):
        return dataclasses.replace(small(block), fastest=period, slowest=2 * period)
    endless = not isinstance(block, level) or block.period == math.inf
    return small(block) if endless else dataclasses.replace(small(block), period=period)


def variants(part: Any, path: str = "") -> Iterator[Variant]:
    """The expression with each option in turn changed to other values, those of its parts included."""
    kinds = typing.get_type_hints(type(part))
    unused = _unused(part)
    for field in dataclasses.fields(part):
        name, value = field.name, getattr(part, field.name)
        if name in unused:
            continue
        neutral = name == "checkpoint" or (name == "chunk" and getattr(part, "exact", False))
        number = isinstance(value, int | float) and not isinstance(value, bool)
        for other in _others(kinds[name], value):
            if isinstance(other, value_shift) and any(isinstance(p, clip) for p in _parts(part)):
                continue  # it makes errors longer, and the clip makes them as long as before
            if {type(value), type(other)} == {retain, retain_first} and not getattr(part, "exact", True):
                continue  # a gradient that is frozen is the same before and after a decay
            same = name == "way" and "stepped" not in (value, other)  # two ways to the same numbers
            yield from _replaced(part, path + name, name, Variant("", other, other, number, neutral or same))
        if isinstance(value, Part):
            for inner in variants(value, f"{path}{name}."):
                yield from _replaced(part, inner.path, name, inner)
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                if not isinstance(item, Part) or _twin(item, value[:index]):
                    continue
                for inner in variants(item, f"{path}{name}[{index}]."):
                    items = (*value[:index], inner.expression, *value[index + 1 :])
                    yield from _replaced(part, inner.path, name, inner._replace(expression=items))


def _replaced(part: Any, path: str, name: str, inner: Variant) -> Iterator[Variant]:
    """`part` with the field `name` as in `inner`, if that is legal."""
    try:
        yield inner._replace(path=path, expression=dataclasses.replace(part, **{name: inner.expression}))
    except ValueError:
        return


def _others(kind: Any, value: Any) -> Iterator[Any]:
    """Other values of an option of this type: all of a choice, some of a number."""
    if typing.get_origin(kind) is Literal:
        yield from (other for other in typing.get_args(kind) if other != value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        tried = (8,) if value == math.inf else (2 * value, value / 2, value / 100, value + 1, 1)
        some = dict.fromkeys(tried)
        whole = isinstance(value, int) or kind is int
        yield from (int(other) if whole else other for other in some if other != value and not (whole and other % 1))
    elif isinstance(value, Part):
        for name, other in type(value).variants.items():
            told = all(field.default is not dataclasses.MISSING for field in dataclasses.fields(other))  # type: ignore[arg-type]
            if told and issubclass(other, kind) and other is not type(value):
                yield _EXAMPLES[name] if name in _EXAMPLES else small(other())
    elif isinstance(value, tuple) and len(value) > 1:
        yield value[:-1]


def _unused(part: Any) -> set[str]:
    """Options that mean nothing beside the others: those of a level that a rule like its own does not use, and how
    many cached memories are chosen where all are read."""
    if isinstance(part, caching) and part.read != "sparse":
        return {"top"}
    if not isinstance(part, level | spectrum):
        return set()
    if isinstance(part, level) and part.period == math.inf:
        return {"rule", "step_size", "momentum", "retention"}
    parts = list(_parts(part.rule))
    unused = set() if any(isinstance(p, momentum | dampen) for p in parts) else {"momentum"}
    return unused if any(isinstance(p, retain) for p in parts) else unused | {"retention"}


def _parts(part: Any) -> Iterator[Any]:
    yield part
    for field in dataclasses.fields(part):
        if isinstance(getattr(part, field.name), Part):
            yield from _parts(getattr(part, field.name))


def _paths(part: Any, path: str = "") -> Iterator[str]:
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        yield path + field.name
        if isinstance(value, Part):
            yield from _paths(value, f"{path}{field.name}.")
        for index, item in enumerate(value if isinstance(value, tuple) else ()):
            if isinstance(item, Part) and not _twin(item, value[:index]):
                yield from _paths(item, f"{path}{field.name}[{index}].")


def _twin(item: Any, others: tuple[Any, ...]) -> bool:
    """Is it like one of the others in all but its period?"""
    rivals = [other for other in others if isinstance(item, level) and isinstance(other, level)]
    return any(dataclasses.replace(item, period=other.period) == other for other in rivals)


def build(expression: Any, seed: int, like: nn.Module | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
    """The expression's module in float64 with all parameters moved, or equal to those of `like` where they fit;
    and its parameters as they were at first."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(expression, ModelConfig):
        module: nn.Module = Decoder(expression, seed=seed)
    else:
        module = expression.build(_SMALL["dim"], _SMALL["heads"], generator)
    module = module.double()
    start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        spread = float(parameter.square().mean().sqrt()) or 0.3
        parameter.add_(0.3 * spread * torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator))
    shapes = {name: parameter.shape for name, parameter in start.items()}
    if like is not None and shapes == {name: parameter.shape for name, parameter in like.named_parameters()}:
        module.load_state_dict(like.state_dict(), strict=False)
    return module, start


def _measure(module: nn.Module, *, reading: bool = True) -> list[Tensor]:
    """The numbers by which options are judged: outputs, and the losses of a decoder that reads and learns."""
    generator = torch.Generator().manual_seed(1)
    if not isinstance(module, Decoder):
        return [module(2.0 * torch.randn(2, 19, _SMALL["dim"], dtype=torch.float64, generator=generator))[0]]
    config = module.config
    tokens = torch.randint(min(config.vocabulary, 7), (2, 69), generator=generator)
    logits = module(tokens[:, :19])[0]
    if not reading:
        return [logits]
    periods = [int(lvl.period) for lvl in module.levels if lvl.period != math.inf]
    reader = Reader(module)
    _, out = reader.read(reader.begin(), tokens[0, : 2 * max(periods, default=4) + 5])
    return [logits, out.nll]

"""Any model, and its optimizer, told as the nested system that it is: a table and a drawing."""

import math
from collections.abc import Iterator
from html import escape
from typing import Any, NamedTuple

import torch
from torch import nn

from nestling.memory.part import Part
from nestling.memory.state import flatten
from nestling.optim import OPTIMIZERS, RuleOptimizer
from nestling.optim.explain import memories
from nestling.sequence.mixer import Mixer, MixerModule
from nestling.sequence.named import Model

from .continuum import Continuum, level
from .growing import Growing
from .losses import next_token
from .stacking import Stacked
from .transfer import direct, direct_context, initialization
from .whole import Whole


class Row(NamedTuple):
    """A level of a nested system. period: tokens between its updates; 0 where nothing is updated because the past is
    kept as it is; inf where it is fixed. numbers: weights, or the numbers of one sequence's state. copies: so many of
    them side by side. transfer: how it reaches the next slower one."""

    name: str
    period: float
    context: str
    objective: str
    rule: str
    numbers: int
    copies: int
    transfer: str


class System(NamedTuple):
    """The levels of a model and of its optimizer, fast to slow."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        """The table."""
        head = ("level", "period", "context flow", "objective", "rule", "numbers", "transfer")
        body = [
            (
                row.name + (f" x{row.copies}" if row.copies > 1 else ""),
                _tokens(row.period),
                row.context,
                row.objective,
                row.rule,
                f"{row.numbers:,}",
                row.transfer,
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [head, *body]
        ]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])

    def draw(self) -> str:
        """The same as an SVG picture: a box for every level, slower ones higher up, with the wires between them."""
        step, left, wide = 74, 120, 620
        high = step * len(self.rows) + 40
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + wide + 20} {high}" '
            'font-family="sans-serif" font-size="13">',
            f'<rect width="{left + wide + 20}" height="{high}" fill="white"/>',
        ]
        for index, row in enumerate(reversed(self.rows)):
            y = 20 + index * step
            count = f" x{row.copies}" if row.copies > 1 else ""
            parts += [
                f'<rect x="{left}" y="{y}" width="{wide}" height="50" rx="6" '
                f'fill="{_shade(row.period)}" stroke="#333"/>',
                f'<text x="{left - 12}" y="{y + 30}" text-anchor="end">{escape(_tokens(row.period))}</text>',
                f'<text x="{left + 12}" y="{y + 20}" font-weight="bold">{escape(row.name + count)}</text>',
                f'<text x="{left + wide - 12}" y="{y + 20}" text-anchor="end">{row.numbers:,} numbers</text>',
                f'<text x="{left + 12}" y="{y + 40}" fill="#333">{escape(f"{row.context}; {row.rule}")}</text>',
            ]
            if index:
                x = left + wide // 2
                parts += [
                    f'<line x1="{x}" y1="{y}" x2="{x}" y2="{y - step + 50}" stroke="#333"/>',
                    f'<path d="M{x - 4},{y - step + 57} L{x},{y - step + 50} L{x + 4},{y - step + 57}" fill="#333"/>',
                    f'<text x="{x + 10}" y="{y - 8}" fill="#555">{escape(row.transfer)}</text>',
                ]
        return "\n".join([*parts, "</svg>"])


def describe(
    model: nn.Module | Whole, optimizer: torch.optim.Optimizer | None = None, *, tokens_per_step: int | None = None
) -> System:
    """The nested system of a model: its sequence memories, its levels, the rest of its weights, and the memories of
    its optimizer. Any module will do; of one that is not this library's, attention is known by its class's name.

    Levels of one expression are told once, with their number. With an optimizer, the weights outside of levels are
    updated once a step of `tokens_per_step` tokens; without one they are fixed.
    """
    step = math.inf if optimizer is None else float(tokens_per_step or 1)
    rows = [*_sequence_rows(_module(model)), *_level_rows(model), _weights_row(model, optimizer, step)]
    rows += [] if optimizer is None else _moment_rows(optimizer, step)
    return System(tuple(sorted((row for row in rows if row.numbers or row.period == 0), key=lambda row: row.period)))


def _module(model: nn.Module | Whole) -> nn.Module:
    return model.model if isinstance(model, Whole) else model


def _sequence_rows(model: nn.Module) -> Iterator[Row]:
    found: dict[Any, list[nn.Module]] = {}
    inner: set[int] = set()
    for module in model.modules():
        if id(module) in inner:
            continue
        mixer = next((x for x in _attributes(module) if isinstance(x, Mixer)), None)
        if isinstance(module, MixerModule) or _is_attention(module):
            inner.update(id(part) for part in module.modules())
            found.setdefault(mixer or type(module).__name__, []).append(module)
    for mixer, modules in found.items():
        told = Model(mixer, "", "").choices if isinstance(mixer, Mixer) else None
        if told is None or told[3].startswith("solved"):
            window = getattr(modules[0], "window", None) or getattr(model, "context", None)  # a stacked model's cache
            pairs = f"the last {window} pairs" if window else "all past pairs"
            wire = f"{direct_context()}: the context itself"
            name = mixer if told is None else type(mixer).__name__
            yield Row(name, 0.0, "tokens", "weighted l2", f"{pairs}, no parameters", 0, len(modules), wire)
            continue
        structure, bias, kept, rule = told
        state = modules[0].init_state(1)  # type: ignore[operator]
        numbers = sum(x.numel() for x in flatten(state).values() if x.is_floating_point())
        kept = "" if kept == "none" else f", kept by {kept}"
        wire = f"{direct()} reads; {initialization()} of its start"
        name = f"{type(mixer).__name__}: {structure}"
        yield Row(name, 1.0, "tokens: keys, values", bias, rule + kept, numbers, len(modules), wire)


class _Told(NamedTuple):
    """A level in words. own: are its weights parameters of the model, and not a life's alone?"""

    name: str
    objective: str = "next-token loss"
    own: bool = True


def _told(model: Any) -> list[_Told]:
    """What each level of a model is, in their order."""
    if isinstance(model, Whole):
        return [*_told(model.model), _Told("all other weights")]
    if isinstance(model, Growing):
        inner = _told(model.model)
        return [
            *inner,
            *(_Told(f"slots: {model.slots} of rank {model.rank}", "a sleep's dreams", False) for _ in inner),
        ]
    if isinstance(model, Stacked):
        beside = f"rank {model.config.rank} beside " if model.config.how == "low_rank" else ""
        parts = "neurons of " if model.config.how == "neurons" else ""
        name = f"level: {beside}{parts}the MLPs of {type(model.base).__name__}"
        return [_Told(name, f"{model.config.loss or next_token()}") for _ in model.levels]
    blocks = [block for part in model.modules() if isinstance(part, Continuum) for block in part.blocks]
    found = [_Told(f"level: {block.structure}", block.objective) for block in blocks for _ in block.levels]
    levels = getattr(model, "levels", ())
    return found if len(found) == len(levels) else [_Told(f"level: {lvl.structure}") for lvl in levels]


def _level_rows(model: nn.Module | Whole) -> Iterator[Row]:
    levels = getattr(model, "levels", ())
    weights = model.level_weights() if levels else ()  # type: ignore[operator]
    found: dict[tuple[level, _Told], list[int]] = {}
    for lvl, told, maps in zip(levels, _told(model), weights, strict=True):
        found.setdefault((lvl, told), []).append(sum(weight.numel() for weight in maps))
    for (lvl, told), sizes in found.items():
        flow = "block inputs, errors of the task" if told.objective == "next-token loss" else "block inputs"
        rule = f"{lvl.rule!r}, step size {lvl.step_size:g}"
        yield Row(told.name, lvl.period, flow, told.objective, rule, sum(sizes), len(sizes), f"{lvl.transfer}")


def _weights_row(model: nn.Module | Whole, optimizer: torch.optim.Optimizer | None, step: float) -> Row:
    levels = model.level_weights() if getattr(model, "levels", ()) else ()  # type: ignore[operator]
    own = [maps for told, maps in zip(_told(model), levels, strict=True) if told.own]
    inside = sum(weight.numel() for maps in own for weight in maps)
    numbers = sum(p.numel() for p in _module(model).parameters()) - inside
    rule = "fixed" if optimizer is None else type(optimizer).__name__
    name, flow = "weights" if not inside else "weights outside of levels", "layer inputs, errors of the task"
    return Row(name, step, flow, "the task's loss", rule, numbers, 1, "slowest")


def _moment_rows(optimizer: torch.optim.Optimizer, step: float) -> list[Row]:
    """What an optimizer remembers, for its first group of parameters."""
    size = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    name = type(optimizer).__name__
    ours = optimizer if isinstance(optimizer, RuleOptimizer) else _like(optimizer)
    if ours is None:
        return [
            Row(f"{type(optimizer).__name__}'s state", step, "gradients", "unknown", "unknown", size, 1, "direct()")
        ]
    rule, _ = ours.express(ours.param_groups[0])
    name = type(optimizer).__name__
    return [
        Row(told.memory, step * told.period, told.keys, told.objective, name, size, 1, f"{direct()}")
        for told in memories(rule)
    ]


def _like(optimizer: torch.optim.Optimizer) -> RuleOptimizer | None:
    """This library's optimizer of the same name and options, over one number."""
    known = OPTIMIZERS.get(type(optimizer).__name__)
    if known is None:
        return None
    options = {
        k: v for k, v in optimizer.param_groups[0].items() if k in ("lr", "betas", "momentum", "nesterov", "eps")
    }
    return known([nn.Parameter(torch.zeros(1, 1))], **options)


def _attributes(module: nn.Module) -> Iterator[Part]:
    for name in ("expression", "memory"):
        part = vars(module).get(name)
        if isinstance(part, Part):
            yield part


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()


def _tokens(period: float) -> str:
    if period == 0:
        return "always"
    if period == math.inf:
        return "never"
    return "every token" if period == 1 else f"{period:,.0f} tokens"


def _shade(period: float) -> str:
    """Fast is light, slow is dark."""
    depth = 0.0 if period <= 1 else 1.0 if period == math.inf else min(1.0, math.log2(period) / 24)
    return f"hsl(35, 80%, {94 - round(34 * depth)}%)"

"""What all commands share: how parts are read from flags, and how work shows its progress."""

import contextlib
import io
import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nestling.memory import Part, parse

BITS = 1 / math.log(2)
app = tyro.extras.SubcommandApp()
registry = tyro.constructors.ConstructorRegistry()
console = Console(stderr=True)


@registry.primitive_rule
def _part_from_flag(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
    """Parts are given on the command line as the expression that builds them."""
    if not (isinstance(info.type, type) and issubclass(info.type, Part)):
        return None
    family = info.type

    def build(words: list[str]) -> Part:
        return parse(words[0], family)

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="EXPRESSION",
        instance_from_str=build,
        is_instance=lambda value: isinstance(value, family),
        str_from_instance=lambda part: [repr(part)],
    )


@contextmanager
def in_one_line() -> Iterator[None]:
    """While open, what tyro says of bad flags in a box becomes one ValueError of one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as stopped:
        if not stopped.code:
            raise
        lines = [line.strip(" │") for line in said.getvalue().splitlines()]
        inner = [line for line in lines if line and line[0] not in "╭╰"]
        parts = [list(part) for ruled, part in itertools.groupby(inner, lambda line: set(line) == {"─"}) if not ruled]
        told = [
            part for part in parts if part[0].startswith(("Error", "Unrecognized", "Required", "Perhaps", "Missing"))
        ]
        raise ValueError("; ".join(" ".join(part) for part in told or parts[:1])) from None


def progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )


def print_json(told: Any) -> None:
    """One line of JSON; what is not a number becomes null."""
    print(json.dumps(_finite(told)))


def _finite(told: Any) -> Any:
    if isinstance(told, dict):
        return {str(name): _finite(value) for name, value in told.items()}
    if isinstance(told, (list, tuple)):
        return [_finite(value) for value in told]
    return None if isinstance(told, float) and not math.isfinite(told) else told

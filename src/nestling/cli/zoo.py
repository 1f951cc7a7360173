"""nestling zoo, nestling demo: what the library ships with."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from nestling.memory import known
from nestling.sequence.named import FAR, Model, error, size
from nestling.sequence.zoo import rows, zoo
from nestling.tasks.demo import DEMO_TRAIN, DemoConfig, run_demo, shortened
from nestling.tasks.report import print_report, write_report

from .shared import app, progress


@app.command(name="zoo")
def zoo_command(name: tyro.conf.Positional[str | None] = None, *, check: bool = False) -> None:
    """List the named models as points in Miras' space of four choices, tell of one, or check all.

    Args:
        name: of a model to tell more of.
        check: run every model against its oracle, in each of its ways, and print how far they are apart.
    """
    shown = {name: known(name, zoo, "model")} if name is not None else dict(rows())
    if check:
        Console().print(checked(shown))
    elif name is None:
        console = Console()
        console.print(listed(shown, console.width))
    else:
        model = shown[name]
        parts = zip(("structure", "attentional bias", "retention", "algorithm"), model.choices, strict=True)
        told = {"": f"{model.equation}", "from": model.source, "expression": f"{model.mixer}", **dict(parts)}
        told |= {"runs": ", ".join(model.ways), "note": model.note}
        table = Table(title=name, show_header=False)
        for word, text in told.items():
            if text:
                table.add_row(word, Text(text))
        Console().print(table)


def listed(models: dict[str, Model], width: int = 300) -> Table:
    """A row a model: the four choices, numbers of state and products a token, of one head of 64. On a terminal of less
    than 150 columns: structure, bias and state."""
    columns = ("structure", "attentional bias", "retention", "algorithm", "ways", "state", "FLOPs/token")
    caption = "one head of 64; FLOPs of a forward pass with projections"
    shown = columns if width >= 150 else ("structure", "attentional bias", "state")
    if shown != columns:
        caption = "numbers of state of one head of 64; nestling zoo NAME tells the rest, as do 150 columns"
    table = Table(caption=caption)
    table.add_column("model", no_wrap=True)
    for name in shown:
        table.add_column(name, no_wrap=name in ("state", "FLOPs/token"), overflow="fold")
    for name, model in models.items():
        cost = size(model.mixer)
        cells = (*model.choices, ", ".join(model.ways), f"{cost.state:,}", f"{cost.flops:,}")
        told = dict(zip(columns, cells, strict=True))
        table.add_row(Text(name), *(Text(told[column]) for column in shown))
    return table


def checked(models: dict[str, Model]) -> Table:
    """A row a model and way: the largest relative difference from its oracle. Raises ValueError where one is large."""
    table = Table(Column("model", no_wrap=True), "way", "error")
    far = []
    for name, model in models.items():
        for way in model.ways:
            found = error(model, way)
            table.add_row(name, way, f"{found:.1e}")
            far += [] if found <= FAR else [f"{name} {way}"]
    if far:
        Console().print(table)
        raise ValueError(f"not as their oracles: {', '.join(far)}")
    return table


@app.command(name="demo")
def demo(*, out: Path = Path("runs/demo"), short: bool = False, seed: int = 0) -> None:
    """Pre-train a small Hope on text that every Python ships with, let it read two other bodies of text, and
    report what it learned and what it forgot.

    Args:
        out: where report.html and report.json go, and model/, which learn, generate and check take.
        short: a few steps of everything, for a quick check that it runs.
        seed: of the weights, the split of the text, the order of the stream.
    """
    config = DemoConfig(seed=seed, train=replace(DEMO_TRAIN, seed=seed))
    if short:
        config = shortened(config)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; --out needs a folder")
    with tempfile.TemporaryDirectory() as scratch, progress() as bars:
        tasks: dict[str, Any] = {}

        def tell(name: str, done: float, total: float, note: str) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total, note="")
            bars.update(tasks[name], completed=done, note=note)

        data = run_demo(config, Path(scratch), tell)
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(out / "model", ignore_errors=True)  # that of the demo before this one
        shutil.move(Path(scratch) / "hope", out / "model")
    print_report(data, Console())
    html, numbers = write_report(data, out)
    print(f"{html}\n{numbers}")

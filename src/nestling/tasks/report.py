"""The report of the demo: what was measured, as JSON, as one page that needs nothing else, and in the terminal.

Nothing is measured here and no number is written here: all of it comes in one dict, the content of report.json.
"""

import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nestling.learner import write_file

__all__ = ["draw_life", "print_report", "write_report"]

# Told apart by the colour-blind, and against white as well as black; an arm keeps its colour when another is missing.
ARM_COLOURS = {
    "hope": "#0072B2",
    "frozen": "#CC79A7",
    "fastest": "#D55E00",
    "matched": "#009E73",
    "transformer": "#E69F00",
}
LEVEL_COLOURS = ("#785EF0", "#DC267F", "#FE6100", "#648FFF")
MARKERS = "os^Dv"
GREY = "#777777"
PLOT_STYLE = {
    "svg.fonttype": "none",  # text stays text, in the reader's font
    "svg.hashsalt": "nestling",
    "text.parse_math": False,
    "font.size": 11,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), GREY),
}
PAGE_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #5c5c63; --line: #d9d9de; --page: #fff; --yes: #006d4f;
  --no: #b03a00 }
@media (prefers-color-scheme: dark) { :root { --ink: #ececef; --soft: #a3a3ab; --line: #3a3a40; --page: #141416;
  --yes: #3ec79b; --no: #ff9052 } }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --page: #fff; --yes: #006d4f;
  --no: #b03a00 } }
body { margin: 0; background: var(--page); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif }
main { max-width: 44rem; margin: 0 auto; padding: 1.5rem 1rem 3rem }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 1rem }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.5rem 0 .75rem; break-after: avoid }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .4rem; text-align: right; font-weight: normal; vertical-align: bottom }
th:first-child { text-align: left; padding-left: 0 }
thead th { color: var(--soft); font-size: .85rem; line-height: 1.25 }
tbody { break-inside: avoid }
tbody tr:first-child th { padding-top: 1rem; border-bottom: 1px solid var(--line); font-weight: 600 }
td b { font-weight: 700 }
small, figcaption, footer, dt { color: var(--soft); font-size: .875rem; font-weight: normal }
figure { margin: 1.5rem 0; break-inside: avoid }
figure svg { display: block; width: 100%; height: auto }
svg text { fill: currentColor !important; font-family: inherit !important }
ul { list-style: none; padding: 0 }
li { padding-left: 1.75rem; margin: .75rem 0; position: relative; break-inside: avoid }
li > b { position: absolute; left: 0 }
.holds { color: var(--yes) }
.fails { color: var(--no) }
dt { margin-top: .75rem }
dd { margin: 0 }
code { font-size: .8125rem; overflow-wrap: anywhere; display: block }
footer { border-top: 1px solid var(--line); margin-top: 3rem; padding-top: 1rem; overflow-wrap: anywhere }
"""


class Row(NamedTuple):
    """One line of a body's table: an arm or the baseline, and its numbers as they are shown, by column."""

    label: str
    cells: list[str]


def write_report(data: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write FOLDER/report.json, the numbers (null for what is not finite), and FOLDER/report.html, the page.

    Raises ValueError where matplotlib is missing; the numbers are on the disk by then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers, page = folder / "report.json", folder / "report.html"
    write_file(numbers, json.dumps(_finite(data), indent=2, allow_nan=False).encode() + b"\n")
    write_file(page, _page(data).encode())
    return numbers, page


def print_report(data: dict[str, Any], console: Console) -> None:
    """Print the table of every body and arm, its best numbers bold, and the claims with a tick or a cross."""
    table = Table(title=Text(data["title"]), caption="held-out bits per byte; while reading: predicted before learned")
    table.add_column()
    for column in _columns(data):
        table.add_column(column, justify="right")
    for body, facts in data["bodies"].items():
        rows = _rows(data, body)
        best = _best(rows)
        table.add_section()
        table.add_row(Text(body, "bold"), *[""] * (len(best) - 1), Text(f"xz -9: {_bits(facts.get('xz'))}", GREY))
        for row in rows:
            cells = (
                Text(cell, "bold" if cell == low != "-" else "") for cell, low in zip(row.cells, best, strict=True)
            )
            table.add_row(Text(row.label), *cells)
    console.print(table)
    tick, cross = ("yes", "NO") if console.options.ascii_only else ("✓", "✗")
    for claim in data["claims"]:
        mark = Text(tick, "bold green") if claim["holds"] else Text(cross, "bold red")
        console.print(Text.assemble(mark, f" {claim['claim']}: {claim['measured']} (bound: {claim['bound']})"))


def draw_life(data: dict[str, Any]) -> str:
    """Held-out bits per byte of every body over the whole life, one panel a body, one line an arm, as SVG.

    Raises ValueError where matplotlib is missing.
    """

    def paint(panels: Sequence[Any]) -> None:
        for panel, (body, facts) in zip(panels, data["bodies"].items(), strict=True):
            curves = {
                name: [(at, bits.get(body)) for at, bits in arm.get("curve", [])] for name, arm in data["arms"].items()
            }
            labels = {name: arm["label"] for name, arm in data["arms"].items()}
            _lines(panel, curves, ARM_COLOURS, labels=labels, markers=True)
            if _is_number(facts.get("xz")):
                panel.axhline(facts["xz"], color=GREY, linestyle=(0, (4, 3)), linewidth=1, label="xz -9")
            _mark_starts(panel, data, labelled=panel is panels[0])
            panel.set_ylabel(body)
        panels[-1].set_xlabel("tokens read in life")
        panels[0].figure.supylabel("held-out bits per byte", fontsize="medium")

    return _draw("life", paint, panels=len(data["bodies"]), panel_height=1.8)


def _draw_moves(data: dict[str, Any]) -> str:
    def paint(panels: Sequence[Any]) -> None:
        arm = data["arms"].get("hope", {})
        curves = {
            name: [(row[0], row[index]) for row in arm.get("moved", []) if row[index] != 0]  # a log scale has no zero
            for index, name in enumerate(arm.get("level_names", []), start=1)
        }
        _lines(panels[0], curves, dict(zip(curves, LEVEL_COLOURS, strict=False)), markers=True)
        panels[0].set(yscale="log", ylabel="size of an update (RMS)", xlabel="tokens read in life")
        _mark_starts(panels[0], data)

    return _draw("moves", paint)


def _draw_training(data: dict[str, Any]) -> str:
    def paint(panels: Sequence[Any]) -> None:
        _lines(panels[0], data["training"], ARM_COLOURS)
        panels[0].set(ylabel="training loss, bits per byte", xlabel="tokens trained on")

    return _draw("training", paint)


def _draw_positions(data: dict[str, Any]) -> str:
    def paint(panels: Sequence[Any]) -> None:
        spans, trained = data["by_position"], data["training_length"]
        points = [(at, bits) for first, last, bits in spans for at in (max(1, first), last)]
        _lines(panels[0], {"hope": points}, ARM_COLOURS)
        panels[0].set(ylabel="held-out bits per byte", xlabel="position in the document, bytes")
        if points and spans[-1][1] - spans[-1][0] > 4 * (
            spans[0][1] - spans[0][0]
        ):  # spans that grow, a scale that does
            panels[0].set_xscale("log", base=2)
        panels[0].axvline(trained, color=GREY, linestyle=(0, (1, 2)))
        _say_above(panels[0], trained, f"training length {trained:,}", ha="center")

    return _draw("positions", paint)


def _lines(
    panel: Any,
    curves: dict[str, Sequence[Sequence[Any]]],
    colours: Mapping[str, str],
    *,
    labels: Mapping[str, str] = MappingProxyType({}),
    markers: bool = False,
) -> None:
    """A line a curve through those of its points that have a value; a word where there is none at all."""
    for index, (name, points) in enumerate(curves.items()):
        if known := [(at, value) for at, value in points if _is_number(value)]:
            marker = MARKERS[index % len(MARKERS)] if len(known) == 1 or (markers and len(known) <= 60) else ""
            colour = colours.get(name, GREY)
            panel.plot(*zip(*known, strict=True), label=labels.get(name, name), color=colour, marker=marker)
    if not panel.lines:
        panel.text(0.5, 0.5, "nothing was recorded", transform=panel.transAxes, ha="center", va="center")


def _mark_starts(panel: Any, data: dict[str, Any], *, labelled: bool = False) -> None:
    """A vertical line where each body of the life begins; the first body was read before it, in pre-training."""
    start = 0
    for body, facts in list(data["bodies"].items())[1:]:
        panel.axvline(start, color=GREY, linewidth=0.8)
        if labelled:
            _say_above(panel, start, f"reads {body}")
        start += facts["read"]


def _say_above(panel: Any, at: float, words: str, **style: Any) -> None:
    place = {"xycoords": ("data", "axes fraction"), "xytext": (0, 3), "textcoords": "offset points"}
    panel.annotate(words, (at, 1), va="bottom", **place, **style)


def _draw(name: str, paint: Callable[[Sequence[Any]], None], *, panels: int = 1, panel_height: float = 3.0) -> str:
    """Panels above one another, as SVG. The ids in it carry the name: several stand in one page."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the report's plots need matplotlib: pip install 'nestling[plots]'") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(PLOT_STYLE)
        figure = Figure(figsize=(6, 0.8 + panel_height * panels), layout="constrained")
        axes = figure.subplots(panels, sharex=True, squeeze=False)[:, 0]
        paint(axes)
        axes[-1].xaxis.set_major_formatter(lambda at, _: f"{at:,.0f}")
        legend = {label: line for panel in axes for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
        if legend:
            figure.legend(legend.values(), legend.keys(), loc="outside upper left", ncols=2)
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = file.getvalue()
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg[svg.index("<svg") :])


def _page(data: dict[str, Any]) -> str:
    first, *later = data["bodies"]
    title = escape(data["title"])
    done = (
        f"A model of {data['model']['parameters']:,} parameters and a transformer of {data['baseline']['parameters']:,} "
        f"were pre-trained on {data['trained_tokens']:,} tokens of {first}; then every arm below read "
        f"{', then '.join(later)}, once, and learned while it read as far as its levels let it. "
        "Held-out numbers are measured on a copy of the life, on text that it never reads, with the weights as they "
        "stand, a fresh sequence state and the clocks stopped, and nothing returns to the life; the numbers under "
        "“while reading” are prequential: every byte was predicted before it was learned."
    )
    short = "<p><small>This is the short form of the demo.</small></p>" if data["short"] else ""
    figures = [
        (draw_life, "Held-out bits per byte of every body over the life; lower is better. A vertical line is where "
         "the reading of a body begins."),
        (_draw_moves, "How far one update moves the weights of each level of Hope, at its ticks; an update of zero "
         "is not drawn."),
        (_draw_training, "The running loss of pre-training."),
        (_draw_positions, "Held-out bits per byte of Hope by position in the document."),
    ]  # fmt: skip
    life, *others = [f"<figure>{draw(data)}<figcaption>{caption}</figcaption></figure>" for draw, caption in figures]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{PAGE_STYLE}</style>
</head>
<body><main>
<h1>{title}</h1>
<p>{escape(done)}</p>{short}
<h2>Bits per byte</h2>
{_html_table(data)}
{life}
<h2>What was claimed and what was found</h2>
{_html_claims(data)}
<h2>How it came about</h2>
{"".join(others)}
<h2>What was compared</h2>
{_html_models(data)}
{_html_foot(data)}
</main></body>
</html>
"""


def _html_table(data: dict[str, Any]) -> str:
    columns = _columns(data)
    parts = [f"<thead><tr><th></th>{''.join(f'<th>{escape(column)}</th>' for column in columns)}</tr></thead>"]
    for body, facts in data["bodies"].items():
        about = f"{facts['read']:,} bytes to read, {facts['held_out']:,} held out; xz -9: {_bits(facts.get('xz'))}"
        lines = f'<tr><th colspan="{len(columns) + 1}">{escape(body)} <small>{about}</small></th></tr>'
        rows = _rows(data, body)
        best = _best(rows)
        for row in rows:
            cells = (
                f"<b>{cell}</b>" if cell == low != "-" else cell for cell, low in zip(row.cells, best, strict=True)
            )
            lines += f"\n<tr><th>{escape(row.label)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        parts.append(f"<tbody>{lines}</tbody>")
    return '<div class="wide"><table>' + "\n".join(parts) + "</table></div>"


def _html_claims(data: dict[str, Any]) -> str:
    items = ""
    for claim in data["claims"]:
        kind, mark, word = ("holds", "✓", "Holds") if claim["holds"] else ("fails", "✗", "Does not hold")
        found = f"{word}: {escape(claim['measured'])} <small>(bound: {escape(claim['bound'])})</small>"
        items += (
            f'<li><b class="{kind}">{mark}</b>{escape(claim["claim"])}<br><span class="{kind}">{found}</span></li>\n'
        )
    return f"<ul>{items}</ul>"


def _html_models(data: dict[str, Any]) -> str:
    told = [("Hope", data["model"]["expression"]), ("Transformer", data["baseline"]["expression"])]
    told += [(arm["label"], "\n".join(arm.get("levels", []))) for arm in data["arms"].values()]
    return "<dl>" + "".join(f"<dt>{escape(a)}</dt><dd><code>{escape(b)}</code></dd>\n" for a, b in told) + "</dl>"


def _html_foot(data: dict[str, Any]) -> str:
    facts = {"commit": data["commit"] or "-", "seed": data["seed"], **data["machine"]}
    facts["peak memory"] = f"{data['peak_bytes'] / 2**20:,.0f} MiB"
    facts |= {phase: f"{seconds:,.1f} s" for phase, seconds in data["seconds"].items()}
    return f"<footer>{' · '.join(escape(f'{name}: {value}') for name, value in facts.items())}</footer>"


def _columns(data: dict[str, Any]) -> list[str]:
    return ["after training", *(f"after {body}" for body in list(data["bodies"])[1:]), "while reading"]


def _rows(data: dict[str, Any], body: str) -> list[Row]:
    rows = []
    *stages, _ = _columns(data)
    for arm in data["arms"].values():
        values = [arm.get("held_out", {}).get(stage, {}).get(body) for stage in stages]
        rows.append(Row(arm["label"], [_bits(value) for value in (*values, arm.get("prequential", {}).get(body))]))
    baseline = data["trained"].get("transformer", {}).get(body)
    return [*rows, Row("transformer", [_bits(baseline), *["-"] * len(stages)])]


def _best(rows: Sequence[Row]) -> list[str]:
    """The smallest number of every column, as it is shown: what is shown equal is equally good."""
    return [
        min((cell for cell in column if cell != "-"), key=float, default="-")
        for column in zip(*(row.cells for row in rows), strict=True)
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _bits(value: Any) -> str:
    return f"{value:.3f}" if _is_number(value) else "-"


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data

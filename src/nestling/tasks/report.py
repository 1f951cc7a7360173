"""The report of the demo: what was measured, as JSON, as one page that needs nothing else, and in the terminal.

Nothing is measured here and no number is written here: all of it comes in one dict, the content of report.json.
"""

import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nestling.learner import write_file

__all__ = ["draw_life", "print_report", "write_report"]

# Told apart by the colour-blind, and against white as well as black; an arm keeps its colour when another is missing.
ARM_COLOURS = dict(hope="#0072B2", frozen="#CC79A7", fastest="#D55E00", matched="#009E73", transformer="#E69F00")
LEVEL_COLOURS = ("#785EF0", "#DC267F", "#FE6100", "#648FFF", "#A0740A")
MARKERS = "os^Dv"
XZ = "xz -9"
GREY = "#777777"
PLOT_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the reader's font
    "svg.hashsalt": "nestling",
    "text.parse_math": False,
    "font.size": 11,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), GREY),
}
PAGE_STYLE = """
:root { color-scheme: light dark;
  --ink: #111; --soft: #5c5c63; --line: #d5d5da; --page: #fff; --yes: #006d4f; --no: #b03a00 }
@media screen and (prefers-color-scheme: dark) { :root {
  --ink: #eee; --soft: #a3a3ab; --line: #3a3a40; --page: #141416; --yes: #3ec79b; --no: #ff9052 } }
body { margin: 0; background: var(--page); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif }
main { max-width: 44rem; margin: 0 auto; padding: 1.5rem 1rem 3rem }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 1rem }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.5rem 0 .75rem; break-after: avoid }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .4rem; text-align: right; font-weight: normal; vertical-align: bottom }
th:first-child { text-align: left; padding-left: 0 }
@media (max-width: 30rem) { th, td { font-size: .875rem; padding: .25rem 0 .25rem .3rem } }
thead th { color: var(--soft); font-size: .85rem; line-height: 1.25 }
tbody tr:first-child th { padding-top: 1rem; border-bottom: 1px solid var(--line); font-weight: 600 }
small, figcaption, footer, dt { color: var(--soft); font-size: .875rem; font-weight: normal }
figure { margin: 1.5rem 0 } figure, tbody, li { break-inside: avoid } svg { width: 100%; height: auto }
svg text { fill: currentColor !important; font-family: inherit !important }
ul { list-style: none; padding: 0 } li { padding-left: 1.75rem; margin: .75rem 0; position: relative }
li > b { position: absolute; left: 0 } .holds { color: var(--yes) } .fails { color: var(--no) }
dt { margin-top: .75rem } dd { margin: 0 } code { font-size: .8125rem; overflow-wrap: anywhere; white-space: pre-wrap }
footer { border-top: 1px solid var(--line); margin-top: 3rem; padding-top: 1rem; overflow-wrap: anywhere }
"""


def write_report(data: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write FOLDER/report.html, the page, and FOLDER/report.json, the numbers (null for what is not finite).

    Raises ValueError where matplotlib is missing; the numbers are on the disk by then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page, numbers = folder / "report.html", folder / "report.json"
    finite = json.loads(json.dumps(data), parse_constant=lambda _: None)
    write_file(numbers, json.dumps(finite, indent=1).encode())
    write_file(page, _page(data).encode())
    return page, numbers


def print_report(data: dict[str, Any], console: Console) -> None:
    """Print the table of every body and arm, its best numbers bold, and the claims with a tick or a cross."""
    caption = "bits per byte; while reading: predicted, then learned"
    table = Table("", title=Text(data["title"]), caption=caption, box=SIMPLE_HEAD)
    for column in _columns(data):
        table.add_column(Text(column.replace(" ", "\n")), justify="right")
    table.add_column(XZ, justify="right")
    for body, facts in data["bodies"].items():
        table.add_section()
        table.add_row(Text(body, "bold"), *[""] * len(_columns(data)), _bits(facts.get("xz")))
        for name, cells in _rows(data, body):
            table.add_row(Text(name), *(Text(cell, "bold" if best else "") for cell, best in cells))
    console.print(table)
    for name, arm in data["arms"].items():
        console.print(Text.assemble((name, "bold"), f"  {arm['label']}"))
    tick, cross = ("yes", "NO") if console.options.ascii_only else ("✓", "✗")
    for claim in data["claims"]:
        mark = (tick, "bold green") if claim["holds"] else (cross, "bold red")
        console.print(Text.assemble(mark, f" {claim['claim']}: {claim['measured']} (bound: {claim['bound']})"))


def draw_life(data: dict[str, Any]) -> str:
    """Held-out bits per byte of every body over the whole life, one panel a body, one line an arm, as SVG.

    Raises ValueError where matplotlib is missing.
    """
    return _draw(_paint_life, data, panels=len(data["bodies"]))


def _paint_life(panels: Sequence[Any], data: dict[str, Any]) -> None:
    for panel, (body, facts) in zip(panels, data["bodies"].items(), strict=True):
        for index, (name, arm) in enumerate(data["arms"].items()):
            points = [(at, bits.get(body)) for at, bits in arm.get("curve", [])]
            width = max(1.0, 2.6 - 0.5 * index)  # a line that lies under another can be seen
            _plot(panel, name, points, label=name, linewidth=width)
        if _is_number(facts.get("xz")):
            panel.axhline(facts["xz"], color=GREY, linestyle=(0, (4, 3)), linewidth=1, label=XZ)
        panel.set(ylabel=body)
        _mark_starts(panel, data, labelled=panel is panels[0])
    panels[-1].set(xlabel="tokens read in life")
    panels[0].figure.supylabel("held-out bits per byte", fontsize="medium")
    panels[0].figure.align_ylabels()


def _paint_moves(panels: Sequence[Any], data: dict[str, Any]) -> None:
    arm = data["arms"].get("hope", {})
    for index, level in enumerate(arm.get("level_names", [])):
        points = [(row[0], row[index + 1]) for row in arm.get("moved", []) if row[index + 1] != 0]
        _plot(panels[0], index, points, label=level, linewidth=0.8)
    panels[0].set(yscale="log", ylabel="size of an update (RMS)", xlabel="tokens read in life")
    panels[0].yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    panels[0].yaxis.set_major_formatter("{x:.0e}")
    panels[0].yaxis.set_minor_formatter("")
    _mark_starts(panels[0], data)


def _paint_training(panels: Sequence[Any], data: dict[str, Any]) -> None:
    for name, points in data["training"].items():
        _plot(panels[0], name, points, label=name)
    panels[0].set(ylabel="training loss, bits per byte", xlabel="tokens trained on")


def _paint_positions(panels: Sequence[Any], data: dict[str, Any]) -> None:
    spans, trained = data["by_position"], data["training_length"]
    _plot(panels[0], "hope", [((first + last) / 2, bits) for first, last, bits in spans], label="hope")
    panels[0].set(ylabel="held-out bits per byte", xlabel="position in the document, bytes")
    if spans and spans[-1][1] - spans[-1][0] > 4 * (spans[0][1] - spans[0][0]):  # spans that grow, a scale that does
        panels[0].set_xscale("log", base=2)
    panels[0].axvline(trained, color=GREY, linestyle=(0, (1, 2)))
    _say_above(panels[0], trained, f"training length {trained:,}", "center")


def _plot(panel: Any, name: str | int, points: Sequence[Any], **style: Any) -> None:
    """A line through those points that have a value, in the colour of an arm, or of a level by its number."""
    if known := [(at, value) for at, value in points if _is_number(value)]:
        colour = LEVEL_COLOURS[name % len(LEVEL_COLOURS)] if isinstance(name, int) else ARM_COLOURS.get(name, GREY)
        marker = MARKERS[len(panel.lines) % len(MARKERS)] if len(known) <= 60 else ""
        panel.plot(*zip(*known, strict=True), color=colour, marker=marker, **style)


def _mark_starts(panel: Any, data: dict[str, Any], *, labelled: bool = False) -> None:
    """A vertical line where each body of the life begins; the first body was read before it, in pre-training."""
    start = 0
    for body, facts in list(data["bodies"].items())[1:]:
        panel.axvline(start, color=GREY, linewidth=0.8)
        if labelled:
            _say_above(panel, start, f"reads {body}")
        start += facts["read"]


def _say_above(panel: Any, at: float, words: str, side: str = "left") -> None:
    panel.annotate(words, (at, 1.02), xycoords=("data", "axes fraction"), ha=side, va="bottom")


def _draw(paint: Callable[..., None], data: dict[str, Any], *, panels: int = 1) -> str:
    """Panels above one another, as SVG. The ids in it carry the painter's name: several stand in one page."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the report's plots need matplotlib: pip install 'nestling[plots]'") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(PLOT_STYLE)
        figure = Figure(figsize=(6, 2 + 1.6 * panels), layout="constrained")
        axes = [row[0] for row in figure.subplots(panels, sharex=True, squeeze=False)]
        paint(axes, data)
        if axes[-1].get_xscale() == "linear":
            axes[-1].locator_params(axis="x", nbins=5)
        axes[-1].xaxis.set_major_formatter("{x:,.0f}")
        legend: dict[str, Any] = {}
        for panel in axes:
            lines, labels = panel.get_legend_handles_labels()
            legend |= zip(labels, lines, strict=True)
            if not {*labels} - {XZ}:
                panel.text(0.5, 0.5, "nothing was recorded", transform=panel.transAxes, ha="center", va="center")
        figure.legend(legend.values(), legend.keys(), loc="outside upper left", ncols=3)
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # the same numbers, the same file
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\1{paint.__name__[1:]}-", svg[svg.index("<svg") :])


def _page(data: dict[str, Any]) -> str:
    first, *later = data["bodies"]
    sizes = [f"{data[which]['parameters']:,}" for which in ("model", "baseline")]
    done = f"""A model of {sizes[0]} parameters and a transformer of {sizes[1]} were pre-trained on
{data["trained_tokens"]:,} tokens of {first}; then every arm below, from the model's weights, read
{", then ".join(later)}, once, and learned from it as far as its levels let it. Held-out numbers are measured on a copy
of the life, on text that it never reads, with the weights as they stand, a fresh sequence state and the clocks stopped,
and nothing returns to the life; the numbers “while reading” are prequential: every byte was predicted before it was
learned."""
    life = "Held-out bits per byte over the life, on a part of the held-out text; lower is better."
    moves = "How far an update moves each level of Hope, at its ticks; an update of zero is not drawn."
    title = escape(data["title"])
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{PAGE_STYLE}</style>
</head><body><main><h1>{title}</h1><p>{escape(done)}</p>
<p>{"This was the short form of the demo: too little training to judge by." if data["short"] else ""}</p>
<h2>Bits per byte</h2>
{_html_table(data)}
{_html_figure(draw_life(data), life)}
<h2>What was claimed and what was found</h2>
<ul>{"".join(map(_html_claim, data["claims"]))}</ul>
<h2>How it went</h2>
{_html_figure(_draw(_paint_moves, data), moves)}
{_html_figure(_draw(_paint_training, data), "The running loss of pre-training.")}
{_html_figure(_draw(_paint_positions, data), "Held-out bits per byte of Hope by position in the document.")}
<h2>What was compared</h2>
{_html_about(data)}
</main></body></html>
"""


def _html_table(data: dict[str, Any]) -> str:
    heads = "".join(f"<th>{escape(column)}</th>" for column in _columns(data))
    lines = [f"<thead><tr><th></th>{heads}</tr></thead>"]
    for body, facts in data["bodies"].items():
        sizes, xz = f"{facts['read']:,} bytes to read, {facts['held_out']:,} held out", _bits(facts.get("xz"))
        about = f"{escape(body)} <small>{sizes}, xz -9 of these: {xz}</small>"
        lines.append(f'<tbody><tr><th colspan="9">{about}</th></tr>')
        for name, cells in _rows(data, body):
            shown = "".join(f"<td><b>{cell}</b></td>" if best else f"<td>{cell}</td>" for cell, best in cells)
            lines.append(f"<tr><th>{escape(name)}</th>{shown}</tr>")
        lines.append("</tbody>")
    arms = "<br>".join(f"<b>{escape(name)}</b> {escape(arm['label'])}" for name, arm in data["arms"].items())
    return "<table>\n" + "\n".join(lines) + f"\n</table>\n<p><small>{arms}</small></p>"


def _html_figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _html_claim(claim: dict[str, Any]) -> str:
    kind, mark, word = ("holds", "✓", "Holds") if claim["holds"] else ("fails", "✗", "Does not hold")
    found = f"{word}: {escape(claim['measured'])} <small>(bound: {escape(claim['bound'])})</small>"
    return f'<li><b class="{kind}">{mark}</b>{escape(claim["claim"])}<br><span class="{kind}">{found}</span></li>\n'


def _html_about(data: dict[str, Any]) -> str:
    made = {which: data[which]["expression"] for which in ("model", "baseline")}
    made |= {name: "\n".join(arm.get("levels", [])) for name, arm in data["arms"].items()}
    terms = "".join(f"<dt>{escape(name)}</dt><dd><code>{escape(what)}</code></dd>\n" for name, what in made.items())
    facts = {"commit": data["commit"] or "-", "seed": data["seed"], **data["machine"]}
    facts["peak memory"] = f"{data['peak_bytes'] / 2**20:,.0f} MiB"
    facts |= {phase: f"{seconds:,.1f} s" for phase, seconds in data["seconds"].items()}
    foot = " · ".join(escape(f"{name}: {value}") for name, value in facts.items())
    return f"<dl>{terms}</dl>\n<footer>{foot}</footer>"


def _columns(data: dict[str, Any]) -> list[str]:
    return ["after training", *(f"after {body}" for body in list(data["bodies"])[1:]), "while reading"]


def _rows(data: dict[str, Any], body: str) -> Iterator[tuple[str, list[tuple[str, bool]]]]:
    """The name of every arm and of the transformer with its numbers as shown, each with whether it is the smallest of
    its column; what is shown equal is equally good."""
    *stages, _ = _columns(data)
    rows = []
    for name, arm in data["arms"].items():
        values = [arm.get("held_out", {}).get(stage, {}).get(body) for stage in stages]
        rows.append((name, [*values, arm.get("prequential", {}).get(body)]))
    rows.append(("transformer", [data["trained"].get("transformer", {}).get(body), *[None] * len(stages)]))
    columns = zip(*(values for _, values in rows), strict=True)
    best = [_bits(min(filter(_is_number, column), default=None)) for column in columns]
    for name, values in rows:
        cells = [_bits(value) for value in values]
        yield name, [(cell, cell == low != "-") for cell, low in zip(cells, best, strict=True)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _bits(value: Any) -> str:
    return f"{value:.3f}" if _is_number(value) else "-"

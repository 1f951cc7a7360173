"""The report of the demo: the numbers as they were given, on a page that needs nothing else, and in the terminal."""

import copy
import io
import json
import math
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from nestling.tasks import report
from nestling.tasks.report import draw_life, print_report, write_report

STAGES = ["after training", "after python", "after names"]
BODIES = ["english", "python", "names"]
ARMS = ["hope", "frozen", "fastest", "matched"]


def made_up() -> dict[str, Any]:
    """A report in which every number of the table is another one, but for what is said below."""
    numbers = iter(range(1, 1000))

    def bits() -> float:
        return 2 + next(numbers) * 0.0137

    arms = {}
    for name in ARMS:
        held_out = {stage: {body: bits() for body in BODIES} for stage in STAGES}
        arms[name] = {
            "label": f"what {name} does",
            "levels": [f"level({name}, 8)", f"level({name}, 64)"],
            "held_out": held_out,
            "prequential": {"python": bits(), "names": bits()},
            "curve": [[at, {body: bits() for body in BODIES}] for at in (0, 100, 250)],
            "moved": [[8, 1e-3, 0.0], [16, 2e-3, 0.0], [64, 0.0, 3e-5], [72, 1e-3, 0.0]],
            "level_names": ["8 tokens", "64 tokens"],
        }
    return {
        "format": 1,
        "title": "A made-up life",
        "short": False,
        "seed": 7,
        "commit": "abc123+",
        "machine": {"torch": "2.99", "threads": 3},
        "seconds": {"pre-training": 1234.5, "life": 67.8},
        "peak_bytes": 500 * 2**20,
        "model": {"expression": "ModelConfig(dim=4)", "parameters": 12_345},
        "baseline": {"expression": "ModelConfig(dim=5)", "parameters": 12_346},
        "trained_tokens": 98_765,
        "bodies": {
            "english": {"read": 5000, "held_out": 900, "xz": 2.987},
            "python": {"read": 100, "held_out": 80, "xz": 3.123},
            "names": {"read": 150, "held_out": 70, "xz": 1.879},
        },
        "training": {"hope": [[10, 8.0], [20, 5.0]], "transformer": [[10, 7.5], [20, 5.5]]},
        "trained": {
            "hope": arms["hope"]["held_out"]["after training"],
            "transformer": {"english": 1.999, "python": 9.111, "names": 9.222},
        },
        "arms": arms,
        "by_position": [[0, 64, 3.5], [64, 256, 3.0], [256, 1024, 2.9]],
        "training_length": 128,
        "claims": [
            {"claim": "it learned", "measured": "0.512", "bound": "at least 0.4", "holds": True},
            {"claim": "it never forgot", "measured": "0.321", "bound": "at most 0", "holds": False},
        ],
    }


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    return write_report(made_up(), tmp_path_factory.mktemp("report"))[0].read_text()


def page(data: dict[str, Any], folder: Path) -> str:
    return write_report(data, folder)[0].read_text()


def table(html: str) -> dict[str, dict[str, list[tuple[str, bool]]]]:
    """Body -> arm -> the cells of its row, each with whether it is bold."""
    found: dict[str, dict[str, list[tuple[str, bool]]]] = {}
    for body in ElementTree.fromstring(html[html.index("<table") : html.index("</table>") + 8]).iter("tbody"):
        first, *rows = body
        name = (first[0].text or "").strip()
        found[name] = {}
        for row in rows:
            cells = [("".join(cell.itertext()), cell.find("b") is not None) for cell in row[1:]]
            found[name][row[0].text or ""] = cells
    return found


def printed(data: dict[str, Any], width: int = 100) -> str:
    file = io.StringIO()
    print_report(data, Console(file=file, width=width))
    return file.getvalue()


def painted(painter: Any, data: dict[str, Any], panels: int = 1) -> list[Any]:
    axes = list(Figure().subplots(panels, squeeze=False)[:, 0])
    painter(axes, data)
    return axes


def points(line: Any) -> list[tuple[float, float]]:
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_the_numbers_are_written_as_they_were_given(tmp_path):
    data = made_up()
    before = copy.deepcopy(data)
    html, numbers = write_report(data, tmp_path / "new" / "folder")
    assert (html.name, numbers.name) == ("report.html", "report.json")
    assert json.loads(numbers.read_text()) == data == before
    assert sorted(path.name for path in html.parent.iterdir()) == ["report.html", "report.json"]


def test_what_is_not_finite_is_null_in_strict_json(tmp_path):
    data = made_up()
    data["arms"]["hope"]["prequential"]["python"] = math.nan
    data["by_position"][0][2] = math.inf

    def refuse(word: str) -> None:
        raise AssertionError(word)

    back = json.loads(write_report(data, tmp_path)[1].read_text(), parse_constant=refuse)
    assert back["arms"]["hope"]["prequential"]["python"] is None
    assert back["by_position"][0] == [0, 64, None]


def test_table_has_every_number_where_it_belongs(html):
    data = made_up()
    found = table(html)
    assert list(found) == BODIES
    for body in BODIES:
        assert list(found[body]) == [*ARMS, "transformer"]
        for name, arm in data["arms"].items():
            expected = [f"{arm['held_out'][stage][body]:.3f}" for stage in STAGES]
            expected.append("-" if body == "english" else f"{arm['prequential'][body]:.3f}")
            assert [cell for cell, _ in found[body][name]] == expected
        expected = [f"{data['trained']['transformer'][body]:.3f}", "-", "-", "-"]
        assert [cell for cell, _ in found[body]["transformer"]] == expected
        facts = data["bodies"][body]
        assert f"{facts['read']:,} bytes to read, {facts['held_out']:,} held out, xz -9 of these: {facts['xz']}" in html


def test_the_best_of_every_column_is_bold_and_nothing_else():
    data = made_up()
    data["arms"]["matched"]["held_out"]["after names"]["python"] = 0.5
    data["arms"]["frozen"]["prequential"]["names"] = 1.00004
    data["arms"]["fastest"]["prequential"]["names"] = 1.00001  # shown as the same number
    data["arms"]["hope"]["held_out"]["after python"]["names"] = math.nan
    found = table(report._html_table(data))
    for rows in found.values():
        for column in zip(*rows.values(), strict=True):
            known = [float(cell) for cell, _ in column if cell != "-"]
            assert [bold for _, bold in column] == [cell != "-" and float(cell) == min(known) for cell, _ in column]
    assert found["english"]["transformer"][0] == ("1.999", True)
    assert found["python"]["matched"][2] == ("0.500", True)
    assert [found["names"][name][3] for name in ("frozen", "fastest")] == [("1.000", True)] * 2
    assert found["names"]["hope"][1] == ("-", False)


@pytest.mark.parametrize("unknown", [None, math.nan, math.inf])
def test_an_unknown_number_is_a_dash(unknown):
    data = made_up()
    data["arms"]["hope"]["held_out"]["after names"]["english"] = unknown
    data["bodies"]["python"]["xz"] = unknown
    html = report._html_table(data)
    assert table(html)["english"]["hope"][2] == ("-", False)
    assert "100 bytes to read, 80 held out, xz -9 of these: -" in html
    assert not re.search(r"\b(nan|inf|None)\b", html + printed(data))


def test_page_needs_nothing_from_outside(html):
    without_namespaces = re.sub(r'xmlns(:\w+)?="http://www\.w3\.org/[^"]*"', "", html)
    assert "http://" not in without_namespaces
    assert "https://" not in html
    assert all(link.startswith("#") for link in re.findall(r'(?:src|href)\s*=\s*["\']?([^"\'\s>]*)', html))
    assert all(link.startswith("#") for link in re.findall(r"url\(([^)]*)\)", html))
    assert not re.search(r"<script|<link|<img|<iframe|@import|\son\w+=", html)


def test_ids_are_unique_and_links_have_their_target(html):
    svgs = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]
    assert len(svgs) == 4
    ids = [element.get("id") for svg in svgs for element in svg.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', html)) <= set(ids)


def test_text_is_escaped(tmp_path):
    data = made_up()
    bad = '<script>alert("1")</script> & $x_1$ [bold]'
    data["title"] = data["commit"] = data["machine"]["cpu"] = bad
    data["model"]["expression"] = data["arms"]["hope"]["label"] = bad
    data["arms"]["hope"]["levels"] = data["arms"]["hope"]["level_names"] = [bad, bad]
    data["claims"][0] |= {"claim": bad, "measured": bad, "bound": bad}
    data["bodies"] = {bad if name == "names" else name: facts for name, facts in data["bodies"].items()}
    data["arms"][bad] = data["arms"].pop("fastest")
    html = page(data, tmp_path)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 15
    assert html.count("$x_1$ [bold]</text>") >= 3
    assert bad in table(html)
    assert bad in table(html)["python"]
    assert bad in printed(data, width=400)


def test_the_same_numbers_make_the_same_file(html, tmp_path):
    is_same = page(made_up(), tmp_path) == html  # apart from the assertion: pytest would take minutes to compare them
    assert is_same
    is_same = draw_life(made_up()) in html
    assert is_same
    assert "dc:date" not in html


def test_claims_say_whether_they_hold(html):
    items = [re.sub("<[^>]*>", " ", item).split() for item in re.findall(r"<li>(.*?)</li>", html)]
    assert " ".join(items[0]) == "✓ it learned Holds: 0.512 (bound: at least 0.4)"
    assert " ".join(items[1]) == "✗ it never forgot Does not hold: 0.321 (bound: at most 0)"
    assert html.index("What was claimed and what was found") < html.index("<li>")
    text = printed(made_up())
    assert "✓ it learned: 0.512 (bound: at least 0.4)" in text
    assert "✗ it never forgot: 0.321 (bound: at most 0)" in text


def test_page_says_what_was_measured_and_where(html, tmp_path):
    data = made_up()
    facts = ["12,345 parameters", "12,346", "98,765 tokens of english", "ModelConfig(dim=4)", "level(matched, 64)"]
    facts += ["commit: abc123+", "seed: 7", "torch: 2.99", "threads: 3", "500 MiB", "pre-training: 1,234.5 s"]
    facts += [arm["label"] for arm in data["arms"].values()]
    assert [fact for fact in facts if fact not in html] == []
    assert "short form" not in html
    other = page({**data, "short": True, "commit": None}, tmp_path)
    assert "short form" in other
    assert "commit: -" in other


def test_terminal_has_a_row_for_every_arm_of_every_body():
    data = made_up()
    lines = [line.split() for line in printed(data, width=80).splitlines()]
    starts = [lines.index([body, str(data["bodies"][body]["xz"])]) for body in BODIES]
    for body, start in zip(BODIES, starts, strict=True):
        for offset, name in enumerate(ARMS, start=1):
            arm = data["arms"][name]
            expected = [f"{arm['held_out'][stage][body]:.3f}" for stage in STAGES]
            last = arm["prequential"].get(body)
            assert lines[start + offset] == [name, *expected, f"{last:.3f}" if last else "-"]
        assert lines[start + 5] == ["transformer", f"{data['trained']['transformer'][body]:.3f}", "-", "-", "-"]
    assert all([name, "what", name, "does"] in lines for name in ARMS)


def test_terminal_prints_the_best_bold():
    data = made_up()
    file = io.StringIO()
    print_report(data, Console(file=file, width=100, force_terminal=True, color_system="standard", no_color=True))
    bold = re.findall(r"\x1b\[1m\s*([0-9.]+)\s*\x1b\[0m", file.getvalue())
    best = [
        cell
        for rows in table(report._html_table(data)).values()
        for row in rows.values()
        for cell, is_bold in row
        if is_bold
    ]
    assert bold == best
    assert len(best) == 11


def test_terminal_without_unicode():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_report(made_up(), Console(file=file, width=100))
    file.flush()
    text = file.buffer.getvalue().decode("ascii")
    assert "yes it learned" in text
    assert "NO it never forgot" in text


def test_life_is_drawn_a_panel_a_body_and_a_line_an_arm():
    data = made_up()
    for panel, body in zip(painted(report._paint_life, data, panels=3), BODIES, strict=True):
        lines = {line.get_label(): line for line in panel.lines}
        for name in ARMS:
            assert points(lines[name]) == [(at, bits[body]) for at, bits in data["arms"][name]["curve"]]
            assert lines[name].get_color() == report.ARM_COLOURS[name]
        assert {*lines["xz -9"].get_ydata()} == {data["bodies"][body]["xz"]}
        upright = [line.get_xdata()[0] for line in panel.lines if line.get_xdata()[0] == line.get_xdata()[1]]
        assert upright == [0, 100]
    svg = draw_life(data)
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert all(f">{word}</text>" in svg for word in [*ARMS, *BODIES, "xz -9", "reads python", "reads names"])


def test_an_arm_keeps_its_colour_when_another_is_missing():
    data = made_up()
    del data["arms"]["hope"]
    lines = {line.get_label(): line for line in painted(report._paint_life, data, panels=3)[0].lines}
    assert lines["matched"].get_color() == report.ARM_COLOURS["matched"]
    assert len(set(report.ARM_COLOURS.values())) == len(report.ARM_COLOURS)


def test_updates_of_zero_are_not_drawn():
    [panel] = painted(report._paint_moves, made_up())
    lines = {line.get_label(): points(line) for line in panel.lines}
    assert lines["8 tokens"] == [(8, 1e-3), (16, 2e-3), (72, 1e-3)]
    assert lines["64 tokens"] == [(64, 3e-5)]
    assert panel.get_yscale() == "log"


def test_training_and_positions_are_drawn():
    data = made_up()
    [panel] = painted(report._paint_training, data)
    assert {line.get_label(): points(line) for line in panel.lines} == {
        "hope": [(10, 8.0), (20, 5.0)],
        "transformer": [(10, 7.5), (20, 5.5)],
    }
    [panel] = painted(report._paint_positions, data)
    assert points(panel.lines[0]) == [(32, 3.5), (160, 3.0), (640, 2.9)]
    assert {*panel.lines[1].get_xdata()} == {128}
    assert panel.get_xscale() == "log"
    data["by_position"] = [[0, 64, 3.5], [64, 128, 3.0]]
    assert painted(report._paint_positions, data)[0].get_xscale() == "linear"


@pytest.mark.parametrize("name", ARMS)
def test_a_missing_arm_is_left_out(name):
    data = made_up()
    del data["arms"][name]
    assert list(table(report._html_table(data))["names"]) == [*(arm for arm in ARMS if arm != name), "transformer"]
    assert f"\n  {name} " not in printed(data)
    assert f">{name}</text>" not in draw_life(data)


def test_empty_measurements_leave_dashes_and_a_word(tmp_path):
    data = made_up()
    data |= {"trained": {}, "training": {}, "by_position": [], "claims": [], "seconds": {}}
    for arm in data["arms"].values():
        arm |= {"held_out": {}, "prequential": {}, "curve": [], "moved": []}
    html = page(data, tmp_path)
    assert {cell for rows in table(html).values() for row in rows.values() for cell in row} == {("-", False)}
    assert html.count("nothing was recorded") == len(BODIES) + 3
    assert "transformer" in printed({**data, "arms": {}})
    data["arms"] = {"frozen": {"label": "only a name"}}
    assert list(table(page(data, tmp_path))["python"]) == ["frozen", "transformer"]


def test_points_without_a_value_are_passed_over():
    data = made_up()
    data["arms"]["hope"]["curve"] = [[0, {"english": 2.0}], [100, {"english": None}], [250, {"english": math.nan}]]
    panels = painted(report._paint_life, data, panels=3)
    assert points(panels[0].lines[0]) == [(0, 2.0)]
    assert "hope" not in [line.get_label() for line in panels[1].lines]
    assert ">hope</text>" in draw_life(data)


def test_without_matplotlib_the_numbers_are_kept_and_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    data = made_up()
    with pytest.raises(ValueError, match=re.escape("pip install 'nestling[plots]'")):
        write_report(data, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == data
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(ValueError, match="matplotlib"):
        draw_life(data)
    assert "transformer" in printed(data)


def test_plots_neither_follow_nor_touch_the_settings_of_matplotlib():
    expected = draw_life(made_up())
    with matplotlib.rc_context({"xtick.labelsize": 30, "lines.linestyle": "--"}):
        before = dict(matplotlib.rcParams)
        is_same = draw_life(made_up()) == expected
        assert is_same
        assert dict(matplotlib.rcParams) == before

"""What the first study's lives say together: paired differences between arms, with intervals, and a picture.

    python studies/sleep/first/summary.py [--of full]

Reads results/<of>.json and writes results/<of>_summary.json and results/<of>.svg. Every difference is within a run (the
same seed, texts and order); intervals are 95% bootstraps over runs, p values two-sided sign tests. Recovered: the share
that is not forgotten of what the no-sleep arm forgets where it has learned as much (on its frontier, by lines).
"""

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

from run import at_equal_plasticity

HERE = Path(__file__).resolve().parent
SHOWN = ("learned", "forgotten", "all bodies at the end", "seconds at rest", "tokens at rest", "bytes stored")


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def interval(values: list[float], draws: int = 2_000) -> tuple[float, float]:
    """95% of the means of as many values, drawn again with replacement."""
    generator = random.Random(0)
    means = sorted(mean(generator.choices(values, k=len(values))) for _ in range(draws))
    return means[draws * 25 // 1000], means[draws * 975 // 1000]


def sign_test(values: list[float]) -> float:
    """How often as many signs, or more, would agree by chance."""
    above = sum(value > 0 for value in values)
    count = sum(value != 0 for value in values)
    tail = sum(math.comb(count, k) for k in range(max(above, count - above), count + 1)) / 2**count
    return min(1.0, 2 * tail)


def told(values: list[float]) -> dict[str, Any]:
    low, high = interval(values)
    return {
        "runs": len(values),
        "mean": mean(values),
        "low": low,
        "high": high,
        "sign test": sign_test(values),
        "each": values,
    }


def summary(lives: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of every arm at every scale; of arms that rest, what is recovered; and arms against one another."""
    arms: dict[str, dict[str, Any]] = {}
    for life in lives:
        found = arms.setdefault(f"{life['arm']} at {life['scale']}", {name: [] for name in SHOWN})
        for name in SHOWN:
            found[name].append(life[name])
    equal = at_equal_plasticity(lives)
    recovered, saved = {}, {}
    for arm in sorted({life["arm"] for life in equal}):
        mine = [life for life in equal if life["arm"] == arm]
        inside = [life for life in mine if life["none forgets"] is not None]
        outside = [life["run"] for life in mine if life["none forgets"] is None]
        if inside:
            saved[arm] = told([life["none forgets"] - life["forgotten"] for life in inside])
            whole = sum(life["none forgets"] for life in inside)
            pooled = 1 - sum(life["forgotten"] for life in inside) / whole
            recovered[arm] = told([life["recovered"] for life in inside]) | {"pooled": pooled, "outside": outside}
    return {
        "arms": {name: {key: mean(values) for key, values in of.items()} for name, of in arms.items()},
        "bits not forgotten at equal plasticity": saved,
        "share recovered at equal plasticity": recovered,
        "sleep against the others": _against(lives, "sleep"),
    }


def _against(lives: list[dict[str, Any]], mine: str) -> dict[str, Any]:
    """Differences of one arm from each other one, run by run, at the same scale."""
    by = {(life["run"], life["arm"], life["scale"]): life for life in lives}
    found = {}
    for other in sorted({life["arm"] for life in lives} - {mine}):
        pairs = [(life, by.get((run, other, scale))) for (run, arm, scale), life in by.items() if arm == mine]
        both = [(a, b) for a, b in pairs if b is not None]
        if both:
            found[other] = {name: told([a[name] - b[name] for a, b in both]) for name in SHOWN[:3]}
    return found


def draw(lives: list[dict[str, Any]], file: Path) -> None:
    """Each run's no-sleep frontier as a line, and where the arms that rest came out."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sleep"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    for index, run in enumerate(sorted({life["run"] for life in lives})):
        points = sorted((x["learned"], x["forgotten"]) for x in lives if x["arm"] == "none" and x["run"] == run)
        label = "no sleep, one line a run" if index == 0 else None
        axes.plot(*zip(*points, strict=True), color="0.75", linewidth=1, marker=".", label=label)
    for arm in sorted({life["arm"] for life in lives} - {"none"}):
        mine = [life for life in lives if life["arm"] == arm]
        axes.scatter([x["learned"] for x in mine], [x["forgotten"] for x in mine], label=arm, s=28)
    axes.set_xlabel("learned of each body, bits a byte")
    axes.set_ylabel("forgotten of older bodies, bits a byte")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", default="full", help="the result that is read")
    name = parser.parse_args().of
    lives = json.loads((HERE / "results" / f"{name}.json").read_text())["lives"]
    found = summary(lives)
    (HERE / "results" / f"{name}_summary.json").write_text(json.dumps(found, indent=2) + "\n")
    draw(lives, HERE / "results" / f"{name}.svg")
    for arm, about in found["share recovered at equal plasticity"].items():
        each = ", ".join(f"{value:.2f}" for value in about["each"])
        print(
            f"{arm}: recovered {about['pooled']:.2f} pooled; by run {each}; outside of the frontier {about['outside']}"
        )
    for arm, about in found["bits not forgotten at equal plasticity"].items():
        said = f"{about['mean']:.3f} [{about['low']:.3f}, {about['high']:.3f}], sign test p = {about['sign test']:.3f}"
        print(f"{arm}: bits a byte not forgotten {said}")
    for other, about in found["sleep against the others"].items():
        each = "; ".join(f"{k} {v['mean']:+.3f} [{v['low']:+.3f}, {v['high']:+.3f}]" for k, v in about.items())
        print(f"sleep less {other}: {each}")


if __name__ == "__main__":
    main()

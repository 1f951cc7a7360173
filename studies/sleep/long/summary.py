"""What the long lives say together: does learning get slower, does the life get larger, and a picture.

    python studies/sleep/long/summary.py [--of full]

Reads results/<of>.json and writes results/<of>_summary.json and results/<of>.svg. Growth is the slope of a straight
line over a life's bodies, times the bodies; its interval is a 95% t interval over runs, of each arm and of each arm
less the fresh model on the same body. Tokens: until held-out text stands `--bits` below where a model fresh from
pre-training begins with it (by lines between looks); a body on which that is not reached counts as a whole one, and is
counted.
"""

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}  # by degrees of freedom
MEASURES = ("tokens", "bits after", "bits learned", "read at", "english", "dead units", "effective rank", "weight norm")


def slope(values: list[float]) -> float:
    """Of the least-squares line over 0, 1, 2, ..."""
    middle, mean = (len(values) - 1) / 2, sum(values) / len(values)
    above = sum((k - middle) * (value - mean) for k, value in enumerate(values))
    return above / sum((k - middle) ** 2 for k in range(len(values)))


def interval(values: list[float]) -> dict[str, Any]:
    """The mean, and a 95% t interval around it."""
    count, mean = len(values), sum(values) / len(values)
    half = math.nan
    if count > 1:
        half = T_95[count - 1] * math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1) / count)
    return {"mean": mean, "low": mean - half, "high": mean + half, "each": values}


def tokens_until(curve: list[float], target: float, each: int) -> float | None:
    """Where the curve first comes down to the target; None where it does not."""
    if curve[0] <= target:
        return 0.0
    for index, (before, after) in enumerate(pairwise(curve)):
        if after <= target:
            return each * (index + (before - target) / (before - after))
    return None


def measured(row: dict[str, Any], fresh: dict[str, Any], bits: float, each: int) -> dict[str, float]:
    """What is said of one body of a life, with the fresh model's row of the same body."""
    curve, target = row["curve"], fresh["curve"][0] - bits
    found = tokens_until(curve, target, each)
    told = {
        "tokens": float(each * (len(curve) - 1)) if found is None else found,
        "missed": float(found is None),
        "bits after": curve[-1],
        "bits learned": curve[0] - curve[-1],
    }
    return told | {name: row[name] for name in MEASURES if name not in told}


def table(lives: list[dict[str, Any]], bits: float, each: int) -> dict[tuple[int, str], list[dict[str, float]]]:
    """By run and arm, a row of measures for each body that the run's fresh models have read too."""
    by = {(life["run"], life["arm"]): life["rows"] for life in lives}
    return {
        (run, arm): [measured(r, f, bits, each) for r, f in zip(rows, by[run, "fresh"], strict=False)]
        for (run, arm), rows in by.items()
    }


def summary(lives: list[dict[str, Any]], bits: float, each: int) -> dict[str, Any]:
    """Means, growth over a life, growth less the fresh model's, and sizes."""
    measures = table(lives, bits, each)
    found: dict[str, Any] = {"bits": bits, "arms": {}, "size": size(lives)}
    for arm in dict.fromkeys(life["arm"] for life in lives):
        runs = [run for run, name in measures if name == arm]
        told: dict[str, Any] = {"runs": runs, "missed": sum(r["missed"] for run in runs for r in measures[run, arm])}
        for name in MEASURES:
            mine = [[row[name] for row in measures[run, arm]] for run in runs]
            other = [[row[name] for row in measures[run, "fresh"]] for run in runs]
            beside = [[a - b for a, b in zip(x, y, strict=False)] for x, y in zip(mine, other, strict=True)]
            told[name] = {
                "mean": interval([sum(values) / len(values) for values in mine]),
                "growth": interval([slope(values) * (len(values) - 1) for values in mine]),
                "less fresh": interval([sum(values) / len(values) for values in beside]),
                "growth less fresh": interval([slope(values) * (len(values) - 1) for values in beside]),
                "last quarter less fresh": interval(
                    [sum(v[-(-len(v) * 3 // 4) :]) / (len(v) - -(-len(v) * 3 // 4)) for v in beside]
                ),
            }
        found["arms"][arm] = told
    return found


def size(lives: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every life that slept: is its size inside of its budget after each sleep?"""
    found = []
    for life in lives:
        rows = life["rows"]
        pairs = [pair for row in rows for pair in row["pairs"]]
        if not pairs:
            continue
        found.append({
            "run": life["run"], "arm": life["arm"], "sleeps": len(rows), "budget": life["budget"],
            "largest": max(row["level bytes"] for row in rows),
            "inside": all(row["level bytes"] <= life["budget"] for row in rows),
            "state bytes": sorted({row["state bytes"] for row in rows}),
            "bytes of text": max(row["bytes of text"] for row in rows),
            "slots": max(row["slots"] for row in rows), "merged": sum(pair[1] != "" for pair in pairs),
            "kept": sum(pair[0] == "kept" for pair in pairs), "pairs": len(pairs),
            "seconds awake": sum(row["seconds awake"] for row in rows),
            "seconds at rest": sum(row["seconds at rest"] for row in rows),
        })  # fmt: skip
    return found


def draw(lives: list[dict[str, Any]], bits: float, each: int, file: Path) -> None:
    """Means over runs: bits after each body and tokens to the target, less the fresh model's; old text; slots."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "long"
    from matplotlib import pyplot

    measures = table(lives, bits, each)
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), sharex=True)
    for arm in dict.fromkeys(life["arm"] for life in lives):
        runs = [run for run, name in measures if name == arm]
        count = min(len(measures[run, arm]) for run in runs)
        for axis, name in zip(axes.flat, ("bits after", "tokens", "english"), strict=False):
            less = 0.0 if name == "english" else 1.0
            values = [
                sum(measures[r, arm][k][name] - less * measures[r, "fresh"][k][name] for r in runs) / len(runs)
                for k in range(count)
            ]
            smooth = [sum(values[max(0, k - 2) : k + 3]) / len(values[max(0, k - 2) : k + 3]) for k in range(count)]
            axis.plot(smooth, label=arm)
        slept = [life["rows"][:count] for life in lives if life["arm"] == arm and life["rows"][-1]["slot norm"] > 0]
        for rows in slept:
            color = axes[0, 0].lines[-1].get_color()
            axes[1, 1].semilogy([row["slot norm"] or math.nan for row in rows], color=color)
    axes[0, 0].set_ylabel("bits a byte after a body, less fresh")
    axes[0, 1].set_ylabel("tokens to the target, less fresh")
    axes[1, 0].set_ylabel("English held out, bits a byte")
    axes[1, 1].set_ylabel("norm of the slots, each run")
    for axis in axes[1]:
        axis.set_xlabel("bodies read")
    axes[1, 0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", default="full", help="the result that is read")
    parser.add_argument("--bits", type=float, default=0.3, help="a byte, below where a fresh model begins")
    parser.add_argument("--each", type=int, default=512, help="tokens between two looks")
    told = parser.parse_args()
    lives = json.loads((HERE / "results" / f"{told.of}.json").read_text())["lives"]
    found = summary(lives, told.bits, told.each)
    (HERE / "results" / f"{told.of}_summary.json").write_text(json.dumps(found, indent=2) + "\n")
    draw(lives, told.bits, told.each, HERE / "results" / f"{told.of}.svg")
    for arm, about in found["arms"].items():
        print(f"{arm}: {about['missed']:.0f} bodies on which the target was not reached")
        for name in MEASURES:
            said = "; ".join(f"{k} {v['mean']:.4g} [{v['low']:.4g}, {v['high']:.4g}]" for k, v in about[name].items())
            print(f"  {name}: {said}")
    for life in found["size"]:
        print(json.dumps(life))


if __name__ == "__main__":
    main()

"""nestling sleep: a life consolidates what it has learned."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.progress import TaskID

from nestling.sleep import DreamConfig, Pair, SleepConfig, SleepReport, evict, merge, paper, refuse, reset
from nestling.sleep.report import period_name

from .opening import opened
from .shared import app, print_json, progress

FULL = {"refuse": refuse(), "merge": merge(), "evict": evict()}
STUDENTS = {"reset": reset(), "paper": paper()}


@app.command(name="sleep")
def sleep(
    directory: tyro.conf.Positional[Path],
    *,
    steps: int | None = None,
    seconds: float | None = None,
    dreams: int | None = None,
    dream: bool = False,
    context: bool = False,
    full: Literal["refuse", "merge", "evict"] = "refuse",
    student: Literal["reset", "paper"] = "reset",
    probe: tuple[Path, ...] = (),
    json: bool = False,
) -> None:
    """Let a life sleep: what its fast levels hold goes to slots of slower ones, by distillation on its own dreams.

    Without --steps, --seconds or --dreams, a night costs at most a quarter of what was read since the last.

    Args:
        directory: a life that was begun with --slots.
        steps: of seeding, for each pair of levels.
        seconds: no longer than this; what is finished then is kept.
        dreams: texts that the life writes for itself, for each pair.
        dream: after that, learn from dreams of its own those that help it to write as it did before.
        context: what the open document's context holds goes to the fastest level, too.
        full: where no slot is free: leave the pair as it is, merge the two least used slots, or lose the least used.
        student: what becomes of the fast levels: their first weights again, or the published one more update.
        probe: files of text, whose surprise is told before and after.
        json: print the report as JSON.
    """
    texts = {path.name: path.read_bytes() for path in probe}
    with opened(directory) as life, progress() as bars:
        config = SleepConfig(when_full=FULL[full], student=STUDENTS[student], context=context)
        if steps is None and seconds is None and dreams is None:
            config = life.night(config)
        if dreams is not None:
            config = replace(config, dreams=dreams)
        if steps is not None:
            config = replace(config, seeding=replace(config.seeding, steps=steps))
        if dream:
            config = replace(config, dreaming=DreamConfig())
        tasks: dict[Pair, TaskID] = {}

        def tell(pair: Pair, done: int, total: int) -> None:
            if pair not in tasks:
                tasks[pair] = bars.add_task(
                    f"{period_name(pair.fast)} -> {period_name(pair.slow)}", total=total, note=""
                )
            bars.update(tasks[pair], completed=done + 1)

        report = life.sleep(config, seconds=seconds, probes=texts, tell=tell)
        event = life.at
    if json:
        print_json({"event": event, **plain_report(report)})
        return
    print(report)


def plain_report(report: SleepReport) -> dict[str, Any]:
    """The report as plain data."""
    told = report._asdict() | {"pairs": [{**pair._asdict(), "kept": pair.kept} for pair in report.pairs]}
    told["probes"] = {name: scores._asdict() for name, scores in report.probes.items()}
    if report.dreamt is not None:
        told["dreamt"] = report.dreamt._asdict() | {"rounds": [each._asdict() for each in report.dreamt.rounds]}
    return told

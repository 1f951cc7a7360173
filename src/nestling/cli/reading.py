"""nestling learn: a life reads, or a model's folder does."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from nestling.learner import (
    Guards,
    Learned,
    Learner,
    SavedModel,
    SavedStack,
    is_life,
    is_stacked,
    load_model,
    load_stacked,
    open_life,
    reader_of,
    save_life,
)
from nestling.learner.fold import Tell
from nestling.learner.guards import Guard, GuardState
from nestling.levels import Reader
from nestling.sleep import Schedule, SleepConfig, SleepReport, by_hand
from nestling.train import named_documents

from .opening import opened
from .resting import FULL, plain_report
from .shared import BITS, app, console, print_json, progress

FINITE = Guards(
    surprise_jump=math.inf, level_jump=math.inf
)  # a folder's life refuses what is not finite, and only that


@app.command(name="learn")
def learn(
    directory: tyro.conf.Positional[Path],
    paths: tyro.conf.Positional[tuple[Path, ...]],
    *,
    source: str | None = None,
    again: bool = True,
    sleep: Schedule = by_hand(),
    full: Literal["refuse", "merge", "evict"] = "refuse",
    json: bool = False,
) -> None:
    """Let a life, or a model, read files or folders, learning as it reads.

    Args:
        directory: a life, from `nestling new`, or a model's folder, from `nestling train`.
        paths: files or folders of text; every file is one document.
        source: what all of it is called, to be forgotten together; if not given, each file is a source of its own.
        again: read what a life has read before from the same source once more; --no-again passes over it, and goes on
            with a document whose reading was cut short.
        sleep: when a life sleeps as it reads: "after(8192)" (tokens), "at_ticks(at_least=512)",
            "when_surprised(nats=0.3, at_least=4096)" or "when_slots_fill()". Each night costs at most a quarter of what
            was read since the last.
        full: at night, where no slot is free: leave the pair as it is, merge the two least used, lose the least used.
        json: print what was done as JSON.
    """
    if not paths:
        raise ValueError("learn: name at least one file or folder to read")
    documents = named_documents(paths)
    torch.set_flush_denormal(True)
    if is_life(directory):
        nights = (sleep, SleepConfig(when_full=FULL[full]))
        _learn_life(directory, [(source or name, text) for name, text in documents], again, nights, json)
        return
    if source is not None or json or not again or sleep != by_hand():
        raise ValueError(
            f"{directory}: not a life: --source, --no-again, --sleep and --json are for lives; see nestling new"
        )
    _learn_model(directory, documents, paths)


def _learn_life(
    directory: Path,
    documents: list[tuple[str, bytes]],
    again: bool,
    nights: tuple[Schedule, SleepConfig],
    as_json: bool,
) -> None:
    told: list[dict[str, Any]] = []
    passed: list[str] = []
    slept: list[dict[str, Any]] = []
    with opened(directory) as life, progress() as bars:
        task = bars.add_task("learning", total=sum(len(text) for _, text in documents), note="")
        for source, text in documents:
            unread = text if again else life.unread(text, source)
            if not again and not len(unread):
                bars.update(task, advance=len(text))
                passed.append(source)
                continue
            found, reports = _read(life, unread, source, nights, lambda n: bars.update(task, advance=n))
            bars.update(task, note=f"{found.nats * BITS:.3f} bits/token")
            told.append({"source": source, **found._asdict()})
            slept += [plain_report(report) for report in reports]
            if found.quarantined:
                console.print(f"[yellow]{source}: in quarantine; nestling release {directory} {source} trusts it[/]")
        tokens, event = sum(one["tokens"] for one in told), life.at
    if as_json:
        print_json({"tokens": tokens, "event": event, "documents": told, "read_before": passed, "nights": slept})
        return
    nats = sum(one["nats"] * one["tokens"] for one in told if one["tokens"]) / max(1, tokens)
    refused = sum(sum(one["refused"].values()) for one in told)
    held, bounded = (sum(one[name] for one in told) for name in ("held", "bounded"))
    if passed:
        print(f"passed over {len(passed)} documents that were read before")
    if tokens or not passed:
        print(
            f"learned {tokens:,} tokens at {nats * BITS:.3f} bits/token, predicted before learned; "
            f"refused {refused} segments, held {held} ticks"
            + (f"; {bounded:,} step sizes of memories came to their bound" if bounded else "")
        )
    if slept:
        outcomes = Counter(pair["outcome"] for night in slept for pair in night["pairs"])
        said = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
        print(f"slept {len(slept)} times; pairs of levels: {said}")


def _read(
    life: Learner, unread: bytes | Tensor, source: str, nights: tuple[Schedule, SleepConfig], tell: Tell
) -> tuple[Learned, list[SleepReport]]:
    schedule, config = nights
    if schedule == by_hand():
        return life.learn(unread, source, tell=tell), []
    return life.live(unread, source, schedule, config, tell=tell)


def open_reader(directory: Path, *, learning: bool) -> tuple[SavedModel | SavedStack, Any, Any]:
    """What a folder holds, trained here or stacked, a reader of it, and the state of the life in it."""
    saved = load_stacked(directory) if is_stacked(directory) else load_model(directory)
    if isinstance(saved, SavedStack):
        reader: Any = reader_of(saved.model, learning=learning)
    else:
        reader = Reader(saved.model, learning=learning)
    return saved, reader, open_life(directory, saved, reader)


def _learn_model(directory: Path, documents: list[tuple[str, bytes]], paths: tuple[Path, ...]) -> None:
    saved, reader, state = open_reader(directory, learning=True)
    guard = Guard(FINITE, saved.model.levels, GuardState.begin(len(saved.model.levels)), str(directory))
    predicts_all = isinstance(reader, Reader)  # an encoder predicts what is masked
    reader = replace(reader, accept=guard)
    total, counted, lost = 0.0, 0.0, 0
    with progress() as bars:
        task = bars.add_task("reading", total=sum(len(text) for _, text in documents), note="")
        for _, document in documents:
            tokens = saved.encode(document)
            a_token, first = len(document) / max(1, tokens.numel()), True  # bytes; nothing predicts the first one
            for part in tokens.split(4096):
                state, out = reader.read(state, part)
                seen = out.nll[out.nll.isfinite()].double()
                total, counted = total + float(seen.sum()), counted + seen.numel() * a_token
                lost += int((~out.nll.isfinite()).sum()) - int(first) if predicts_all else 0
                first = False
                note = f"{total * BITS / max(1, counted):.3f} bits/byte"
                bars.update(task, advance=part.numel() * a_token, note=note)
            state, _ = reader.end_document(state)
    save_life(directory, saved, state, {"documents": [str(path) for path in paths]})
    print(f"read {counted:,.0f} bytes at {total * BITS / max(1, counted):.3f} bits/byte, predicted before learned")
    if guard.refused or guard.held or lost:
        print(
            f"not finite: {guard.refused.total()} segments, which were refused, {guard.held.total()} ticks, which were "
            f"held, and {lost:,} predictions, which are not in the mean. The levels' steps are too large"
        )

"""nestling learn: a life reads, or a model's folder does."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro

from nestling.learner import (
    Guards,
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
from nestling.learner.guards import Guard, GuardState
from nestling.levels import Reader
from nestling.train import named_documents

from .opening import opened
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
    json: bool = False,
) -> None:
    """Let a life, or a model, read files or folders, learning as it reads.

    Args:
        directory: a life, from `nestling new`, or a model's folder, from `nestling train`.
        paths: files or folders of text; every file is one document.
        source: what all of it is called, to be forgotten together; if not given, each file is a source of its own.
        again: read what a life has read before from the same source once more; --no-again passes over it.
        json: print what was done as JSON.
    """
    if not paths:
        raise ValueError("learn: name at least one file or folder to read")
    documents = named_documents(paths)
    torch.set_flush_denormal(True)
    if is_life(directory):
        _learn_life(directory, [(source or name, text) for name, text in documents], again, json)
        return
    if source is not None or json or not again:
        raise ValueError(f"{directory}: not a life: --source, --no-again and --json are for lives; see nestling new")
    _learn_model(directory, documents, paths)


def _learn_life(directory: Path, documents: list[tuple[str, bytes]], again: bool, as_json: bool) -> None:
    told: list[dict[str, Any]] = []
    passed: list[str] = []
    with opened(directory) as life, progress() as bars:
        task = bars.add_task("learning", total=sum(len(text) for _, text in documents), note="")
        for source, text in documents:
            if not again and life.has_read(text, source):
                bars.update(task, advance=len(text))
                passed.append(source)
                continue
            found = life.learn(text, source, tell=lambda n: bars.update(task, advance=n))
            bars.update(task, note=f"{found.nats * BITS:.3f} bits/token")
            told.append({"source": source, **found._asdict()})
            if found.quarantined:
                console.print(f"[yellow]{source}: in quarantine; nestling release {directory} {source} trusts it[/]")
        tokens, event = sum(one["tokens"] for one in told), life.at
    if as_json:
        print_json({"tokens": tokens, "event": event, "documents": told, "read_before": passed})
        return
    nats = sum(one["nats"] * one["tokens"] for one in told if one["tokens"]) / max(1, tokens)
    refused, held = sum(sum(one["refused"].values()) for one in told), sum(one["held"] for one in told)
    if passed:
        print(f"passed over {len(passed)} documents that were read before")
    if tokens or not passed:
        print(
            f"learned {tokens:,} tokens at {nats * BITS:.3f} bits/token, predicted before learned; "
            f"refused {refused} segments, held {held} ticks"
        )


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

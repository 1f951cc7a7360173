"""Whether a life is what was written: every file, event and text; and, asked for, every state learned again."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from nestling.levels import LevelledModel, Reader

from .about import broken_seal, read_about
from .event import BIRTH, event_key
from .files import check_sums, leftovers, numbered
from .fold import Fold, Tell, digest
from .intake import read_back
from .journal import Journal
from .kinds import Tokens, read_model
from .machine import machine_differences
from .pins import FOLDER
from .recovery import check_witness, void
from .snapshot import Snapshot, list_snapshots, read_snapshot


class Verified(NamedTuple):
    """problems: what is wrong, each in a sentence; checked: how much of what was looked at; notes: what to know."""

    problems: list[str]
    checked: dict[str, int]
    notes: list[str]

    @property
    def good(self) -> bool:
        return not self.problems


def verify_life(folder: Path, *, replay: bool = False, tell: Tell | None = None) -> Verified:
    """Check a life, beside its writer too. With `replay` everything on its path is learned again, and must come to
    the digest of every snapshot on the way; where machines differ, one that does not is a note and no problem. Raises
    ValueError where there is no life, or its facts, its model or its
    journal cannot be read at all."""
    about = read_about(folder, write=False)
    model, tokens, found = read_model(folder / "model")
    journal = Journal(folder, write=False)
    try:
        report = Verified([], {}, [])
        if found != about.model:
            report.problems.append(f"{folder}: a life of model {about.model}, but model/ is {found}")
        if broken := broken_seal(folder, journal.facts().get("about")):
            report.problems.append(broken)
        with journal.still():
            _check_journal(journal, report)
        good = _check_snapshots(folder, journal, model, report)
        _check_conversations(folder, report)
        _look_for_leftovers(folder, report)
        if replay and not report.problems:
            _check_replay(journal, good, Fold(model, about.config.guards), tokens, report, tell)
        return report
    finally:
        journal.close()


def _check_journal(journal: Journal, report: Verified) -> None:
    # The witness first: what the journal is asked after it is answered from one moment, and its writer may go on.
    for check in (check_witness, lambda found: found.head, Journal.notes, Journal.check_done):
        try:
            check(journal)
        except ValueError as error:
            report.problems.append(str(error))
    (said,) = journal.ask("PRAGMA integrity_check(1)")[0]
    if said != "ok":
        report.problems.append(f"{journal.path}: damaged ({said})")
        return
    chains, references, texts = {BIRTH: journal.chain_of(BIRTH) or ""}, Counter[str](), 0
    for event in journal.all_events():
        chains[event.id] = event.chain
        if event.link(chains.get(event.parent, "")) != event.chain:
            report.problems.append(f"{journal.path}: event {event.id} is not what was journaled")
        if event.blob and not event.pruned:
            references[event.blob] += 1
            texts += 1
            try:
                journal.content(event)
            except ValueError as error:
                report.problems.append(str(error))
    if dict(journal.ask("SELECT hash, refs FROM blobs")) != dict(references):
        report.problems.append(f"{journal.path}: the texts that it holds are not those that its events refer to")
    ordinals: Counter[str] = Counter()
    for event in journal.path_events(journal.head[0]):
        if event_key(event.source, ordinals[event.source], event.kind, event.blob, event.ends) != event.key:
            report.problems.append(f"{journal.path}: the key of event {event.id} is not its own")
        ordinals[event.source] += 1
    report.checked.update(events=len(chains) - 1, texts=texts)


def _check_snapshots(folder: Path, journal: Journal, model: LevelledModel, report: Verified) -> list[Snapshot]:
    like, listed = Reader(model).begin(), {s.folder: s for s in list_snapshots(folder / "snapshots")}
    good = []
    for each in numbered(folder / "snapshots"):
        try:
            if each not in listed:
                raise ValueError(f"{each}: damaged: it does not say what it is")
            read_snapshot(each, like)
            if void(journal, listed[each]) and not journal.facts()["void"]:
                raise ValueError(f"{each}: its event {listed[each].event} is not in the journal")
            good.append(listed[each])
        except (ValueError, OSError) as error:
            if each.exists():  # else its writer let go of it meanwhile
                report.problems.append(str(error))
    report.checked["snapshots"] = len(good)
    return good


def _check_conversations(folder: Path, report: Verified) -> None:
    checked = 0
    for conversation in sorted((folder / FOLDER).glob("[!.]*")):
        for turn in numbered(conversation):
            try:
                check_sums(turn)
                checked += 1
            except ValueError as error:
                report.problems.append(str(error))
    report.checked["conversation turns"] = checked


def _look_for_leftovers(folder: Path, report: Verified) -> None:
    """They are hidden, and never read; but there may be text in them that was forgotten."""
    for root in (folder, folder / "snapshots", folder / FOLDER):
        report.notes.extend(
            f"{left}: half-written or half-removed, by a writer at work or by a process that was killed; "
            "the next opening for writing removes it"
            for left in leftovers(root)
        )


def _check_replay(
    journal: Journal, good: list[Snapshot], fold: Fold, tokens: Tokens, report: Verified, tell: Tell | None
) -> None:
    head, _ = journal.head
    way = journal.path_events(head)
    depth = {BIRTH: 0} | {event.id: i for i, event in enumerate(way, 1)}
    first = max((i for i, event in enumerate(way, 1) if event.pruned), default=0)
    on_the_way = sorted((s for s in good if s.event in depth), key=lambda s: depth[s.event])
    start = next((s for s in on_the_way if depth[s.event] >= first), None)
    if start is None:
        report.notes.append("nothing was learned again: the texts are pruned")
        return
    differs = sorted({said for snapshot in on_the_way for said in machine_differences(snapshot.machine)})
    report.notes.extend(f"this machine differs, states need not be the same bit for bit: {said}" for said in differs)
    expected: dict[int, set[str]] = {}
    for snapshot in on_the_way:
        expected.setdefault(snapshot.event, set()).add(snapshot.digest)
    state = read_snapshot(start.folder, Reader(fold.model).begin())
    compared = 0
    for event in way[depth[start.event] :]:
        state, _ = fold.step(state, event, read_back(journal.content(event), event, tokens), tell)
        if event.id in expected:
            compared += 1
            if expected[event.id] != {digest(state)}:
                said = f"the snapshot after event {event.id} is not what its events come to"
                (report.notes if differs else report.problems).append(said)
    report.checked["states learned again"] = compared

"""A model's life in a folder: one writer, any number of readers.

    LIFE/life.json         what it is
    LIFE/model/            the model, which a life does not change
    LIFE/journal.sqlite    every event and what it read
    LIFE/witness           how far the journal had come
    LIFE/snapshots/N/      states
    LIFE/conversations/    what was said to it, each conversation with a sequence state of its own
    LIFE/lock              held by the writer

What is acknowledged is in the journal before it is learned from. The state is a function of the events, so that the
newest good snapshot and the events after it give it back.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from nestling.levels import LevelledModel, ReadingState
from nestling.memory import known
from nestling.sleep import Pair, Schedule, SleepConfig, SleepReport
from nestling.sleep.night import Tell as SleepTell

from . import telling
from .about import LifeConfig
from .conversation import Conversation, check_name, remove_conversation, spoken
from .copying import begin_life, copy_life
from .event import BIRTH, Event
from .fold import Done, LifeState, Tell, digest
from .forgetting import Plan, plan_forgetting, scrub, take_out
from .held import Held
from .intake import Given, as_tokens, entries_of, read_back, tokens_read, with_last
from .journal import Entry, Journal
from .living import live
from .recovery import way_back
from .sleeping import SOURCE, default_night, fall_asleep, growing, night_key, score
from .snapshot import Snapshot, check_free, events_by_name, list_snapshots, release_name
from .talks import Talks
from .telling import Learned
from .verify import Verified, verify_life
from .voice import go_on, surprises
from .why import Why, explain


class Learner:
    """A life. Use `create` or `open`; close it, or use it in a `with`."""

    def __init__(self, folder: Path, *, write: bool, tell: Tell | None = None) -> None:
        self.held = held = Held(folder, write=write, tell=tell)
        self.folder, self.fold = folder, held.fold
        self.model, self.tokens, self.model_hash = held.model, held.tokens, held.model_hash
        self.talks = Talks(folder, held.model, held.config.seed, held.like)

    @classmethod
    def create(
        cls,
        folder: Path | str,
        model: LevelledModel,
        *,
        config: LifeConfig | None = None,
        birth: ReadingState | None = None,
    ) -> "Learner":
        """Begin a life of a model in a folder that does not exist yet (or is empty). birth: the reading state that
        it begins with, if not the model's own."""
        begin_life(Path(folder), model, config or LifeConfig(), birth)
        return cls(Path(folder), write=True)

    @classmethod
    def open(cls, folder: Path | str, *, write: bool = True, tell: Tell | None = None) -> "Learner":
        """Open a life. Only one writer at a time: `Busy` is raised at once for a second one. A reader
        (`write=False`) sees the newest snapshot. tell: hears of what a writer has to learn again. Raises ValueError
        where the folder is not a life or is damaged."""
        return cls(Path(folder), write=write, tell=tell)

    def __enter__(self) -> "Learner":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Write a snapshot where something was learned since the last one, and let go of the life."""
        self.held.close()

    @property
    def config(self) -> LifeConfig:
        """How the life is kept now."""
        return self.held.config

    @property
    def journal(self) -> Journal:
        return self.held.journal

    @property
    def state(self) -> LifeState:
        """After event `at`."""
        return self.held.state

    @property
    def at(self) -> int:
        return self.held.at

    @property
    def stands_on(self) -> Snapshot:
        """The newest snapshot on the way to the state."""
        return self.held.stands_on

    @property
    def notes(self) -> list[str]:
        """What a person should know of how the life was opened."""
        return self.held.notes

    @property
    def digest(self) -> str:
        """A hash of every bit of the state: equal in lives that are equal."""
        return digest(self.state)

    # learning

    def learn(
        self,
        given: Given | Iterable[Given],
        source: str,
        *,
        ends: bool = True,
        derived: int | None = None,
        tell: Tell | None = None,
    ) -> Learned:
        """Journal a document (or the pieces of one, as they come) and learn from it. ends=False: it goes on in the
        next call with the same source. derived: the event whose state wrote it, if the model did. Raises ValueError,
        with nothing of the piece journaled, for what is no text of this model."""
        done: list[Done] = []
        for piece, last in with_last(given):
            self.accept(piece, source, ends=ends and last, derived=derived)
            done += self.catch_up(tell)
        return telling.summed(done, len(self.model.levels))

    def live(
        self,
        given: Given | Iterable[Given],
        source: str,
        schedule: Schedule,
        config: SleepConfig = SleepConfig(),
        *,
        share: float | None = 0.25,
        ends: bool = True,
        derived: int | None = None,
        tell: Tell | None = None,
        tell_sleep: SleepTell | None = None,
    ) -> tuple[Learned, list[SleepReport]]:
        """Learn a document as `learn` does, and sleep where a schedule says so: what was learned, and the nights. What
        comes after a point at which the schedule is asked is journaled once that is done, and each sleep is an event
        of its own. config: of the nights, each of which costs at most a share of what was learned since the last one
        (in tokens; a life stays awake where that is too little); share=None: they are as the config says."""
        told: dict[str, Any] = {"ends": ends, "derived": derived, "tell": tell, "tell_sleep": tell_sleep}
        done, nights = live(self, given, source, schedule, config, share, **told)
        return telling.summed(done, len(self.model.levels)), nights

    def accept(self, given: Given, source: str, *, ends: bool = True, derived: int | None = None) -> list[Event]:
        """Journal a document without learning from it yet: when this returns it cannot be lost. `catch_up` learns."""
        self.held.writing()
        if source == SOURCE:
            raise ValueError(f"source {SOURCE!r} is what a life's own sleeps are called; choose another name")
        if derived is not None and self.journal.chain_of(derived) is None:
            raise ValueError(f"derived must be an event of this life, or {BIRTH} for its birth, got {derived}")
        size = self.config.event_bytes
        return self.held.append(entries_of(given, source, self.tokens, ends=ends, derived=derived, event_bytes=size))

    def catch_up(self, tell: Tell | None = None) -> list[Done]:
        """Learn what was journaled and not yet learned; what each event did."""
        return self.held.catch_up(tell)

    def unread(self, given: Given, source: str) -> Tensor:
        """The tokens of a document [n] that the life's path has not read from a source: none where it was read before,
        the rest where its reading was cut short, else all."""
        tokens = as_tokens(given, self.tokens)
        (whole,) = entries_of(tokens, source, self.tokens, ends=True, derived=None, event_bytes=4 * tokens.numel())
        return tokens[tokens_read(whole, self.journal.path_events(self.at)) :]

    def release(self, source: str) -> None:
        """Take a source out of quarantine, and trust it from now on: jumps of its are taken in."""
        self.held.writing()
        if not self.state.guard.record(source).quarantined:
            raise ValueError(f"{source!r} is not in quarantine")
        self.held.append([Entry(source, b"", 0, ends=False, kind="release")])
        self.catch_up()

    def sleep(
        self,
        config: SleepConfig | None = None,
        *,
        seconds: float | None = None,
        only: Sequence[Pair] | None = None,
        probes: Mapping[str, Given] | None = None,
        tell: SleepTell | None = None,
    ) -> SleepReport:
        """Consolidate the fast levels into slots of the slower ones (see `nestling.sleep`): one event, journaled when
        it is finished, so that a sleep that is cut short has not been. config: `self.night()` by default. seconds: no
        longer than this, but for a step of seeding and the scores: a pair that is being seeded stops, one that is not
        yet is left; what is finished stays, and where the clock cut is what is journaled. only: some of the pairs.
        probes: texts by name, whose nats a token are told before and after."""
        self.catch_up()
        model, key = growing(self.model), night_key(self.config.seed, self.held.ordinals[SOURCE])
        config = config or self.night()
        scores = {name: score(name, model, as_tokens(text, self.tokens)) for name, text in (probes or {}).items()}
        guard = self.fold.sleeping(self.state)
        reading, report, night = fall_asleep(model, self.state.reading, config, key, seconds, scores, tell, guard, only)
        (event,) = self.held.append([Entry(SOURCE, night.write(), 0, ends=False, kind="sleep")])
        self.journal.record(event.id, {"report": str(report), "kept": [p.kept for p in report.pairs]}, 0)
        known = guard.state if guard else self.state.guard
        self.held.stand(self.state._replace(reading=reading, guard=known), event.id, 0)
        return report

    def night(self, config: SleepConfig = SleepConfig()) -> SleepConfig:
        """The default sleep: one of a kind that costs at most a quarter of what was learned since the last
        (`affordable`; in tokens, so that a replay is the same). Raises ValueError where that is too little for any."""
        return default_night(growing(self.model), self.journal.day(self.at), config)

    # talking

    def generate(
        self, prompt: Given, tokens: int, *, temperature: float = 0.8, seed: int | None = None
    ) -> Iterator[int]:
        """Yields tokens that go on from a prompt, from a fresh sequence state. Nothing is learned and no clock
        ticks. seed: of the sampling; the life's own, if none is given."""
        words = as_tokens(prompt, self.tokens)
        seed = self.config.seed if seed is None else seed
        return go_on(self.model, self.state.reading.levels.weights, words, tokens, temperature, seed)

    def conversation(self, name: str) -> Conversation:
        """The conversation of a name; one begins, on the newest snapshot, where there is none. A writer takes a
        snapshot for it where its state has none. `Busy` is raised where another process has it open."""
        if name in self.talks.names():
            return self.talks.resume(name)
        check_name(name)
        if self.held.write and self.stands_on.event != self.at:
            self.snapshot()
        return self.talks.begin(name, self._ground)

    def _ground(self) -> Snapshot:
        """The snapshot to begin a conversation on, while none can be removed."""
        if self.stands_on not in list_snapshots(self.folder / "snapshots"):  # its number may be another's by now
            self.held.go_to(None)
        return self.stands_on

    def learn_conversation(self, conversation: Conversation, *, own_words: bool = False) -> Learned:
        """Learn what was said in a conversation since it was last learned from; what the model itself wrote only
        with `own_words`. The source is "conversation NAME"; it goes where what the model knew then is forgotten."""
        tokens = spoken(conversation.turns[conversation.learned :], own_words=own_words)
        found = telling.summed((), len(self.model.levels))
        if tokens.numel():
            found = self.learn(tokens, f"conversation {conversation.name}", derived=conversation.event)
        conversation.learned = len(conversation.turns)
        conversation.save()
        return found

    # looking

    def evaluate(self, probes: Sequence[Given]) -> list[float]:
        """Mean nats of a token of each text, from a fresh sequence state with the levels as they stand: on a copy,
        clocks stopped, nothing is learned."""
        return surprises(self.model, self.state.reading.levels, [as_tokens(probe, self.tokens) for probe in probes])

    def why(self, prompt: Given, answer: Given, *, exact: bool = False, tell: Tell | None = None) -> Why:
        """What an answer after a prompt owes to each level and, estimated, to each source; with `exact` checked by
        learning everything again without each."""
        asked = (as_tokens(prompt, self.tokens), as_tokens(answer, self.tokens))
        place = (self.state, self.at)
        return explain(self.folder, self.journal, self.fold, self.tokens, place, asked, exact=exact, tell=tell)

    def status(self) -> dict[str, Any]:
        """What the life is, has read and weighs, as plain data."""
        known_of = {"folder": str(self.folder), "model": self.model_hash, "seed": self.config.seed, "notes": self.notes}
        return known_of | telling.status(self.folder, self.journal, self.model.levels, self.state, self.at)

    def sources(self) -> dict[str, dict[str, Any]]:
        """Per source: tokens, surprise when they were read, how far each level moved, what the guards refused."""
        return telling.sources(self.journal, self.state, self.at)

    def verify(self, *, replay: bool = False) -> Verified:
        """Whether every file is what was written (see `verify_life`)."""
        return verify_life(self.folder, replay=replay)

    def remembered(self, tokens: int = 1024) -> dict[str, float]:
        """Per source: mean nats of the first `tokens` of what it was, with the levels as they stand now (see
        `evaluate`); beside the surprise when it was read, what is left of it. Pruned sources are left out."""
        first: dict[str, Event] = {}
        for event in self.journal.path_events(self.at):
            if event.kind == "learn" and not event.pruned:
                first.setdefault(event.source, event)
        texts = (read_back(self.journal.content(event), event, self.tokens)[:tokens] for event in first.values())
        return dict(zip(first, surprises(self.model, self.state.reading.levels, texts), strict=True))

    def history(self) -> list[dict[str, Any]]:
        """What happened, oldest first."""
        return telling.history(self.journal)

    # going back and forth

    def snapshot(self, name: str | None = None) -> Snapshot:
        """Write the state as it stands. A named snapshot is kept, and can be gone back to by its name."""
        self.held.writing()
        if name is not None:
            check_free(self.folder / "snapshots", name)
        return self.held.snapshot(name)

    def keep(
        self,
        *,
        snapshot_tokens: int | None = None,
        keep_snapshots: int | None = None,
        journal_tokens: float | None = None,
    ) -> LifeConfig:
        """Change what is kept from now on (see `LifeConfig`; None: as it was). Texts that `journal_tokens` lets go of
        do not come back. Raises ValueError for what is out of bounds."""
        self.held.writing()
        asked = {
            "snapshot_tokens": snapshot_tokens,
            "keep_snapshots": keep_snapshots,
            "journal_tokens": journal_tokens,
        }
        if changes := {name: value for name, value in asked.items() if value is not None}:
            self.held.keep(changes)
        return self.config

    def release_snapshot(self, name: str) -> None:
        """Let go of a snapshot's name: it is kept no longer than one that never had any. Raises ValueError where there
        is none of that name."""
        self.held.writing()
        known(name, events_by_name(self.folder / "snapshots"), "snapshot")
        with self.journal.transaction():
            self.journal.note("release snapshot", self.journal.last(), name=name)
        for snapshot in list_snapshots(self.folder / "snapshots"):
            if snapshot.name == name:
                release_name(snapshot)
        self.held.clean()

    def resolve(self, to: str | int) -> int:
        """The event that a snapshot's name, "birth", or an event's number stands for."""
        if to == "birth":
            return BIRTH
        if isinstance(to, str) and not to.isdigit():
            return int(known(to, events_by_name(self.folder / "snapshots"), "snapshot"))
        if self.journal.chain_of(int(to)) is None:
            raise ValueError(f"there is no event {to} in this life")
        return int(to)

    def rollback(self, to: str | int, tell: Tell | None = None) -> None:
        """Go back to a named snapshot, to "birth", or to the state after an event. What came after stays in the
        journal, off the life's path, and can be gone back to by its event's number until it is forgotten."""
        self.held.writing()
        target, was = self.resolve(to), self.at
        way_back(self.folder, self.journal, self.held.like, target)
        with self.held.all_the_way("a rollback"):
            with self.journal.transaction(acknowledged=True):
                self.journal.set_fact("head", [target, self.journal.chain_of(target)])
                self.journal.note("rollback", self.journal.last(), event=target, was=was)
            self.held.turn_back(tell)

    def forget(self, *sources: str, tell: Tell | None = None) -> Plan:
        """Forget sources exactly: all that was read from them and all that derives from them goes, and the rest is
        learned again from the newest snapshot before them. Raises ValueError, and forgets nothing, where the journal
        was pruned of what would have to be read again. Forgetting "conversation NAME" removes the conversation. Returns
        what was taken out, with the names of the snapshots that went with it. `notes` say where a reader keeps traces
        of it in the journal's files."""
        self.held.writing()
        talk_of = {f"conversation {name}": name for name in self.talks.names()}
        read = [source for source in sources if source not in talk_of or self.journal.has_source(source)]
        plan = plan_forgetting(self.journal, read)
        way_back(self.folder, self.journal, self.held.like, plan.head, plan.base, plan.gone)
        for source in talk_of.keys() & set(sources):
            remove_conversation(self.folder, talk_of[source])
        if read:
            before = set(events_by_name(self.folder / "snapshots"))
            with self.held.all_the_way("a forget"):
                take_out(self.journal, plan)
                scrub(self.journal)
                self.held.turn_back(tell)
            self.held.tell_of_traces()
            plan = plan._replace(snapshots=tuple(sorted(before - set(events_by_name(self.folder / "snapshots")))))
        return plan

    def fork(self, folder: Path | str, at: str | int | None = None, tell: Tell | None = None) -> "Learner":
        """A copy of this life in another folder, as it stands or as it stood `at`; from there on they know nothing
        of each other. Conversations stay behind."""
        target = self.journal.head[0] if at is None else self.resolve(at)
        if self.held.write:
            with self.journal.transaction():
                self.journal.note("fork", self.journal.last(), event=target)
        copy_life(self.folder, self.journal, Path(folder), target)
        return Learner(Path(folder), write=True, tell=tell)

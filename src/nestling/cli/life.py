"""Commands on a life: new, status, history, sleep, snapshot, keep, rollback, fork, forget, release, why, verify."""

from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nestling.learner import Learner, LifeConfig
from nestling.learner.verify import verify_life
from nestling.levels import Growing
from nestling.models import Decoder
from nestling.models import preset as preset_config

from .opening import learning_again, opened, say_notes
from .reading import open_reader
from .shared import BITS, app, console, print_json
from .training import Presets

LifeFolder = tyro.conf.Positional[Path]


@app.command(name="new")
def new(
    directory: LifeFolder,
    *,
    model: Path | None = None,
    preset: Presets | None = None,
    slots: int = 0,
    rank: int = 8,
    config: Annotated[LifeConfig, tyro.conf.OmitArgPrefixes] = LifeConfig(),
    json: bool = False,
) -> None:
    """Begin a life, of a trained model or of a preset that knows nothing yet.

    Args:
        directory: the life's folder; it must not exist yet.
        model: a model's folder, from `nestling train` or `nestling stack`; what was learned in it goes into the life.
        preset: instead of a model: a configuration with fresh weights.
        slots: beside each level, for sleep to fill; without any, a life cannot sleep.
        rank: of each slot.
        config: how the life is kept.
        json: print what was begun as JSON.
    """
    if (model is None) == (preset is None):
        raise ValueError("new: give either --model, a folder that nestling train or stack made, or --preset")
    of: Any
    birth = None
    if model is not None:
        saved, _, birth = open_reader(model, learning=True)
        of = saved.model
    else:
        assert preset is not None
        of = Decoder(preset_config(preset), seed=config.seed)
    if slots:
        of = Growing(of, slots, rank)
        birth = None if birth is None else birth._replace(levels=of.grown(birth.levels))
    with Learner.create(directory, of, config=config, birth=birth) as life:
        told = {"folder": str(directory), "model": life.model_hash, "position": int(life.state.reading.position)}
    _say(told, json, f"{directory}: a life of model {told['model']} begins")


@app.command(name="status")
def status(directory: LifeFolder, *, now: bool = False, json: bool = False) -> None:
    """Say what a life is, what it has read and how large it is. Beside its writer too.

    Args:
        directory: a life.
        now: read the beginning of every source again, without learning, and say how surprising it is now.
        json: print it as JSON.
    """
    with opened(directory, write=False, notes=False) as life:
        told = life.status()
        for source, nats in (life.remembered() if now else {}).items():
            told["sources"][source]["nats_now"] = nats
    if json:
        print_json(told)
        return
    table = Table(title=str(directory), show_header=False)
    for name in ("model", "position", "event", "waiting", "open_source", "digest"):
        table.add_row(name.replace("_", " "), str(told[name]))
    for lvl in told["levels"]:
        table.add_row("level", f"{lvl['level']}, {lvl['since_tick']} tokens since its tick")
    for name, size in told["bytes"].items():
        table.add_row(f"{name} on the disk", f"{size:,} bytes")
    for shot in told["snapshots"]:
        name = "birth" if shot["event"] == 0 else f"after event {shot['event']}"
        table.add_row(f"snapshot {shot['number']}", f"{name}, named {shot['name']}" if shot["name"] else name)
    for name, talk in told["conversations"].items():
        said = talk.get("problem") or f"{talk['turns']} turns, {talk['learned']} learned, on event {talk['event']}"
        table.add_row("conversation", Text(f"{name}: {said}"))
    for note in told["notes"]:
        table.add_row("note", note)
    Console().print(table)
    Console().print(_sources(told["sources"], now) if told["sources"] else "nothing was read yet: nestling learn")


def _sources(sources: dict[str, dict[str, Any]], with_now: bool) -> Table:
    table = Table(
        "source",
        "tokens",
        "bits/token when read",
        *(["now"] if with_now else []),
        "levels moved by",
        "refused, held",
        "",
    )
    for name, about in sources.items():
        moved = " ".join(f"{value:.1e}" for value in about["moved"])
        more = {"ticks held": about["held"], "steps at their bound": about["bounded"]}
        counts = about["refused"] | {name: count for name, count in more.items() if count}
        refused = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
        kept = "in quarantine" if about["quarantined"] else "trusted" if about["trusted"] else ""
        now = [f"{about['nats_now'] * BITS:.3f}" if "nats_now" in about else "pruned"] if with_now else []
        table.add_row(Text(name), f"{about['tokens']:,}", f"{about['nats'] * BITS:.3f}", *now, moved, refused, kept)
    return table


@app.command(name="history")
def history(directory: LifeFolder, *, json: bool = False) -> None:
    """Say what happened in a life, oldest first.

    Args:
        directory: a life.
        json: print it as JSON.
    """
    with opened(directory, write=False) as life:
        told = life.history()
    if json:
        print_json(told)
        return
    table = Table("event", "what", "")
    for line in told:
        rest = ", ".join(f"{name} {value}" for name, value in line.items() if name not in ("action", "event"))
        table.add_row(str(line.get("event", "")), line["action"], Text(rest))
    Console().print(table)


@app.command(name="snapshot")
def snapshot(
    directory: LifeFolder, name: tyro.conf.Positional[str], *, remove: bool = False, json: bool = False
) -> None:
    """Keep the state of a life under a name.

    Args:
        directory: a life.
        name: to go back to it by.
        remove: instead: let go of the snapshot that has the name.
        json: print it as JSON.
    """
    with opened(directory) as life:
        if remove:
            life.release_snapshot(name)
            _say({"released": name}, json, f"snapshot {name!r} is kept no longer")
            return
        found = life.snapshot(name)
    told = {"name": name, "number": found.number, "event": found.event, "digest": found.digest}
    _say(told, json, f"snapshot {name!r} after event {found.event}")


@app.command(name="keep")
def keep(
    directory: LifeFolder,
    *,
    snapshot_tokens: int | None = None,
    keep_snapshots: int | None = None,
    journal_tokens: float | None = None,
    json: bool = False,
) -> None:
    """Change what a life keeps from now on; given nothing, say what it keeps.

    Args:
        directory: a life.
        snapshot_tokens: learned between two snapshots.
        keep_snapshots: how many of the newest, beside birth, named ones and those that conversations stand on.
        journal_tokens: text older than so many tokens is let go of, for good; inf: none.
        json: print it as JSON.
    """
    asked = {"snapshot_tokens": snapshot_tokens, "keep_snapshots": keep_snapshots, "journal_tokens": journal_tokens}
    changes: Any = {name: value for name, value in asked.items() if value is not None}
    with opened(directory, write=bool(changes)) as life:
        config = life.keep(**changes) if changes else life.config
        told = {name: getattr(config, name) for name in asked} | {"bytes": life.status()["bytes"]}
    _say(told, json, ", ".join(f"{name.replace('_', ' ')} {told[name]:,}" for name in asked))


@app.command(name="rollback")
def rollback(directory: LifeFolder, to: tyro.conf.Positional[str], *, json: bool = False) -> None:
    """Go back to a snapshot, to the state after an event, or to birth. What came after stays in the journal.

    Args:
        directory: a life.
        to: a snapshot's name, an event's number (see `nestling history`), or "birth".
        json: print it as JSON.
    """
    with opened(directory) as life:
        with learning_again() as tell:
            life.rollback(to, tell)
        say_notes(life.notes)
        told = {"event": life.at, "digest": life.digest}
    _say(told, json, f"{directory}: after event {told['event']} again")


@app.command(name="fork")
def fork(directory: LifeFolder, copy: tyro.conf.Positional[Path], *, at: str | None = None, json: bool = False) -> None:
    """Copy a life, as it stands or as it stood. Beside its writer too.

    Args:
        directory: a life.
        copy: the folder of the copy; it must not exist yet.
        at: a snapshot's name, an event's number, or "birth".
        json: print it as JSON.
    """
    with opened(directory, write=False) as life, learning_again() as tell, life.fork(copy, at, tell) as other:
        told = {"folder": str(copy), "event": other.at, "digest": other.digest}
    _say(told, json, f"{copy}: a copy of {directory} after event {told['event']}")


@app.command(name="forget")
def forget(directory: LifeFolder, sources: tyro.conf.Positional[tuple[str, ...]], *, json: bool = False) -> None:
    """Forget sources exactly: their text goes, and what was read beside them is learned again without them.

    Args:
        directory: a life.
        sources: as `nestling status` calls them; "conversation NAME" for a conversation.
        json: print it as JSON.
    """
    if not sources:
        raise ValueError("forget: name at least one source")
    with opened(directory) as life:
        talks = life.talks.names()
        with learning_again() as tell:
            plan = life.forget(*sources, tell=tell)
        say_notes(life.notes)
        gone = sorted(set(talks) - set(life.talks.names()))
        told = {"event": life.at, "digest": life.digest, "events": len(plan.gone), "tokens": plan.tokens}
    line = f"{directory}: {plan.tokens:,} tokens forgotten, as if they had never been read"
    line += f"; and conversations {', '.join(gone)}" if gone else ""
    line += f"; and snapshots {', '.join(plan.snapshots)}" if plan.snapshots else ""
    _say(told | {"conversations": gone, "snapshots": list(plan.snapshots)}, json, line)


@app.command(name="release")
def release(directory: LifeFolder, source: tyro.conf.Positional[str], *, json: bool = False) -> None:
    """Take a source out of quarantine, and trust it from now on.

    Args:
        directory: a life.
        source: as `nestling status` calls it.
        json: print it as JSON.
    """
    with opened(directory) as life:
        life.release(source)
        told = {"source": source, "event": life.at}
    _say(told, json, f"{source}: trusted")


@app.command(name="why")
def why(directory: LifeFolder, *, prompt: str, answer: str, exact: bool = False, json: bool = False) -> None:
    """Say what an answer owes to each level and to each source: nats of log-probability that it would lose without.

    Args:
        directory: a life.
        prompt: what comes before the answer.
        answer: what to explain.
        exact: learn everything again without each source, and compare with the estimates.
        json: print it as JSON.
    """
    with opened(directory, write=False) as life, learning_again() as tell:
        found = life.why(prompt, answer, exact=exact, tell=tell)
        levels = [repr(lvl) for lvl in life.model.levels]
    if json:
        print_json(found._asdict() | {"level_names": levels})
        return
    print(f"log-probability {found.log_probability:.3f} nats")
    table = Table("", "nats lost without it (estimated)", *(["exactly"] if found.exact is not None else []))
    for name, lost in zip(levels, found.levels, strict=True):
        table.add_row(Text(f"{name} as at birth"), f"{lost:+.4f} (exactly)")
    for source, lost in sorted(found.sources.items(), key=lambda item: -item[1]):
        checked = [] if found.exact is None else [f"{found.exact[source]:+.4f}"]
        table.add_row(Text(source), f"{lost:+.4f}", *checked)
    Console().print(table)
    if found.agreement is not None:
        print(f"rank correlation of estimate and exact: {found.agreement:.2f}")


@app.command(name="verify")
def verify(directory: LifeFolder, *, replay: bool = False, json: bool = False) -> None:
    """Check every file of a life: exit code 0 where all is what was written. Beside its writer too.

    Args:
        directory: a life.
        replay: learn everything again, too, and compare with the snapshots bit for bit.
        json: print it as JSON.
    """
    with learning_again() as tell:
        found = verify_life(directory, replay=replay, tell=tell)
    if json:
        print_json(found._asdict())
    else:
        for note in found.notes:
            console.print(f"[yellow]{note}[/]")
        print(", ".join(f"{count} {name}" for name, count in found.checked.items()))
    if not found.good:
        raise ValueError("; ".join(found.problems))


def _say(told: dict[str, Any], as_json: bool, line: str) -> None:
    if as_json:
        print_json(told)
    else:
        print(line)

"""One-line sabotages, each of which must fail a test.

    python tests/mutants.py [--only WORD]

Every mutant is applied to a copy of the package, and the tests that should see it run on that copy; the first that
fails kills it. Ends with the survivors, and with exit code 1 if there are any. Not part of `make test`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutant(NamedTuple):
    """In `file` of the package, `old`, which stands there once, becomes `new`; seen by `tests`."""

    file: str
    old: str
    new: str
    tests: str


MUTANTS = (
    Mutant("learner/fold.py", "if state.source not in (None, event.source):", "if False:", "tests/test_life.py"),
    Mutant("learner/fold.py", "if event.ends:", "if True:", "tests/test_life.py"),
    Mutant("learner/forgetting.py", "parent=kept(event.parent)", "parent=event.parent", "tests/test_life.py"),
    Mutant("learner/forgetting.py", " or event.derived in tainted", "", "tests/test_life.py"),
    Mutant("learner/forgetting.py", 'journal.ask("VACUUM")', "pass", "tests/test_life.py"),
    Mutant("learner/guards.py", "if not finite:", "if False:", "tests/test_guards.py"),
    Mutant("learner/guards.py", "if record.quarantined:", "if False:", "tests/test_guards.py"),
    Mutant("learner/voice.py", "self.read(torch.tensor([token]))", "pass", "tests/test_conversations.py"),
    Mutant("learner/files.py", ".hexdigest() != expected:", '.hexdigest() == "":', "tests/test_life_damage.py"),
    Mutant("learner/recovery.py", "if seen is not None and seen[0] > steps:", "if False:", "tests/test_life_damage.py"),
    Mutant(
        "learner/snapshot.py",
        "s.number not in newest | pinned and",
        "s.number not in newest and",
        "tests/test_conversations.py",
    ),
    Mutant("learner/talks.py", "self._at_hand[0] != sums", "False", "tests/test_conversations.py"),
    Mutant("learner/verify.py", "(report.notes if differs else report.problems)", "report.notes", "tests/test_life.py"),
    Mutant(
        "learner/verify.py", "(report.notes if differs else report.problems)", "report.problems", "tests/test_life.py"
    ),
    Mutant("learner/voice.py", "reader.begin(levels)", "reader.begin()", "tests/test_life.py"),
    Mutant(
        "learner/why.py",
        "moved_alone(fold, journal, tokens, birth, events)",
        "moved_alone(fold, journal, tokens, birth, path)",
        "tests/test_why.py",
    ),
    Mutant(
        "memory/rule.py",
        "buffer = _plus(_wide(gates.momentum) * state.buffer, times, added, own=True)",
        "buffer = _plus(-_wide(gates.momentum) * state.buffer, times, added, own=True)",
        "tests/test_rule.py",
    ),
    Mutant(
        "memory/rule.py",
        "if own and not torch.is_grad_enabled() and",
        "if not torch.is_grad_enabled() and",
        "tests/test_rule.py",
    ),
    Mutant(
        "memory/gradient_memory.py",
        "self.attentional_bias.target(rows, -wanted)",
        "self.attentional_bias.target(rows, wanted)",
        "tests/test_gradient_memory.py",
    ),
    Mutant(
        "memory/gradient_memory.py",
        "target(x, -n * gradient.error)",
        "target(x, -gradient.error)",
        "tests/test_gradient_memory.py",
    ),
    Mutant("optim/sharded.py", "return total / mesh.size()", "return total", "tests/test_sharded.py"),
    Mutant(
        "optim/adapter.py",
        "if cut is not None and not own.elementwise:",
        "if cut is not None and own.elementwise:",
        "tests/test_sharded.py",
    ),
    Mutant(
        "memory/rule.py",
        "return added - _wide(step_size) * gradient.project(weight), state",
        "return added + _wide(step_size) * gradient.project(weight), state",
        "tests/test_rule.py",
    ),
    Mutant("memory/rule.py", "tick = elapsed >= self.period", "tick = elapsed > self.period", "tests/test_rule.py"),
    Mutant("memory/rule.py", "norms.input.cumsum(-1)", "norms.input", "tests/test_sequence.py"),
    Mutant("memory/retention.py", "torch.lerp(start, weight,", "torch.lerp(weight, start,", "tests/test_sequence.py"),
    Mutant("memory/structure.py", "(2.0 - squared) * (g * error)", "squared * (g * error)", "tests/test_fused.py"),
    Mutant(
        "sequence/chunk.py", "later(after.start_kept, 1.0)", "later(after.start_kept, 0.0)", "tests/test_sequence.py"
    ),
    Mutant(
        "sequence/fused.py",
        "return _add(answer, scores.mul_(written), writes, -1.0)",
        "return _add(answer, scores.mul_(written), writes, 1.0)",
        "tests/test_fused.py",
    ),
    Mutant("sequence/fused.py", "after.add_(start)", "after.add_(0.0)", "tests/test_fused.py"),
    Mutant("sequence/elementwise.py", "d_x[:, :back] += d_head[:, back:]", "pass", "tests/test_elementwise.py"),
    Mutant(
        "sequence/elementwise.py", "by_head, mean, value=-1.0", "by_head, mean, value=1.0", "tests/test_elementwise.py"
    ),
    Mutant("sequence/averaged_gates.py", "share.diff()", "0.0 * share.diff()", "tests/test_averaged_gates.py"),
    Mutant("memory/retention.py", "return weight, weight", "return weight, start", "tests/test_averaged_gates.py"),
    Mutant("sequence/layout.py", "- last + self.phase[0]", "- last", "tests/test_averaged_gates.py"),
    Mutant(
        "sequence/stepped.py",
        "Gates(mean, momentum / some, log_retention)",
        "Gates(mean, momentum / some, 0.0)",
        "tests/test_stepped.py",
    ),
    Mutant("sequence/stepped.py", "pending.gradient * share", "pending.gradient", "tests/test_zoo.py"),
    Mutant("sequence/window.py", "(age <= n)", "(age < n)", "tests/test_window.py"),
    Mutant("sequence/window.py", "band = band * shares", "band = band + 0.0 * shares", "tests/test_window.py"),
    Mutant("sequence/streams.py", "-SLOWEST * decayed", "-decayed", "tests/test_zoo.py"),
    Mutant("sequence/srwm.py", "(wanted - found)", "(found - wanted)", "tests/test_zoo.py"),
    Mutant(
        "sequence/linear_mixer.py",
        "select(piece.reset, start, memory)",
        "select(piece.reset, memory, start)",
        "tests/test_layout.py",
    ),
    Mutant(
        "sequence/attention.py", "exists[each, last.clamp(min=0)] & (last >= 0)", "last >= 0", "tests/test_layout.py"
    ),
    Mutant("sequence/layout.py", "(phase + length) % frame", "phase * 0 + length % frame", "tests/test_layout.py"),
    Mutant("sequence/convolution.py", "after = x[:, -back:]", "after = x[:, :back]", "tests/test_layout.py"),
    Mutant(
        "sequence/self_modifying.py",
        "pairs = Writes(k, v, gates, present, True, carry)",
        "pairs = Writes(k, v, gates, present, False, carry)",
        "tests/test_self_modifying.py",
    ),
    Mutant("sequence/gating.py", "else F.logsigmoid(retention),", "else -retention.sigmoid(),", "tests/test_gating.py"),
    Mutant(
        "memory/adaptive.py", "1.0 - self.share * count.clamp(max=1.0)", "1.0 - self.share", "tests/test_optim_torch.py"
    ),
    Mutant("learner/states.py", 'if about.get("fits") != fits:', 'if about.get("fits") == "":', "tests/test_states.py"),
    Mutant("levels/neurons.py", "self.fastest * 2**k", "self.fastest * (k + 1)", "tests/test_neurons.py"),
    Mutant("levels/neurons.py", "slice(start, end)))", "slice(0, end - start)))", "tests/test_neurons.py"),
    Mutant(
        "levels/continuum.py",
        "onward._replace(input=onward.input[..., self.neurons])",
        "onward._replace(input=onward.input[..., : onward.input[..., self.neurons].shape[-1]])",
        "tests/test_neurons.py",
    ),
    Mutant("levels/attention_cache.py", "(slots >= start[used:, None])", "(slots >= 0)", "tests/test_stacking.py"),
    Mutant(
        "levels/attention_cache.py",
        "count - 1 + state.offset[:, None]",
        "count - 1 + 0 * state.offset[:, None]",
        "tests/test_stacking.py",
    ),
    Mutant("levels/layouts.py", "back = beside[-1:]", "back = beside[:1]", "tests/test_stacking.py"),
    Mutant("levels/layouts.py", "rows=half, start=half)", "rows=half, start=0)", "tests/test_stacking.py"),
    Mutant(
        "levels/stacking.py",
        "return torch.cat(parts, -1) if len(maps) > 1 else None",
        "return None",
        "tests/test_stacking.py",
    ),
    Mutant(
        "levels/reading.py",
        "self.accumulators = given, False",
        "self.accumulators = given, True",
        "tests/test_levels.py",
    ),
    Mutant("levels/writing.py", "if id(weight) in self.held", "if False", "tests/test_levels.py"),
    Mutant("memory/rule.py", "total.zero_() if free", "total.zero_() if own", "tests/test_rule.py"),
    Mutant("levels/stacking.py", "return output + more", "return output + 2.0 * more", "tests/test_stacking.py"),
    Mutant("levels/losses.py", "known[label] = True", "known[:] = True", "tests/test_encoders.py"),
    Mutant(
        "levels/encoders.py",
        "shown = tokens.masked_fill(hidden, told.mask_token)",
        "shown = tokens",
        "tests/test_encoders.py",
    ),
    Mutant("train/outer.py", "clock.advance(self.tokens)", "clock.advance(1)", "tests/test_scripts.py"),
    Mutant(
        "learner/states.py",
        'if about.get("fits") != fits:',
        'if about.get("fits") == "":',
        "tests/test_stacked_folder.py",
    ),
    Mutant("levels/slots.py", "+ bank.gate[:, -1]) * bank.active", "+ bank.gate[:, -1])", "tests/test_slots.py"),
    Mutant("sleep/schedule.py", "in pairwise(ladder))[::-1]", "in pairwise(ladder))", "tests/test_sleep_parts.py"),
    Mutant(
        "sleep/grow.py",
        "torch.zeros_like(found.up[0]), torch.zeros_like(found.gate[0]))\n        return put",
        "torch.ones_like(found.up[0]), torch.zeros_like(found.gate[0]))\n        return put",
        "tests/test_sleep.py",
    ),
    Mutant(
        "sleep/divergence.py",
        "return beta * kl(log_t, mixed)",
        "return beta * kl(mixed, log_t)",
        "tests/test_sleep_parts.py",
    ),
    Mutant(
        "sleep/imitation.py",
        "rewards - (rewards.sum(1, keepdim=True) - rewards) / (group - 1)",
        "rewards - rewards.mean(1, keepdim=True)",
        "tests/test_sleep_parts.py",
    ),
    Mutant("sleep/budget.py", "LEARNED = 3", "LEARNED = 6", "tests/test_budget.py"),
    Mutant("sleep/divergence.py", "+ (1 - beta) * kl(", "+ kl(", "tests/test_sleep_parts.py::TestDivergence"),
    Mutant(
        "sleep/imitation.py", "z <= within * longest", "z < within * longest", "tests/test_sleep_parts.py::TestReward"
    ),
    Mutant(
        "sleep/imitation.py",
        "self.share * self.meaning.agrees(heard) + (1 - self.share) * spelled",
        "(1 - self.share) * self.meaning.agrees(heard) + self.share * spelled",
        "tests/test_sleep_parts.py::TestReward",
    ),
    Mutant(
        "sleep/schedule.py",
        "if moment.awake >= self.tokens",
        "if moment.awake > self.tokens",
        "tests/test_sleep_parts.py::TestSchedule",
    ),
    Mutant(
        "sleep/schedule.py", "if position > 0 and position", "if position", "tests/test_sleep_parts.py::TestSchedule"
    ),
    Mutant(
        "sleep/schedule.py",
        "if surprised and moment.awake >= self.at_least",
        "if surprised",
        "tests/test_sleep_parts.py::TestSchedule",
    ),
    Mutant("sleep/seed.py", "gradient * min(1.0, config.clip / max(norm, 1e-12))", "gradient", "tests/test_night.py"),
    Mutant(
        "sleep/seed.py", "if track and apart > EXPLODED", "if False and apart > EXPLODED", "tests/test_life_sleep.py"
    ),
    Mutant(
        "sleep/seed.py",
        "theirs, mine, config.beta).mean()\n        if weight < 1",
        "mine, theirs, config.beta).mean()\n        if weight < 1",
        "tests/test_sleep.py::TestSeeding",
    ),
    Mutant("sleep/warm_start.py", "RIDGE = 0.1", "RIDGE = 3e-6", "tests/test_sleep_parts.py::TestCompressing"),
    Mutant("sleep/warm_start.py", " + math.log(count_a / count_b)", "", "tests/test_sleep_parts.py::TestCompressing"),
    Mutant(
        "sleep/warm_start.py",
        "Rows(received, wanted - answered)",
        "Rows(received, answered - wanted)",
        "tests/test_sleep.py::TestSeeding",
    ),
    Mutant(
        "sleep/warm_start.py",
        "default=host), host + 1)",
        "default=host) * 0 + host, host + 1)",
        "tests/test_sleep.py::TestSeeding",
    ),
    Mutant(
        "sleep/warm_start.py",
        "[:, :rank].mT  # [r, v]",
        "[:, -rank:].mT  # [r, v]",
        "tests/test_sleep_parts.py::TestCompressing",
    ),
    Mutant("sleep/dreams.py", "part.tokens.split(rows)", "part.tokens.split(10 * rows)", "tests/test_sleep_memory.py"),
    Mutant("sleep/prune.py", ".norm(dim=-1) * opening(found, h)", ".norm(dim=-1)", "tests/test_sleep.py::TestPruning"),
    Mutant(
        "sleep/prune.py",
        "full = folded + torch.linalg.solve",
        "full = torch.linalg.solve",
        "tests/test_sleep_parts.py::TestCompressing",
    ),
    Mutant(
        "sleep/prune.py",
        "inputs.norm(dim=0), sparsity, by_row=True",
        "inputs.norm(dim=0), sparsity, by_row=False",
        "tests/test_sleep_parts.py::TestCompressing",
    ),
    Mutant(
        "sleep/prune.py",
        "while int(active(model, weights, hosts).sum()) > slots",
        "while int(active(model, weights, hosts).sum()) > slots + 1",
        "tests/test_sleep.py::TestPruning",
    ),
    Mutant(
        "sleep/night.py",
        "current = config.student.teacher(before, learned)",
        "current = learned",
        "tests/test_sleep.py::TestPaper",
    ),
    Mutant(
        "sleep/night.py",
        "if done.outcome in FINISHED and started < after",
        "if False and started < after",
        "tests/test_night.py",
    ),
    Mutant("sleep/night.py", "before * (1 - self.config.least_recovered)", "before", "tests/test_night.py"),
    Mutant("sleep/night.py", "levels_of(model, pair.slow) if _own(config) else ()", "()", "tests/test_night.py"),
    Mutant(
        "sleep/night.py",
        "masked(model, done.weights, hosts, place.slot)",
        "done.weights",
        "tests/test_sleep.py::TestSleep",
    ),
    Mutant("sleep/bound.py", ">= self.seconds", "> self.seconds", "tests/test_sleep_parts.py"),
    Mutant("sleep/grow.py", "masks[slot] = mask", "masks[slot] = 1.0", "tests/test_sleep_parts.py::TestCompressing"),
    Mutant("sleep/student.py", "new._replace(elapsed=old.elapsed)", "new", "tests/test_sleep.py::TestSleep"),
    Mutant(
        "sleep/dreaming.py",
        "place, texts[index][None], prompt, config.trial_steps",
        "place, texts[:1], prompt, config.trial_steps",
        "tests/test_dreaming.py",
    ),
    Mutant("sleep/dreaming.py", "gate[slot, -1] = _OPEN", "gate[slot, -1] = -_OPEN", "tests/test_dreaming.py"),
    Mutant("sleep/dreaming.py", "if not after < start:", "if not after < math.inf:", "tests/test_dreaming.py"),
    Mutant("learner/living.py", " if learned(day) else None", "", "tests/test_life_live.py"),
    Mutant("learner/living.py", "        ask()  # again", "        pass  # again", "tests/test_life_live.py"),
    Mutant("learner/sleeping.py", "for mean in means[:-1]", "for mean in means", "tests/test_life_live.py"),
    Mutant(
        "learner/sleeping.py",
        '{"steps": night.steps, "only": night.only,',
        '{"steps": night.steps,',
        "tests/test_life_live.py",
    ),
    Mutant("learner/journal.py", "WHERE e.kind <> 'sleep')", ")", "tests/test_life_live.py"),
    Mutant(
        "learner/intake.py",
        "            begun = []\n            continue",
        "            continue",
        "tests/test_life_live.py",
    ),
    Mutant(
        "sleep/warm_start.py",
        "Rows(h * torch.sigmoid(h @ gate[:-1] + gate[-1])[:, None], y)",
        "Rows(h, y)",
        "tests/test_sleep.py::TestSeeding",
    ),
    Mutant(
        "levels/beside.py",
        "output = output + read_slots",
        "output = output - read_slots",
        "tests/test_stacked_sleep.py",
    ),
    Mutant("sleep/seed.py", "(groups.to(said) * said)", "(-groups.to(said) * said)", "tests/test_sleep.py"),
    Mutant(
        "sleep/student.py",
        "LevelsState(empty(model, tuple(weights), fast),",
        "LevelsState(tuple(weights),",
        "tests/test_sleep.py",
    ),
    Mutant(
        "sleep/reservoir.py", "torch.randint(0, seen, (1,)", "torch.randint(0, room, (1,)", "tests/test_sleep_parts.py"
    ),
    Mutant(
        "sleep/dreaming.py",
        "F.cosine_similarity(gradients, wanted[None]",
        "F.cosine_similarity(gradients, -wanted[None]",
        "tests/test_dreaming.py",
    ),
)


def survives(mutant: Mutant, folder: Path) -> bool:
    """Do its tests pass on a copy of the package with the mutant in it?"""
    copy = folder / "src"
    shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
    file = copy / "nestling" / mutant.file
    text = file.read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.file}: {mutant.old!r} stands there {text.count(mutant.old)} times, not once")
    file.write_text(text.replace(mutant.old, mutant.new))
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", mutant.tests]
    code = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True).returncode
    if code not in (0, 1):
        raise SystemExit(f"{mutant.tests}: pytest ended with {code}, not with tests that passed or failed")
    return code == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose file has this in its name")
    asked = parser.parse_args()
    survivors = []
    for mutant in (m for m in MUTANTS if asked.only in m.file):
        with tempfile.TemporaryDirectory() as folder:
            alive = survives(mutant, Path(folder))
        print(f"{'SURVIVES' if alive else 'killed'}  {mutant.file}: {mutant.old} -> {mutant.new}", flush=True)
        survivors += [mutant] * alive
    print(f"{len(survivors)} survived")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()

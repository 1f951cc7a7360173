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

from life_mutants import LEARNER

ROOT = Path(__file__).resolve().parents[1]


class Mutant(NamedTuple):
    """In `file` of the package, `old`, which stands there once, becomes `new`; seen by `tests`."""

    file: str
    old: str
    new: str
    tests: str


MUTANTS = (
    *(Mutant(f"learner/{file}", old, new, tests) for file, old, new, tests in LEARNER),
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
    Mutant(
        "tasks/recall.py",
        "torch.arange(1, writes + 1)[:, None]",
        "torch.arange(writes, 0, -1)[:, None]",
        "tests/test_recall.py",
    ),
    Mutant(
        "tasks/recall.py",
        "which.gather(1, _without_repetition(rows, some, some, generator))",
        "which",
        "tests/test_recall.py",
    ),
    Mutant(
        "tasks/recall.py",
        "torch.cat([which, torch.randint(of,",
        "torch.cat([which, 0 * torch.randint(of,",
        "tests/test_recall.py",
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
    Mutant("memory/rule.py", "return state.elapsed >= (", "return state.elapsed > (", "tests/test_rule.py"),
    Mutant("memory/rule.py", "norms.input.cumsum(-1)", "norms.input", "tests/test_sequence.py"),
    Mutant("memory/retention.py", "torch.lerp(start, weight,", "torch.lerp(weight, start,", "tests/test_sequence.py"),
    Mutant("memory/structure.py", "x, x, value=-1.0)", "x, x, value=1.0)", "tests/test_fused.py"),
    Mutant(
        "sequence/chunk.py", "later(after.start_kept, 1.0)", "later(after.start_kept, 0.0)", "tests/test_sequence.py"
    ),
    Mutant(
        "sequence/fused.py",
        "return _add(answer, _times(scores, written), writes, -1.0)",
        "return _add(answer, _times(scores, written), writes, 1.0)",
        "tests/test_fused.py",
    ),
    Mutant("sequence/fused.py", "torch.lerp(start, weight,", "torch.lerp(weight, start,", "tests/test_fused.py"),
    Mutant(
        "sequence/scan.py", "if graph_only and self.structure.ends_plainly", "if graph_only", "tests/test_recompute.py"
    ),
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
        "Writes(k, v, gates, present, True, carry)",
        "Writes(k, v, gates, present, False, carry)",
        "tests/test_self_modifying.py",
    ),
    Mutant(
        "sequence/self_modifying.py", "int(state.bounded.sum())", "len(state.bounded)", "tests/test_self_modifying.py"
    ),
    Mutant(
        "learner/fold.py",
        "bounded = bounded_steps(reading.now) - bounded_steps(state.reading.now)",
        "bounded = bounded_steps(reading.now)",
        "tests/test_guards.py",
    ),
    Mutant("sequence/gating.py", "else F.logsigmoid(retention),", "else -retention.sigmoid(),", "tests/test_gating.py"),
    Mutant(
        "memory/adaptive.py", "1.0 - self.share * count.clamp(max=1.0)", "1.0 - self.share", "tests/test_optim_torch.py"
    ),
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
    Mutant("levels/layouts.py", "rows=half, start=start", "rows=half, start=0", "tests/test_stacking.py"),
    Mutant("levels/layouts.py", "every = 2 if starts[1] == 1 else 1", "every = 1", "tests/test_stacking.py"),
    Mutant(
        "levels/stacking.py",
        "return fuse(maps, parts, -1) if len(maps) > 1 else None",
        "return None",
        "tests/test_stacking.py",
    ),
    Mutant("levels/local.py", "keys[..., 1:, :]", "keys[..., now, :]", "tests/test_local.py"),
    Mutant("levels/local.py", "(0, 0, 0, 1)", "(0, 0, 1, 0)", "tests/test_local.py"),
    Mutant(
        "levels/local.py", "if not any(weight.requires_grad for weight in weights):", "if True:", "tests/test_local.py"
    ),
    Mutant("levels/describe.py", "if told.own]", "]", "tests/test_describe.py"),
    Mutant("levels/judging.py", "self.accumulators = False", "self.accumulators = True", "tests/test_levels.py"),
    Mutant("levels/judging.py", "if id(weight) in self.held", "if False", "tests/test_levels.py"),
    Mutant("levels/judging.py", "moves(square):\n        made", "True:\n        made", "tests/test_levels.py"),
    Mutant("levels/judging.py", "moves(square):\n        return", "True:\n        return", "tests/test_wiring.py"),
    Mutant("levels/judging.py", "new._replace(of=old.of)", "new", "tests/test_wiring.py"),
    Mutant(
        "levels/in_context.py",
        "starts[i], weights[i] = start, start.weights",
        "starts[i] = start",
        "tests/test_cms_laws.py",
    ),
    Mutant("levels/transfer.py", "b.detach() + (a - a.detach())", "b", "tests/test_cms_laws.py"),
    Mutant("memory/rule.py", "state.gradient.zero_() if free", "state.gradient.zero_() if own", "tests/test_rule.py"),
    Mutant(
        "memory/rule.py",
        "if self.added is None or _lies_in(self.weight, self.of):",
        "if self.added is None:",
        "tests/test_levels.py",
    ),
    Mutant("levels/stacking.py", "return output + more", "return output + 2.0 * more", "tests/test_stacking.py"),
    Mutant("levels/losses.py", "known[label] = True", "known[:] = True", "tests/test_encoders.py"),
    Mutant(
        "levels/encoders.py",
        "shown = tokens.masked_fill(hidden, told.mask_token)",
        "shown = tokens",
        "tests/test_encoders.py",
    ),
    Mutant("train/outer.py", "clock.advance(self.tokens)", "clock.advance(1)", "tests/test_scripts.py"),
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
    Mutant(
        "memory/structure.py",
        "index < self.meets_keys and unit_keys:",
        "index < self.meets_keys:",
        "tests/test_structure.py",
    ),
    Mutant("memory/structure.py", "return self.of.residual", "return False", "tests/test_attentional_bias.py"),
    Mutant("memory/structure.py", "hidden * F.silu(gate), error", "hidden * gate, error", "tests/test_compound.py"),
    Mutant(
        "memory/attentional_bias.py",
        "near = residual.square().sum(-1, keepdim=True) <= bound**2",
        "near = residual.square().sum(-1, keepdim=True) <= bound",
        "tests/test_attentional_bias.py",
    ),
    Mutant(
        "memory/attentional_bias.py",
        "residual.abs().clamp(min=torch.finfo(residual.dtype).tiny)",
        "residual.abs()",
        "tests/test_attentional_bias.py",
    ),
    Mutant(
        "memory/attentional_bias.py",
        "far = bound if isinstance(bound, Tensor) or bound < math.inf else 0.0",
        "far = bound",
        "tests/test_attentional_bias.py",
    ),
    Mutant("memory/adaptive.py", "g, g, value=self.share)", "g, g)", "tests/test_nested_optimizers.py"),
    Mutant(
        "memory/adaptive.py",
        "root = torch.where(seen, torch.where(seen, square, 1.0).sqrt(), 0.0)",
        "root = square.sqrt()",
        "tests/test_optimizer_memories.py",
    ),
    Mutant(
        "memory/adaptive.py",
        "inputs = gradient.gram() if self.of.needs_inputs else None",
        "inputs = None",
        "tests/test_nested_optimizers.py",
    ),
    Mutant("memory/compound.py", "return self.of.meets_keys", "return 1", "tests/test_compound.py"),
    Mutant("memory/compound.py", "return self.of.residual", "return False", "tests/test_attentional_bias.py"),
    Mutant("memory/compound.py", "return self.of.bare", "return True", "tests/test_compound.py"),
    Mutant(
        "memory/nested.py",
        "if self.retention > 0 else -math.inf",
        "if self.retention > 0 else 0.0",
        "tests/test_nested_optimizers.py",
    ),
    Mutant("memory/nested.py", "self.rule.anchor(state.of)", "state.of", "tests/test_nested_optimizers.py"),
    Mutant(
        "memory/nested.py",
        "return AddState(self.of.anchor(state.of), self.other.anchor(state.other))",
        "return state",
        "tests/test_nested_optimizers.py",
    ),
    Mutant(
        "sequence/streams.py",
        "torch.logit(torch.full((dim,), part.floor))",
        "torch.full((dim,), part.floor)",
        "tests/test_zoo_parts.py",
    ),
    Mutant("sequence/streams.py", "math.log(math.expm1(1.0 - part.ridge))", "0.0", "tests/test_zoo_parts.py"),
    Mutant("sequence/steps.py", "x.movedim(0, 3)", "x.movedim(0, 2)", "tests/test_steps.py"),
    Mutant("sequence/steps.py", "torch.zeros_like(once).expand", "once.expand", "tests/test_steps.py"),
    Mutant("sequence/layer.py", "return self.chunk * self.steps", "return self.chunk", "tests/test_steps.py"),
    Mutant("sequence/chunk.py", "slice(0 if before else steps - 1,", "slice(steps - 1,", "tests/test_steps.py"),
    Mutant("sequence/scan.py", "(0 if before else n - 1) :: n", "n - 1 :: n", "tests/test_steps.py"),
    Mutant("sequence/scan.py", "range(t * n, t * n + n)", "range(t * n, t * n + 1)", "tests/test_steps.py"),
    Mutant(
        "sequence/scan.py",
        "self.valid.repeat_interleave(self.steps, 1)",
        "self.valid.repeat(1, self.steps)",
        "tests/test_steps.py",
    ),
    Mutant("sequence/scan.py", "pair, self.chunk_pairs)", "pair, self.chunk)", "tests/test_steps.py"),
    Mutant(
        "sequence/gating.py", "self.steps == 1 else step[0]", "self.steps == 1 else step[-1]", "tests/test_steps.py"
    ),
    Mutant(
        "sequence/preparation.py",
        "(1 + 2 * steps) * heads, (1 + steps) * heads)",
        "(1 + 2 * steps) * heads, 2 * heads)",
        "tests/test_steps.py",
    ),
    Mutant("models/data.py", "if field.metadata == LATER", "if False", "tests/test_steps.py"),
    Mutant(
        "sequence/linear_mixer.py",
        "enabled=False):\n            y, memory",
        "enabled=True):\n            y, memory",
        "tests/test_layout.py",
    ),
    *(
        Mutant("sequence/kernels.py", old, new, "tests/test_kernels.py")
        for old, new in (
            ("start.float().mT.contiguous()", "start.float()"),
            ("y.to(v.dtype), state.mT.contiguous()", "y.to(v.dtype), state"),
            ("x.float().clamp(min=LEAST)", "x.float()"),
            ('{"step_size": "beta", "log_retention": "g"}', '{"log_retention": "beta", "step_size": "g"}'),
            ("if torch.is_grad_enabled():", "if False:"),
            ("q.shape[-1] ** -0.5 if scale is None", "1.0 if scale is None"),
        )
    ),
    Mutant("sequence/by_channel.py", " and (first or gates is None)", "", "tests/test_kernels.py"),
    Mutant(
        "sequence/by_channel.py", "plan.write * slope + plan.erase", "plan.write + plan.erase", "tests/test_kernels.py"
    ),
    Mutant(
        "sequence/scan.py",
        "if pairs.gates.by_channel else counted)",
        "if pairs.gates.by_channel else 1.0)",
        "tests/test_kernels.py",
    ),
    Mutant("sequence/linear.py", "-p.to(q.dtype)", "p.to(q.dtype)", "tests/test_kernels.py"),
    Mutant("sequence/self_caching.py", "torch.where(exists, found, 0.0)", "found", "tests/test_layout.py"),
    *(
        Mutant(f"sequence/{file}.py", old, new, "tests/test_self_caching.py")
        for file, old, new in (
            ("self_caching", "g[:, :, 0] * weight + (g", "weight + (g"),
            ("srwm", "state.memory[..., : self.rows[0], :]", "state.memory[..., self.rows[0] : 2 * self.rows[0], :]"),
            ("self_modifying", "torch.cat([y, q], -1) if asked", "torch.cat([y, k], -1) if asked"),
        )
    ),
    Mutant("sequence/linear.py", "or not q.numel():", "or q.shape[1] == 0:", "tests/test_linear.py"),
    Mutant(
        "sequence/layout.py",
        "if not len(phase):",
        "if False:",
        "tests/test_zoo.py::test_no_rows_or_no_tokens_change_nothing",
    ),
    Mutant("sequence/linear_mixer.py", "if held is not None:", "if False:", "tests/test_layout.py"),
    Mutant(
        "sequence/caching.py",
        "torch.where(exists[:, None, :, None, None], read, 0.0).sum(2)",
        "read.sum(2)",
        "tests/test_layout.py",
    ),
    Mutant("sequence/segments.py", ".masked_fill(~open_to, -torch.inf).topk", ".topk", "tests/test_layout.py"),
    Mutant("sequence/segments.py", "segments.tokens > 0", "segments.tokens >= 0", "tests/test_caching.py"),
    Mutant("sequence/streams.py", "writing = (1, 3, 4)", "writing = (3, 4)", "tests/test_linear_caching.py"),
    Mutant("sequence/streams.py", "writing = (2,)", "writing = ()", "tests/test_linear_caching.py"),
    Mutant(
        "sequence/self_modifying.py",
        "_bare(expression.gate_structure or expression.structure)",
        "_bare(expression.structure)",
        "tests/test_self_modifying.py",
    ),
    Mutant("train/loop.py", "if config.compile:", "if False:", "tests/test_train.py"),
    Mutant("sequence/compiled.py", "x.view_as(x) if again else x", "x", "tests/test_compiled.py"),
    Mutant("sequence/compiled.py", "x.requires_grad != asked", "False", "tests/test_compiled.py"),
    Mutant(
        "sequence/compiled.py", "*map_tensors(Tensor.contiguous, tuple(others))", "*others", "tests/test_compiled.py"
    ),
    Mutant(
        "sequence/compiled.py",
        "if piece.stop - piece.start != chunk or not all",
        "if not all",
        "tests/test_compiled.py",
    ),
    Mutant(
        "sequence/compiled.py",
        "_walk(forward, given, more) if",
        "_walk(forward, given, more) if False and",
        "tests/test_compiled.py",
    ),
    Mutant(
        "sequence/fused.py",
        "_add(known, scores * written, fixed, -1.0)",
        "_add(known, scores * written, fixed)",
        "tests/test_fused.py",
    ),
    Mutant("checks/special.py", "far <= FAR, far", "True, far", "tests/test_special_case_law.py"),
    Mutant("checks/special.py", "[y.detach(), *gradients]", "[y.detach() * 0.0]", "tests/test_special_case_law.py"),
    Mutant("sequence/linear_caching.py", "y = own * y +", "y = y +", "tests/test_linear_caching.py"),
    Mutant("sequence/tnt.py", "gates, pairs.valid, steps", "gates, steps", "tests/test_layout.py"),
    Mutant(
        "sequence/tnt.py",
        "states = own if rows is True else select(rows, own, states)",
        "states = own",
        "tests/test_layout.py",
    ),
    Mutant("sequence/tnt.py", "chunk), self.shard, self.queries)", "chunk), self.shard)", "tests/test_tnt.py"),
    Mutant(
        "optim/named.py",
        "average(surprise(), beta) if beta else surprise()",
        "surprise()",
        "tests/test_optim_behaviour.py",
    ),
    Mutant(
        "optim/named.py",
        "(scale(full_matrix_adagrad(eps=eps))), weight_decay)",
        "(scale(full_matrix_adagrad(eps=eps))), 0.0)",
        "tests/test_optim_behaviour.py",
    ),
    Mutant(
        "optim/named.py",
        "every(period, retain(decay(), orthogonal(slow)))",
        "every(period, orthogonal(slow))",
        "tests/test_nested_optimizers.py",
    ),
    Mutant(
        "optim/options.py",
        "isinstance(rule, (retain, every))",
        "isinstance(rule, retain)",
        "tests/test_optim_states.py",
    ),
    Mutant(
        "optim/adapter.py",
        "return tensor.float() if tensor.dtype == torch.float16 else tensor",
        "return tensor",
        "tests/test_optim_states.py",
    ),
    Mutant("optim/adapter.py", "if found and found not in told:", "if not told:", "tests/test_optim_states.py"),
    Mutant(
        "optim/adapter.py",
        "if part.dim() > 2 and rule.elementwise:",
        "if not part.dim():",
        "tests/test_optim_states.py",
    ),
    Mutant(
        "optim/adapter.py",
        "            self.param_groups.pop()\n            raise",
        "            raise",
        "tests/test_optim_states.py",
    ),
    Mutant("memory/rule.py", "state.inputs, tokens=1)", "state.inputs, tokens=0)", "tests/test_optim_states.py"),
    Mutant("optim/adapter.py", "self._begin_states(own, members, group)", "pass", "tests/test_optim_states.py"),
    Mutant("optim/adapter.py", "parameter.dtype, pairs, cut,", "parameter.dtype, cut,", "tests/test_capture.py"),
    Mutant("optim/states.py", "for depth in (0, 1, -1, 2, -2):", "for depth in (0,):", "tests/test_optim_states.py"),
    Mutant(
        "optim/groups.py",
        'if finite(self.param_groups, said[0] if said else "raise"):',
        "if said or not said:",
        "tests/test_joined.py",
    ),
    Mutant("optim/groups.py", '{"params": flat, "flat": True}', '{"params": flat}', "tests/test_joined.py"),
    Mutant(
        "memory/feature.py",
        "torch.cat([keys, -keys], -1)",
        "torch.cat([keys, keys], -1)",
        "tests/test_gradient_memory.py",
    ),
    Mutant(
        "optim/options.py",
        "        self._take_torchs(param_group)\n        super()",
        "        super()",
        "tests/test_optim_behaviour.py",
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

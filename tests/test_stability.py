"""Stability as a law: a hundred chunks at the extremes of the gates, and what each cure of a divergence cures."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from nestling.memory import (
    Gates,
    clip,
    dampen,
    decay,
    decay_to_start,
    delta_gradient_descent,
    gradient_descent,
    matrix,
    momentum,
    retain,
)
from nestling.sequence import Memory, self_modifying, sequence_memory
from nestling.sequence.scan import Writes

DIM, HEADS, CHUNK, CHUNKS = 32, 2, 8, 100
SHUT, OFTEN, OPEN = -20.0, 3.0, 20.0  # raw gates: sigmoid at 0, 0.95 and 1 (an average of updates, nothing forgotten)
INPUTS = ("random", "aligned", "periodic")


def inputs(kind: str) -> torch.Tensor:
    generator, tokens = torch.Generator().manual_seed(1), CHUNK * CHUNKS
    if kind == "random":
        return torch.randn(1, tokens, DIM, generator=generator)
    period = 1 if kind == "aligned" else 4
    return torch.randn(1, period, DIM, generator=generator).repeat(1, tokens // period, 1)


def growth(mixer, kind: str, *, kept: float, retention: float, step: float = OPEN) -> float:
    """The largest norm of a memory's map after all chunks, over its norm at the start; inf where a read was not
    finite. The gates are the same for all tokens."""
    layer = mixer.build(DIM, HEADS, torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.gates.weight.zero_()
        if isinstance(mixer, self_modifying):
            layer.gates.bias.fill_(kept)
            layer.gate_bias.copy_(torch.tensor([step, retention]).expand(HEADS, 2))
        else:
            layer.gates.bias.copy_(torch.tensor([step, kept, retention]).repeat_interleave(HEADS))
        y, after = layer(inputs(kind))
        if not y.isfinite().all():
            return math.inf
    before = layer.init_state(1)
    memories = (
        zip(before.memories, after.memories, strict=True)
        if hasattr(after, "memories")
        else [(before.memory, after.memory)]
    )
    ratios = [
        (new.flatten(-2).norm(dim=-1) / old.flatten(-2).norm(dim=-1)).max().item()
        for start, end in memories
        for old, new in zip(start.running, end.running, strict=True)
    ]
    return max(ratios) if all(map(math.isfinite, ratios)) else math.inf


MIXERS = {
    "self_modifying": self_modifying(chunk=CHUNK, projection_chunk=CHUNK),
    "sequence_memory": sequence_memory(chunk=CHUNK),
}


@pytest.mark.parametrize(("kept", "retention"), [*itertools.product((SHUT, OFTEN, OPEN), (SHUT, 5.0, OPEN))])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", MIXERS)
def test_norms_stay_bounded_at_the_extremes(name, kind, kept, retention):
    assert growth(MIXERS[name], kind, kept=kept, retention=retention) < 12


def test_with_retention_toward_zero_they_stay_bounded_too():
    rule = retain(decay(), delta_gradient_descent(momentum(dampen(clip()))))
    mixer = self_modifying(rule=rule, chunk=CHUNK, projection_chunk=CHUNK)
    for kind, retention in itertools.product(INPUTS, (5.0, OPEN)):
        assert growth(mixer, kind, kept=OFTEN, retention=retention) < 12


def without(rule, **how):
    return self_modifying(rule=rule, chunk=CHUNK, projection_chunk=CHUNK, **how)


CURES = {
    "erases as large as writes": (
        "self_modifying",
        without(retain(decay_to_start(), momentum(dampen(clip())))),
        {"kept": SHUT, "retention": OPEN},
    ),
    "a momentum that averages": (
        "self_modifying",
        without(retain(decay_to_start(), delta_gradient_descent(momentum(clip())))),
        {"kept": OFTEN, "retention": 5.0},
    ),
    "a bound on the error": (
        "self_modifying",
        without(retain(decay_to_start(), delta_gradient_descent(momentum(dampen())))),
        {"kept": OFTEN, "retention": OPEN},
    ),
    "steps bounded by what hidden inputs add up to": (
        "sequence_memory",
        sequence_memory(rule=retain(decay_to_start(), momentum(dampen())), chunk=CHUNK),
        {"kept": SHUT, "retention": 5.0},
    ),
}


@pytest.mark.parametrize("cure", CURES)
def test_without_a_cure_aligned_inputs_diverge(cure):
    name, mixer, gates = CURES[cure]
    whole = growth(MIXERS[name], "aligned", **gates)
    assert growth(mixer, "aligned", **gates) > 8 * whole


def test_keys_and_values_have_their_norm_whatever_the_memories_say():
    mixer = MIXERS["self_modifying"]
    layer = mixer.build(DIM, HEADS, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for start in layer.starts.parameters():
            start.mul_(1e3)
        *generators, _ = zip(layer.memories, layer.init_state(1).memories, strict=True)
        states = [memory.open(state, True) for memory, state in generators]
        u = torch.nn.functional.normalize(torch.randn(1, HEADS, 5, DIM // HEADS), dim=-1)
        _, keys, values, _, _ = layer.project(
            states, u, [u], torch.zeros(1, 1, HEADS, 5), layer.value_scale[:, None, None], layer.gate_bias
        )
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(1, HEADS, 5))
    torch.testing.assert_close(values.norm(dim=-1), layer.value_scale.expand(1, 5, HEADS).mT.detach())


@pytest.mark.parametrize("direction", [clip(), gradient_descent()])
def test_a_bound_on_the_error_gives_a_flip_its_size(direction):
    """One key again and again, and a value against it: what is stored under the key changes sign with every write.
    Times 1 - eta' (2 - k.v), here -1.175, each time; with the error bounded, eta' / (2 - eta') in the end."""
    memory = Memory(
        matrix(), rule=retain(decay_to_start(), delta_gradient_descent(direction)), chunk=1, way="recurrent"
    )
    generator = torch.Generator().manual_seed(0)
    key = F.normalize(torch.randn(1, 1, 1, 8, generator=generator, dtype=torch.float64), dim=-1)
    gates = Gates(torch.full((1, 1, 1), 3.0, dtype=torch.float64), 0.0, torch.zeros(1, 1, 1, dtype=torch.float64))
    state = memory.begin((torch.randn(1, 1, 8, 8, generator=generator, dtype=torch.float64) / 8,))
    first = key @ state.running[0].mT
    reads = []
    for _ in range(60):
        y, state = memory.run(memory.open(state, True), Writes(key, -0.9 * key, gates, own_targets=True), key)
        reads.append(y)
    assert all((a * b).sum() < 0 for a, b in itertools.pairwise(reads)), "every write flips"
    bounded = isinstance(direction, clip)
    last = (0.75 / (2 - 0.75)) if bounded else 1.175**60 * first.norm().item()
    torch.testing.assert_close(reads[-1].norm().item(), last)
    torch.testing.assert_close(F.cosine_similarity(reads[-1], first, dim=-1).item(), 1.0)

"""The correctness kit: each check catches the faults that it is there for, planted in a sound decoder."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling import checks
from nestling.levels import level
from nestling.memory import matrix
from nestling.memory.rule import Gates
from nestling.memory.state import detach
from nestling.models import Decoder, ModelConfig
from nestling.sequence import sequence_memory

MIXER = sequence_memory(matrix(), chunk=8)


def config(mixer: sequence_memory = MIXER) -> ModelConfig:
    return ModelConfig(vocabulary=17, dim=16, heads=2, blocks=1, mixer=mixer, levels=(level(16), level(48)))


class SeesTheNext(Decoder):
    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        self.leak = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: Tensor, state: Any = None, **more: Any) -> Any:
        logits, state = super().forward(tokens, state, **more)
        following = torch.cat([tokens[:, 1:], tokens[:, -1:]], 1)
        return logits + self.leak * F.one_hot(following, 17), state


class SeesTheEnd(Decoder):
    def forward(self, tokens: Tensor, state: Any = None, **more: Any) -> Any:
        logits, state = super().forward(tokens, state, **more)
        return logits + 1e-9 * logits.mean(1, keepdim=True), state


class Deaf(Decoder):
    def forward(self, tokens: Tensor, state: Any = None, **more: Any) -> Any:
        heard = torch.where(torch.arange(tokens.shape[1]) == 8, 0, tokens)
        return super().forward(heard, state, **more)


class RemembersInSecret(Decoder):
    secret: Any = 0.0

    def forward(self, tokens: Tensor, state: Any = None, **more: Any) -> Any:
        logits, state = super().forward(tokens, state, **more)
        logits = logits + self.secret
        self.secret = 1e-3 * logits.detach().mean()
        return logits, state


class SpoilsItsState(Decoder):
    def forward(self, tokens: Tensor, state: Any = None, **more: Any) -> Any:
        out = super().forward(tokens, state, **more)
        if state is not None:
            state.blocks[0].tail.mul_(0.5)
        return out


class Counting(Decoder):
    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, tokens: Tensor, state: Any = None, **more: Any) -> Any:
        self.calls += 1
        return super().forward(tokens, state, **more)


class WritesItself(Decoder):
    def forward(self, tokens: Tensor, state: Any = None, **more: Any) -> Any:
        out = super().forward(tokens, state, **more)
        self.norm.data.mul_(1.001)
        return out


class Forgetful(Decoder):
    def forward(self, tokens: Tensor, state: Any = None, **more: Any) -> Any:
        return super().forward(F.dropout(tokens.double(), 0.5, self.training).long() % 17, state, **more)


class SkipsUnderGradients(Decoder):
    def forward(self, tokens: Tensor, state: Any = None, **more: Any) -> Any:
        return super().forward(tokens * 0 if torch.is_grad_enabled() else tokens, state, **more)


class AveragesRows(Decoder):
    def forward(self, tokens: Tensor, state: Any = None, **more: Any) -> Any:
        logits, state = super().forward(tokens, state, **more)
        return logits + 1e-9 * logits.mean(0), state


class ResetsAllRows(Decoder):
    def forward(self, tokens: Tensor, state: Any = None, *, reset: Tensor | None = None, **more: Any) -> Any:
        reset = None if reset is None else reset.any(0).expand_as(reset)
        return super().forward(tokens, state, reset=reset, **more)


class IgnoresResets(Decoder):
    def forward(self, tokens: Tensor, state: Any = None, *, reset: Tensor | None = None, **more: Any) -> Any:
        return super().forward(tokens, state, **more)


class StartsOver(Decoder):
    def forward(self, tokens: Tensor, state: Any = None, **more: Any) -> Any:
        return super().forward(tokens, None, **more)


class ChunksByTheCall(Decoder):
    def forward(self, tokens: Tensor, state: Any = None, **more: Any) -> Any:
        if state is not None:
            state = state._replace(blocks=tuple(s._replace(phase=s.phase * 0) for s in state.blocks))
        return super().forward(tokens, state, **more)


class StaleState(Decoder):
    """Right logits, but the state that it returns misses the last token."""

    def forward(self, tokens: Tensor, state: Any = None, **more: Any) -> Any:
        logits, after = super().forward(tokens, state, **more)
        return logits, after._replace(blocks=tuple(s._replace(tail=s.tail.roll(1, 1)) for s in after.blocks))


class DetachedStart(Decoder):
    def init_state(self, batch: int) -> Any:
        return detach(super().init_state(batch))


class Unused(Decoder):
    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        self.spare = nn.Parameter(torch.ones(3))


class NotFinite(SeesTheNext):
    def forward(self, tokens: Tensor, state: Any = None, **more: Any) -> Any:
        logits, state = super(SeesTheNext, self).forward(tokens, state, **more)
        return logits + (self.leak * 0).abs().sqrt(), state


class Truncated(Decoder):
    """The same logits, but no gradient from one half to the other."""

    def forward(self, tokens: Tensor, state: Any = None, **more: Any) -> Any:
        first, state = super().forward(tokens[:, :16], state, **more)
        if tokens.shape[1] <= 16:
            return first, state
        second, state = super().forward(tokens[:, 16:], detach(state), **more)
        return torch.cat([first, second], 1), state


class Loud(Decoder):
    def forward(self, tokens: Tensor, state: Any = None, **more: Any) -> Any:
        logits, state = super().forward(tokens, state, **more)
        return 20.0 * logits, state


FAULTS = [
    (SeesTheNext, "causality", "is felt before it"),
    (SeesTheNext, "entropy_floor", "nats after"),
    (SeesTheEnd, "causality", "is felt before it"),
    (Deaf, "causality", "nothing at or after token 8 depends on it"),
    (RemembersInSecret, "purity", "the same input gave another output"),
    (SpoilsItsState, "purity", "changed the state it was given"),
    (Counting, "purity", "a call changed the model"),
    (WritesItself, "purity", "a call changed the model"),
    (Forgetful, "purity", "train() changes the output"),
    (SkipsUnderGradients, "purity", "gradient mode changes the output"),
    (AveragesRows, "rows_independent", "others changed: "),
    (ResetsAllRows, "rows_independent", "others changed, with resets"),
    (IgnoresResets, "split_invariance", "each document alone"),
    (StartsOver, "split_invariance", "in two: "),
    (ChunksByTheCall, "split_invariance", "in odd pieces: "),
    (StaleState, "split_invariance", "in two: "),
    (DetachedStart, "gradient_coverage", "blocks.0.mixer.start.0"),
    (Unused, "gradient_coverage", "without: spare"),
    (NotFinite, "gradient_coverage", "without: leak"),
    (Truncated, "gradient_exactness", "blocks.0.mixer.start.0"),
    (DetachedStart, "gradient_exactness", "wrong: blocks.0.mixer.start.0"),
    (Loud, "initial_loss", "ln V is"),
]


@pytest.mark.parametrize("name", sorted({name for _, name, _ in FAULTS}))
def test_without_a_fault_the_same_model_passes(name: str) -> None:
    report = checks.check(Decoder(config()), only=[name], steps=60)
    assert report.passed, str(report)


@pytest.mark.parametrize(("kind", "name", "words"), FAULTS, ids=[f"{kind.__name__}-{name}" for kind, name, _ in FAULTS])
def test_a_faulty_model_is_caught(kind: type[Decoder], name: str, words: str) -> None:
    report = checks.check(kind(config()), only=[name], steps=60)
    assert report[name].passed is False, report[name]
    assert words in report[name].detail
    assert not report.passed


def test_a_truncated_gradient_covers_all_parameters() -> None:
    assert checks.gradient_coverage(Truncated(config())).passed, "which is why gradient_exactness is there"


class outside_of_the_graph(sequence_memory, abstract=True):
    """Writes of which the outer loss sees nothing: the commonest fault of this field."""

    def run(self, state: Any, pairs: Any, queries: Any = None, **how: Any) -> Any:
        gates = Gates(*(gate.detach() for gate in pairs.gates))
        pairs = pairs._replace(keys=pairs.keys.detach(), values=pairs.values.detach(), gates=gates)
        return super().run(state, pairs, queries, **how)


def test_keys_and_values_without_a_gradient_are_told_from_queries_with_one() -> None:
    model = Decoder(config(outside_of_the_graph(matrix(), chunk=8)))
    finding = checks.gradient_coverage(model)
    assert not finding.passed
    assert "mixer.qkv.weight (32 of 48 rows)" in finding.detail
    assert "mixer.gates.weight" in finding.detail

"""The correctness kit: sound models pass every check; readers, memories and options with a planted fault do not.
Models with a planted fault: test_checks_faults.py."""

import dataclasses
import io
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from nestling import checks
from nestling.checks import options
from nestling.levels import LevelsState, Reader, level
from nestling.levels.judging import Own
from nestling.memory import clip, decay, decay_to_start, gradient_descent, l2, matrix, mlp, momentum, normalize, retain
from nestling.memory.rule import dampen
from nestling.models import Decoder, ModelConfig
from nestling.sequence import Memory, attention, caching, mac, mag, mal, self_modifying, sequence_memory, tnt

LEVELS = (level(16), level(48))
LINEAR = retain(decay_to_start(), momentum(dampen(normalize())))  # without clip, which has no exact chunked form
MIXERS = {
    "mlp": sequence_memory(mlp(), chunk=8),
    "matrix": sequence_memory(matrix(), chunk=8),
    "matrix at token": sequence_memory(matrix(), rule=LINEAR, chunk=8, gradient_at="token"),
    "mlp at token": sequence_memory(mlp(), chunk=8, gradient_at="token", way="recurrent"),
    "mlp, a window": sequence_memory(mlp(), rule=retain(decay(), momentum()), chunk=8, window=3),
    "mlp, one step a chunk": sequence_memory(mlp(), chunk=8, read="boundary", way="stepped"),
    "self-modifying": self_modifying(chunk=8, projection_chunk=8),
    "attention": attention(window=8),
    "memory as context": mac(sequence_memory(matrix(), chunk=8), segment=8, persistent=2),
    "caching": caching(sequence_memory(chunk=8), segment=8, slots=2),
}
BLOCKS = {
    "memory as gate": mag(sequence_memory(matrix(), chunk=8), window=8, persistent=2),
    "memory as layer": mal(sequence_memory(matrix(), chunk=8), window=8, persistent=2),
    "sparse caching": caching(sequence_memory(chunk=8), segment=8, read="sparse", slots=3, top=2),
    "tnt": tnt(matrix(), rule=LINEAR, chunk=8, local=(4,), shard=8),
}
QUICK = [name for name in checks.CHECKS if name not in ("entropy_floor", "options_live", "named_model")]


def config(mixer: Any = MIXERS["matrix"], **changes: Any) -> ModelConfig:
    return ModelConfig(
        **{"vocabulary": 17, "dim": 16, "heads": 2, "blocks": 1, "mixer": mixer, "levels": LEVELS} | changes
    )


# sound models


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_sound_decoder_passes(mixer: str) -> None:
    report = checks.check(Decoder(config(MIXERS[mixer])), only=QUICK)
    assert report.passed, str(report)
    alone = isinstance(MIXERS[mixer], Memory)
    assert [f.name for f in report if f.skipped] == ([] if alone else ["surprise_falls"]), str(report)


def test_two_chunk_sizes_in_one_mixer_pass() -> None:
    names = ["causality", "rows_independent", "split_invariance", "gradient_coverage", "gradient_exactness"]
    report = checks.check(Decoder(config(self_modifying(chunk=4, projection_chunk=8))), only=names)
    assert report.passed, str(report)


@pytest.mark.parametrize("mixer", BLOCKS)
def test_sound_blocks_pass_all_but_the_reading(mixer: str) -> None:
    names = [name for name in QUICK if not name.startswith(("reading", "surprise"))]
    report = checks.check(Decoder(config(BLOCKS[mixer])), only=names)
    assert report.passed, str(report)


def test_averaged_memories_pass() -> None:
    names = ["causality", "rows_independent", "split_invariance", "gradient_coverage", "gradient_exactness"]
    mixer = caching(sequence_memory(chunk=4), segment=4, read="soup", slots=2)
    report = checks.check(Decoder(config(mixer)), only=names)
    assert report.passed, str(report)


def test_two_blocks_and_levels_with_other_rules_pass() -> None:
    levels = (
        level(8, matrix(), retain(decay(), momentum(normalize())), retention=0.99),
        level(24, rule=clip()),
        level(math.inf),
    )
    report = checks.check(Decoder(config(blocks=2, levels=levels)), only=QUICK)
    assert report.passed, str(report)


@pytest.mark.parametrize("mixer", ["mlp", "matrix", "matrix at token", "self-modifying", "attention"])
def test_a_sound_decoder_keeps_to_the_entropy_floor(mixer: str) -> None:
    finding = checks.entropy_floor(Decoder(config(MIXERS[mixer])), steps=30)
    assert finding.passed, finding


@pytest.mark.parametrize("mixer", [*MIXERS, *BLOCKS])
def test_every_option_of_a_mixer_is_live(mixer: str) -> None:
    finding = checks.options_live((MIXERS | BLOCKS)[mixer])
    assert finding.passed, finding


def test_every_option_of_a_model_is_live() -> None:
    levels = (level(16, rule=gradient_descent()), level(48, rule=gradient_descent()))
    finding = checks.options_live(config(attention(window=8), levels=levels))
    assert finding.passed, finding
    assert finding.detail == "not judged: levels[0].momentum, levels[0].retention", "plain descent uses neither"


def test_the_wiring_of_the_default_model_is_live(monkeypatch) -> None:
    """Reptile too, beside a slower level whose step is one."""
    every = options.variants
    wiring = lambda part, path="": (found for found in every(part, path) if found.path.endswith("transfer"))  # noqa: E731
    monkeypatch.setattr(options, "variants", wiring)
    finding = checks.options_live(Decoder(ModelConfig(dim=16, heads=2, blocks=1, vocabulary=17)))
    assert finding.passed, finding.detail


def test_options_of_levels_are_judged_where_they_mean_something() -> None:
    levels = (level(16, matrix(), retain(decay(), momentum(normalize()))), level(math.inf))
    finding = checks.options_live(config(attention(), levels=levels))
    assert finding.passed, finding
    assert finding.detail.startswith("not judged: levels[0].transfer, levels[1]"), "nothing slower learns a start"
    assert "levels[1].step_size" in finding.detail, "a frozen level has no step to size"


def test_the_model_and_the_random_state_are_untouched() -> None:
    model = Decoder(config(attention(window=8)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    checks.check(model, steps=4)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(tensor.dtype == torch.float32 and tensor.grad is None for tensor in model.parameters())
    assert model.training


# models of other people


class Recurrent(nn.Module):
    """A GRU: no levels, no reset, no configuration."""

    def __init__(self, both_ways: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 12)
        self.gru = nn.GRU(12, 12, batch_first=True, bidirectional=both_ways)
        self.head = nn.Linear(24 if both_ways else 12, 17)

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        y, state = self.gru(self.embed(tokens), None if state is None else state["h"])
        return self.head(y), {"h": state}


class Counts:
    """Not even a module: logits from how often each token was seen."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.ones(1))

    def parameters(self) -> list[nn.Parameter]:
        return [self.weight]

    def __call__(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        seen = F.one_hot(tokens, 17).to(self.weight.dtype).cumsum(1) + (0.0 if state is None else state[:, None])
        return self.weight * (1.0 + seen).log(), seen[:, -1]


NOT_APPLICABLE = {"initial_loss", "reading_invariance", "surprise_falls", "reading_surprise_falls"}
NOT_APPLICABLE |= {"named_model", "options_live"}


@pytest.mark.parametrize("model", [Recurrent(), Counts()], ids=["module", "callable"])
def test_other_models_pass_what_applies(model: Any) -> None:
    report = checks.check(model, steps=30)
    assert report.passed, str(report)
    assert {finding.name for finding in report if finding.skipped} == NOT_APPLICABLE
    assert all(finding.detail and finding.passed is None for finding in report if finding.skipped)
    assert not checks.check(model, only=NOT_APPLICABLE).passed, "what is skipped has not passed"


class Plain(nn.Module):
    """Logits alone, or in an object, from a causal mean of embeddings; or from a mean of all of them."""

    def __init__(self, wrapped: bool = False, causal: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(17, 8), nn.Linear(8, 17)
        self.wrapped, self.causal = wrapped, causal

    def forward(self, tokens: Tensor) -> Any:
        x = self.embed(tokens)
        count = torch.arange(1, tokens.shape[1] + 1)[:, None]
        x = x.cumsum(1) / count if self.causal else x.mean(1, keepdim=True).expand_as(x)
        logits = self.head(torch.tanh(x))
        return SimpleNamespace(logits=logits) if self.wrapped else logits


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_of_logits_alone_is_held_against_what_applies(wrapped: bool) -> None:
    report = checks.check(Plain(wrapped), steps=30)
    assert report.passed, str(report)
    assert {finding.name for finding in report if finding.skipped} == NOT_APPLICABLE | {"split_invariance"}
    assert report["split_invariance"].detail == "the model returns no state"
    leaky = checks.check(Plain(wrapped, causal=False), only=["causality"])
    assert leaky["causality"].passed is False


def test_what_answers_with_anything_else_is_said() -> None:
    with pytest.raises(ValueError, match=r"answers tokens \[1, 2\] with \[1, 2\]; needed are logits \[1, 2, V\]"):
        checks.check(nn.Sequential(nn.Embedding(17, 1), nn.Flatten(1)))


def test_initial_loss_of_another_model() -> None:
    torch.manual_seed(0)
    assert checks.initial_loss(Recurrent(), build=Recurrent).passed

    def loud() -> Recurrent:
        model = Recurrent()
        with torch.no_grad():
            model.head.bias.mul_(20.0)
        return model

    assert checks.initial_loss(Recurrent(), build=loud).passed is False


# readers


class LearnsAtCalls(Reader):
    """Learns from an open segment because a call ends there."""

    def read(self, state: Any, tokens: Tensor) -> Any:
        state, out = super().read(state, tokens)
        if state.segment.numel() > 1:
            state = state._replace(levels=self._learn(state, state.segment, None, Own(state.levels))[1])
        return state, out


class ForgetsWhatCameInPieces(Reader):
    def _close(self, state: Any, following: Any, own: Own) -> Any:
        return super()._close(state._replace(segment=state.segment[-1:]), following, own)


class NeverLearns(Reader):
    def _learn(self, state: Any, tokens: Tensor, following: Tensor | None, own: Own) -> Any:
        logits, _, now, squares = super()._learn(state, tokens, following, Own(state.levels))
        return logits, state.levels, now, [0.0] * len(squares)


class ChangesTheModel(Reader):
    def read(self, state: Any, tokens: Tensor) -> Any:
        self.model.norm.data.add_(1e-15)
        return super().read(state, tokens)


class Ascends(Reader):
    def _learn(self, state: Any, tokens: Tensor, following: Tensor | None, own: Own) -> Any:
        logits, levels, now, squares = super()._learn(state, tokens, following, Own(state.levels))
        both = zip(state.levels.weights, levels.weights, strict=True)
        turned = tuple(tuple(2 * a - b for a, b in zip(old, new, strict=True)) for old, new in both)
        return logits, LevelsState(turned, levels.rules), now, squares


@pytest.mark.parametrize(
    ("reader", "words"),
    [
        (LearnsAtCalls, "token by token: "),
        (ForgetsWhatCameInPieces, "in odd pieces: "),
        (NeverLearns, "no level ever moved"),
        (ChangesTheModel, "reading changed the model"),
    ],
)
def test_a_faulty_reader_is_caught(reader: type[Reader], words: str) -> None:
    finding = checks.reading_invariance(Decoder(config(attention(window=8))), reader=reader)
    assert finding.passed is False
    assert words in finding.detail


@pytest.mark.parametrize("reader", [NeverLearns, Ascends])
def test_a_reader_that_does_not_learn_is_not_less_surprised(reader: type[Reader]) -> None:
    assert checks.reading_surprise_falls(Decoder(config(attention(window=8))), reader=reader).passed is False


def test_frozen_levels_are_skipped_not_passed() -> None:
    report = checks.check(
        Decoder(config(levels=(level(math.inf),))), only=["reading_invariance", "reading_surprise_falls"]
    )
    assert all(finding.skipped and "no level learns" in finding.detail for finding in report)
    assert not report.passed


# memories


class Stale(Memory):
    """Takes every surprise at the document's first weights."""

    def open(self, state: Any, rows: Any) -> Any:
        return state


class WritesNothing(Memory):
    def run(self, state: Any, pairs: Any, queries: Any = None) -> Any:
        return super().run(state, pairs, queries)[0], state


@dataclass(frozen=True, repr=False)
class uphill(l2, abstract=True):
    def error(self, read: Tensor, value: Tensor) -> Tensor:
        return value - read


@pytest.mark.parametrize("memory", [Stale(mlp()), WritesNothing(matrix()), Memory(mlp(), uphill())])
def test_a_memory_that_does_not_learn_is_caught(memory: Memory) -> None:
    assert checks.surprise_falls(replace(memory, chunk=8)).passed is False


# options


class dead_retention(sequence_memory, abstract=True):
    """Says which retention it has, and always has the same."""

    def build(self, dim: int, heads: int, generator: torch.Generator | None = None) -> Any:
        rule = replace(self.rule, retention=decay()) if isinstance(self.rule, retain) else self.rule
        return sequence_memory(
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"rule": rule}
        ).build(dim, heads, generator)


class crooked_way(sequence_memory, abstract=True):
    def build(self, dim: int, heads: int, generator: torch.Generator | None = None) -> Any:
        chosen = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.way == "recurrent":
            chosen["read"] = "before"
        return sequence_memory(**chosen).build(dim, heads, generator)


@dataclass(frozen=True, repr=False)
class unread_number(attention, abstract=True):
    temperature: float = 1.0


@pytest.mark.parametrize(
    ("mixer", "words"),
    [
        (dead_retention(matrix(), rule=LINEAR), "rule.retention=decay() changes nothing"),
        (crooked_way(matrix()), "way='recurrent' must change nothing"),
        (unread_number(), "temperature changes nothing"),
    ],
)
def test_a_dead_option_is_caught(mixer: Any, words: str) -> None:
    finding = checks.options_live(mixer)
    assert finding.passed is False
    assert finding.measured >= 1
    assert words in finding.detail


def test_what_is_declared_neutral_must_be() -> None:
    assert checks.options_live(unread_number(), neutral=["temperature"]).passed
    assert "window=8 must change nothing" in checks.options_live(attention(), neutral=["window"]).detail


# reports


class Backwards(Decoder):
    def forward(self, tokens: Tensor, state: Any = None, **more: Any) -> Any:
        logits, state = super().forward(tokens, state, **more)
        return logits.flip(1), state


def test_a_report_reads_as_text_and_as_a_table() -> None:
    model = Backwards(config(attention(window=8)))
    report = checks.check(model, only=["rows_independent", "causality", "surprise_falls"])
    assert [finding.verdict for finding in report] == ["passed", "FAILED", "skipped"]
    assert len(report) == 3
    lines = str(report).splitlines()
    assert lines[0].split() == ["rows_independent", "passed", "0", "<=", "1e-12"]
    assert "is felt before it" in lines[1]
    assert lines[2].endswith("there is no nestling memory in the model")
    assert lines[3] == "1 passed, 1 failed, 1 skipped"
    console = Console(width=120, file=io.StringIO())
    console.print(report)
    assert "rows_independent" in console.file.getvalue()
    with pytest.raises(KeyError):
        report["purity"]


def test_an_unknown_check_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'causality'"):
        checks.check(Decoder(config()), only=["casuality"])

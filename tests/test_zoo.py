"""Every named model is its oracle, is causal and goes on where it stopped, learns, and is told of truly."""

import dataclasses
from typing import Any

import pytest
import torch

from nestling import Decoder, ModelConfig, checks, zoo
from nestling.cli import main
from nestling.memory import Part, Rule, decay, every, gradient_descent, l2, matrix, mlp, parse, retain, surprise
from nestling.memory.state import difference
from nestling.sequence import Memory, Mixer, sequence_memory, window_gates
from nestling.sequence.gating import gates_of
from nestling.sequence.named import FAR, Model, Size, error, size

ORACLES = [
    (name, way, length)
    for name, model in zoo.items()
    for way in model.ways
    for length in ((1, 7, 20) if name == "self_modifying_titans" else (1, 7, 63, 100))  # whose oracle takes seconds
]
SHORT = {"chunk": 8, "projection_chunk": 8, "segment": 8, "window": 8, "shard": 16, "local": (4, 8), "persistent": 2}


def short(part: Part, sizes: dict[str, Any] = SHORT) -> Any:
    """The same model with chunks that a test can cross."""
    fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    changes = {name: value for name, value in sizes.items() if name in fields and fields[name] not in (1, None)}
    if isinstance(part, Memory | window_gates):  # as many pairs as before
        changes.pop("window", None)
    changes |= {name: short(value, sizes) for name, value in fields.items() if isinstance(value, Part)}
    return dataclasses.replace(part, **changes)


@pytest.mark.parametrize(("name", "way", "length"), ORACLES)
def test_is_its_oracle(name, way, length):
    assert error(zoo[name], way, length, width=4) <= FAR


def test_every_row_has_an_oracle():
    assert all(model.oracle is not None for model in zoo.values())
    assert zoo["oja"].ways == ("recurrent",), "a way that raises at its first chunk is none"
    with pytest.raises(ValueError, match=r"sequence_memory\(\) has no oracle here"):
        error(Model(sequence_memory(), "", ""), "chunked")


def test_what_attention_remembers_is_compared():
    found = zoo["sliding_window_attention"]
    run = found.oracle

    def other(*given):
        y, kept = run(*given)
        return y, kept | {"values": kept["keys"]}

    assert error(dataclasses.replace(found, oracle=other), "its own", 7, width=4) > 1e-2


def test_a_fault_is_seen():
    """A model with another rule than its oracle's is far from it."""
    found = zoo["deltanet"]
    wrong = dataclasses.replace(found, mixer=dataclasses.replace(found.mixer, rule=retain(decay(), gradient_descent())))
    assert error(wrong, "chunked") > 1e-2


@pytest.mark.parametrize("name", zoo)
def test_keeps_the_laws_of_sequence_models(name):
    config = ModelConfig(dim=8, heads=2, blocks=1, vocabulary=7, mixer=short(zoo[name].mixer))
    names = ["causality", "rows_independent", "purity", "split_invariance", "gradient_coverage"]
    report = checks.check(Decoder(config), only=names)
    assert report.passed, str(report)


@pytest.mark.parametrize("name", zoo)
def test_prints_as_the_line_that_builds_it(name):
    assert parse(str(zoo[name].mixer), Mixer) == zoo[name].mixer


@pytest.mark.parametrize("name", zoo)
def test_no_rows_or_no_tokens_change_nothing(name):
    mixer = zoo[name].mixer.build(8, 2, torch.Generator().manual_seed(0))
    for rows, length in ((0, 5), (2, 0), (0, 0)):
        x, before = torch.randn(rows, length, 8), mixer.init_state(rows)
        for state in (before, None):
            y, after = mixer(x, state)
            assert y.shape == x.shape
            assert not any(difference(before, after).values())
    one = torch.ones(0, 5, dtype=torch.bool)
    y, _ = mixer(torch.randn(0, 5, 8), reset=one, valid=one)
    assert y.shape == (0, 5, 8)


def test_deep_memories_depend_on_their_chunk_and_exact_ones_do_not():
    x = torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(0))

    def apart(name: str) -> float:
        mixers = [dataclasses.replace(zoo[name].mixer, chunk=chunk) for chunk in (4, 12)]
        layers = [mixer.build(16, 2, torch.Generator().manual_seed(0)) for mixer in mixers]
        layers[1].step_bound = layers[0].step_bound  # the same steps
        return float((layers[0](x)[0] - layers[1](x)[0]).abs().max().detach())

    assert max(map(apart, ("linear_attention", "deltanet", "gated_deltanet"))) < 1e-5
    assert min(map(apart, ("titans", "yaad", "dla"))) > 1e-4


def test_a_layer_learns_only_the_gates_that_its_rule_looks_at():
    rules = {"linear_attention": 1, "titans": 3, "dla": 2}
    for name, gates in rules.items():
        assert zoo[name].mixer.build(16, 2).gates.weight.shape == (2 * gates, 16)
    assert gates_of(every(4, retain(decay(), gradient_descent()))) == ("step_size", "log_retention")
    assert gates_of(surprise()) == ()
    layer = sequence_memory(matrix(), rule=surprise(), gradient_at="token").build(16, 2)
    y, _ = layer(torch.randn(1, 5, 16))
    assert y.shape == (1, 5, 16)


def test_four_choices_and_what_they_cost():
    model = zoo["titans"]
    assert model.choices == ("mlp()", "l2()", "decay()", "momentum()")
    assert model.ways == ("chunked", "recurrent")
    assert size(model.mixer).state == 4 * 64 * 64, "two maps, each with a momentum"
    assert size(zoo["deltanet"].mixer).state == 64 * 64
    longer = [size(zoo["deltanet"].mixer, length=length).flops for length in (256, 512)]
    assert longer[0] == longer[1], "linear in length"
    assert zoo["atlas"].ways == ("stepped",)


def test_the_command_line_lists_tells_and_checks(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["zoo"]) == 0
    told = capfd.readouterr().out
    assert all(name in told for name in zoo)
    assert main(["zoo", "moneta"]) == 0
    told = capfd.readouterr().out
    assert "equations 24, 25" in told
    assert "lp(" in told
    assert main(["zoo", "deltanet", "--check"]) == 0
    assert "recurrent" in capfd.readouterr().out
    assert main(["zoo", "monetta"]) == 2
    assert "did you mean 'moneta'?" in capfd.readouterr().err


def test_names_stand_whole_on_a_terminal_of_80_columns(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("nestling.cli.zoo.size", lambda mixer: Size(1_048_576, 123_456))
    assert main(["zoo"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\u2026" not in "".join(lines)
    assert {line.split()[1] for line in lines if len(line.split()) > 1} >= set(zoo)


@pytest.mark.parametrize("name", zoo)
def test_all_four_choices_are_told_and_an_equation(name):
    assert all(zoo[name].choices)
    assert any(sign in zoo[name].equation for sign in ("=", "<-")) or name in (
        "transformer",
        "self_modifying_titans",
        "ttt_mlp",
        "unnamed",
    )


def test_a_model_far_from_its_oracle_fails_the_check(capfd, monkeypatch):
    wrong = Model(
        sequence_memory(matrix(), l2(), retain(decay(), gradient_descent()), gradient_at="token"),
        *(zoo["deltanet"].equation, zoo["deltanet"].source, zoo["deltanet"].oracle),
    )
    monkeypatch.setitem(zoo, "deltanet", wrong)
    assert main(["zoo", "deltanet", "--check"]) == 2
    assert "not as their oracles: deltanet chunked" in capfd.readouterr().err


def test_rules_are_parts_and_structures_too():
    for model in zoo.values():
        if isinstance(model.mixer, Memory):
            assert isinstance(model.mixer.rule, Rule)
    assert mlp() == zoo["titans"].mixer.structure

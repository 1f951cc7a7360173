"""Parts print as the line that builds them, and are parsed back from it and from nothing else."""

import dataclasses
import importlib
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nestling.sequence  # noqa: F401  (its expressions are parts too)
from nestling.memory import adam, add, newton_schulz, remember
from nestling.memory.attentional_bias import (
    dot,
    huber_coordinates,
    huber_norm,
    huber_switch,
    l2,
    lp,
    residual_l2,
    value_shift,
)
from nestling.memory.compound import biased, features, normed
from nestling.memory.feature import elu_plus_one, exponential, identity, polynomial
from nestling.memory.part import Part, all_variants, known, parse
from nestling.memory.retention import (
    decay,
    decay_to_start,
    elastic_net,
    elastic_net_ftrl,
    kl,
    lq,
    row_norm,
    sigmoid,
)
from nestling.memory.rule import (
    Rule,
    clip,
    dampen,
    delta_gradient_descent,
    every,
    gradient_descent,
    momentum,
    normalize,
    retain,
    retain_first,
    scale,
    surprise,
)
from nestling.memory.structure import Structure, gated_mlp, matrix, mlp, together
from nestling.sequence import attention, mac, mag, mal, memora, moneta, self_modifying, sequence_memory, yaad

FAMILIES = (
    "AttentionalBias",
    "FeatureMap",
    "Gating",
    "Mixer",
    "Preparation",
    "Retention",
    "Rule",
    "Streams",
    "Structure",
)
TOLD = {
    name: part
    for family in Part.__subclasses__()
    if family.__name__ in FAMILIES
    for name, part in family.variants.items()
    if part.__module__.startswith("nestling.")
}
SOURCES = (
    r"Sources?: |\d{4}\.\d{5}|[Ee]quations? \d|Miras|Titans|ATLAS|LaCT|TTT|Nested Learning|torch|et al\.| \d{4}[.)]"
)


@pytest.mark.parametrize("name", sorted(TOLD))
def test_a_part_tells_its_source_and_its_oracle(name):
    """And the oracle that it names is there."""
    told = TOLD[name].__doc__
    text, found, oracle = re.split(r"(\bOracles?:\s)", told, maxsplit=1) if "Oracle" in told else (told, "", "")
    assert found, "no oracle"
    assert re.search(SOURCES, text), "no source"
    for file in re.findall(r"tests/(\w+\.py)", oracle):
        assert (Path(__file__).parent / file).exists(), file
    for named in re.findall(r"`((?:memory\.|sequence\.)?(?:naive|oracles|zoo)\w*[\w.]*)`", oracle):
        room = "nestling." if named.startswith(("memory.", "sequence.")) else "nestling.sequence."
        *module, last = f"{room}{named}".split(".")
        try:
            importlib.import_module(".".join([*module, last]))
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(".".join(module)), last), named


def test_no_family_of_parts_is_left_out():
    assert set(FAMILIES) <= {family.__name__ for family in Part.__subclasses__()}
    assert len(TOLD) > 70


@pytest.mark.parametrize(
    ("text", "field", "stands"),
    [
        ("linear_mixer(gradient_descent())", "streams must be one of Streams", "gradient_descent"),
        ("linear_mixer(kda_gates())", "streams must be one of Streams", "kda_gates"),
        ("hgrn2_streams(kda_gates())", "floor must be a plain value", "kda_gates"),
        ("rwkv7_streams(kda_gates())", "rank must be a plain value", "kda_gates"),
        ("sequence_memory(steps=mesa_streams())", "steps must be a plain value", "mesa_streams"),
        ("comba_streams(l2())", "gating must be one of Gating", "l2"),
        ("mesa_streams(comba_streams())", "gating must be one of Gating", "comba_streams"),
        ("sequence_memory(comba_streams())", "structure must be one of Structure", "comba_streams"),
        ("sequence_memory(matrix(), matrix())", "attentional_bias must be one of AttentionalBias", "matrix"),
        ("sequence_memory(matrix(), l2(), comba_streams())", "rule must be one of Rule", "comba_streams"),
        ("sequence_memory(gating=silu())", "gating must be one of Gating", "silu"),
        ("sequence_memory(preparation=comba_streams())", "preparation must be one of Preparation", "comba_streams"),
        ("window_gates(comba_streams())", "of must be one of Gating", "comba_streams"),
        ("mag(comba_streams())", "memory must be one of Mixer", "comba_streams"),
        ("normed(l2())", "of must be one of Structure", "l2"),
        ("features(matrix(), l2())", "kind must be one of FeatureMap", "l2"),
        ("together(l2())", "needs one memory's structure", "l2"),
    ],
)
def test_what_cannot_be_combined_is_named_with_what_it_was_put_into(text, field, stands):
    with pytest.raises(ValueError, match=field) as told:
        parse(text)
    assert f"{stands}(" in str(told.value)
    assert text.split("(")[0] in str(told.value)


directions = st.recursive(
    st.just(surprise()),
    lambda inner: st.one_of(
        *[st.builds(part, inner) for part in (scale, gradient_descent, dampen, normalize, momentum)],
        st.builds(clip, inner, st.floats(1e-3, allow_nan=False)),
        st.sampled_from([gradient_descent(), clip(), clip(bound=2.0), dampen(), normalize(), momentum()]),
    ),
    max_leaves=4,
)
additive = directions | st.builds(delta_gradient_descent, directions) | st.just(delta_gradient_descent())
gates = st.sampled_from([decay(), decay_to_start()])
keepers = additive | st.builds(retain, gates, additive) | st.builds(retain_first, gates, additive) | st.just(retain())
sizes = st.floats(1e-3, 1e3)
retentions = (
    st.sampled_from([row_norm(), sigmoid(), lq(), kl(), elastic_net(), elastic_net_ftrl()])
    | st.builds(lq, st.floats(1.01, 9.0), sizes)
    | st.builds(kl, sizes)
    | st.builds(elastic_net, sizes, sizes)
    | st.builds(elastic_net_ftrl, sizes)
)
periods = st.integers(1, 10**6) | st.just(math.inf)
clocked = additive | st.builds(retain, gates | retentions, additive)
rules = keepers | clocked | st.builds(every, periods, clocked) | st.builds(every, periods)
mlps = st.builds(
    mlp,
    depth=st.integers(2, 5),
    expansion=st.floats(1e-3, allow_nan=False),
    residual=st.booleans(),
    activation=st.sampled_from(["gelu", "silu"]),
)
alone = st.just(matrix()) | mlps
kinds = (
    st.sampled_from([identity(), elu_plus_one()]) | st.builds(polynomial, st.integers(1, 4)) | st.just(exponential())
)
bare = st.sampled_from([matrix(), mlp(residual=False), gated_mlp()]) | st.builds(gated_mlp, sizes)
bare = bare | st.builds(biased, bare) | st.builds(features, bare, kinds) | st.sampled_from([biased(), features()])
structures = alone | st.builds(together, alone) | bare | st.builds(normed, bare, st.booleans()) | st.just(normed())
biases = (
    st.sampled_from(
        [dot(), l2(), residual_l2(), lp(), huber_coordinates(), huber_norm(), huber_switch(), value_shift()]
    )
    | st.builds(lp, st.floats(1, 9), sizes)
    | st.builds(huber_switch, sizes, sizes | st.just(math.inf))
    | st.builds(huber_norm, sizes)
)
plain = biases.filter(lambda bias: bias != residual_l2())  # of structures with a residual
linear = st.sampled_from([dot(), l2(), residual_l2()])
chunk = st.sampled_from([1, 16, 64])
frozen = {"gradient_at": st.just("chunk"), "read": st.sampled_from(["after", "before", "boundary"])}
mixers = (
    st.builds(sequence_memory, mlps, plain, keepers, chunk, **frozen)
    | st.builds(sequence_memory, rule=keepers, chunk=chunk, way=st.sampled_from(["chunked", "recurrent"]))
    | st.builds(sequence_memory, st.just(matrix()), linear, keepers, chunk, st.just("token"), st.just("before"))
    | st.builds(sequence_memory, mlps, plain, keepers, chunk, steps=st.integers(1, 4))
    | st.builds(self_modifying, mlps, plain, keepers, chunk, projection_chunk=chunk, convolution=st.integers(1, 4))
    | st.sampled_from([moneta(), yaad(), memora(chunk=4)])
    | st.builds(attention, window=st.integers(1, 512), convolution=st.integers(1, 4), persistent=st.integers(0, 9))
)
blocks = (
    st.builds(mag, mixers, persistent=st.integers(0, 9))
    | st.builds(mal, mixers, st.integers(1, 512))
    | st.builds(mac, mixers.filter(lambda mixer: not isinstance(mixer, attention)), convolution=st.integers(1, 4))
)
parts = rules | structures | biases | mixers | blocks


@given(parts)
def test_a_part_prints_as_the_line_that_builds_it(part):
    assert parse(repr(part)) == part
    assert repr(parse(repr(part))) == repr(part)
    assert hash(parse(repr(part))) == hash(part)
    assert eval(repr(part), {**all_variants(), "inf": math.inf}) == part


@given(parts, parts)
def test_parts_are_equal_where_they_print_alike(one, other):
    assert (one == other) == (repr(one) == repr(other))


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (retain(), "retain()"),
        (retain(of=momentum()), "retain(decay(), momentum())"),
        (every(512, retain(decay(), momentum())), "every(512, retain(decay(), momentum()))"),
        (every(math.inf), "every(inf)"),
        (gradient_descent(), "gradient_descent()"),
        (scale(momentum(surprise())), "scale(momentum(surprise()))"),
        (clip(momentum(), 0.5), "clip(momentum(), bound=0.5)"),
        (mlp(depth=3, activation="silu"), "mlp(depth=3, activation='silu')"),
        (together(matrix()), "together(matrix())"),
        (normed(biased(matrix())), "normed(biased())"),
        (features(matrix(), polynomial(3)), "features(matrix(), polynomial(degree=3))"),
        (retain(kl(), momentum()), "retain(kl(), momentum())"),
        (sequence_memory(rule=momentum()), "sequence_memory(mlp(), l2(), momentum())"),
        (attention(window=8), "attention(window=8)"),
        (adam(beta1=0.8), "adam(surprise(), beta1=0.8)"),
        (add(adam(), momentum(), 0.5), "add(adam(), momentum(), share=0.5)"),
        (newton_schulz(momentum(), coefficients=(2, 1, 0)), "newton_schulz(momentum(), coefficients=(2, 1, 0))"),
        (remember(every(3, momentum()), retention=0.5), "remember(every(3, momentum()), retention=0.5)"),
    ],
)
def test_what_is_printed(part, text):
    assert repr(part) == text
    assert parse(f"  {text}\n") == part


def test_parts_compare_by_what_they_are():
    assert momentum(dampen()) == momentum(dampen(gradient_descent()))
    assert momentum() != dampen()
    assert gradient_descent() != scale(surprise()), "an alias prints under its own name, and is another part"
    assert {momentum(), momentum(gradient_descent()), momentum(surprise())} == {momentum(), momentum(surprise())}
    with pytest.raises(dataclasses.FrozenInstanceError):
        every(3).period = 4


def test_each_family_lists_its_own():
    assert all_variants().keys() >= Rule.variants.keys() | Structure.variants.keys()
    assert {"matrix", "mlp", "together"} <= Structure.variants.keys()
    assert not any(name.startswith("_") or name[0].isupper() for name in all_variants())
    assert known("momentum", Rule.variants, "rule") is momentum


@pytest.mark.parametrize("text", ["momentun()", "retain(decay(), momentun())"])
def test_an_unknown_name_lists_the_known_and_guesses(text):
    with pytest.raises(ValueError, match=r"unknown part 'momentun'.*surprise.*did you mean 'momentum'\?") as refused:
        parse(text)
    assert all(name in str(refused.value) for name in all_variants())


def test_a_name_like_no_other_gets_no_guess():
    with pytest.raises(ValueError, match="unknown part 'xyzzy'") as refused:
        parse("xyzzy()")
    assert "did you mean" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "momentum(",
        "momentum() momentum()",
        "a = momentum()",
        "import os",
        "momentum",
        "momentum.variants",
        "__import__('os').system('touch {path}')",
        "momentum(__import__('os').system('touch {path}'))",
        "open('{path}', 'w')",
        "mlp(depth=open('{path}', 'w'))",
        "(lambda: momentum())()",
        "[open('{path}', 'w') for _ in 'a']",
        "momentum() if open('{path}', 'w') else momentum()",
        "(momentum())(open('{path}', 'w'))",
        "f'{{open(1)}}'",
        "mlp(depth=1 + 1)",
        "mlp(**{{'depth': 3}})",
        "mlp(*(3,))",
        "mlp(depth=3, depth=4)",
        "mlp(width=3)",
        "momentum(surprise(), surprise())",
        "every()",
        "every('a')",
        "scale()",
        "momentum(2)",
        "momentum(retain())",
        "512",
        "'momentum()'",
        "(momentum(), momentum())",
        "None",
    ],
)
def test_anything_else_is_refused_and_nothing_is_evaluated(text, tmp_path):
    path = tmp_path / "made"
    with pytest.raises(ValueError, match=r"."):
        parse(text.format(path=path))
    assert not path.exists()


def test_a_part_of_another_family_is_refused():
    with pytest.raises(ValueError, match=r"'l2\(\)' is a l2, but a Rule is needed here"):
        parse("l2()", Rule)
    assert parse("momentum()", Rule) == momentum()
    assert isinstance(parse("matrix()"), Part)

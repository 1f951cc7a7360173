"""Levels in pre-trained models: equal to them until something is learned, then equal to plain autograd on them."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nestling.levels import Reader, Stacked, level, mean_surprise, next_token, seen_classes, spectrum, stack
from nestling.levels.layouts import find_feedforwards
from nestling.levels.reading import LevelledModel
from nestling.memory import decay, momentum, retain
from nestling.memory.state import clone, flatten
from pretrained import DECODERS, ENCODERS, LEARNED_POSITIONS, MIXTURES, in_turn, transformers

TEXT = torch.randint(0, 61, (90,), generator=torch.Generator().manual_seed(1))
ROWS = TEXT[:80].view(2, 40)
HOWS = {
    "layers": ("layers", [4, 12]),
    "neurons": ("neurons", [4, 12, math.inf]),
    "spectrum": ("neurons", spectrum(2, 8, step_size=0.1)),
    "low_rank": ("low_rank", [4, 12]),
}
WAYS = pytest.mark.parametrize("how", HOWS)
LAYOUTS = pytest.mark.parametrize("layout", DECODERS)


def stacked(layout: str, how: str, **options) -> Stacked:
    kind, periods = HOWS[how]
    return stack(DECODERS[layout](), periods, kind, **options)


def read(model: Stacked, text: torch.Tensor = TEXT):
    reader = Reader(model)
    return reader.read(reader.begin(), text)


FOUND = {
    "llama": "model.layers.{}.mlp.{{gate_proj,up_proj,down_proj}}",
    "mistral": "model.layers.{}.mlp.{{gate_proj,up_proj,down_proj}}",
    "qwen2": "model.layers.{}.mlp.{{gate_proj,up_proj,down_proj}}",
    "qwen3": "model.layers.{}.mlp.{{gate_proj,up_proj,down_proj}}",
    "gpt2": "transformer.h.{}.mlp.{{c_fc,c_proj}}",
    "phi3": "model.layers.{}.mlp.{{gate_up_proj,gate_up_proj,down_proj}}",
    "gpt_neox": "gpt_neox.layers.{}.mlp.{{dense_h_to_4h,dense_4h_to_h}}",
    "bert": "encoder.layer.{}.{{intermediate.dense,output.dense}}",
    "bert, masked": "bert.encoder.layer.{}.{{intermediate.dense,output.dense}}",
    "bert, classes": "bert.encoder.layer.{}.{{intermediate.dense,output.dense}}",
}


@pytest.mark.parametrize("layout", FOUND)
def test_every_mlp_is_found(layout: str) -> None:
    found = find_feedforwards((DECODERS | ENCODERS)[layout]())
    for index, feedforward in enumerate(found):
        prefix, _, names = FOUND[layout].format(index).partition("{")
        assert [m.path for m in feedforward.maps] == [prefix + name for name in names.rstrip("}").split(",")]
        assert {m.transposed for m in feedforward.maps} == {layout == "gpt2"}
        assert (feedforward.last.rows, feedforward.last.columns) == (16, 64 if layout == "gpt2" else 24)
    assert len(found) == 3


@pytest.mark.parametrize("how", ["layers", "neurons", "low_rank"])
def test_gate_and_up_in_turn_are_those_in_halves(how: str) -> None:
    """The same model in another order learns the same, neuron by neuron."""
    halves, turn = (stack(base().double(), [4, 12], how) for base in (DECODERS["phi3"], in_turn))
    assert torch.equal(turn(ROWS, weights=clone(turn.level_weights()))[0], in_turn().double()(ROWS).logits)
    for one, other in zip(halves.level_weights(), turn.level_weights(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    first, second = (read(model, TEXT[:30])[0].levels for model in (halves, turn))
    for name, tensor in flatten(first).items():
        torch.testing.assert_close(flatten(second)[name], tensor, rtol=0, atol=1e-12, msg=name)


def test_a_fused_map_in_another_order_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.bent, self.back = nn.Linear(4, 12), nn.SiLU(), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = self.both(x).chunk(2, -1)
            return self.back(self.bent(gate) * up.flip(-1))

    class Asking(Odd):
        def forward(self, x: torch.Tensor, how: str) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x)

    for odd, said in ((Odd(), r"it takes \(0, 11\)"), (Asking(), "it takes none")):
        with pytest.raises(ValueError, match=r"tower\.0\.both: looks like gate and up.*0 and 6.*" + said):
            find_feedforwards(nn.ModuleDict({"tower": nn.ModuleList([odd])}))
        assert not odd.both._forward_hooks
        assert not odd.back._forward_pre_hooks


def test_asking_a_fused_map_leaves_training_as_it_is() -> None:
    """Dropout is off while it is asked, and on again afterwards."""

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.bent, self.back = nn.Linear(4, 12), nn.SiLU(), nn.Linear(6, 4)
            self.drop = nn.Dropout(0.9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = self.both(x).chunk(2, -1)
            return self.back(self.drop(self.bent(gate) * up))

    dropping = Dropping().train()
    dropping.back.eval()
    (found,) = find_feedforwards(nn.ModuleDict({"tower": nn.ModuleList([dropping])}))
    assert [each.start for each in found.first] == [0, 6]
    assert (dropping.training, dropping.drop.training, dropping.back.training) == (True, True, False)


class Unheard(nn.Module):
    """A layer of no known class: an MLP as wide as its input, an activation that is a function, other names."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.bent = F.silu
        self.wide, self.side, self.back = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)


def test_structure_decides_not_the_name() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.squash = nn.ReLU()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    model = nn.ModuleDict({"tower": nn.ModuleList([nn.ModuleDict({"x": nn.Linear(8, 8), "y": Inner()})])})
    (found,) = find_feedforwards(model)
    assert [m.path for m in found.maps] == ["tower.0.y.a", "tower.0.y.b"]


def test_an_unknown_layout_says_what_was_looked_for() -> None:
    no_activation = nn.ModuleDict({"tower": nn.ModuleList([nn.ModuleDict({"x": nn.Linear(8, 16)})])})
    with pytest.raises(ValueError, match=r"no MLP found.*activation.*d -> h.*h -> d.*tower\.0 holds x Linear"):
        find_feedforwards(no_activation)
    with pytest.raises(ValueError, match=r"no nn\.ModuleList"):
        find_feedforwards(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="no MLP found"):  # five maps of one shape beside an activation
        find_feedforwards(nn.ModuleDict({"tower": nn.ModuleList([Unheard()])}))


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_mixture_of_experts_is_refused(mixture: str) -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts holds a mixture of experts \(gate_up_proj \[4, "):
        stack(MIXTURES[mixture](), [4])


def test_a_list_of_experts_is_refused() -> None:
    def expert() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))

    layer = nn.ModuleDict({"router": nn.Linear(4, 2), "experts": nn.ModuleList([expert(), expert()])})
    with pytest.raises(ValueError, match=r"tower\.0\.experts holds a mixture of experts \(2 MLPs\)"):
        find_feedforwards(nn.ModuleDict({"tower": nn.ModuleList([layer])}))


@LAYOUTS
@WAYS
def test_logits_are_the_models_own_at_the_start(layout: str, how: str) -> None:
    model = stacked(layout, how)
    expected = DECODERS[layout]()(ROWS).logits
    assert torch.equal(model(ROWS)[0], expected)
    assert torch.equal(model(ROWS, weights=model.level_weights())[0], expected)
    copied = clone(model.level_weights())  # as they come back from a file
    assert torch.equal(model(ROWS, weights=copied)[0], expected)
    assert isinstance(model, LevelledModel)


@LAYOUTS
@WAYS
def test_logits_stay_while_nothing_is_learned(layout: str, how: str) -> None:
    kind, _ = HOWS[how]
    still = [level(p, rule=retain(decay(), momentum()), step_size=0.0, retention=1.0) for p in (4, 12)]
    model = stack(DECODERS[layout](), still, kind)
    state, _ = read(model, TEXT[:25])
    expected = DECODERS[layout]()(ROWS).logits
    assert torch.equal(model(ROWS, weights=state.levels.weights)[0], expected)


@LAYOUTS
@WAYS
def test_only_levels_differ_after_learning(layout: str, how: str) -> None:
    model = stacked(layout, how)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = clone(model.level_weights())
    state, out = read(model, TEXT[:25])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    for lvl, old, new in zip(model.levels, start, state.levels.weights, strict=True):
        assert any(torch.equal(a, b) for a, b in zip(old, new, strict=True)) == (lvl.period == math.inf)
    assert not torch.equal(model(ROWS, weights=state.levels.weights)[0], model(ROWS)[0])
    assert bool(out.nll[1:].isfinite().all())


@LAYOUTS
@pytest.mark.parametrize("how", ["layers", "neurons"])
def test_a_tick_is_plain_autograd_on_the_model(layout: str, how: str) -> None:
    """Every parameter that is a level's moves by step_size / period times its gradient, summed over the period."""
    period = 8
    model = stack(DECODERS[layout]().double(), [period, period], how, step_size=0.7)
    state, _ = read(model, TEXT[: period + 1])
    naive = DECODERS[layout]().double()
    losses = F.cross_entropy(naive(TEXT[None, :period]).logits[0], TEXT[1 : period + 1], reduction="sum")
    losses.backward()
    learned = model.placed(state.levels.weights)
    assert len(learned) == sum(len(f.modules) for f in model.feedforwards)
    for name, weight in learned.items():
        parameter = naive.get_parameter(name)
        expected = parameter - 0.7 / period * parameter.grad
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-12, msg=name)


def test_a_tick_of_low_rank_levels_is_plain_autograd() -> None:
    period = 8
    model = stack(DECODERS["llama"]().double(), [period, period], "low_rank", step_size=0.7, rank=2)
    with torch.no_grad():
        for parameter in model.extra.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    state, _ = read(model, TEXT[: period + 1])
    naive = DECODERS["llama"]().double()
    leaves = [[w.detach().clone().requires_grad_() for w in maps] for maps in model.level_weights()]

    class Beside(nn.Module):
        def __init__(self, mlp: nn.Module, pairs) -> None:
            super().__init__()
            self.mlp, self.pairs = mlp, pairs

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp(x) + sum(x @ down.T @ up.T for down, up in self.pairs)

    for index, layer in enumerate(naive.model.layers):
        layer.mlp = Beside(layer.mlp, leaves[2 * index : 2 * index + 2])
    losses = F.cross_entropy(naive(TEXT[None, :period]).logits[0], TEXT[1 : period + 1], reduction="sum")
    losses.backward()
    for maps, found in zip(leaves, state.levels.weights, strict=True):
        for start, after in zip(maps, found, strict=True):
            torch.testing.assert_close(after, start - 0.7 / period * start.grad, rtol=0, atol=1e-11)


@LAYOUTS
@pytest.mark.parametrize(
    ("how", "context"), [("layers", (64, 0)), ("low_rank", (10, 0)), ("neurons", (10, 4))], ids=lambda c: str(c)
)
def test_one_pass_is_split_passes(layout: str, how: str, context: tuple[int, int]) -> None:
    if context[1] and layout in LEARNED_POSITIONS:
        with pytest.raises(ValueError, match="overlap=0"):
            stack(DECODERS[layout](), [4, 12], how, context=context[0], overlap=context[1])
        return
    model = stack(DECODERS[layout]().double(), [4, 12], how, context=context[0], overlap=context[1])
    whole, out = read(model, TEXT[:31])
    reader = Reader(model)
    for pieces in ([1] * 31, [7, 15, 1, 8]):
        state, nll = reader.begin(), []
        for part in TEXT[:31].split(pieces):
            state, got = reader.read(state, part)
            nll.append(got.nll)
        torch.testing.assert_close(torch.cat(nll), out.nll, rtol=0, atol=1e-10, equal_nan=True)
        for name, tensor in flatten(whole).items():
            torch.testing.assert_close(flatten(state)[name], tensor, rtol=0, atol=1e-10, msg=name)


@LAYOUTS
def test_a_context_without_overlap_is_windows_read_afresh(layout: str) -> None:
    model = stack(DECODERS[layout]().double(), [4], context=16)
    naive = DECODERS[layout]().double()
    expected = torch.cat([naive(part[None]).logits[0] for part in TEXT.split(16)])
    torch.testing.assert_close(model(TEXT[None])[0][0], expected, rtol=0, atol=1e-12)
    assert {keys.shape[2] for keys in model.init_state(1).keys} == {0}
    state = model(TEXT[None])[1]
    assert {slots.shape[2] for slots in (*state.keys, *state.values)} == {state.valid.shape[1]} == {len(TEXT) % 16}


def test_empty_slots_after_those_that_are_used_say_nothing() -> None:
    """As lives of an older version have them: a cache as long as the context."""
    model = stack(DECODERS["llama"]().double(), [4], context=32)
    state = model(TEXT[None, :10])[1]
    room = tuple(tuple(F.pad(each, (0, 0, 0, 22), value=9.0) for each in slots) for slots in (state.keys, state.values))
    older = state._replace(keys=room[0], values=room[1], valid=F.pad(state.valid, (0, 22)))
    expected, after = model(TEXT[None, 10:20], state)
    got, same = model(TEXT[None, 10:20], older)
    assert torch.equal(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(flatten(after).values(), flatten(same).values(), strict=True))


@pytest.mark.parametrize("layout", sorted(set(DECODERS) - LEARNED_POSITIONS))
def test_overlap_is_a_cache_cut_when_it_is_full(layout: str) -> None:
    """Token by token with transformers' own cache, cut down by hand to its last tokens when it is full."""
    model = stack(DECODERS[layout]().double(), [4], context=10, overlap=3)
    naive, cache, expected = DECODERS[layout]().double(), transformers.DynamicCache(), []
    for position, token in enumerate(TEXT[:40]):
        if cache.get_seq_length() == 10:
            old, cache = cache, transformers.DynamicCache()
            for index, layer in enumerate(old.layers):
                cache.update(layer.keys[:, :, -3:], layer.values[:, :, -3:], index)
        ids = torch.tensor([[position]])
        out = naive(token.view(1, 1), past_key_values=cache, position_ids=ids, use_cache=True)
        expected.append(out.logits[0, 0])
    logits, _ = model(TEXT[None, :40])
    torch.testing.assert_close(logits[0], torch.stack(expected), rtol=0, atol=1e-12)


@LAYOUTS
@pytest.mark.parametrize("context", [64, 12])
def test_a_padded_token_is_never_looked_at(layout: str, context: int) -> None:
    model = stack(DECODERS[layout]().double(), [4], context=context)
    rows = torch.zeros(2, 9, dtype=torch.int64)
    valid = torch.ones(2, 9, dtype=torch.bool)
    rows[0], rows[1, 2:] = TEXT[:9], TEXT[9:16]
    valid[1, :2] = False
    logits, state = model(rows, valid=valid)
    torch.testing.assert_close(logits[0], model(TEXT[None, :9])[0][0], rtol=0, atol=1e-12)
    torch.testing.assert_close(logits[1, 2:], model(TEXT[None, 9:16])[0][0], rtol=0, atol=1e-12)
    if context == 64:  # the same slots to go on in
        following, _ = model(TEXT[20:24].view(2, 2), state)
        alone, _ = model(torch.cat([TEXT[9:16], TEXT[22:24]])[None])
        torch.testing.assert_close(following[1], alone[0, 7:], rtol=0, atol=1e-12)


@LAYOUTS
@WAYS
def test_generate_writes_with_a_lifes_levels(layout: str, how: str) -> None:
    model = stacked(layout, how)
    naive = DECODERS[layout]()
    options = {"max_new_tokens": 6, "do_sample": False}
    prompt = TEXT[None, :6]
    assert torch.equal(model.generate(prompt, **options), naive.generate(prompt, **options))
    state, _ = read(stack(DECODERS[layout](), [level(4, step_size=50.0)], HOWS[how][0]), TEXT[:17])
    strong = stack(DECODERS[layout](), [level(4, step_size=50.0)], HOWS[how][0])
    written = strong.generate(prompt, weights=state.levels.weights, **options)[0]
    ids = prompt[0]
    for _ in range(options["max_new_tokens"]):  # greedily, each token from all before it
        logits, _ = strong(ids[None], weights=state.levels.weights)
        ids = torch.cat([ids, logits[0, -1].argmax().view(1)])
    assert torch.equal(written, ids)
    assert not torch.equal(written, naive.generate(prompt, **options)[0])
    assert all(not module._forward_hooks for module in strong.modules()), "nothing is left behind"


def test_levels_are_in_float32_where_the_model_is_not() -> None:
    model = stack(DECODERS["gpt2"]().bfloat16(), [4, 12])
    naive = DECODERS["gpt2"]().bfloat16()
    assert {weight.dtype for weight in flatten(model.level_weights()).values()} == {torch.float32}
    logits, _ = model(ROWS, weights=model.level_weights())
    assert torch.equal(logits, naive(ROWS).logits.float())
    state, out = read(model)
    assert {weight.dtype for weight in flatten(state.levels.weights).values()} == {torch.float32}
    assert bool(out.nll[1:].isfinite().all())


@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_graph_begins_at_the_first_level_that_steps(first: int) -> None:
    """What stands before it is computed without one, and the base's parameters are constants in it."""
    model = stack(DECODERS["llama"](), [math.inf] * first + [4] * (3 - first))
    graph: list[bool] = []
    for layer in model.base.model.layers:
        layer.register_forward_hook(lambda module, given, output: graph.append(output.requires_grad))
    state, _ = read(model, TEXT[:5])
    assert graph[:3] == [index >= first for index in range(3)]
    for index, (old, new) in enumerate(zip(model.level_weights(), state.levels.weights, strict=True)):
        assert torch.equal(old[0], new[0]) == (index < first)


def test_there_is_no_training_mode() -> None:
    model = stack(DECODERS["gpt2"](), [4, 12])  # with dropout
    trained, evaluated = read(model.train())[1], read(model.eval())[1]
    assert torch.equal(trained.nll[1:], evaluated.nll[1:])


def test_one_base_serves_many_lives() -> None:
    base = DECODERS["llama"]()
    one, two = stack(base, [4, 12]), stack(base, [8, 16], "neurons")
    first, _ = read(one)
    second, _ = read(two, TEXT.flip(0))
    assert one.base is two.base
    assert torch.equal(one(ROWS)[0], DECODERS["llama"]()(ROWS).logits)
    assert not torch.equal(one(ROWS, weights=first.levels.weights)[0], two(ROWS, weights=second.levels.weights)[0])


def test_a_text_that_comes_back_surprises_less() -> None:
    model = stack(DECODERS["llama"](), [level(8, step_size=1.0), level(24, step_size=1.0)], "neurons")
    reader = Reader(model)
    state, means = reader.begin(), []
    for _ in range(5):
        state, out = reader.read(state, TEXT)
        state, _ = reader.end_document(state)
        means.append(float(out.nll.nanmean()))
    assert means == sorted(means, reverse=True)
    text = bytes(TEXT.tolist())
    assert mean_surprise(model, [text], weights=state.levels.weights, piece=32) < mean_surprise(model, [text], piece=32)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: stack(DECODERS["llama"](), []), "at least one period"),
        (lambda: stack(DECODERS["llama"](), [4], "neuron"), "how must be"),
        (lambda: stack(DECODERS["llama"](), spectrum(4, 8)), "how='neurons'"),
        (lambda: stack(DECODERS["llama"](), [4], rank=0), "rank must be"),
        (lambda: stack(DECODERS["llama"](), [4], context=65), "context must be <= 64"),
        (lambda: stack(DECODERS["llama"](), [4], context=8, overlap=8), "overlap must be"),
        (lambda: stack(DECODERS["llama"](), [4], overlap=64), "overlap must be less than context = 64"),
        (lambda: stack(DECODERS["llama"](), [4] * 25, "neurons").level_weights(), "24 neurons cannot be divided"),
        (lambda: stack(DECODERS["llama"](), [4], loss=seen_classes()), "predicts the next token"),
        (lambda: stack(ENCODERS["bert"](), [4], loss=next_token()), "is an encoder"),
        (lambda: Reader(stack(ENCODERS["bert"](), [4])).begin(), "nothing says what it learns from"),
        (lambda: Reader(stack(ENCODERS["bert"](), [4], loss=seen_classes())).begin(), "read with ExampleReader"),
    ],
    ids=lambda told: told if isinstance(told, str) else "",
)
def test_what_is_refused(build, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build()

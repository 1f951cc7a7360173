"""Linear memories: the chunk form, token by token, and each paper's own loop say the same, gradients included."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from nestling.memory import naive_linear as naive
from nestling.sequence import linear, linear_chunk
from nestling.sequence.linear import linear_memory
from nestling.sequence.linear_chunk import Given, LinearChunks, plain
from nestling.sequence.mesa import mesa

B, H, K, V, N = 2, 2, 4, 3, 2
LENGTHS = (1, 7, 63, 100)
Inputs = dict[str, Tensor]


def draw(t: int, seed: int = 0) -> Inputs:
    """Everything that a family may ask for; time is dim 1 and heads dim 2, or -2 where there are several steps."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def unit(*shape: int) -> Tensor:
        return F.normalize(normal(*shape), dim=-1)

    return {
        "q": normal(B, t, H, K),
        "k": unit(B, t, H, K),
        "v": normal(B, t, H, V),
        "ks": unit(B, t, N, H, K),
        "vs": normal(B, t, N, H, V),
        "p": unit(B, t, H, K) * 0.8,
        "r": unit(B, t, H, K),
        "b": normal(B, t, H).sigmoid(),
        "bs": 2 * normal(B, t, N, H).sigmoid(),
        "bk": normal(B, t, H, K).sigmoid(),
        "bv": normal(B, t, H, V).exp(),
        "log": -0.3 * normal(B, t, H).abs(),
        "logk": -0.3 * normal(B, t, H, K).abs(),
        "far": -12.0 * normal(B, t, H, K).square(),
        "e": normal(B, t, H, K).sigmoid(),
        "rate": 0.3 * normal(H),
        "d": normal(H),
        "ridge": normal(H, K).exp(),
        "s": normal(B, H, V, K),
        "inner": torch.einsum("bhij,bhkj->bhik", *[normal(B, H, K, K)] * 2),
    }


Fast = Callable[..., tuple[Tensor, Tensor]]
FAMILIES: dict[str, tuple[tuple[str, ...], Fast, Callable[..., tuple[Tensor, ...]]]] = {
    "linear attention": (("q", "k", "v"), linear.linear_attention, naive.naive_linear_attention),
    "retention": (("q", "k", "v"), linear.retention, naive.naive_retention),
    "gla": (
        ("q", "k", "v", "logk"),
        linear.gated_linear_attention,
        lambda q, k, v, g, s: naive.naive_gla(q, k, v, g.exp(), s),
    ),
    "gla, gates that forget": (
        ("q", "k", "v", "far"),
        linear.gated_linear_attention,
        lambda q, k, v, g, s: naive.naive_gla(q, k, v, g.exp(), s),
    ),
    "mamba2": (("q", "k", "v", "b", "rate"), linear.mamba2, naive.naive_mamba2),
    "hgrn2": (("q", "v", "logk"), linear.hgrn2, lambda q, v, g, s: naive.naive_hgrn2(q, v, g.exp(), s)),
    "delta rule": (("q", "k", "v", "b"), linear.delta_rule, naive.naive_delta_rule),
    "gated delta rule": (
        ("q", "k", "v", "b", "log"),
        linear.gated_delta_rule,
        lambda q, k, v, b, g, s: naive.naive_gated_delta_rule(q, k, v, b, g.exp(), s),
    ),
    "gated delta rule by channel": (
        ("q", "k", "v", "b", "logk"),
        linear.gated_delta_rule,
        lambda q, k, v, b, g, s: naive.naive_gated_delta_rule(q, k, v, b, g.exp(), s),
    ),
    "kda, gates that forget": (
        ("q", "k", "v", "b", "far"),
        linear.kda,
        lambda q, k, v, b, g, s: naive.naive_gated_delta_rule(q, k, v, b, g.exp(), s),
    ),
    "kda with an erase gate": (
        ("q", "k", "v", "b", "logk", "e"),
        lambda *x, **how: linear.kda(*x[:-1], erase_gate=x[-1], **how),
        lambda q, k, v, b, g, e, s: naive.naive_kda_erase(q, k, v, b, g.exp(), e, s),
    ),
    "delta product": (
        ("q", "ks", "vs", "bs", "log"),
        linear.delta_product,
        lambda q, k, v, b, g, s: naive.naive_delta_product(q, k, v, b, g.exp(), s),
    ),
    "delta product without decay": (
        ("q", "ks", "vs", "bs"),
        linear.delta_product,
        lambda q, k, v, b, s: naive.naive_delta_product(q, k, v, b, torch.ones_like(q[:, 0]), s),
    ),
    "rwkv7": (
        ("q", "k", "v", "logk", "r", "bk"),
        linear.rwkv7,
        lambda q, k, v, g, r, a, s: naive.naive_rwkv7(q, k, v, g.exp(), r, a, s),
    ),
    "rwkv7, gates that forget": (
        ("q", "k", "v", "far", "r", "bk"),
        linear.rwkv7,
        lambda q, k, v, g, r, a, s: naive.naive_rwkv7(q, k, v, g.exp(), r, a, s),
    ),
    "longhorn": (
        ("q", "k", "v", "b"),
        linear.longhorn,
        lambda q, k, v, b, s: naive.naive_longhorn(q, k, v, b[:, None].expand(v.shape), s),
    ),
    "longhorn by channel": (("q", "k", "v", "bv"), linear.longhorn, naive.naive_longhorn),
    "comba": (
        ("q", "k", "v", "p", "b", "log", "d"),
        lambda *x, **how: linear.comba(*x[:-1], feedback=x[-1], **how),
        lambda q, k, v, p, b, g, d, s: naive.naive_comba(q, k, v, p, b, g.exp(), d, s),
    ),
}


def with_gradients(inputs: Inputs, run: Callable[[Inputs], tuple[Tensor, ...]]) -> list[Tensor]:
    """What `run` returns, and the gradients of a fixed function of it."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    out = run(leaves)
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, dtype=torch.float64, generator=generator)).sum() for y in out)
    assert isinstance(loss, Tensor)
    return [*out, *torch.autograd.grad(loss, list(leaves.values()))]


def by_head(function: Callable[..., tuple[Tensor, ...]], inputs: Inputs, numbered: bool) -> tuple[Tensor, ...]:
    """A naive loop over every head of every row."""
    rows = []
    for row in range(B):
        heads = []
        for h in range(H):
            own = [
                x[h]
                if x.dim() < 3
                else x[row, h]
                if name in ("s", "inner")
                else x[row, ..., h, :]
                if name in LAST
                else x[row, ..., h]
                for name, x in inputs.items()
            ]
            heads.append(function(*own[:-1], *([h] if numbered else []), own[-1]) if numbered else function(*own))
        rows.append(heads)
    return tuple(
        torch.stack([torch.stack([rows[row][h][i] for h in range(H)], 1 if i == 0 else 0) for row in range(B)])
        for i in range(len(rows[0][0]))
    )


LAST = ("q", "k", "v", "ks", "vs", "p", "r", "bk", "bv", "logk", "far", "e")  # heads are the last dim but one


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_is_recurrent_is_naive(family: str) -> None:
    names, fast, slow = FAMILIES[family]
    for t in LENGTHS:
        inputs = {name: draw(t)[name] for name in (*names, "s")}

        def run(given: Inputs, way: str = "chunked", chunk: int = 64) -> tuple[Tensor, Tensor]:
            *own, s = given.values()
            return fast(*own, initial_state=s, scale=1.0, way=way, chunk=chunk)

        expected = with_gradients(inputs, lambda given: by_head(slow, given, family == "retention"))
        ways = [("recurrent", 64)] if t == 63 else []
        for way, chunk in (*ways, ("chunked", 16), *((("chunked", 1), ("chunked", 64)) if t > 1 else ())):
            found = with_gradients(inputs, lambda given: run(given, way, chunk))  # noqa: B023
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("way", ["chunked", "recurrent"])
@pytest.mark.parametrize(("rows", "t"), [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("family", [*FAMILIES, "mesa"])
def test_no_rows_or_no_tokens_are_answered_with_nothing(family, rows, t, way) -> None:
    drawn = {
        name: x[:rows] if x.shape[0] == B and name not in ("rate", "d", "ridge") else x for name, x in draw(t).items()
    }
    names = ("q", "k", "v", "b", "log", "ridge") if family == "mesa" else FAMILIES[family][0]
    given = [drawn[name].requires_grad_() for name in names]
    if family == "mesa":
        y, (state, inner) = mesa(*given, initial_state=(drawn["s"], drawn["inner"]))
        assert torch.equal(inner, drawn["inner"])
    else:
        y, state = FAMILIES[family][1](*given, initial_state=drawn["s"], way=way)
    assert y.shape == (rows, t, H, V)
    assert torch.equal(state, drawn["s"])
    gradients = torch.autograd.grad(y.sum(), given, allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("t", [1, 7, 63])
def test_mesa_is_a_direct_solve(t: int) -> None:
    drawn = draw(t)
    inputs = {name: drawn[name] for name in ("q", "k", "v", "b", "log", "ridge", "s", "inner")}

    def fast(given: Inputs) -> tuple[Tensor, ...]:
        *own, g, h = given.values()
        y, (g, h) = mesa(*own, initial_state=(g, h), chunk=16)
        return y, g, h

    def slow(q, k, v, b, log, ridge, g, h):
        return naive.naive_mesa(q, k, v, b, log.exp(), ridge, g, h)

    expected = with_gradients(inputs, lambda given: by_head(slow, given, False))
    for a, b in zip(with_gradients(inputs, fast), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_mesa_twice_differentiable_and_better_with_iterations() -> None:
    x = draw(2)
    tensors = [x[name][:1].requires_grad_() for name in ("q", "k", "v", "b", "log")]
    ridge = x["ridge"].requires_grad_()
    assert gradgradcheck(lambda *a: mesa(*a, chunk=2, iterations=6)[0], (*tensors, ridge), fast_mode=True, atol=1e-4)
    exact, whole, few = (mesa(*tensors, ridge, iterations=n)[0] for n in (30, K, 1))
    torch.testing.assert_close(whole, exact)
    assert (few - exact).abs().max() > 1e-3
    with pytest.raises(ValueError, match="ridge must be"):
        mesa(*tensors, ridge[:, :1])
    with pytest.raises(ValueError, match="iterations"):
        mesa(*tensors, ridge, iterations=0)


def test_mesa_solves_in_float32_at_least() -> None:
    x = draw(20)
    low = [x[name].bfloat16() for name in ("q", "k", "v", "b", "log", "ridge")]
    y, (g, _) = mesa(*low)
    assert y.dtype == torch.bfloat16
    assert g.dtype == torch.float32
    expected, _ = mesa(*(part.double() for part in low))
    torch.testing.assert_close(y, expected.bfloat16(), rtol=2e-2, atol=1e-3)


GATES = (None, "log", "logk", "far")
ERASES = ((None, None), ("p", None), ("p", "e"))


def given(t: int, gates: str | None, erase: tuple[str | None, str | None], dtype=torch.float64) -> Given:
    x = draw(t)
    picked = (None if name is None else x[name].to(dtype) for name in ("q", "k", "v", gates, *erase, "s"))
    return Given(*picked)


def asked(given: Given) -> dict[str, Tensor | None]:
    return {"log_retention": given.log_gates, "erase": given.p, "erase_along": given.x, "initial_state": given.state}


@pytest.mark.parametrize(("gates", "erase", "read"), list(itertools.product(GATES, ERASES, ("after", "before"))))
def test_plain_fast_and_recurrent_agree(gates, erase, read) -> None:
    x = given(37, gates, erase)
    inputs = {name: part for name, part in x._asdict().items() if part is not None}

    def full(part: Inputs) -> Given:
        return Given(*(part.get(name) for name in Given._fields))

    def run(part: Inputs, way: str) -> tuple[Tensor, Tensor]:
        g = full(part)
        return linear_memory(g.q, g.k, g.v, **asked(g), scale=1.0, read=read, way=way, chunk=16)

    expected = with_gradients(inputs, lambda part: run(part, "recurrent"))
    for found in (
        with_gradients(inputs, lambda part: run(part, "chunked")),
        with_gradients(inputs, lambda part: plain(full(part), 16, read == "before")),
    ):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("gates", "erase"), list(itertools.product(GATES[:3], ERASES)))
def test_finite_differences_of_both_orders(gates, erase) -> None:
    x = Given(*(None if part is None else part[:1].clone().requires_grad_() for part in given(5, gates, erase)))
    tensors = tuple(part for part in x if part is not None)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        left = iter(tensors)
        return LinearChunks.apply(*(None if part is None else next(left) for part in x), 3, False)

    assert gradcheck(run, tensors, fast_mode=True)
    assert gradgradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize(("gates", "erase"), list(itertools.product(("log", "logk"), ERASES)))
def test_gates_of_exactly_zero_and_one(gates, erase) -> None:
    x = given(40, gates, erase)
    log_gates = x.log_gates.clone()
    log_gates[:, 5::11], log_gates[:, 3::7] = -torch.inf, 0.0
    inputs = {name: part for name, part in x._replace(log_gates=log_gates)._asdict().items() if part is not None}

    def run(part: Inputs, way: str) -> tuple[Tensor, Tensor]:
        g = Given(*(part.get(name) for name in Given._fields))
        return linear_memory(g.q, g.k, g.v, **asked(g), way=way, chunk=16)

    expected = with_gradients(inputs, lambda part: run(part, "recurrent"))
    found = with_gradients(inputs, lambda part: run(part, "chunked"))
    assert not found[2 + list(inputs).index("log_gates")][log_gates == -torch.inf].any()
    for a, b in zip(found, expected, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("gates", "erase"), list(itertools.product(GATES, ERASES)))
def test_float32(gates, erase) -> None:
    exact, rough = given(100, gates, erase), given(100, gates, erase, torch.float32)

    def run(g: Given) -> list[Tensor]:
        parts = [None if x is None else x.clone().requires_grad_() for x in g]
        live = [x for x in parts if x is not None]
        y, state = linear_memory(*parts[:3], **asked(Given(*parts)))
        return [y, state, *torch.autograd.grad(y.square().sum() + state.square().sum(), live)]

    for a, b in zip(run(rough), run(exact), strict=True):
        assert (a - b).abs().max() < 2e-5 * b.abs().max()


@pytest.mark.parametrize(("gates", "erase"), list(itertools.product(GATES, ERASES)))
def test_split_passes_are_one_pass(gates, erase) -> None:
    x = given(50, gates, erase)
    before = [None if part is None else part.clone() for part in x]
    whole, end = linear_memory(*x[:3], **asked(x), chunk=16)
    reads, state = [], x.state
    for at in (slice(0, 1), slice(1, 21), slice(21, 50)):
        part = Given(*(None if y is None else y[:, at] for y in x[:6]), state)
        y, state = linear_memory(*part[:3], **asked(part), chunk=16)
        reads.append(y)
    torch.testing.assert_close(torch.cat(reads, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, end, rtol=1e-10, atol=1e-10)
    for kept, part in zip(before, x, strict=True):
        assert kept is None or torch.equal(kept, part)


def test_several_groups_of_chunks(monkeypatch) -> None:
    x = given(100, "logk", ERASES[2])
    whole = linear_memory(*x[:3], **asked(x), chunk=16)
    monkeypatch.setattr(linear_chunk, "ELEMENTS", 2 * B * H * K * 16)
    for a, b in zip(linear_memory(*x[:3], **asked(x), chunk=16), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_scale_dtype_and_no_tokens() -> None:
    x = given(9, "log", ERASES[1], torch.float32)
    y, _ = linear_memory(*x[:3], **asked(x))
    z, _ = linear_memory(*x[:3], **asked(x), scale=1.0)
    torch.testing.assert_close(y * math.sqrt(K), z)
    low, state = linear_memory(*(part.bfloat16() for part in x[:3]))
    assert low.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    empty, state = linear_memory(*(part[:, :0] for part in x[:3]), initial_state=x.state)
    assert empty.shape == (B, 0, H, V)
    assert torch.equal(state, x.state)


def test_delta_rule_reads_back_a_unit_key_written_with_step_one() -> None:
    x = draw(20)
    y, _ = linear.delta_rule(x["k"], x["k"], x["v"], torch.ones_like(x["b"]), scale=1.0, initial_state=x["s"], chunk=8)
    torch.testing.assert_close(y, x["v"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(B, 9, H, K + 1)}, "k must be"),
        ({"v": torch.zeros(B, 8, H, V)}, "v must be"),
        ({"log_retention": torch.zeros(B, 9, H, V)}, "log_retention must be"),
        ({"erase": torch.zeros(B, 9, H)}, "erase must be"),
        ({"erase_along": torch.zeros(B, 9, H, K)}, "no erase"),
        ({"initial_state": torch.zeros(B, H, K, V)}, "initial_state must be"),
        ({"chunk": 0}, "chunk must be"),
        ({"read": "later"}, "read must be"),
        ({"way": "fast"}, "way must be"),
    ],
)
def test_what_is_refused(change, message) -> None:
    x = draw(9)
    with pytest.raises(ValueError, match=message):
        linear_memory(**({name: x[name] for name in "qkv"} | change))
    if "k" in change:
        with pytest.raises(ValueError, match="n, h, k"):
            linear.delta_product(x["q"], x["k"], x["v"], x["b"])
        with pytest.raises(ValueError, match="after its last step"):
            linear.delta_product(x["q"], x["ks"], x["vs"], x["bs"], read="before")

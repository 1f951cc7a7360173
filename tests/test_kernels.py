"""The linear family through flash-linear-attention: what is handed over and what comes back, and its own kernels."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from nestling import zoo
from nestling.memory import decay, delta_gradient_descent, dot, gradient_descent, matrix, momentum, parse, retain
from nestling.memory.state import flatten
from nestling.sequence import linear, sequence_memory
from nestling.sequence.kernels import KERNELS
from nestling.sequence.linear import linear_memory
from test_linear import FAMILIES, draw, with_gradients

SCRIPT = Path(__file__).parent / "interpreted_kernels.py"


def recurrence(q, k, v, decay, erase, along, scale, initial_state, output_final_state):
    """What the package says of itself: S <- Diag(exp g) S, then - x (p^T S), + k v^T; o = scale q^T S; S [b, h, k, v].
    `erase` is p of the undecayed S."""
    assert output_final_state is True
    assert initial_state.dtype == torch.float32
    assert initial_state.is_contiguous()
    assert q.dtype == k.dtype == v.dtype
    assert decay is None or decay.isfinite().all()
    dtype, state, reads = v.dtype, initial_state, []
    q, k, v, decay, erase, along = (None if x is None else x.float() for x in (q, k, v, decay, erase, along))
    for t in range(q.shape[1]):
        seen = 0.0 if erase is None else torch.einsum("bhkv,bhk->bhv", state, erase[:, t])
        state = state if decay is None else state * decay[:, t].exp()[..., None]
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        state = state if erase is None else state - torch.einsum("bhk,bhv->bhkv", along[:, t], seen)
        reads.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(reads, 1).to(dtype), state


def chunk_linear_attn(q, k, v, scale=None, initial_state=None, output_final_state=False, normalize=True):
    assert not normalize
    return recurrence(q, k, v, None, None, None, scale, initial_state, output_final_state)


def chunk_simple_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False):
    return recurrence(q, k, v, g[..., None], None, None, scale, initial_state, output_final_state)


def chunk_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False):
    assert g.shape == q.shape
    return recurrence(q, k, v, g, None, None, scale, initial_state, output_final_state)


def chunk_kda(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
    b = beta[..., None]
    return recurrence(q, k, v * b, g, k * g.exp() * b, k, scale, initial_state, output_final_state)


def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
    return chunk_kda(q, k, v, g[..., None], beta, scale, initial_state, output_final_state)


def chunk_delta_rule(q, k, v, beta, scale=None, initial_state=None, output_final_state=False):
    return chunk_gated_delta_rule(q, k, v, torch.zeros_like(beta), beta, scale, initial_state, output_final_state)


def chunk_comba(q, k, v, p, g, beta, scale=None, initial_state=None, output_final_state=False):
    b = beta[..., None]
    return recurrence(q, k, v * b, g[..., None], p * b, k, scale, initial_state, output_final_state)


def chunk_dplr_delta_rule(q, k, v, a, b, gk, scale=None, initial_state=None, output_final_state=False):
    return recurrence(q, k, v, gk, -a, b, scale, initial_state, output_final_state)


STAND_INS = (
    *(chunk_linear_attn, chunk_simple_gla, chunk_gla, chunk_kda, chunk_gated_delta_rule, chunk_delta_rule),
    *(chunk_comba, chunk_dplr_delta_rule),
)


@pytest.fixture
def package(monkeypatch):
    """A module in the place of flash-linear-attention's, and tensors on a CPU let through."""
    module = ModuleType("fla.ops")
    for function in STAND_INS:
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", module)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return module


def test_every_kernel_stands_in() -> None:
    assert {function.__name__ for function in STAND_INS} == {kernel.name for kernel in KERNELS.values()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale", [None, 0.5])
def test_kernels_are_handed_what_they_expect(package, monkeypatch, family: str, scale: float | None) -> None:
    """All functions, with all gradients. (float32, and `delta_rule` let through in it.)"""
    monkeypatch.setitem(KERNELS, "delta_rule", KERNELS["delta_rule"]._replace(narrow=False))
    names, fast, _ = FAMILIES[family]
    drawn = draw(9)
    inputs = {name: drawn[name].float() for name in (*names, "s")}

    def run(way: str):
        def function(leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
            *own, s = leaves.values()
            y, state = fast(*own, initial_state=s, scale=scale, way=way)
            assert state.is_contiguous()
            return y.double(), state.double()

        return function

    for found, expected in zip(*(with_gradients(inputs, run(way)) for way in ("kernels", "chunked")), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    *own, _ = inputs.values()
    for found, expected in zip(*(fast(*own, way=way) for way in ("kernels", "chunked")), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)  # from nothing


def test_each_form_has_the_kernel_of_its_own(package, monkeypatch) -> None:
    asked = []
    for function in STAND_INS:
        monkeypatch.setattr(
            package, function.__name__, lambda *a, own=function, **told: (asked.append(own.__name__), own(**told))[1]
        )
    x = {name: part.bfloat16() for name, part in draw(3).items()}
    q, k, v, b, p = (x[name] for name in ("q", "k", "v", "b", "p"))
    for run in (
        lambda: linear.linear_attention(q, k, v, way="kernels"),
        lambda: linear.retention(q, k, v, way="kernels"),
        lambda: linear.gated_linear_attention(q, k, v, x["logk"], way="kernels"),
        lambda: linear.delta_rule(q, k, v, b, way="kernels"),
        lambda: linear.gated_delta_rule(q, k, v, b, x["log"], way="kernels"),
        lambda: linear.gated_delta_rule(q, k, v, b, x["logk"], way="kernels"),
        lambda: linear.comba(q, k, v, p, b, x["log"], way="kernels"),
        lambda: linear_memory(q, k, v, erase=p, way="kernels"),
    ):
        y, state = run()
        assert y.dtype == torch.bfloat16
        assert state.dtype == torch.float32
    assert asked == [kernel.name for kernel in KERNELS.values()]


def test_a_gate_that_forgets_all_is_a_number(package) -> None:
    x = {name: part.float() for name, part in draw(4).items()}
    gates = x["log"].clone()
    gates[:, 2] = -torch.inf
    for form in (
        linear.gated_linear_attention,
        lambda q, k, v, g, way: linear.gated_delta_rule(q, k, v, x["b"], g, way=way),
    ):
        found, expected = (form(x["q"], x["k"], x["v"], gates, way=way) for way in ("kernels", "chunked"))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_one_dtype_is_handed_over_and_the_values_one_comes_back(package, monkeypatch) -> None:
    """A step size in float32 makes mamba2's values float32."""
    x = draw(3)
    q, k, v = (x[name].bfloat16() for name in ("q", "k", "v"))
    y, _ = linear.mamba2(q, k, v, x["b"].float(), x["rate"].float(), way="kernels")
    assert y.dtype == torch.float32


def test_second_derivatives_are_refused(package) -> None:
    x = {name: part.float().requires_grad_() for name, part in draw(3).items()}
    y, _ = linear.gated_delta_rule(*(x[name] for name in ("q", "k", "v", "b", "log")), way="kernels")
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(y.square().sum(), x["k"], create_graph=True)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_is_read_from_nothing(package, monkeypatch, shape) -> None:
    monkeypatch.setattr(package, "chunk_gated_delta_rule", None)
    q, k, v = torch.randn(3, *shape, 2, 4)
    gates = torch.randn(2, *shape, 2)
    s = torch.randn(shape[0], 2, 4, 4)
    y, state = linear.gated_delta_rule(q, k, v, *gates, initial_state=s, way="kernels")
    assert y.shape == v.shape
    assert torch.equal(state, s)


LINEAR = (
    "linear_attention",
    "retnet",
    "mamba2",
    "gla",
    "deltanet",
    "gated_deltanet",
    "kda",
    "longhorn",
    "delta_product",
)
MIXED = ("hgrn2", "rwkv7", "comba")


OTHERS = {  # which have no kernel of their own
    "decay after": sequence_memory(matrix(), rule=retain(decay(), gradient_descent()), gradient_at="token"),
    "dot, erased": sequence_memory(matrix(), dot(), delta_gradient_descent(), gradient_at="token"),
}


@pytest.mark.parametrize("name", [*LINEAR, *MIXED, *OTHERS])
def test_layers_are_what_they_are_without(package, monkeypatch, name: str) -> None:
    """In one piece, and with documents, padding and a state carried on."""
    mixer = replace(OTHERS[name] if name in OTHERS else zoo[name].mixer, chunk=4)
    layers = [replace(mixer, way=way).build(8, 2, torch.Generator().manual_seed(0)) for way in ("chunked", "kernels")]
    x = torch.randn(2, 11, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    reset = torch.zeros(2, 11, dtype=torch.bool)
    reset[1, 5] = True
    valid = torch.ones_like(reset)
    valid[0, 8:] = False
    found = []
    for layer in layers:
        y, state = layer(x)
        z, after = layer(x, state, reset=reset, valid=valid)
        loss = y.square().sum() + (z * valid[..., None]).square().sum()
        memory = {name: part for name, part in flatten(after).items() if "memory" in name and "running" in name}
        gradients = torch.autograd.grad(loss, [x, *layer.parameters()])
        found.append([y, z * valid[..., None], *(memory or flatten(after.memory)).values(), *gradients])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("deltanet", "chunk_gated_delta_rule"),
        ("kda", "chunk_kda"),
        ("retnet", "chunk_simple_gla"),
        ("gla", "chunk_gla"),
    ],
)
def test_a_layer_calls_once_and_what_is_fastest(package, monkeypatch, name: str, kernel: str) -> None:
    own, calls = getattr(package, kernel), []
    monkeypatch.setattr(package, kernel, lambda *a, **told: (calls.append(kernel), own(*a, **told))[1])
    mixer = replace(zoo[name].mixer, chunk=4, way="kernels")
    mixer.build(8, 2, torch.Generator().manual_seed(0))(torch.randn(1, 11, 8))
    assert calls == [kernel]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "sequence_memory(way='kernels')",
            r"for matrix\(\) memories with .*, not for mlp\(\) with 'chunk', 'after' and 1",
        ),
        ("sequence_memory(matrix(), lp(), gradient_at='token', way='kernels')", r"which lp\(\) under .* is none of"),
        ("linear_mixer(mesa_streams(), way='kernels')", r"mesa_streams\(\) solves a system at every token"),
    ],
)
def test_models_without_kernels_say_so(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(text)


def test_a_momentum_has_no_kernel(package) -> None:
    mixer = sequence_memory(matrix(), rule=momentum(), gradient_at="token", way="kernels")
    with pytest.raises(ValueError, match="way='kernels' has a chunked form without momentum"):
        mixer.build(8, 2)(torch.randn(1, 3, 8))


def test_what_cannot_be_is_said(monkeypatch, package) -> None:
    x = {name: part.float() for name, part in draw(3).items()}
    q, k, v, b = (x[name] for name in ("q", "k", "v", "b"))
    with pytest.raises(ValueError, match=r"read='before'; use way='chunked'"):
        linear.delta_rule(q, k, v, b, read="before", way="kernels")
    with pytest.raises(ValueError, match=r"chunk_delta_rule takes q in one of torch.bfloat16.*got torch.float32"):
        linear.delta_rule(q, k, v, b, way="kernels")
    with pytest.raises(ValueError, match=r"got torch.float64"):
        linear.linear_attention(q.double(), k, v, way="kernels")
    with pytest.raises(ValueError, match=r"step_size must be \[2, 3, 2\]"):
        linear.gated_delta_rule(q, k, v, b[:, :2], x["log"], way="kernels")
    with pytest.raises(ValueError, match=r"v must be"):
        linear.gated_delta_rule(q, k, v[:, :2], b, x["log"], way="kernels")
    with pytest.raises(ValueError, match=r"way must be one of"):
        linear_memory(q, k, v, way="kernel")
    monkeypatch.delitem(sys.modules, "fla.ops")
    with pytest.raises(ValueError, match=r"chunk_linear_attn of flash-linear-attention: pip install 'nestling\[gpu\]'"):
        linear.linear_attention(q, k, v, way="kernels")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"on a GPU, got some on a CPU; use way='chunked'"):
        linear.linear_attention(q, k, v, way="kernels")


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("fla", "triton"))),
    reason="flash-linear-attention and Triton are not installed: pip install 'nestling[gpu]'",
)
def test_the_kernels_themselves_say_the_same() -> None:
    run = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    found = dict(line.split("\t") for line in run.stdout.splitlines())
    assert len(found) > 12
    for family, apart in found.items():
        assert float(apart) < (5e-3 if torch.cuda.is_available() or family in NARROW else 1e-5), family


NARROW = ("delta rule", "delta product without decay", "longhorn")  # in half the bits

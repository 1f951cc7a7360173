"""Gradients by hand against the plain expressions they stand for, and against finite differences of both orders."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from nestling.memory.gradient import SquaredNorms
from nestling.memory.structure import GeluError
from nestling.sequence.fused import LOG_ZERO, Decay, Look, Write

LEADING, TOKENS, IN, OUT = (2, 2), 4, 3, 2
SWITCHES = [
    (momentum, start, erase, retention)
    for momentum, start, erase, retention in itertools.product((False, True), repeat=4)
    if retention or not start
]


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, when: bool = True, lower: bool = False) -> Tensor | None:
        if not when:
            return None
        x = torch.randn(*shape, dtype=torch.float64, generator=generator)
        return (x.tril() if lower else x).requires_grad_()

    return normal


def check(function, plain, given: tuple[Tensor | None, ...]) -> None:
    """The function is the plain expression, and its gradients are those of finite differences."""

    def called(*tensors: Tensor) -> tuple[Tensor, ...]:
        left = iter(tensors)
        out = function.apply(*[None if x is None else next(left) for x in given])
        return tuple(y for y in (out if isinstance(out, tuple) else (out,)) if y is not None)

    tensors = tuple(x for x in given if x is not None)
    expected = plain(*given)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for found, wanted in zip(called(*tensors), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert gradcheck(called, tensors, fast_mode=True)
    assert gradgradcheck(called, tensors, fast_mode=True)


def standing(weight, start, buffer, x, b, f):
    answer = x @ weight.mT * (1.0 if b is None else b[..., None])
    if start is not None:
        answer = answer + x @ start.mT * (1.0 - b[..., None])
    return answer if buffer is None else answer + x @ buffer.mT * f[..., None]


def look(x, weight, start, buffer, inputs, writes, erased, b, f, written, kept):
    scores = x @ inputs.mT
    answer = standing(weight, start, buffer, x, b, f) - (scores * written) @ writes
    return answer if erased is None else answer - (scores * kept) @ erased


class LookAtValues(Look):
    @staticmethod
    def apply(*given):
        return Look.apply(False, *given)


@pytest.mark.parametrize(("momentum", "start", "erase", "retention"), SWITCHES)
@pytest.mark.parametrize("several", [1, 2])
def test_look(draw, several, momentum, start, erase, retention):
    maps, tokens, gates = (*LEADING, OUT, IN), (*LEADING, TOKENS), (2, several, TOKENS)
    check(
        LookAtValues,
        look,
        (
            draw(*tokens, IN),
            draw(*maps),
            draw(*maps, when=start),
            draw(*maps, when=momentum),
            draw(*tokens, IN),
            draw(*tokens, OUT),
            draw(*tokens, OUT, when=erase),
            draw(*gates, when=retention),
            draw(*gates, when=momentum),
            draw(*gates, TOKENS, lower=True),
            draw(*gates, TOKENS, lower=True, when=erase),
        ),
    )


SLOPE = 0.7


def write(weight, start, buffer, x, fixed, eta, beta, b, f, written, kept, b_end, f_end, m_end, *ends):
    written_end, kept_end, decayed = ends
    scores = x @ x.mT
    writes, erased, system = fixed, None, torch.eye(TOKENS, dtype=torch.float64)
    if eta is not None:
        system = system + scores * written * (SLOPE * eta[..., None, :])
    if beta is not None:
        system = system + scores * kept * beta[..., None, :]
    seen = torch.linalg.inv(system) @ (standing(weight, start, buffer, x, b, f) - (scores * written) @ fixed)
    if eta is not None:
        writes = writes + SLOPE * eta[..., None] * seen
    after = weight * (1.0 if b_end is None else b_end[..., None, None]) - (writes * written_end[..., None]).mT @ x
    if start is not None:
        after = after + start * (1.0 - b_end[..., None, None])
    if beta is not None:
        erased = seen * beta[..., None]
        after = after - (erased * kept_end[..., None]).mT @ x
    outs = [after, writes] if erased is None else [after, writes, erased]
    if buffer is not None:
        outs[0] = after + buffer * f_end[..., None, None]
        outs.insert(1, buffer * m_end[..., None, None] - (writes * decayed[..., None]).mT @ x)
    return tuple(outs)


class WriteStrictly(Write):
    """With matrices cut to their strict lower triangles: differences that leave them are not the function's."""

    @staticmethod
    def apply(*given):
        given = list(given)
        for i in (9, 10):
            given[i] = None if given[i] is None else given[i].tril(-1)
        return Write.apply(SLOPE, False, *given)


@pytest.mark.parametrize(("momentum", "start", "erase", "retention"), SWITCHES)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("several", [1, 2])
def test_write(draw, several, exact, momentum, start, erase, retention):
    maps, tokens, gates = (*LEADING, OUT, IN), (*LEADING, TOKENS), (2, several)
    check(
        WriteStrictly,
        lambda *given: write(*given[:9], *(None if m is None else m.tril(-1) for m in given[9:11]), *given[11:]),
        (
            draw(*maps),
            draw(*maps, when=start),
            draw(*maps, when=momentum),
            draw(*tokens, IN),
            draw(*tokens, OUT),
            draw(*gates, TOKENS, when=exact),
            draw(*gates, TOKENS, when=erase),
            draw(*gates, TOKENS, when=retention),
            draw(*gates, TOKENS, when=momentum),
            draw(*gates, TOKENS, TOKENS),
            draw(*gates, TOKENS, TOKENS, when=erase),
            draw(*gates, when=retention),
            draw(*gates, when=momentum),
            draw(*gates, when=momentum),
            draw(*gates, TOKENS),
            draw(*gates, TOKENS, when=erase),
            draw(*gates, TOKENS, when=momentum),
        ),
    )


class TestDecay:
    def test_is_the_product_of_the_gates_between(self, draw):
        def plain(log_gates: Tensor) -> tuple[Tensor, Tensor]:
            gates = log_gates.exp()
            rows = [
                torch.stack([gates[..., j + 1 : t + 1].prod(-1) * (j <= t) for j in range(TOKENS)], -1)
                for t in range(TOKENS)
            ]
            return torch.stack(rows, -2), gates.cumprod(-1)

        check(Decay, plain, ((-draw(2, TOKENS).detach().abs()).requires_grad_(),))

    def test_a_gate_of_zero_forgets_all_and_gets_no_gradient(self):
        log_gates = torch.tensor([-0.1, -torch.inf, -0.2], requires_grad=True)
        products, first = Decay.apply(log_gates)
        torch.testing.assert_close(first, torch.tensor([-0.1, -torch.inf, -torch.inf]).exp())
        torch.testing.assert_close(products[2], torch.tensor([0.0, (torch.tensor(-0.2)).exp().item(), 1.0]))
        (products.sum() + first.sum()).backward()
        assert log_gates.grad is not None
        assert log_gates.grad.isfinite().all()
        assert log_gates.grad[1] == 0
        assert LOG_ZERO < -30


def test_the_error_before_a_gelu(draw):
    def plain(error: Tensor, x: Tensor) -> Tensor:
        return torch.autograd.grad(F.gelu(x), x, error, create_graph=True)[0]

    check(GeluError, plain, (draw(7), draw(7)))


def test_squared_norms(draw):
    check(SquaredNorms, lambda x: (x * x).sum(-1), (draw(3, 7),))


def test_the_squared_norm_of_nothing_has_a_gradient():
    x = torch.zeros(2, 3, requires_grad=True)
    SquaredNorms.apply(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.zeros(2, 3))

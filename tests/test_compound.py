"""Gated, normed and biased memories and feature maps: by hand, by autograd, and against the naive oracle."""

import math
from functools import lru_cache
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from miras import F64, LENGTHS, assert_is_oracle, fast, make
from nestling.memory import (
    Gates,
    biased,
    decay,
    dot,
    elu_plus_one,
    exponential,
    features,
    gated_mlp,
    identity,
    l2,
    matrix,
    mlp,
    momentum,
    normed,
    parse,
    plain,
    polynomial,
    retain,
)
from nestling.memory.naive_miras import naive_miras, residual_mlp
from nestling.sequence import Memory, sequence_memory
from nestling.sequence.scan import Writes

TTT_LINEAR = normed(biased(matrix()))
STRUCTURES = [
    gated_mlp(),
    gated_mlp(expansion=1.5, residual=True),
    normed(),
    normed(gated_mlp(), residual=False),
    TTT_LINEAR,
    biased(),
    biased(mlp(depth=3, activation="silu")),
    normed(biased(mlp(expansion=2.0, residual=False))),
    features(),
    features(matrix(), identity()),
    features(mlp(residual=False), polynomial()),
    features(biased(matrix()), exponential()),
    biased(features(gated_mlp(), polynomial())),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def phi(kind, key: Tensor) -> Tensor:
    """Features of one key: for kernels of <q, k>, every product of channels of every order."""
    if isinstance(kind, identity):
        return key
    if isinstance(kind, elu_plus_one):
        return torch.where(key > 0, key + 1, key.exp())
    found = []
    for powers in product(range(kind.degree + 1), repeat=len(key)):
        if sum(powers) <= kind.degree:
            ways = math.prod(math.factorial(n) for n in powers)
            if isinstance(kind, polynomial):
                ways *= math.factorial(kind.degree - sum(powers)) / math.factorial(kind.degree)
            found.append(math.prod(x**n for x, n in zip(key, powers, strict=True)) * ways**-0.5)
    return torch.stack([torch.as_tensor(x, dtype=F64) for x in found])


@lru_cache
def order(kind, width: int) -> Tensor:
    """Where the library has each of `phi`'s features: found by distinct primes as channels."""
    probe = torch.tensor([math.log(prime) for prime in (2, 3, 5, 7)[:width]], dtype=F64).exp()
    mine, theirs = kind.features(probe), phi(kind, probe)
    return (mine[:, None] - theirs[None]).abs().argmin(1)


def by_hand(structure, weights, x: Tensor) -> Tensor:
    """M(x) of one token, written out with plain weights [out, in]."""
    match structure:
        case matrix():
            return weights[0] @ x
        case mlp():
            y = x
            for index, weight in enumerate(weights):
                y = weight @ ((F.gelu(y) if structure.activation == "gelu" else y * y.sigmoid()) if index else y)
            return x + y if structure.residual else y
        case gated_mlp():
            gate = weights[0] @ x
            y = weights[2] @ (gate * gate.sigmoid() * (weights[1] @ x))
            return x + y if structure.residual else y
        case normed():
            y = by_hand(structure.of, weights, x)
            y = (y - y.mean()) / ((y - y.mean()).square().mean() + 1e-6).sqrt()
            return x + y if structure.residual else y
        case features(of, kind):
            chosen = phi(kind, x)
            return by_hand(of, weights, chosen if len(chosen) == len(x) else chosen[order(kind, len(x))])
        case biased(features(of, kind)):
            return by_hand(features(biased(of), kind), weights, x)
        case biased(of):
            return with_biases(of, weights, x)
    raise AssertionError(structure)


def with_biases(of, weights, x: Tensor) -> Tensor:
    w, b = [weight[:, :-1] for weight in weights], [weight[:, -1] for weight in weights]
    match of:
        case matrix():
            return w[0] @ x + b[0]
        case mlp():
            y = w[0] @ x + b[0]
            for weight, bias in zip(w[1:], b[1:], strict=True):
                y = weight @ (F.gelu(y) if of.activation == "gelu" else y * y.sigmoid()) + bias
            return x + y if of.residual else y
        case gated_mlp():
            gate = w[0] @ x + b[0]
            return w[2] @ (gate * gate.sigmoid() * (w[1] @ x + b[1])) + b[2]
    raise AssertionError(of)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
class TestStructure:
    KEY, VALUE, TOKENS = 3, 3, 5

    def made(self, structure):
        weights = structure.init(self.KEY, self.VALUE, (2,), torch.Generator().manual_seed(0))
        moved = tuple(w.to(F64) + 0.2 * normal(*w.shape, seed=i + 7) for i, w in enumerate(weights))
        return tuple(w.requires_grad_() for w in moved), normal(2, self.TOKENS, self.KEY, seed=1).requires_grad_()

    def test_forward_is_the_function_written_out(self, structure):
        weights, keys = self.made(structure)
        values, inputs, outputs = structure.forward(plain(weights), keys)
        for row in range(2):
            expected = [by_hand(structure, [w[row] for w in weights], key) for key in keys[row]]
            torch.testing.assert_close(values[row], torch.stack(expected), rtol=1e-12, atol=1e-12)
        assert [tuple(w.shape[1:]) for w in weights] == list(structure.shapes(self.KEY, self.VALUE))
        for weight, x, output in zip(weights, inputs, outputs, strict=True):
            torch.testing.assert_close(x @ weight.mT, output)
        mapped = structure.map_keys(keys)
        met = [x.shape == mapped.shape and torch.allclose(x, mapped, rtol=1e-12) for x in inputs]
        assert met == [True] * structure.meets_keys + [False] * (len(inputs) - structure.meets_keys)
        if structure.bare:
            torch.testing.assert_close(values, outputs[-1])
        assert structure.linear == (len(weights) == 1 and structure.bare)

    def test_backward_is_autograds(self, structure):
        weights, keys = self.made(structure)
        values, inputs, outputs = structure.forward(plain(weights), keys)
        error = normal(*values.shape, seed=3)
        found = structure.backward(weights, outputs, error)
        for mine, x, dense in zip(found, inputs, torch.autograd.grad(values, weights, error), strict=True):
            torch.testing.assert_close(mine.mT @ x, dense, rtol=1e-12, atol=1e-12)

    def test_the_backward_has_a_gradient_of_its_own(self, structure):
        weights, keys = self.made(structure)
        error = normal(2, self.TOKENS, self.VALUE, seed=3).requires_grad_()

        def errors(keys, error, *weights):
            return structure.backward(weights, structure.forward(plain(weights), keys)[2], error)

        assert torch.autograd.gradcheck(errors, (keys, error, *weights), fast_mode=True)

    def test_prints_and_parses(self, structure):
        assert parse(repr(structure)) == structure

    @pytest.mark.parametrize(("length", "way"), [(n, "chunked") for n in LENGTHS] + [(7, "recurrent")])
    def test_in_a_memory_it_is_the_oracle(self, structure, length, way):
        memory = Memory(structure, l2(), retain(decay()), 16, "chunk", "after", way)
        data = make(memory, length, key=3, value=3, step_size=0.003)
        slope = lambda read, value, key: read - value  # noqa: E731
        function = lambda weights, key: by_hand(structure, weights, key)  # noqa: E731
        assert_is_oracle(memory, data, lambda starts, flow: naive_miras(function, slope, starts, flow, chunk=16))


@pytest.mark.parametrize("structure", [gated_mlp(), TTT_LINEAR, features(mlp(residual=False), polynomial())], ids=str)
def test_a_chunk_of_one_is_recurrent_and_no_other_is(structure):
    def ends(chunk, gradient_at="chunk", way="chunked"):
        memory = Memory(structure, dot(), retain(decay()), chunk, gradient_at, "before", way)
        y, state = fast(memory, make(memory, 20, step_size=0.05))
        return [y, *state.running]

    for mine, theirs in zip(ends(1), ends(16, "token", "recurrent"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(ends(16), ends(1), strict=True):
        assert (mine - theirs).abs().max() > 1e-4


LINEAR = [biased(), features(), features(biased(), polynomial()), biased(features(matrix(), exponential()))]


@pytest.mark.parametrize("structure", LINEAR, ids=str)
@pytest.mark.parametrize("bias", [dot(), l2()], ids=str)
def test_one_linear_map_has_a_chunked_form_at_every_token(structure, bias):
    memory = Memory(structure, bias, retain(decay()), 16, "token")
    data = make(memory, 37, key=3, value=2, step_size=0.1)
    slope = lambda read, value, key: -value if bias == dot() else read - value  # noqa: E731
    function = lambda weights, key: by_hand(structure, weights, key)  # noqa: E731
    assert_is_oracle(memory, data, lambda starts, flow: naive_miras(function, slope, starts, flow))


def test_titans_memory_written_in_two_forms():
    memory = Memory(normed(mlp(residual=False, expansion=4.0)), l2(), retain(decay()), 8, "chunk")
    data = make(memory, 21, step_size=0.01)
    slope = lambda read, value, key: read - value  # noqa: E731
    assert_is_oracle(memory, data, lambda starts, flow: naive_miras(residual_mlp, slope, starts, flow, chunk=8))


def test_a_vector_memory_is_a_matrix_in_heads_of_width_one():
    """w <- a w - b (w k - v) k, channel by channel."""
    t, d = 19, 5
    k, v, q = normal(3, t, d).unbind()
    b, a = normal(2, t, d, seed=3).sigmoid().unbind()
    w, reads = normal(d, seed=4), []
    start = w
    for i in range(t):
        w = a[i] * w - b[i] * (w * k[i] - v[i]) * k[i]
        reads.append(w * q[i])
    memory = Memory(matrix(), l2(), retain(decay()), 8, "token")
    k, v, q = (x.T[None, ..., None] for x in (k, v, q))
    pairs = Writes(k, v, Gates(b.T[None], 0.0, a.log().T[None]))
    y, state = memory.run(memory.begin((start[None, :, None, None],)), pairs, q)
    torch.testing.assert_close(y[0, ..., 0].T, torch.stack(reads))
    torch.testing.assert_close(state.running[0][0, :, 0, 0], w)


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4))
def test_kernels(seed, width, degree):
    q, k = normal(2, width, seed=seed).unbind()
    (inner,) = (q @ k)[None]
    poly, taylor = polynomial(degree), exponential(degree)
    torch.testing.assert_close(poly.features(q) @ poly.features(k), (1 + inner) ** degree, rtol=1e-9, atol=1e-9)
    series = sum(inner**i / math.factorial(i) for i in range(degree + 1))
    torch.testing.assert_close(taylor.features(q) @ taylor.features(k), series, rtol=1e-9, atol=1e-9)
    assert poly.features(q).shape == (poly.width(width),)
    assert (elu_plus_one().features(q) > 0).all()
    assert torch.equal(identity().features(q), q)


def test_features_made_without_gradients_serve_with_them():
    kind = polynomial(3)
    with torch.inference_mode():
        kind.features(normal(9))
    keys = normal(2, 9).requires_grad_()
    assert torch.autograd.gradcheck(kind.features, (keys,), fast_mode=True)
    assert kind.features(keys.float()).dtype == torch.float32


@pytest.mark.parametrize("structure", [TTT_LINEAR, gated_mlp(residual=True), features(matrix(), polynomial())], ids=str)
def test_layers_learn_through_it(structure):
    layer = sequence_memory(structure, rule=retain(decay(), momentum()), chunk=4).build(
        8, 2, torch.Generator().manual_seed(0)
    )
    y, state = layer(torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(1)))
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in layer.start)
    assert layer(y.detach(), state)[0].isfinite().all()


def test_starts():
    made = biased(mlp(residual=False)).init(8, 8, (2,), torch.Generator().manual_seed(0), unit_keys=True)
    bare = mlp(residual=False).init(8, 8, (2,), torch.Generator().manual_seed(0), unit_keys=True)
    for mine, theirs in zip(made, bare, strict=True):
        assert torch.equal(mine[..., :-1], theirs)
        assert not mine[..., -1].any()
    gate, up, last = gated_mlp().init(64, 64, (4,), torch.Generator().manual_seed(0), unit_keys=True)
    assert [round(w.std().item() * 8, 1) for w in (gate, up, last)] == [8.0, 8.0, 0.3]
    (wide,) = features(matrix(), polynomial()).init(6, 3, (), torch.Generator().manual_seed(0))
    assert wide.shape == (3, 28)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: gated_mlp(expansion=0.0), "gated_mlp: expansion must be more than 0, got 0.0"),
        (lambda: gated_mlp(residual=True).shapes(4, 3), "got 4 and 3; set residual=False"),
        (lambda: normed(mlp()), r"normed\(mlp\(\)\): needs a structure without a residual"),
        (lambda: normed(normed(matrix())), "without a residual or a norm of its own"),
        (lambda: normed().shapes(4, 3), "got 4 and 3; set residual=False"),
        (lambda: normed(residual=False).init(4, 1), "at least 2 channels, got 1"),
        (lambda: features(mlp(), polynomial()).init(4, 4), "got 15 and 4; set residual=False"),
        (lambda: polynomial(0), "polynomial: degree must be a whole number of at least 1, got 0"),
        (lambda: exponential(1.5), "exponential: degree must be a whole number of at least 1, got 1.5"),
        (lambda: Memory(biased(mlp()), gradient_at="token"), r"one linear map, not for biased\(mlp\(\)\)"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_memory_too_large_to_be_meant_is_refused():
    words = r"mlp\(residual=False\) over the 47,905 features that exponential\(degree=3\) makes of 64 channels.* GB"
    with pytest.raises(ValueError, match=words):
        features(mlp(residual=False), exponential(3)).init(64, 64)
    assert features(matrix(), exponential(3)).init(64, 64)[0].shape == (64, 47_905)

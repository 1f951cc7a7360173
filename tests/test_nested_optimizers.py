"""Nested Learning's optimizers against their equations: DGD, delta momentum, M3, and optimizers as memories."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from nestling.memory import (
    Gates,
    Pairs,
    Rule,
    Summed,
    adagrad,
    adam,
    add,
    ascent,
    average,
    decay,
    delta_gradient_descent,
    every,
    gradient_descent,
    joint_delta_gradient_descent,
    momentum,
    newton_schulz,
    normalize,
    remember,
    retain,
    ridge,
    scale,
    surprise,
)
from nestling.memory.orthogonal import CUBIC, orthogonalize
from nestling.optim import (
    M3,
    AdamW,
    DeltaGradientDescent,
    DeltaMomentum,
    FullMatrixAdagrad,
    PreconditionedMomentum,
    explain,
    to_optimizer,
)

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=tolerance, atol=tolerance)


def direct_solve(weight: Tensor, x: Tensor, error: Tensor, eta: float) -> Tensor:
    """argmin_W |W X + E|^2 / 2 + |W - W_t|^2 / (2 eta): its normal equations, entry by entry as one system."""
    rows, columns = weight.shape
    system = torch.kron(torch.eye(rows, dtype=F64), x.T @ x + torch.eye(columns, dtype=F64) / eta)
    target = weight / eta - error.T @ x
    return torch.linalg.solve(system, target.flatten()).view(rows, columns)


@pytest.mark.parametrize("rule", [delta_gradient_descent(), joint_delta_gradient_descent()], ids=str)
@pytest.mark.parametrize("length", [0.3, 1.0, 4.0])
def test_dgd_of_one_pair_is_the_direct_solve(rule, length):
    weight, x, error = normal(3, 5), normal(1, 5, seed=1), normal(1, 3, seed=2)
    x = length * x / x.norm()
    stepped, _ = rule.step(weight, Pairs(error, x), rule.init(weight), Gates(0.7))
    same(stepped, direct_solve(weight, x, error, 0.7))


@pytest.mark.parametrize("n", [2, 4, 5, 11])
@pytest.mark.parametrize("summed", [False, True])
def test_dgd_of_a_batch_is_the_direct_solve(n, summed):
    """Fewer pairs than inputs (Woodbury), as many, and more; from pairs, and from their Gram matrix."""
    weight, x, error = normal(3, 5), normal(n, 5, seed=1), normal(n, 3, seed=2)
    rule = joint_delta_gradient_descent()
    gradient = Summed(error.T @ x, x.T @ x, n) if summed else Pairs(error, x)
    stepped, _ = rule.step(weight, gradient, rule.init(weight), Gates(0.7))
    same(stepped, direct_solve(weight, x, error, 0.7))


class TestDeltaGradientDescent:
    def run(self, form: str, reduction: str, pieces: int = 1) -> tuple[nn.Linear, nn.Linear, Tensor, Tensor]:
        torch.manual_seed(0)
        net, x, y = nn.Linear(5, 3).double(), normal(12, 5), normal(12, 3, seed=1)
        before = nn.Linear(5, 3).double()
        before.load_state_dict(net.state_dict())
        optimizer = DeltaGradientDescent(net.parameters(), lr=0.2, form=form, reduction=reduction)
        for part, target in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            with optimizer.capture(net):
                losses = 0.5 * (net(part) - target).square().sum(-1)
            (losses.mean() / pieces if reduction == "mean" else losses.sum()).backward()
        optimizer.step()
        return before, net, x, y

    @pytest.mark.parametrize("pieces", [1, 3], ids=["whole", "accumulated"])
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_exact(self, reduction, pieces):
        before, net, x, y = self.run("exact", reduction, pieces)
        error = before(x) - y
        root = 12**0.5 if reduction == "mean" else 1.0
        same(net.weight, direct_solve(before.weight.detach(), x / root, error.detach() / root, 0.2))
        share = error.mean(0) if reduction == "mean" else error.sum(0)
        same(net.bias, before.bias - 0.2 * share)

    def test_averaged(self):
        before, net, x, y = self.run("averaged", "mean")
        gram, slope = x.T @ x / 12, (before(x) - y).T @ x / 12
        eta = 0.2 / (1 + 0.2 * gram.trace())
        same(net.weight, before.weight - eta * before.weight @ gram - eta * slope)

    def test_what_was_not_captured_descends(self):
        weight = nn.Parameter(normal(3, 5))
        start, weight.grad = weight.detach().clone(), normal(3, 5, seed=1)
        DeltaGradientDescent([weight], lr=0.1, weight_decay=0.5).step()
        same(weight, 0.95 * start - 0.1 * normal(3, 5, seed=1))


def test_backpropagation_writes_into_a_memory():
    """Equation 9: a step of SGD on a layer minimises <W x, u> + |W - W_t|^2 / (2 eta), u the local surprise."""
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2, bias=False)).double()
    before, x = net[0].weight.detach().clone(), normal(1, 4, seed=1)
    y = net[0](x)
    y.retain_grad()
    net[2](y.tanh()).square().sum().backward()
    to_optimizer(gradient_descent(), net.parameters(), step_size=0.3).step()
    found = net[0].weight.detach().requires_grad_()
    objective = (found @ x[0] * y.grad[0]).sum() + (found - before).square().sum() / (2 * 0.3)
    assert float(torch.autograd.grad(objective, found)[0].abs().max()) < 1e-12


def minimiser(objective, start: Tensor) -> Tensor:
    """Of a function that is quadratic entry by entry: one Newton step by autograd."""
    at = start.clone().requires_grad_()
    slope = torch.autograd.grad(objective(at), at, create_graph=True)[0]
    return (at - slope / torch.autograd.grad(slope.sum(), at)[0]).detach()


def test_backpropagation_through_three_layers_writes_into_three_memories():
    """Equation 31: each layer's step minimises the sum of <W x, delta> + |W - W_t|^2 / (2 eta), its own inputs the
    keys, the errors at its outputs the values."""
    layers = [nn.Linear(4, 5).double(), nn.Linear(5, 6).double(), nn.Linear(6, 2).double()]
    x, inputs, outputs = normal(7, 4, seed=1), [], []
    for layer in layers:
        inputs.append(x.detach())
        x = layer(x)
        x.retain_grad()
        outputs.append(x)
        x = x.tanh()
    x.square().sum().backward()
    before = [layer.weight.detach().clone() for layer in layers]
    to_optimizer(gradient_descent(), [layer.weight for layer in layers], step_size=0.3).step()
    for layer, old, keys, answers in zip(layers, before, inputs, outputs, strict=True):
        delta = answers.grad
        found = minimiser(
            lambda w, k=keys, d=delta, o=old: (k @ w.T * d).sum() + (w - o).square().sum() / (2 * 0.3),
            torch.zeros_like(old),
        )
        same(layer.weight, found, 1e-10)


@pytest.mark.parametrize("rule", [delta_gradient_descent(), joint_delta_gradient_descent()], ids=str)
def test_delta_decays_along_the_input_alone(rule):
    """Without an error what W says to x decays by eta' |x|^2, and what it says across x not at all."""
    weight, x = normal(3, 5), normal(1, 5, seed=1)
    across = normal(5, seed=2)
    across = across - x[0] * (across @ x[0]) / (x[0] @ x[0])
    stepped, _ = rule.step(weight, Pairs(torch.zeros(1, 3, dtype=F64), x), rule.init(weight), Gates(0.7))
    size = float(x[0] @ x[0])
    same(stepped @ x[0], (1 - 0.7 * size / (1 + 0.7 * size)) * weight @ x[0])
    same(stepped @ across, weight @ across)


def test_a_changed_gradient_brings_its_inputs_along():
    """What normalises by the inputs does so behind a change of the gradient too."""
    weight, pairs, gates = normal(3, 5), Pairs(normal(2, 3, seed=1), normal(2, 5, seed=2)), Gates(0.7)
    plain = normalize()
    expected, _ = plain.update(weight, pairs, plain.init(weight), gates)
    for rule, factor in ((ridge(normalize(), 0.0), 1.0), (ascent(normalize()), -1.0)):
        same(rule.update(weight, pairs, rule.init(weight), gates)[0], factor * expected)


def test_what_counts_inputs_begins_anew_where_the_point_of_gradients_moves():
    """A memory of gradients has moved after each of them; two directions side by side move together."""
    gates, weight = Gates(0.7), normal(3, 5)
    first, second = (Pairs(normal(2, 3, seed=seed), normal(2, 5, seed=seed + 5)) for seed in (1, 2))

    def bounded(pairs: Pairs) -> Tensor:
        return -pairs.error.T @ pairs.input * 0.7 / (1 + 0.7 * pairs.input.square().sum())

    memory = remember(retain(decay(), normalize()))
    one, state = memory.update(weight, first, memory.init(weight), gates)
    two, _ = memory.update(weight, second, state, gates)
    same(one, bounded(first))
    same(two, bounded(first) + bounded(second))
    both = add(normalize(), normalize(), share=0.5)
    _, state = both.update(weight, first, both.init(weight), gates)
    again, _ = both.update(weight, second, both.anchor(state), gates)
    same(again, 1.5 * bounded(second))


def test_momentum_is_a_memory_of_gradients():
    """Equation 33: the buffer is a weight of its own, learned by descent and retention on its dot product."""
    weight = normal(3, 4)
    one, two = scale(momentum(surprise())), scale(remember(step_size=1.0, retention=0.8))
    s1, s2, w1, w2 = one.init(weight), two.init(weight), weight, weight
    for seed in range(5):
        g = Summed(normal(3, 4, seed=seed))
        w1, s1 = one.step(w1, g, s1, Gates(0.1, 0.8))
        w2, s2 = two.step(w2, g, s2, Gates(0.1))
    same(w1, w2)


def test_adaptive_scaling_is_the_optimal_memory():
    """Equations 101 to 105 with weights one: the minimiser of sum |m g_i - P|^2, P the root of the summed squares, is
    the sum of gradients over that root: adagrad of a momentum that forgets nothing."""
    gradients = normal(9, 3, 4)
    spread = gradients.square().sum(0).sqrt()
    m = torch.zeros(3, 4, dtype=F64, requires_grad=True)
    objective = (m * gradients - spread).square().sum()
    slope = torch.autograd.grad(objective, m, create_graph=True)[0]
    curvature = torch.autograd.grad(slope.sum(), m)[0]
    minimiser = (m - slope / curvature).detach()  # quadratic, entry by entry: one Newton step
    rule = adagrad(momentum(surprise()), eps=0.0)
    state, weight = rule.init(m.detach()), m.detach()
    for g in gradients:
        update, state = rule.update(weight, Summed(g), state, Gates(1.0, 1.0))
    same(-update, minimiser)


@pytest.mark.parametrize(("beta1", "beta2"), [(0.8, 0.8), (0.8, 0.95)])
def test_the_adam_that_users_run_minimises_a_quadratic_too(beta1, beta2):
    """sum_i b_i (m g_i)^2 / 2 - m P sum_i a_i g_i, a and b the normalised weights of the two averages, P^2 = sum b g^2.
    With one decay that is equation 101, sum b_i (m g_i - P)^2 / 2 up to a constant; with two, as users have it, the
    fit is to gradients weighed otherwise than those that it correlates with, and no sum of squares of m g_i - P."""
    gradients, t = normal(9, 3, 4), 9
    ages = torch.arange(t - 1, -1, -1, dtype=F64)
    a, b = ((1 - beta) * beta**ages / (1 - beta**t) for beta in (beta1, beta2))
    a, b = a[:, None, None], b[:, None, None]
    spread = (b * gradients.square()).sum(0).sqrt()
    start = torch.ones(3, 4, dtype=F64)
    found = minimiser(
        lambda m: 0.5 * (b * (m * gradients).square()).sum() - (m * spread * (a * gradients).sum(0)).sum(), start
    )
    rule, weight = adam(surprise(), beta1, beta2, eps=0.0), torch.zeros(3, 4, dtype=F64)
    state = rule.init(weight)
    for g in gradients:
        update, state = rule.update(weight, Summed(g), state, Gates())
    same(-update, found, 1e-10)
    in_appendix_b = minimiser(lambda m: 0.5 * (b * (m * gradients - spread).square()).sum(), start)
    assert torch.allclose(in_appendix_b, found, atol=1e-10) == (beta1 == beta2)


def test_full_matrix_adagrad_of_a_vector():
    """Equation 111 for a column: H^(-1/2) g with H the sum of outer products."""
    weight, h, expected = nn.Parameter(normal(4)), torch.zeros(4, 4, dtype=F64), normal(4)
    optimizer = FullMatrixAdagrad([weight], lr=0.1, eps=1e-3)
    for seed in range(5):
        g = normal(4, seed=seed + 1)
        weight.grad = g.clone()
        optimizer.step()
        h = h + torch.outer(g, g)
        values, vectors = torch.linalg.eigh(h + 1e-3 * torch.eye(4, dtype=F64))
        expected = expected - 0.1 * vectors @ torch.diag(values**-0.5) @ vectors.T @ g
    same(weight, expected, 1e-10)


@pytest.mark.parametrize("form", ["literal", "bounded"])
def test_delta_momentum_descends_its_objective(form):
    """Equation 48: one step from S is S - c d/dS |S g^T + I|^2 / 2, retention on S beside it."""
    weight = nn.Parameter(normal(3, 5))
    before, s = weight.detach().clone(), torch.zeros(3, 5, dtype=F64)
    optimizer = DeltaMomentum([weight], lr=0.05, momentum=0.8, form=form)
    for seed in range(4):
        g = normal(3, 5, seed=seed + 1)
        weight.grad = g.clone()
        optimizer.step()
        at = s.clone().requires_grad_()
        objective = 0.5 * (at @ g.T + torch.eye(3, dtype=F64)).square().sum()
        c = 0.05 if form == "literal" else 0.05 / (1 + 0.05 * float(g.square().sum()))
        s = 0.8 * s - c * torch.autograd.grad(objective, at)[0]
        before = before + s
        same(weight, before)


def test_preconditioned_momentum():
    weight = nn.Parameter(normal(3, 5))
    expected, s, h = weight.detach().clone(), 0.0, torch.zeros(3, 3, dtype=F64)
    optimizer = PreconditionedMomentum([weight], lr=0.05, momentum=0.8, eps=1e-4)
    for seed in range(4):
        g = normal(3, 5, seed=seed + 1)
        weight.grad = g.clone()
        optimizer.step()
        h = h + g @ g.T
        left, size, right = torch.linalg.svd(h + 1e-4 * torch.eye(3, dtype=F64))
        s = 0.8 * s - 0.05 * left @ torch.diag(size**-0.5) @ right @ g
        expected = expected + s
    same(weight, expected, 1e-10)


@pytest.mark.parametrize("shape", [(4, 4), (3, 5)], ids=str)
def test_a_quarter_step_on_the_orthogonality_objective_is_cubic_newton_schulz(shape):
    """Equation 44 is a step on |O - g|^2 / 2 + |O^T O - I|^2 / 2 (not on 43, which leaves the first term out), here by
    autograd from O = g."""
    g = normal(*shape)
    g = g / g.norm()
    at = g.clone().requires_grad_()
    eye = torch.eye(shape[1], dtype=F64)
    objective = 0.5 * (at - g).square().sum() + 0.5 * (at.T @ at - eye).square().sum()
    same(orthogonalize(g, 1, CUBIC, 1e-7), g - 0.25 * torch.autograd.grad(objective, at)[0])
    full = orthogonalize(g, 60, CUBIC, 1e-7)
    same(full @ full.T, torch.eye(shape[0], dtype=F64), 1e-8)


def test_several_momenta_at_one_frequency():
    """Three decay rates side by side: the sum of three unbiased averages, each written out."""
    betas = (0.5, 0.9, 0.99)
    rule = scale(add(average(beta=0.5), add(average(beta=0.9), average(beta=0.99))))
    weight = nn.Parameter(normal(3, 4))
    expected, buffers = weight.detach().clone(), [torch.zeros(3, 4, dtype=F64) for _ in betas]
    optimizer = to_optimizer(rule, [weight], step_size=0.1)
    for step in range(1, 6):
        weight.grad = normal(3, 4, seed=step)
        optimizer.step()
        buffers = [b * m + (1 - b) * weight.grad for b, m in zip(betas, buffers, strict=True)]
        expected = expected - 0.1 * sum(m / (1 - b**step) for b, m in zip(betas, buffers, strict=True))
        same(weight, expected)
    assert explain(optimizer).count("first moment m, unbiased") == 3


def quintic(x: Tensor, steps: int = 5) -> Tensor:
    flip = x.shape[0] > x.shape[1]
    x = x.T if flip else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x - 4.775 * a @ x + 2.0315 * a @ a @ x
    return x.T if flip else x


M3_OPTIONS = {"lr": 0.01, "alpha": 0.6, "periods": 4, "eps": 1e-3, "precision": "weight"}


class TestM3:
    def trajectory(self, steps: int = 13, shape=(6, 4), **options) -> tuple[list[Tensor], M3, nn.Parameter]:
        weight = nn.Parameter(normal(*shape))
        optimizer, seen = M3([weight], **{**M3_OPTIONS, **options}), []
        for step in range(steps):
            weight.grad = normal(*shape, seed=step + 1)
            optimizer.step()
            seen.append(weight.detach().clone())
        return seen, optimizer, weight

    def test_paper_is_algorithm_1(self):
        f, (b1, b2, b3), alpha, lr, eps = 4, (0.9, 0.5, 0.7), 0.6, 0.01, 1e-3
        seen, _, _ = self.trajectory(mode="paper", betas=(b1, b2, b3))
        theta = normal(6, 4)
        m1 = m2 = v = torch.zeros(6, 4, dtype=F64)
        chunk: list[Tensor] = []
        for k in range(4):  # the slow loop
            m2 = m2 + b3 * sum(chunk, torch.zeros(6, 4, dtype=F64))
            o2 = quintic(m2)
            assert bool(o2.any()) == (k > 0)
            chunk = []
            for t in range(k * f, min((k + 1) * f, 13)):
                g = normal(6, 4, seed=t + 1)
                chunk.append(g)
                m1, v = m1 + b1 * g, v + b2 * g**2
                theta = theta - lr * (quintic(m1) + alpha * o2) / (v.sqrt() + eps)
                same(seen[t], theta)

    def test_the_slow_memory_is_silent_for_a_period_then_constant_within_each(self):
        """Told by the difference that alpha makes to the steps."""
        steps = []
        for alpha in (0.0, 0.6):
            weight = nn.Parameter(normal(6, 4))
            optimizer = M3([weight], **{**M3_OPTIONS, "mode": "paper", "alpha": alpha})
            own = []
            for step in range(13):
                before, weight.grad = weight.detach().clone(), normal(6, 4, seed=step + 1)
                optimizer.step()
                v = sum(0.999 * normal(6, 4, seed=s + 1) ** 2 for s in range(step + 1))
                own.append((before - weight.detach()) * (v.sqrt() + 1e-3) / 0.01)
            steps.append(torch.stack(own))
        slow = (steps[1] - steps[0]) / 0.6
        same(slow[:4], torch.zeros(4, 6, 4, dtype=F64), 1e-9)
        for first in (4, 8, 12):
            same(slow[first : first + 4], slow[first].expand_as(slow[first : first + 4]), 1e-9)
        assert not torch.allclose(slow[4], slow[8])
        assert float(slow[4].norm()) > 1.0

    def test_in_the_letter_of_the_paper_beta1_and_beta3_do_nothing(self):
        runs = [self.trajectory(mode="paper", betas=b)[0] for b in ((0.9, 0.9, 0.9), (0.3, 0.9, 0.05), (0.9, 0.5, 0.9))]
        same(runs[0][-1], runs[1][-1], 1e-11)
        assert float((runs[0][-1] - runs[2][-1]).norm()) > 1e-2

    def test_ema_moves_each_matrix_by_lr(self):
        seen, _, _ = self.trajectory(mode="ema")
        for before, after in itertools.pairwise(seen):
            same((after - before).square().mean().sqrt(), torch.tensor(0.01, dtype=F64))
        other = self.trajectory(mode="ema", betas=(0.3, 0.999, 0.9))[0]
        assert not torch.allclose(seen[-1], other[-1]), "here the fast memory forgets"

    def test_more_levels(self):
        """A third memory with a longer period speaks once that has passed, and not before."""
        two, three = self.trajectory(periods=(4,))[0], self.trajectory(periods=(4, 8))[0]
        assert all(torch.equal(a, b) for a, b in zip(two[:8], three[:8], strict=True))
        assert not torch.allclose(two[8], three[8])


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (scale(newton_schulz()), "momentum S, orthogonalised: layer inputs -> surprises"),
        (
            every(8, retain(decay(), gradient_descent())),
            "weights W: layer inputs -> surprises; minimise <W x, u> (9)",
        ),
        (delta_gradient_descent(), "minimise |W x - u|^2 / 2 (56); every step"),
        (remember(every(8, gradient_descent())), "learned by every(8); every 8 steps"),
    ],
    ids=str,
)
def test_explain(rule: Rule, text: str):
    told = explain(to_optimizer(rule, [nn.Parameter(normal(3, 4))]))
    assert text in told
    assert f"rule: {rule!r}" in told


def test_explain_tells_of_adams_two_memories_at_one_level():
    told = explain(AdamW([nn.Parameter(normal(3, 4))]))
    assert told.count("every step") == 3
    assert "first moment" in told
    assert "second moment" in told
    with pytest.raises(ValueError, match="not Rprop"):
        explain(torch.optim.Rprop([nn.Parameter(normal(3, 4))]))

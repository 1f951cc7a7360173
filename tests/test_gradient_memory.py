"""Memories that are fed gradients, and objectives of one's own, against autograd of what they minimise."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.memory import (
    Gates,
    Pairs,
    Summed,
    biased,
    decay,
    delta_gradient_descent,
    delta_momentum,
    dot,
    every,
    features,
    full_matrix_adagrad,
    gated_mlp,
    generalized_gradient_descent,
    gradient_descent,
    gradient_memory,
    huber_norm,
    identity,
    kl,
    l2,
    lift,
    lp,
    lq,
    matrix,
    mlp,
    momentum,
    nesterov,
    newton_schulz,
    normalize,
    odd_power,
    polynomial,
    retain,
    retain_first,
    scale,
    sigmoid,
    signed,
    surprise,
)
from nestling.optim import DeepMomentum, GeneralizedGradientDescent, Muon, to_optimizer

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=tolerance, atol=tolerance)


def two_maps(maps: list[Tensor], keys: Tensor) -> Tensor:
    return F.gelu(keys @ maps[0].T) @ maps[1].T


def gated(maps: list[Tensor], keys: Tensor) -> Tensor:
    return (F.silu(keys @ maps[0].T) * (keys @ maps[1].T)) @ maps[2].T


def one_map(maps: list[Tensor], keys: Tensor) -> Tensor:
    return keys @ maps[0].T


def with_bias(maps: list[Tensor], keys: Tensor) -> Tensor:
    return keys @ maps[0][:, :-1].T + maps[0][:, -1]


def squared(maps: list[Tensor], keys: Tensor) -> Tensor:
    """Monomials to the second degree, such that <phi(a), phi(b)> = (1 + <a, b>)^2."""
    width = keys.shape[-1]
    columns = [torch.ones_like(keys[:, 0])] + [2**0.5 * keys[:, i] for i in range(width)]
    for i in range(width):
        columns += [keys[:, i] * keys[:, j] * (1.0 if i == j else 2**0.5) for j in range(i, width)]
    return torch.stack(columns, -1) @ maps[0].T


STRUCTURES = {
    matrix(): one_map,
    mlp(residual=False): two_maps,
    mlp(expansion=2.0, residual=False): two_maps,
    gated_mlp(): gated,
    biased(matrix()): with_bias,
}


def huber(answer: Tensor, wanted: Tensor, bound: float) -> Tensor:
    return sum(
        0.5 * r @ r if float(r.detach().norm()) <= bound else bound * (r.norm() - bound / 2) for r in answer - wanted
    )


OBJECTIVES = {
    dot(): lambda answer, wanted: -(answer * wanted).sum(),
    l2(): lambda answer, wanted: 0.5 * (answer - wanted).square().sum(),
    huber_norm(0.7): lambda answer, wanted: huber(answer, wanted, 0.7),
}


def by_autograd(answers, loss, maps: list[Tensor], gradients: list[Tensor], form: str, keep: float, eta: float):
    """Equation 50 with decay to the start: the updates that the memory says, one gradient after the other."""
    starts, said = maps, []
    for u in gradients:
        maps = [w.detach().requires_grad_() for w in maps]
        answer = answers(maps, u)
        wanted = -torch.eye(len(u), dtype=F64) if form == "units" else -torch.ones_like(answer)
        slopes = torch.autograd.grad(loss(answer, wanted), maps)
        maps = [s + keep * (w - s) - eta * g for w, s, g in zip(maps, starts, slopes, strict=True)]
        said.append(answers(maps, torch.eye(u.shape[1], dtype=F64)).T if form == "units" else answers(maps, u))
    return said


@pytest.mark.parametrize("form", ["units", "ones"])
@pytest.mark.parametrize("bias", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_deep_momentum_descends_its_objective(structure, bias, form):
    rule = gradient_memory(structure, bias, step_size=0.05, retention=0.8, form=form)
    weight = normal(3, 5)
    state, gradients = rule.init(weight), [normal(3, 5, seed=s + 1) for s in range(6)]
    assert not state.maps[-1].any()
    starts = [w.clone() for w in state.maps]
    expected = by_autograd(STRUCTURES[structure], OBJECTIVES[bias], starts, gradients, form, 0.8, 0.05)
    for g, step in zip(gradients, expected, strict=True):
        before = weight
        weight, state = rule.step(weight, Summed(g), state, Gates())
        same(weight - before, step, 1e-11)
    assert float(step.detach().norm()) > 1e-2


def test_the_letter_of_equation_50_writes_ones_alone():
    """L = <m(u), 1>: the last map only ever learns along the vector of ones, and so each row of the update is one
    number; it is no descent direction, whatever the memory."""
    for structure in (matrix(), mlp(residual=False), gated_mlp()):
        rule = gradient_memory(structure, dot(), step_size=0.1, retention=0.9, form="ones")
        weight = normal(3, 5)
        state, along = rule.init(weight), []
        for seed in range(8):
            g = normal(3, 5, seed=seed + 1)
            update, state = rule.update(weight, Summed(g), state, Gates())
            same(update, update[:, :1].expand_as(update))
            along.append(float((update * g).sum()))
        assert max(along) > 0 > min(along)


GRADIENTS = [normal(4, 4, seed=s + 1) for s in range(7)]


def trajectory(rule, gates: Gates, gradients=GRADIENTS) -> Tensor:
    weight = normal(*gradients[0].shape)
    state, seen = rule.init(weight), []
    for g in gradients:
        weight, state = rule.step(weight, Summed(g), state, gates)
        seen.append(weight)
    return torch.stack(seen)


@pytest.mark.parametrize(
    ("deep", "known"),
    [
        (gradient_memory(matrix(), dot(), retention=0.8), momentum()),
        (gradient_memory(matrix(), l2(), retention=0.8), delta_momentum()),
        (
            scale(newton_schulz(gradient_memory(matrix(), dot(), step_size=1.0, retention=0.8))),
            scale(newton_schulz(momentum(surprise()))),
        ),
    ],
    ids=["momentum 34", "delta momentum 48", "Muon 52"],
)
def test_a_matrix_that_is_fed_gradients_is(deep, known):
    gates = Gates(0.05, 0.8)
    found, expected = trajectory(deep, gates), trajectory(known, gates)
    same(found, expected)


def test_a_clock_inside_counts_steps():
    """Nothing is said before the third gradient; then the mean of three, for three steps."""
    seen = trajectory(gradient_memory(matrix(), dot(), every(3, gradient_descent())), Gates(0.3))
    steps = seen.diff(dim=0, prepend=normal(4, 4)[None])
    same(steps[:2], torch.zeros(2, 4, 4, dtype=F64))
    same(steps[2:5], -0.1 * sum(GRADIENTS[:3]).expand(3, 4, 4))
    same(steps[5], -0.1 * sum(GRADIENTS[:6]))


def test_features_of_rows_make_a_kernel_of_the_momentum():
    """A linear memory of phi(u) read at phi(e_j) says minus the sum of kernels (1 + u_ij)^2."""
    rule = gradient_memory(features(matrix(), polynomial(2)), dot(), step_size=0.1, retention=1.0)
    weight, total = normal(3, 5), torch.zeros(3, 5, dtype=F64)
    state = rule.init(weight)
    for seed in range(4):
        g = normal(3, 5, seed=seed + 1)
        update, state = rule.update(weight, Summed(g), state, Gates())
        total = total + (1 + g) ** 2
        same(update, -0.1 * total)


def test_preconditioned_momentum_of_higher_order_features():
    """Equation 51: m <- a m - eta P phi(g), phi the cube and P = (sum g g^T + eps)^-1/2."""
    rule = momentum(scale(full_matrix_adagrad(lift(surprise(), odd_power(3.0)), eps=0.1)))
    weight = expected = normal(3, 5)
    m, h, state = torch.zeros(3, 5, dtype=F64), 0.1 * torch.eye(3, dtype=F64), rule.init(weight)
    for seed in range(4):
        g = normal(3, 5, seed=seed + 1)
        weight, state = rule.step(weight, Summed(g), state, Gates(0.05, 0.8))
        h = h + g @ g.T
        values, vectors = torch.linalg.eigh(h)
        m = 0.8 * m - 0.05 * vectors @ torch.diag(values**-0.5) @ vectors.T @ g**3
        expected = expected + m
        same(weight, expected, 1e-10)


@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("bias", OBJECTIVES, ids=repr)
def test_generalized_gradient_descent_descends_the_objective(bias, reduction, n):
    """Definition 5: W - eta d/dW L~(W x, u), u minus the error of each row's own loss."""
    weight, x, error = normal(3, 5), normal(n, 5, seed=1), normal(n, 3, seed=2)
    rule = generalized_gradient_descent(bias, reduction=reduction)
    share = n if reduction == "mean" else 1
    stepped, _ = rule.step(weight, Pairs(error / share, x), rule.init(weight), Gates(0.3))
    at = weight.clone().requires_grad_()
    objective = OBJECTIVES[bias](x @ at.T, -error) / share
    same(stepped, weight - 0.3 * torch.autograd.grad(objective, at)[0])


def test_the_objective_of_delta_gradient_descent():
    """Equations 55 and 57: the dot product is gradient descent; L2 with the implicit step is delta descent."""
    weight, pair = normal(3, 5), Pairs(normal(1, 3, seed=2), normal(1, 5, seed=1))
    for mine, known in (
        (generalized_gradient_descent(dot()), gradient_descent()),
        (generalized_gradient_descent(l2(), normalize()), delta_gradient_descent()),
    ):
        one, two = (rule.step(weight, pair, rule.init(weight), Gates(0.7))[0] for rule in (mine, known))
        same(one, two)


class TestOptimizers:
    def net(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5)).double()

    def losses(self, net: nn.Module, optimizer, steps: int, pieces: int = 1) -> list[float]:
        x, seen = normal(12, 5, seed=3), []
        for _ in range(steps):
            optimizer.zero_grad()
            total = 0.0
            for part in x.chunk(pieces):
                with optimizer.capture(net):
                    loss = (net(part) - part.sin()).square().sum(-1).mean() / pieces
                loss.backward()
                total += float(loss.detach())
            optimizer.step()
            seen.append(total)
        return seen

    @pytest.mark.parametrize("objective", ["dot()", "l2()"])
    @pytest.mark.parametrize("structure", ["matrix()", "mlp(residual=False)", "mlp(depth=3, residual=False)"])
    def test_deep_momentum_trains(self, structure, objective):
        net = self.net()
        optimizer = DeepMomentum(net.parameters(), lr=0.01, structure=structure, objective=objective)
        losses = self.losses(net, optimizer, 120)
        assert losses[-1] < 0.5 * losses[0]

    def test_objectives_of_ones_own_train(self):
        for objective, lr in (("dot()", 0.1), ("huber_norm(bound=0.5)", 0.1), ("l2()", 0.02)):
            net = self.net()
            losses = self.losses(net, GeneralizedGradientDescent(net.parameters(), lr=lr, objective=objective), 60)
            assert losses[-1] < 0.9 * losses[0], objective

    def test_pairs_accumulate(self):
        """Rows in three parts, each part's mean weighed by a third: the step of all rows at once."""
        nets = [self.net(), self.net()]
        for net, pieces in zip(nets, (1, 3), strict=True):
            optimizer = GeneralizedGradientDescent(net.parameters(), lr=0.1, objective="huber_norm(bound=0.5)")
            self.losses(net, optimizer, 3, pieces)
        for one, two in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            same(one, two)

    def test_without_pairs_it_descends(self):
        weight = nn.Parameter(normal(3, 5))
        start, weight.grad = weight.detach().clone(), normal(3, 5, seed=1)
        GeneralizedGradientDescent([weight], lr=0.1, weight_decay=0.5).step()
        same(weight, 0.95 * start - 0.1 * normal(3, 5, seed=1))

    @pytest.mark.parametrize("retention", [kl(), kl(scale=4.0), sigmoid(), lq(3.0)], ids=repr)
    def test_optimizers_that_nobody_has_published(self, retention):
        """A Huber bias over gradients, KL retention (or another geometry), orthogonalised as it is read."""
        structure = matrix() if retention == lq(3.0) else features(matrix(), signed())
        memory = gradient_memory(structure, huber_norm(0.5), retain(retention, gradient_descent()), step_size=0.5)
        net = self.net()
        rule = scale(newton_schulz(memory))
        losses = self.losses(net, to_optimizer(rule, net.parameters(), step_size=0.02, retention=0.9), 100)
        assert losses[-1] < 0.2 * losses[0]

    def test_the_gated_delta_rule_as_a_momentum(self):
        """Written out: m' = a m, then m' - c (m' g^T + I) g."""
        rule = gradient_memory(matrix(), l2(), retain_first(decay(), gradient_descent()), retention=0.8, step_size=0.1)
        weight = expected = normal(3, 5)
        m, state = torch.zeros(3, 5, dtype=F64), rule.init(weight)
        for seed in range(5):
            g = normal(3, 5, seed=seed + 1)
            weight, state = rule.step(weight, Summed(g), state, Gates())
            kept = 0.8 * m
            m = kept - 0.1 * (kept @ g.T + torch.eye(3, dtype=F64)) @ g
            expected = expected + m
            same(weight, expected)

    def test_orthogonalised_it_is_muon(self):
        """Equation 52: a linear memory, read out by Newton-Schulz."""
        one, two = nn.Parameter(normal(4, 6)), nn.Parameter(normal(4, 6))
        inner = gradient_memory(matrix(), dot(), retain(decay(), gradient_descent()), step_size=0.1, retention=0.9)
        ours = to_optimizer(scale(newton_schulz(inner)), [one], step_size=0.1)
        options = {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.9, "nesterov": False, "precision": "weight"}
        muon = Muon([two], **options)
        for seed in range(5):
            one.grad = normal(4, 6, seed=seed + 1)
            two.grad = one.grad.clone()
            ours.step()
            muon.step()
            same(one, two)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: gradient_memory(matrix(), dot(), form="rows"), "form must be 'units' or 'ones', got 'rows'"),
        (lambda: gradient_memory(matrix(), dot(), step_size=-1.0), "gradient_memory: step_size must be >= 0, got -1.0"),
        (lambda: gradient_memory(dot()), "the first argument is a structure"),
        (lambda: every(2, generalized_gradient_descent()), "a clock keeps the sum of a period, and not its pairs"),
        (lambda: generalized_gradient_descent(lp(), retain()), "wraps a direction"),
        (lambda: generalized_gradient_descent(reduction="all"), "reduction must be 'sum' or 'mean', got 'all'"),
        (lambda: odd_power(0.0), "odd_power: exponent must be > 0, got 0.0"),
        (lambda: trajectory(lift(surprise(), polynomial()), Gates()), "features of 4 channels must be as many, got 15"),
        (lambda: trajectory(generalized_gradient_descent(), Gates()), "was given their sum"),
        (lambda: DeepMomentum([nn.Parameter(normal(2, 2))], structure="nlp()"), "unknown part 'nlp'"),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_momentum_on_the_simplex_is_exponentiated_gradient_with_both_signs():
    """Kivinen and Warmuth: W+ and W- of each row on one simplex, multiplied by exp(-eta g) and normalised; with
    retention their logarithms decay first. The objective's slope by autograd."""
    rule = gradient_memory(features(matrix(), signed()), huber_norm(0.5), retain(kl(2.0)), step_size=0.3, retention=0.8)
    weight = normal(3, 5)
    state, both = rule.init(weight), torch.full((3, 10), 0.2, dtype=F64)
    for seed in range(5):
        g = normal(3, 5, seed=seed + 1)
        at = both.clone().requires_grad_()
        answers = g @ (at[:, :5] - at[:, 5:]).T
        slope = torch.autograd.grad(huber(answers, -torch.eye(3, dtype=F64), 0.5), at)[0]
        both = (both / 2) ** 0.8 * torch.exp(-0.3 * slope)
        both = 2 * both / both.sum(-1, keepdim=True)
        update, state = rule.update(weight, Summed(g), state, Gates())
        same(update, both[:, :5] - both[:, 5:])
    assert float(update.abs().max()) > 0.1


def test_a_momentum_on_the_simplex_without_signs_is_no_descent():
    """All that it says is positive, whatever the gradient."""
    rule = gradient_memory(matrix(), huber_norm(0.5), retain(kl(), gradient_descent()), step_size=0.3, retention=0.8)
    weight, g = normal(3, 5), normal(3, 5).abs()
    update, _ = rule.update(weight, Summed(-g), rule.init(weight), Gates())
    assert bool((update > 0).all())
    update, _ = rule.update(weight, Summed(g), rule.init(weight), Gates())
    assert bool((update > 0).all())


def test_lifted_by_the_identity_is_the_gradient():
    gates = Gates(0.05, 0.8)
    one, two = nesterov(lift(gradient_descent(), identity())), nesterov(gradient_descent())
    same(trajectory(one, gates), trajectory(two, gates))

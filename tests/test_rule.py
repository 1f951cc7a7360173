"""Learning rules: each part's step against its equation, the laws of the algebra, and the clock."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestling.memory.retention import decay, decay_to_start
from nestling.memory.rule import (
    Gates,
    Pairs,
    Rule,
    Summed,
    clip,
    dampen,
    delta_gradient_descent,
    every,
    gradient_descent,
    momentum,
    normalize,
    retain,
    scale,
    surprise,
)
from nestling.memory.state import clone, flatten

F64 = torch.float64
LEADING, OUT, IN = (2, 3), 4, 5
STEP, KEPT, LOG_RETENTION = 0.3, 0.8, math.log(0.9)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def given_pairs(n: int = 1, seed: int = 0) -> tuple[torch.Tensor, Pairs]:
    """A weight, and n pairs of error and input at it."""
    error, x = normal(*LEADING, n, OUT, seed=seed + 1), normal(*LEADING, n, IN, seed=seed + 2)
    return normal(*LEADING, OUT, IN, seed=seed), Pairs(error, x)


def given_gates(seed: int = 9) -> Gates:
    """Another value of every gate for every row and head."""
    step_size, kept, retention = normal(3, *LEADING, seed=seed).sigmoid()
    return Gates(step_size, kept, retention.log())


def wide(gate: torch.Tensor) -> torch.Tensor:
    return gate[..., None, None]


def as_summed(gradient: Pairs) -> Summed:
    return Summed(gradient.error.mT @ gradient.input, gradient.input.mT @ gradient.input, gradient.input.shape[-2])


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def run(rule: Rule, weight: torch.Tensor, gradient: Pairs | Summed, gates: Gates, state=None):
    return rule.step(weight, gradient, rule.init(weight) if state is None else state, gates)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("form", [lambda pairs: pairs, as_summed], ids=["pairs", "summed"])
class TestEquations:
    """Two steps by the rule and by its equation, written out."""

    def steps(self, rule, n, form):
        """(W before, g, x, e, step size, momentum, retention, W after) of two steps, gates different in each."""
        weight, state, told = given_pairs()[0], None, []
        for seed in (10, 20):
            gradient, gates = given_pairs(n, seed)[1], given_gates(seed)
            after, state = run(rule, weight, form(gradient), gates, state)
            g = torch.einsum("...no,...ni->...oi", gradient.error, gradient.input)
            told.append(
                (weight, g, gradient.input, gradient.error, *map(wide, (gates[0], gates[1], gates[2].exp())), after)
            )
            weight = after
        return told

    def test_surprise(self, n, form):
        for before, g, _, _, _, _, _, after in self.steps(surprise(), n, form):
            same(after, before - g)

    @pytest.mark.parametrize("rule", [gradient_descent(), scale(surprise())], ids=str)
    def test_gradient_descent(self, n, form, rule):
        for before, g, _, _, step, _, _, after in self.steps(rule, n, form):
            same(after, before - step * g)

    @pytest.mark.parametrize("bound", [1.0, 2.5])
    def test_clip(self, n, form, bound):
        for before, g, x, error, step, _, _, after in self.steps(clip(bound=bound), n, form):
            if form is as_summed:  # as if it were one pair
                length = wide(g.square().sum((-1, -2)).sqrt() / x.square().sum((-1, -2)).sqrt())
                clipped = g * (bound / length).clamp(max=1)
            else:
                shorter = error * (bound / error.norm(dim=-1, keepdim=True)).clamp(max=1)
                clipped = torch.einsum("...no,...ni->...oi", shorter, x)
            same(after, before - step * clipped)

    def test_dampen(self, n, form):
        for before, g, _, _, step, kept, _, after in self.steps(dampen(), n, form):
            same(after, before - (1 - kept) * step * g)

    def test_normalize_since_the_anchor(self, n, form):
        seen = 0.0
        for before, g, x, _, step, _, _, after in self.steps(normalize(), n, form):
            seen = seen + wide(x.square().sum((-1, -2)))
            same(after, before - step / (1 + step * seen) * g)

    def test_momentum(self, n, form):
        buffer = 0.0
        for before, g, _, _, step, kept, _, after in self.steps(momentum(), n, form):
            buffer = kept * buffer - step * g
            same(after, before + buffer)

    def test_scale_outside_of_momentum(self, n, form):
        buffer = 0.0
        for before, g, _, _, step, kept, _, after in self.steps(scale(momentum(surprise())), n, form):
            buffer = kept * buffer - g
            same(after, before + step * buffer)

    def test_average_in_momentum(self, n, form):
        buffer = 0.0
        for before, g, _, _, step, kept, _, after in self.steps(momentum(dampen()), n, form):
            buffer = kept * buffer - (1 - kept) * step * g
            same(after, before + buffer)

    def test_retain(self, n, form):
        for before, g, _, _, step, _, retention, after in self.steps(retain(), n, form):
            same(after, retention * before - step * g)

    def test_retain_toward_the_start(self, n, form):
        start = given_pairs()[0]
        for before, g, _, _, step, _, retention, after in self.steps(retain(decay_to_start()), n, form):
            same(after, start + retention * (before - start) - step * g)

    def test_delta_gradient_descent_around_momentum_inside_retain(self, n, form):
        buffer = 0.0
        for before, g, x, _, step, kept, retention, after in self.steps(
            retain(decay(), delta_gradient_descent(momentum())), n, form
        ):
            step = step / (1 + step * wide(x.square().sum((-1, -2))))
            buffer = kept * buffer - step * g
            erased = torch.einsum("...oi,...ni,...nj->...oj", before, x, x)
            same(after, retention * before - step * erased + buffer)


class TestDeltaGradientDescent:
    @given(st.integers(0, 10_000), st.floats(0.01, 5.0), st.floats(1e-3, 10.0))
    def test_is_the_direct_solve_of_equation_56(self, seed, length, step_size):
        weight, (error, x) = given_pairs(seed=seed)
        x = length * x / x.norm(dim=-1, keepdim=True)
        after, _ = run(delta_gradient_descent(), weight, Pairs(error, x), Gates(step_size))
        # argmin |W x - u|^2 / 2 + |W - W_t|^2 / (2 eta), u = -error:  W (x x^T + 1/eta) = u x^T + W_t / eta
        system = x.mT @ x + torch.eye(IN, dtype=F64) / step_size
        solved = torch.linalg.solve(system, -error.mT @ x + weight / step_size, left=False)
        assert (after - solved).norm() < 1e-12 * solved.norm()

    @given(st.integers(0, 10_000), st.floats(0.1, 4.0), st.floats(0.01, 5.0))
    def test_of_dot_is_gradient_descent_on_l2(self, seed, length, step_size):
        weight, (value, x) = given_pairs(seed=seed)
        x = length * x / x.norm(dim=-1, keepdim=True)
        dot_error, l2_error = -value, x @ weight.mT - value
        found, _ = run(delta_gradient_descent(), weight, Pairs(dot_error, x), Gates(step_size))
        bounded = step_size / (1 + step_size * length**2)
        expected, _ = run(gradient_descent(), weight, Pairs(l2_error, x), Gates(bounded))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    @given(st.integers(0, 10_000), st.floats(0.7, 1.3), st.floats(1.0, 2.0))
    def test_of_l2_settles_at_half_the_value(self, seed, length, step_size):
        weight, (value, x) = given_pairs(seed=seed)
        x = length * x / x.norm(dim=-1, keepdim=True)
        rule = delta_gradient_descent()
        for _ in range(40):
            weight, _ = run(rule, weight, Pairs(x @ weight.mT - value, x), Gates(step_size))
        torch.testing.assert_close(x @ weight.mT, value / 2, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 10_000))
def test_l2_with_gradient_descent_reads_back_exactly(seed):
    weight, (value, x) = given_pairs(seed=seed)
    x = x / x.norm(dim=-1, keepdim=True)
    weight, _ = run(gradient_descent(), weight, Pairs(x @ weight.mT - value, x), Gates(1.0))
    same(x @ weight.mT, value)


WITH_ARGUMENTS = {"every": every(3), "scale": scale(momentum(surprise()))}
WITHOUT_STEP_SIZE = {
    *("surprise", "ridge", "ascent", "nesterov", "hold_back", "slow_down", "average", "adagrad", "rmsprop", "adam"),
    *("newton_schulz", "match_spectrum", "match_rms", "unit_rms", "full_matrix_adagrad", "lift"),
}
RULES = [WITH_ARGUMENTS.get(name) or rule() for name, rule in Rule.variants.items()] + [
    retain(decay(), delta_gradient_descent(momentum(normalize()))),
    every(2, retain(decay_to_start(), delta_gradient_descent(momentum(dampen())))),
    normalize(scale(momentum(surprise()))),
    dampen(momentum()),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
class TestContract:
    @pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
    @pytest.mark.parametrize("n", [1, 4])
    def test_nothing_given_is_changed(self, rule, n, grad):
        """Without autograd parts write over their own intermediate results, and over nothing else."""
        weight, gradient = given_pairs(n)
        for gates in (given_gates(), Gates(STEP, KEPT, LOG_RETENTION)):
            state = rule.step(weight, gradient, rule.init(weight), gates)[1]
            arguments = (weight, gradient, state, gates)
            kept = clone(arguments)
            with torch.set_grad_enabled(grad):
                rule.step(*arguments)
            self.same_tensors(arguments, kept)

    def test_it_is_the_same_without_autograd(self, rule):
        weight, gradient = given_pairs(4)
        ends = []
        for grad in (True, False):
            at, state = weight, rule.init(weight)
            with torch.set_grad_enabled(grad):
                for _ in range(3):
                    at, state = rule.step(at, gradient, state, Gates(STEP, KEPT, LOG_RETENTION))
            ends.append((at, state))
        torch.testing.assert_close(flatten(ends[0]), flatten(ends[1]), rtol=1e-13, atol=1e-13)

    def same_tensors(self, arguments, kept):
        for name, tensor in flatten(arguments).items():
            assert torch.equal(tensor, flatten(kept)[name]), name

    def test_zero_step_at_retention_one_changes_nothing(self, rule):
        weight, gradient = given_pairs(4)
        after, _ = run(rule, weight, gradient, Gates(0.0, KEPT, 0.0))
        bare = type(rule).__name__ in WITHOUT_STEP_SIZE
        assert torch.equal(after, weight) == (not bare)
        if bare:
            after, _ = run(scale(rule), weight, gradient, Gates(0.0, KEPT, 0.0))
            assert torch.equal(after, weight)

    def test_numbers_as_gates_are_tensors_of_the_same(self, rule):
        weight, gradient = given_pairs(4)
        numbers = run(rule, weight, gradient, Gates(STEP, KEPT, LOG_RETENTION))
        tensors = run(
            rule, weight, gradient, Gates(*(torch.full(LEADING, g, dtype=F64) for g in (STEP, KEPT, LOG_RETENTION)))
        )
        torch.testing.assert_close(numbers, tensors, rtol=1e-12, atol=1e-12)

    def test_the_outer_gradient_is_right(self, rule):
        weight, gradient = given_pairs(2)

        def stepped(weight, error, x, *gates):
            state = rule.init(weight)
            for _ in range(2):
                weight, state = rule.step(weight, Pairs(error, x), state, Gates(*gates))
            return weight

        arguments = (weight, *gradient, *given_gates())
        assert torch.autograd.gradcheck(stepped, [a.requires_grad_() for a in arguments], fast_mode=True)


class keeping(Rule, abstract=True):
    """Keeps the gradient that it is given, itself."""

    def init(self, weight):
        return torch.zeros_like(weight)

    def step(self, weight, gradient, state, gates):
        return weight - gates.step_size * gradient.dense(), gradient.dense()


def _tensors(state):
    return list(flatten(state).values())


class TestEvery:
    INNER = retain(decay_to_start(), delta_gradient_descent(momentum(dampen())))
    GATES = Gates(STEP, KEPT, LOG_RETENTION)

    @pytest.mark.parametrize(("period", "tokens"), [(6, 1), (6, 2), (7, 3), (1, 1), (2, 5)])
    def test_steps_on_the_clock_on_the_sum_and_else_changes_nothing(self, period, tokens):
        rule, expected_state = every(period, self.INNER), None
        weight, ticks, since, expected = given_pairs()[0], 0, [], 0
        state = rule.init(weight)
        for call in range(1, 9):
            gradient = given_pairs(tokens, seed=10 * call)[1]
            since.append(gradient)
            after, state = rule.step(weight, gradient, state, self.GATES)
            if call * tokens // period == (call - 1) * tokens // period:
                assert torch.equal(after, weight)
                continue
            ticks += 1
            summed = Pairs(*(torch.cat(part, -2) for part in zip(*since, strict=True)))
            gates = self.GATES._replace(step_size=STEP / period)
            expected, expected_state = run(self.INNER, weight, summed, gates, expected_state)
            same(after, expected)
            assert not torch.equal(after, weight)
            weight, since = after, []
        assert ticks > 0

    @pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
    @pytest.mark.parametrize("dense", [False, True])
    def test_a_sum_of_ones_own_is_added_to_where_it_lies(self, leading, dense):
        """The same steps bit for bit; nothing else is written over, what the rule within keeps included."""
        rule, kept = every(6, keeping()), []  # type: ignore[arg-type]
        pure = own = normal(*leading, OUT, IN)
        pure_state, own_state = rule.init(pure), rule.init(own)
        for call in range(9):
            pairs = Pairs(normal(*leading, 2, OUT, seed=call + 20), normal(*leading, 2, IN, seed=call + 40))
            gradient = Summed(pairs.dense(), None, 2) if dense else pairs
            before = clone((pure_state, pairs))
            pure, after = rule.step(pure, gradient, pure_state, self.GATES)
            assert all(torch.equal(a, b) for a, b in zip(*map(_tensors, (before, (pure_state, pairs))), strict=True))
            pure_state, where = after, own_state.gradient.data_ptr()
            with torch.no_grad():
                own, own_state = rule.step(own, gradient, own_state, self.GATES, own=True)
            assert torch.equal(own, pure)
            assert all(torch.equal(a, b) for a, b in zip(*map(_tensors, (pure_state, own_state)), strict=True))
            assert (own_state.gradient.data_ptr() == where) == ((call + 1) % 3 != 0)  # at a tick it is kept within
            kept.append((own_state.of, clone(own_state.of)))
        assert all(torch.equal(now, then) for now, then in kept)

    def test_never_with_an_infinite_period(self):
        weight, gradient = given_pairs(4)
        rule = every(math.inf, self.INNER)
        state = rule.init(weight)
        for _ in range(3):
            after, state = rule.step(weight, gradient, state, self.GATES)
            assert torch.equal(after, weight)

    def test_rows_tick_each_in_its_own_time(self):
        weight, gradient = given_pairs(2)
        rule = every(4, momentum(normalize()))
        elapsed = torch.tensor([[0, 1, 2], [3, 0, 2]])
        after, state = rule.step(weight, gradient, rule.init(weight)._replace(elapsed=elapsed), self.GATES)
        alone, _ = run(momentum(normalize()), weight, gradient, self.GATES._replace(step_size=STEP / 4))
        ticked = elapsed >= 2
        same(after[ticked], alone[ticked])
        assert torch.equal(after[~ticked], weight[~ticked])
        assert torch.equal(state.elapsed, torch.tensor([[2, 3, 0], [1, 2, 0]]))
        same(state.gradient[~ticked], gradient.dense()[~ticked])
        same(state.of.buffer[ticked], (alone - weight)[ticked])
        for nothing in (state.gradient[ticked], state.inputs[ticked], state.of.buffer[~ticked]):
            assert not nothing.any()

    @pytest.mark.parametrize("period", [0.7, 2.0])
    def test_finer_samples_of_a_signal_give_one_trajectory(self, period):
        """dw = -eta/P * integral of (w - sin t) at each tick: the integral of the signal is known."""
        rule, ticks, eta = every(period, timed=True), 8, 0.6
        exact, at = 0.3, 0.0
        for _ in range(ticks):
            exact -= eta * (exact - (math.cos(at) - math.cos(at + period)) / period)
            at += period
        errors = []
        for samples in (7, 70, 700):  # a period
            weight = torch.full((1, 1), 0.3, dtype=F64)
            state, last = rule.init(weight), period / samples
            for index in range(ticks * samples):
                signal = math.sin((index + 0.5) * last)
                weight, state = rule.step(weight, Summed((weight - signal) * last, None, last), state, Gates(eta))
            assert float(state.elapsed) < 1e-6, "as many ticks as periods"
            errors.append(abs(float(weight) - exact))
        assert errors[0] > 50 * errors[1] > 2500 * errors[2], errors
        assert errors[0] < 0.01

    def test_a_timed_clock_of_whole_samples_is_the_clock_of_tokens(self):
        weight, gradient = given_pairs(4)
        total, untimed = Summed(gradient.dense(), None, 1), retain(decay_to_start(), momentum())
        counted, timed = every(3, untimed), every(3, untimed, timed=True)
        expected, state = run(counted, weight, total, self.GATES)
        got, other = run(timed, weight, total, self.GATES)
        for _ in range(7):
            expected, state = run(counted, expected, total, self.GATES, state)
            got, other = run(timed, got, total, self.GATES, other)
            assert torch.equal(expected, got)
        assert float(other.elapsed[0, 0]) == float(state.elapsed[0, 0]) == 2

    def test_each_period_is_an_anchor(self):
        weight, gradient = given_pairs(2)
        rule = every(2, normalize())
        once, state = run(rule, weight, gradient, self.GATES)
        twice, _ = run(rule, weight, gradient, self.GATES, state)
        same(twice, once)


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: momentum(delta_gradient_descent()), ["momentum(", "delta_gradient_descent()"]),
        (lambda: normalize(retain()), ["normalize(", "retain()"]),
        (lambda: scale(every(2)), ["scale(", "every(2)"]),
        (lambda: dampen(decay()), ["dampen(", "decay()"]),
        (lambda: delta_gradient_descent(retain()), ["delta_gradient_descent(", "retain()"]),
        (lambda: delta_gradient_descent(delta_gradient_descent()), ["delta_gradient_descent(delta_gradient_descent()"]),
        (lambda: retain(decay(), retain()), ["retain(", "retain()"]),
        (lambda: retain(decay(), every(2)), ["retain(", "every(2)"]),
        (lambda: retain(momentum()), ["retain(", "momentum()", "decay()"]),
        (lambda: every(2, every(3)), ["every(2", "every(3)"]),
        (lambda: clip(bound=0.0), ["clip: bound must be > 0, got 0.0"]),
        (lambda: clip(retain()), ["clip(", "retain()"]),
        (lambda: every(0), ["period", "got 0"]),
        (lambda: every(2.5), ["period", "got 2.5", "timed=True"]),
        (lambda: every(0.0, timed=True), ["timed clock must be > 0, got 0.0"]),
        (lambda: every(math.nan), ["period", "got nan"]),
    ],
)
def test_a_wrong_pair_of_parts_is_named(build, names):
    with pytest.raises(ValueError, match=re.escape(names[0])) as refused:
        build()
    assert all(name in str(refused.value) for name in names), refused.value


def test_a_clipped_sum_of_nothing_changes_nothing():
    weight, _ = given_pairs()
    nothing = Pairs(torch.zeros(*LEADING, 2, OUT, dtype=F64), torch.zeros(*LEADING, 2, IN, dtype=F64))
    for gradient in (nothing, as_summed(nothing)):
        after, _ = run(clip(), weight, gradient, given_gates())
        assert torch.equal(after, weight)


@pytest.mark.parametrize(
    "rule", [delta_gradient_descent(), normalize(), clip(), retain(decay(), delta_gradient_descent())]
)
def test_inputs_are_asked_for_where_they_are_needed(rule):
    weight, gradient = given_pairs(3)
    assert rule.needs_inputs
    assert every(4, rule).needs_inputs
    assert not retain().needs_inputs
    for asked in (rule, every(4, rule)):
        with pytest.raises(ValueError, match="needs the inputs of each linear map"):
            run(asked, weight, Summed(gradient.dense(), tokens=3), Gates())

"""What a memory holds, without any training around it: pairs are written, then every key is asked for again.

The orders that are told of memories, and where they stop: the delta rule is closer than linear attention, and tells
values apart better where keys resemble one another; where they do not, and are many, linear attention does, if what is
read may be rescaled (as a norm behind a memory does) and the delta rule takes whole steps. With steps of a quarter the
delta rule is ahead there too. An MLP holds more than any matrix can, but not in one pass.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.memory import Gates, Structure, clip, dot, gradient_descent, l2, matrix, mlp, normalize
from nestling.sequence import Memory
from nestling.sequence.scan import Writes

LINEAR = Memory(matrix(), dot(), gradient_descent(), 64, "token")
DELTA = Memory(matrix(), l2(), gradient_descent(), 64, "token")


class Drawn(NamedTuple):
    keys: Tensor  # [b, 1, n, d], of norm one
    values: Tensor  # [b, 1, n, d], of norm one


def draw(count: int, dim: int, rows: int, shared: float = 0.0) -> Drawn:
    """shared: the length of what all keys of a row have in common, beside that of what each has of its own."""
    generator = torch.Generator().manual_seed(0)

    def normal(n: int) -> Tensor:
        return torch.randn(rows, 1, n, dim, dtype=torch.float64, generator=generator)

    return Drawn(F.normalize(normal(count) + shared * normal(1), dim=-1), F.normalize(normal(count), dim=-1))


def start(structure: Structure, dim: int, rows: int) -> tuple[Tensor, ...]:
    if structure == matrix():
        return (torch.zeros(rows, 1, dim, dim, dtype=torch.float64),)
    maps = structure.init(dim, dim, (rows, 1), torch.Generator().manual_seed(1), unit_keys=True)
    return tuple(weight.double() for weight in maps)


@torch.no_grad()
def recalled(memory: Memory, drawn: Drawn, passes: int = 1, step_size: float = 1.0) -> Tensor:
    """What is read for every key [b, n, d] after all pairs were written, `passes` times over."""
    rows, _, count, dim = drawn.keys.shape
    state = memory.begin(start(memory.structure, dim, rows))
    for _ in range(passes):
        for first in range(0, count, memory.chunk):
            k, v = (x[:, :, first : first + memory.chunk] for x in drawn)
            ones = torch.ones_like(k[..., 0])
            _, state = memory.run(
                memory.open(state, True), Writes(k, v, Gates(step_size * ones, 0.0 * ones, 0.0 * ones))
            )
    return memory.structure.forward(lambda i, x: x @ state.running[i].mT, drawn.keys)[0][:, 0]


def error(read: Tensor, drawn: Drawn) -> Tensor:
    """|read - value|^2 as a share of |value|^2, by row [b]."""
    return (read - drawn.values[:, 0]).square().sum((1, 2)) / drawn.values.square().sum((1, 2, 3))


def rescaled(read: Tensor, drawn: Drawn) -> Tensor:
    """`error` with the one factor that makes it least."""
    along = (read * drawn.values[:, 0]).sum((1, 2), keepdim=True)
    return error(read * along / read.square().sum((1, 2), keepdim=True), drawn)


def told_apart(read: Tensor, drawn: Drawn) -> float:
    """How often the value wanted is the nearest of all in direction."""
    found = (read @ drawn.values[:, 0].mT).argmax(-1)
    return float((found == torch.arange(read.shape[1])).double().mean())


def test_the_delta_rule_is_closer_than_linear_attention() -> None:
    for shared in (0.0, 1.0):
        for count in (8, 16, 64):  # of keys of 16
            drawn = draw(count, 16, 32, shared)
            linear, delta = (error(recalled(memory, drawn), drawn) for memory in (LINEAR, DELTA))
            assert delta.mean() < (0.75 if count < 16 else 0.7) * linear.mean()
            assert (delta < linear).all() or count < 16


def test_the_delta_rule_tells_more_values_apart_where_keys_resemble_one_another() -> None:
    for count in (32, 64):
        drawn = draw(count, 16, 64, shared=1.0)
        linear, delta = (told_apart(recalled(memory, drawn), drawn) for memory in (LINEAR, DELTA))
        assert delta > 1.3 * linear
    drawn = draw(16, 16, 64, shared=1.0)
    linear, delta = (rescaled(recalled(memory, drawn), drawn).mean() for memory in (LINEAR, DELTA))
    assert delta < 0.95 * linear


def test_many_keys_at_random_are_told_apart_better_by_linear_attention() -> None:
    """The delta rule forgets what was written first, linear attention everything alike."""
    for count in (32, 64):
        drawn = draw(count, 16, 64)
        linear, delta = (recalled(memory, drawn) for memory in (LINEAR, DELTA))
        assert told_apart(linear, drawn) > 1.2 * told_apart(delta, drawn)
        assert rescaled(linear, drawn).mean() < 0.9 * rescaled(delta, drawn).mean()
        last = slice(-4, None)
        closest = [(y - drawn.values[:, 0])[:, last].square().sum(-1).mean() for y in (linear, delta)]
        assert closest[1] < 0.3 * closest[0], "of the last pairs the delta rule knows nearly all"


def test_many_keys_are_told_apart_best_by_the_delta_rule_with_steps_of_a_quarter() -> None:
    """Linear attention is the limit of small steps, up to a factor. Larger ones mend more and erase more of other
    pairs: the best lies between."""
    for shared in (0.0, 1.0):
        for count in (32, 64):
            drawn = draw(count, 16, 256, shared)
            linear = told_apart(recalled(LINEAR, drawn), drawn)
            whole, quarter, tiny = (
                told_apart(recalled(DELTA, drawn, step_size=step), drawn) for step in (1, 0.25, 1e-3)
            )
            assert quarter > linear + 0.02
            assert quarter > whole + 0.03
            assert abs(tiny - linear) < 0.005


def test_a_deep_memory_holds_more_than_any_matrix() -> None:
    """16 pairs of 8 numbers, 12 passes: under half the error of the best matrix there is. One pass is not enough."""
    drawn = draw(16, 8, 6)
    best = drawn.keys @ torch.linalg.pinv(drawn.keys) @ drawn.values  # least squares
    deep = Memory(mlp(expansion=4.0, residual=False), l2(), normalize(clip()), 1)
    found = error(recalled(deep, drawn, passes=12), drawn)
    assert (found < 0.5 * error(best[:, 0], drawn)).all()
    once = error(recalled(deep, drawn), drawn)
    assert once.mean() > error(best[:, 0], drawn).mean()

"""One step a chunk: for rules that no coefficient form can compute, such as Adam, or anything orthogonalised.

While a chunk is read its gradient is summed, at the weights on which it opened; when the next one opens, the rule
takes one step on the sum. What a chunk wrote is therefore seen from the next chunk on. Oracle:
`memory.naive.naive_stepped`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestling.memory.rule import Gates, Pairs, Rule, Summed
from nestling.memory.state import select


class Pending(NamedTuple):
    """What the open chunk has written to one linear map [..., out, in] so far, and the rule's state before it."""

    gradient: Tensor  # sum_t eta_t e_t x_t^T [..., out, in]
    inputs: Tensor | None  # sum_t eta_t x_t x_t^T [..., in, in], where the rule needs it
    sums: Tensor  # over tokens: of 1, the step size eta, the momentum and the log retention [..., 4]
    of: Any


def begin(rule: Rule, weight: Tensor) -> Pending:
    """Nothing written yet."""
    *leading, _, columns = weight.shape
    square = weight.new_zeros(*leading, columns, columns) if rule.needs_inputs else None
    return Pending(torch.zeros_like(weight), square, weight.new_zeros(*leading, 4), rule.init(weight))


def add(
    pending: Pending,
    error: Tensor,
    x: Tensor,
    gates: Gates,
    counted: Tensor | None,
    band: Tensor | None = None,
    step: Tensor | float = 1.0,
) -> Pending:
    """`pending` and the pairs of one piece: errors [..., c, out], inputs [..., c, in], gates [..., c] and tokens
    that count, 1 or 0 [..., c]; all but the errors may stand for several maps (a size of one). band [..., c, pairs]:
    what each pair counts in each token's window, where errors and inputs are of pairs. step [..., c]: of this map
    beside the others."""
    ones = torch.ones_like(error[..., 0]) if band is None else error.new_ones(*error.shape[:-2], band.shape[-2])
    told = ones if counted is None else ones * counted
    each = torch.stack([told, *(gate * told for gate in gates)], -1)
    size = (each[..., 1] * step)[..., None]  # [..., c, 1]
    size = size if band is None else band.mT @ size
    weighed = Pairs(error * size, x)
    inputs = pending.inputs
    if inputs is not None:
        inputs = inputs + (x * size).mT @ x
    return Pending(pending.gradient + weighed.dense(), inputs, pending.sums + each.sum(-2), pending.of)


def tick(rule: Rule, weight: Tensor, pending: Pending, tokens: int) -> tuple[Tensor, Pending]:
    """The weight after the step that `pending` asks for, which counts as `tokens` tokens, and nothing pending.

    The step size is the mean of the tokens' own and the gradient their sum weighed by their share of it, so that a
    rule that is linear in the gradient takes sum_t eta_t e_t x_t^T; the momentum is the mean, the retention the
    product. Where no token was written nothing changes.
    """
    count, step_size, momentum, log_retention = pending.sums.unbind(-1)
    some = count.clamp(min=1.0)
    mean = step_size / some
    share = 1.0 / torch.where(mean > 0, mean, 1.0)[..., None, None]
    gradient = Summed(pending.gradient * share, None if pending.inputs is None else pending.inputs * share, tokens)
    stepped, after = rule.step(weight, gradient, rule.anchor(pending.of), Gates(mean, momentum / some, log_retention))
    empty = begin(rule, weight)._replace(of=after)
    written = count > 0
    if not torch.compiler.is_compiling() and bool(written.all()):
        return stepped, empty
    return select(written, stepped, weight), select(written, empty, pending)

"""A matrix memory under a linear rule as one `linear_memory`: with retention for every key channel, and on a GPU."""

import torch
from torch import Tensor

from nestling.memory.rule import Plan

from .linear import How, gated_delta_rule, linear_memory


def run_as_linear_memory(
    plan: Plan,
    log_retention: Tensor,
    weight: Tensor,
    keys: Tensor,
    fixed: Tensor,
    slope: float,
    queries: Tensor | None,
    *,
    before: bool = False,
    way: str = "chunked",
) -> tuple[Tensor, Tensor]:
    """A chunk of writes with errors slope * W x_t + `fixed` at every token's own weights, and its reads.

        W_t = W_{t-1} Diag(a_t) - (write_t slope + erase_t) (W_{t-1} x_t) x_t^T - write_t fixed_t x_t^T

    with Diag(a_t) x_t in the place of the x_t that is read, where the rule takes its gradient at decayed weights.
    plan: of the same rule with all kept, its log_keep None for a rule without a retention gate; log_retention = log a
    [b, h, c, k] or [b, h, c]; weight [b, h, v, k]; keys, queries [b, h, c, k]; fixed [b, h, c, v]. Returns what was
    read [b, h, c, v] (`fixed` where nothing is asked) and the weight after the chunk. Raises ValueError for a rule
    with momentum, or one that decays to a start.
    """
    if plan.momentum is not None or plan.start is not None:
        what = "way='kernels'" if way == "kernels" else "retention by channel"
        raise ValueError(f"{what} has a chunked form without momentum and toward zero only; use way='recurrent'")
    gates = None if plan.log_keep is None else log_retention
    first = plan.sight is not None and gates is not None  # the gradient is taken at decayed weights
    asked = keys if queries is None else queries
    how: How = {"initial_state": weight, "chunk": keys.shape[-2], "scale": 1.0, "way": way}
    how["read"] = "before" if before else "after"
    if way == "kernels" and slope == 1.0 and plan.erase is None and (first or gates is None):  # it has its own
        gates = torch.zeros_like(plan.write) if gates is None else gates
        q, k, v, step, gates = (x.transpose(1, 2) for x in (asked, keys, -fixed, plan.write, gates))
        y, after = gated_delta_rule(q, k, v, step, gates, **how)
    else:
        sees = plan.write * slope if plan.erase is None else plan.write * slope + plan.erase
        erase = keys * sees[..., None] if slope or plan.erase is not None else None
        if erase is not None and gates is not None and first:
            erase = erase * (gates if gates.dim() == 4 else gates[..., None]).exp()
        q, k, v = (x.transpose(1, 2) for x in (asked, keys, -fixed * plan.write[..., None]))
        others = {"log_retention": gates, "erase": erase}
        told = {name: None if x is None else x.transpose(1, 2) for name, x in others.items()}
        y, after = linear_memory(q, k, v, **told, **how)
    return (fixed if queries is None else y.transpose(1, 2)), after.to(weight.dtype)

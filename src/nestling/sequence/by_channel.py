"""Retention for every key channel: a matrix memory under a linear rule, as one `linear_memory`."""

from torch import Tensor

from nestling.memory.rule import Plan

from .linear import linear_memory


def run_by_channel(
    plan: Plan,
    log_retention: Tensor,
    weight: Tensor,
    keys: Tensor,
    fixed: Tensor,
    slope: float,
    queries: Tensor | None,
    *,
    before: bool = False,
) -> tuple[Tensor, Tensor]:
    """A chunk of writes with errors slope * W x_t + `fixed` at every token's own weights, and its reads.

        W_t = W_{t-1} Diag(a_t) - (write_t slope + erase_t) (W_{t-1} x_t) x_t^T - write_t fixed_t x_t^T

    with Diag(a_t) x_t in the place of the x_t that is read, where the rule takes its gradient at decayed weights.
    plan: of the same rule with all kept, its log_keep None for a rule without a retention gate; log_retention = log a
    [b, h, c, k]; weight [b, h, v, k]; keys, queries [b, h, c, k]; fixed [b, h, c, v]. Returns what was read
    [b, h, c, v] (`fixed` where nothing is asked) and the weight after the chunk. Raises ValueError for a rule with
    momentum, or one that decays to a start.
    """
    if plan.momentum is not None or plan.start is not None:
        raise ValueError(
            "retention by channel has a chunked form without momentum and toward zero only; use way='recurrent'"
        )
    gates = None if plan.log_keep is None else log_retention
    sees = plan.write * slope if plan.erase is None else plan.write * slope + plan.erase
    erase = keys * sees[..., None] if slope or plan.erase is not None else None
    if erase is not None and plan.sight is not None and gates is not None:
        erase = erase * gates.exp()
    streams = (keys if queries is None else queries, keys, -fixed * plan.write[..., None])
    q, k, v, gates, erase = (None if x is None else x.transpose(1, 2) for x in (*streams, gates, erase))
    assert q is not None
    assert k is not None
    assert v is not None
    y, after = linear_memory(
        q,
        k,
        v,
        log_retention=gates,
        erase=erase,
        initial_state=weight,
        chunk=keys.shape[-2],
        scale=1.0,
        read="before" if before else "after",
    )
    return (fixed if queries is None else y.transpose(1, 2)), after.to(weight.dtype)

"""The memory without parameters: nothing is learned step by step, the objective is solved anew for every query."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from nestling.memory.attentional_bias import AttentionalBias, l2


def softmax_memory(
    keys: Float[Tensor, "*b t k"],
    values: Float[Tensor, "*b t v"],
    queries: Float[Tensor, "*b t k"],
    *,
    window: float = math.inf,
    attentional_bias: AttentionalBias = l2(),
) -> Float[Tensor, "*b t v"]:
    """Reads of a memory that keeps the pairs themselves and answers each query with the best constant::

        y_t = argmin_z sum_i exp(q_t . k_i / sqrt k) loss(z, v_i),    t - window < i <= t

    The slope of a bias whose error is linear in the read, error(z, v) = slope z + error(0, v), gives the zero of the
    sum of errors directly: with l2() the Nadaraya-Watson mean, which is softmax attention (Nested Learning equations
    62 and 63; Miras; TTT theorem 2), and `window` its sliding window. Written to be read: t x t weights, no cache.
    `attention` is the mixer. Raises ValueError for a bias that has no minimum in this form (dot() falls for ever), and
    for a window below one token. Oracles: F.scaled_dot_product_attention and autograd (tests/test_identities.py).
    """
    if not attentional_bias.slope:
        raise ValueError(f"softmax_memory: {attentional_bias} has no minimum that is linear in the values; use l2()")
    if not window >= 1:
        raise ValueError(f"softmax_memory: window must be at least 1 token, got {window}")
    scores = queries @ keys.mT / math.sqrt(keys.shape[-1])
    distance = torch.arange(keys.shape[-2], device=keys.device)
    distance = distance[:, None] - distance
    scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()  # the minimum does not know their scale
    errors = attentional_bias.error(torch.zeros_like(values), values)
    return -(weights @ errors) / (attentional_bias.slope * weights.sum(-1, keepdim=True))

"""How far a student's next-token distributions are from a teacher's."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def divergence(
    teacher: Float[Tensor, "*n v"], student: Float[Tensor, "*n v"], beta: float = 0.5
) -> Float[Tensor, "*n"]:
    """The generalised Jensen-Shannon divergence of two distributions given as logits [..., V], in nats.

    JSD_beta = beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S. beta = 0 is KL(T || S), the
    forward one, which covers what the teacher does; beta = 1 is KL(S || T), the reverse one, which seeks one mode.
    These are the limits of JSD_beta / (beta (1 - beta)), so that the ends are larger than their neighbours. GKD
    (Agarwal et al. 2024), section 2. Raises ValueError for a beta outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    log_t, log_s = teacher.log_softmax(-1), student.log_softmax(-1)
    if beta == 0:
        return kl(log_t, log_s)
    if beta == 1:
        return kl(log_s, log_t)
    mixed = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    return beta * kl(log_t, mixed) + (1 - beta) * kl(log_s, mixed)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P || Q) of log probabilities [..., V]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)

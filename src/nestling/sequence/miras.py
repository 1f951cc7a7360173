"""The three models of Miras (arXiv 2504.13173, section 5): points of its design space, one expression each."""

from nestling.memory.attentional_bias import huber_switch, l2, lp
from nestling.memory.compound import normed
from nestling.memory.retention import decay, kl, lq
from nestling.memory.rule import gradient_descent, retain
from nestling.memory.structure import mlp

from .layer import sequence_memory
from .pair_gates import bound_gates

_MEMORY = normed(mlp(residual=False, expansion=4.0))  # M(x) = x + LN(W_2 GELU(W_1 x)), in all three


def moneta(p: float = 3.0, q: float = 4.0, chunk: int = 16) -> sequence_memory:
    """Moneta: an l_p objective, weights normalised by their l_q norm (equations 24 and 25).

    Weights are normalised where a chunk opens, and read there. The paper's gates have a channel each; here they are
    one a head. Oracle: memory.naive_miras.naive_moneta.
    """
    return sequence_memory(_MEMORY, lp(p), retain(lq(q), gradient_descent()), chunk, read="boundary")


def yaad(bound: float = 1.0, chunk: int = 16) -> sequence_memory:
    """Yaad: l_2 up to a bound of the residual and l_1 beyond it, retention by decay (equation 26).

    Every token chooses its bound, one a head where the paper has one a channel; `bound` at the start.
    Oracle: memory.naive_miras.naive_yaad.
    """
    rule = retain(decay(), gradient_descent())
    return sequence_memory(_MEMORY, huber_switch(bound), rule, chunk, gating=bound_gates())


def memora(scale: float = 1.0, chunk: int = 16) -> sequence_memory:
    """Memora: l_2 by mirror descent on the simplex, every row of a map a softmax (equation 27).

    The logits stand between tokens, exactly, where the paper takes a softmax once a chunk and is linear in between;
    they are exposed where a chunk opens, and read there. Oracle: memory.naive_miras.naive_memora.
    """
    return sequence_memory(_MEMORY, l2(), retain(kl(scale), gradient_descent()), chunk, read="boundary")

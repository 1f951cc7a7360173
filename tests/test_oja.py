"""Oja's rule against its equation, one token at a time."""

import pytest
import torch

from miras import LENGTHS, assert_is_oracle, fast, make
from nestling.memory import Gates, Pairs, Summed, decay, dot, l2, matrix, momentum, oja, parse, retain
from nestling.memory.naive_miras import Run
from nestling.sequence import Memory


@pytest.mark.parametrize("length", LENGTHS)
def test_a_memory_learns_by_it(length):
    memory = Memory(matrix(), dot(), retain(decay(), oja()), 16, "token", "after", "recurrent")

    def oracle(starts, flow):
        (weight,), reads = starts, []
        for k, v, q, eta, kept in zip(*flow, strict=True):
            weight = kept * weight + eta * torch.outer(v, k - weight.mT @ v)
            reads.append(weight @ q)
        return Run(torch.stack(reads), (weight,))

    assert_is_oracle(memory, make(memory, length, value=3), oracle)


def test_what_it_settles_at():
    """One pair over and over: W^T v is the key."""
    k, v = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rule, weight = oja(), torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(400):
        weight, _ = rule.step(weight, Pairs(-v[None], k[None]), rule.init(weight), Gates(0.1))
    torch.testing.assert_close(weight.mT @ v, k)


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"oja\(retain\(\)\): oja wraps a direction"):
        oja(retain())
    weight = torch.eye(2)
    with pytest.raises(ValueError, match=r"oja\(\) needs the error of every token"):
        oja().step(weight, Summed(weight), (), Gates())
    memory = Memory(matrix(), l2(), oja(), 4)
    with pytest.raises(ValueError, match="no chunked form"):
        fast(memory, make(memory, 3))
    assert parse(repr(retain(decay(), oja(momentum())))) == retain(decay(), oja(momentum()))

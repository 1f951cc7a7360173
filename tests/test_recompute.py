"""checkpoint=True: the same numbers, from far fewer of them kept."""

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from nestling.sequence import self_modifying, sequence_memory

CHUNK, DIM = 32, 16
MIXERS = {
    "sequence_memory": lambda **how: sequence_memory(chunk=CHUNK, **how),
    "self_modifying": lambda **how: self_modifying(chunk=CHUNK, projection_chunk=CHUNK, **how),
    "self_modifying, two sizes": lambda **how: self_modifying(chunk=2 * CHUNK, projection_chunk=CHUNK, **how),
    "recurrent": lambda **how: sequence_memory(chunk=CHUNK, way="recurrent", **how),
}


def run(mixer: str, chunks: int, **how) -> tuple[list[Tensor], int]:
    """Output and gradients over `chunks` chunks and a half, and how many numbers the backward pass kept."""
    layer = MIXERS[mixer](**how).build(DIM, 2, torch.Generator().manual_seed(0))
    x = torch.randn(2, chunks * CHUNK + CHUNK // 2, DIM, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    kept: dict[int, int] = {}

    def keep(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with saved_tensors_hooks(keep, lambda saved: saved):
        y, _ = layer(x)
    found = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    return [y, *found], sum(kept.values())


@pytest.mark.parametrize("mixer", MIXERS)
def test_outputs_and_gradients_are_the_same(mixer):
    plain, _ = run(mixer, 5)
    again, _ = run(mixer, 5, checkpoint=True)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("mixer", "share"), [("sequence_memory", 0.5), ("self_modifying", 0.25)])
def test_a_chunk_more_keeps_little_more(mixer, share):
    plain = run(mixer, 12)[1] - run(mixer, 6)[1]
    again = run(mixer, 12, checkpoint=True)[1] - run(mixer, 6, checkpoint=True)[1]
    assert again < share * plain

"""Outer gradients of whole layers, through any number of chunks, against finite differences; and those of gradients."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from nestling.memory import matrix, mlp
from nestling.sequence import self_modifying, sequence_memory

DIM, HEADS, CHUNK = 8, 2, 3
MIXERS = {
    "self_modifying": self_modifying(chunk=CHUNK, projection_chunk=CHUNK),
    "self_modifying, two sizes": self_modifying(chunk=CHUNK, projection_chunk=2 * CHUNK, checkpoint=True),
    "self_modifying, adaptive query": self_modifying(matrix(), chunk=CHUNK, projection_chunk=1, generators=("query",)),
    "sequence_memory": sequence_memory(chunk=CHUNK),
    "sequence_memory, deep": sequence_memory(mlp(depth=3, activation="silu"), chunk=CHUNK, read="before"),
}


def of_everything(name: str, tokens: int):
    """The layer as a function of its input and all its parameters, and a point away from neutral starts."""
    generator = torch.Generator().manual_seed(0)
    layer = MIXERS[name].build(DIM, HEADS, generator).double()
    names = [name for name, _ in layer.named_parameters()]
    point = [torch.randn(1, tokens, DIM, dtype=torch.float64, generator=generator)]
    for parameter in layer.parameters():
        moved = parameter + 0.2 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        point.append(moved.detach())

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))[0]

    return function, tuple(tensor.requires_grad_() for tensor in point)


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("name", MIXERS)
def test_outer_gradients(name, chunks):
    function, point = of_everything(name, chunks * CHUNK + 1)
    assert gradcheck(function, point, fast_mode=True)


@pytest.mark.parametrize("name", ["self_modifying", "sequence_memory"])
def test_gradients_of_outer_gradients(name):
    function, point = of_everything(name, CHUNK + 1)
    assert gradgradcheck(function, point, fast_mode=True)

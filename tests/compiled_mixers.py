"""Mixers under torch.compile beside the same without: python tests/compiled_mixers.py BACKEND [NAME ...].

Started by tests/test_compiled.py, in a process of its own: functions that are type-checked at run time do not compile.
Prints for each: the largest difference of outputs, states and gradients, how many steps were compiled, how often a
step broke into several graphs.
"""

import sys

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from nestling.levels import level
from nestling.memory import (
    adam,
    clip,
    dot,
    gradient_descent,
    l2,
    matrix,
    mlp,
    normalize,
    retain_first,
    scale,
)
from nestling.memory.state import detach, map_tensors
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention, comba_streams, linear_mixer, self_modifying, sequence_memory, shards

CHUNK = 4
DEEP = sequence_memory(mlp(), rule=normalize(clip()), chunk=CHUNK)
MIXERS = {
    "delta": sequence_memory(matrix(), l2(), retain_first(), CHUNK, "token"),
    "several steps": sequence_memory(matrix(), l2(), retain_first(), CHUNK, "token", steps=2),
    "deep": DEEP,
    "recomputed": sequence_memory(matrix(), dot(), gradient_descent(), CHUNK, checkpoint=True),
    "stepped": sequence_memory(matrix(), l2(), scale(adam()), CHUNK, "chunk", "boundary", "stepped"),
    "self-modifying": self_modifying(matrix(), chunk=CHUNK, projection_chunk=CHUNK),
    "shards": shards(DEEP, 2 * CHUNK),
    "attention": attention(),
    "linear": linear_mixer(comba_streams(), chunk=CHUNK),
}


def tensors(tree: object) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(lambda x: found.append(x) or x, tree)
    return found


def run(module: torch.nn.Module, parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    """Two calls, the second from the detached state of the first, and of a length that ends inside of a chunk; then one
    without gradients, and one with rows of two lengths."""
    state, found = None, []
    for seed, length in enumerate((3 * CHUNK, 2 * CHUNK + 1)):
        x = torch.randn(2, length, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        y, state = module(x, state)
        grads = torch.autograd.grad(y.square().sum(), parameters, allow_unused=True)
        state = detach(state)
        found += [y.detach(), *tensors(state), *(g for g in grads if g is not None)]
    valid = torch.ones(2, x.shape[1], dtype=torch.bool)
    valid[1, CHUNK:] = False
    with torch.no_grad():
        return [*found, module(x)[0], module(x, valid=valid)[0]]


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    assert len(a) == len(b)
    return max(float((x.double() - y.double()).abs().max()) for x, y in zip(a, b, strict=True) if x.numel())


def main(backend: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names or MIXERS:
        counters.clear()
        module = MIXERS[name].build(8, 2, torch.Generator().manual_seed(0)).double()
        parameters = list(module.parameters())
        plain = run(module, parameters)
        module.compile(backend=backend)
        apart = difference(plain, run(module, parameters))
        print(
            name.replace(" ", "-"), apart, counters["stats"]["unique_graphs"], len(counters["graph_break"]), flush=True
        )
        torch._dynamo.reset()
    if not names:
        decoder(backend)


def decoder(backend: str) -> None:
    """A whole model, by the method that every module has; and one that is compiled by the caller, whose mixers run as
    they are."""
    levels = (level(8), level(16))
    config = ModelConfig(vocabulary=16, dim=8, heads=2, blocks=2, mixer=MIXERS["delta"], levels=levels)
    models = [Decoder(config, seed=0).double() for _ in range(3)]
    models[1].compile(backend=backend)
    calls = [*models[:2], torch.compile(models[2], backend=backend)]
    found, forms = [], []
    for model, call in zip(models, calls, strict=True):
        counters.clear()
        logits = call(torch.arange(24).view(2, 12) % 16)[0]
        logits.square().sum().backward()
        found.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        forms.append(counters["stats"]["unique_graphs"])
    print("decoder", difference(*found[:2]), forms[1], 0, flush=True)
    print("around", difference(found[0], found[2]), forms[2], 0, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

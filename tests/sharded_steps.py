"""One rank of a sharded run, beside the same run unsharded: python tests/sharded_steps.py RANK WORLD PORT.

Started by tests/test_sharded.py. Every rank has the same data, so that the averaged gradient is that of the whole run.
"""

import functools
import math
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nestling import optim

OPTIONS = {
    "AdamW": {"lr": 0.02, "weight_decay": 0.1},
    "Muon": {"lr": 0.02, "precision": "weight"},
    "M3": {"lr": 0.02, "precision": "weight", "periods": 2},
    "DeltaGradientDescent": {"lr": 0.1, "momentum": 0.5},
    "FullMatrixAdagrad": {"lr": 0.02},
    "DeepMomentum": {"lr": 0.01},
    "for_model": {"lr": 0.02, "precision": "weight"},
}


def build(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "for_model":  # biases by torch's AdamW
        return optim.for_model(model, functools.partial(optim.Muon, **OPTIONS[name]))
    return getattr(optim, name)(model.parameters(), **OPTIONS[name])


def net(biased: bool) -> nn.Module:
    """Three matrices of one shape, so that two ranks have unequal shares; rows that two do not divide."""
    torch.manual_seed(0)
    layers = [nn.Linear(7, 7, bias=biased) for _ in range(3)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2], nn.Linear(7, 3, bias=biased)).double()


def train(model: nn.Module, optimizer, seeds, rows: slice = slice(None)) -> None:
    for seed in seeds:
        x = torch.randn(8, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)[rows]
        optimizer.zero_grad()
        with optimizer.capture(model):
            loss = (model(x) - x[:, :3].sin()).square().sum(-1).mean()
        loss.backward()
        optimizer.step()


def gathered(model: nn.Module) -> torch.Tensor:
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in whole])


def sharded(name: str, rank: int, world: int) -> float:
    """How far the sharded run is from the whole one, the optimizer's state saved and loaded on the way."""
    biased = name not in ("Muon", "M3")
    whole, cut = net(biased), net(biased)
    mesh = init_device_mesh("cpu", (world,))
    for layer in cut:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(cut, mesh=mesh)
    one, two = (build(name, m) for m in (whole, cut))
    own = slice(rank * 8 // world, (rank + 1) * 8 // world)
    train(whole, one, range(5))
    train(cut, two, range(3), own)
    saved = get_optimizer_state_dict(cut, two)
    fresh = build(name, cut)
    set_optimizer_state_dict(cut, fresh, saved)
    train(cut, fresh, range(3, 5), own)
    start = gathered(net(biased))
    assert float((gathered(whole) - start).abs().max()) > 1e-3, "nothing was trained"
    refused(cut, fresh, rank)
    return float((gathered(whole) - gathered(cut)).abs().max())


def refused(model: nn.Module, optimizer, rank: int) -> None:
    """A gradient that is not finite on one rank alone stops all of them, before anything has changed."""
    before = gathered(model)
    if rank == 0:
        next(model.parameters()).grad.to_local()[0] = math.nan
    try:
        optimizer.step()
    except FloatingPointError as error:
        assert "is not finite; nothing was changed" in str(error)  # noqa: PT017
        assert torch.equal(gathered(model), before)
        return
    raise AssertionError("a gradient of nan was taken")


def main() -> None:
    rank, world, port = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for name in OPTIONS:
        print(name, sharded(name, rank, world), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

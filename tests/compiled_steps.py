"""Optimizers with compiled steps beside the same without: python tests/compiled_steps.py.

Started by tests/test_compiled.py, in a process of its own: functions that are type-checked at run time do not compile.
"""

import torch
from torch import nn

from nestling import optim

OPTIONS = {"AdamW": {}, "Muon": {"precision": "weight"}, "M3": {"precision": "weight", "periods": 2}}


def net(biased: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6, bias=biased), nn.Tanh(), nn.Linear(6, 6, bias=biased)).double()


def main() -> None:
    torch.set_num_threads(1)
    for name, options in OPTIONS.items():
        nets = [net(name == "AdamW") for _ in range(2)]
        start = torch.cat([p.detach().flatten() for p in nets[0].parameters()])
        optimizers = [getattr(optim, name)(n.parameters(), lr=0.01, **options) for n in nets]
        steps = [optimizers[0].step, torch.compile(optimizers[1].step)]
        for seed in range(5):
            for own, optimizer, step in zip(nets, optimizers, steps, strict=True):
                optimizer.param_groups[0]["lr"] = 0.01 / (1 + seed // 2)  # as a scheduler changes it
                x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                optimizer.zero_grad()
                (own(x) - x.sin()).square().mean().backward()
                step()
        plain, compiled = (torch.cat([p.detach().flatten() for p in n.parameters()]) for n in nets)
        assert float((plain - start).abs().max()) > 1e-3, "nothing was trained"
        assert optimizers[1].compiled, "nothing was compiled"
        print(name, float((plain - compiled).abs().max()), flush=True)


if __name__ == "__main__":
    main()

"""What stands around a memory, written out one token at a time in float64: for the tests of blocks."""

import torch
from torch import Tensor, nn

from nestling.memory.naive import Choices, Maps, naive_memory

F64 = torch.float64
EXACT = Choices(objective="l2", decay_to="zero")
"""Of a memory with gradients at every token's own weights and the rule retain(decay(), momentum())."""
DEEP = Choices(objective="l2", residual=True, decay_to="start", normalized=True, clip=1.0, dampened=True, chunk=4)
"""Of mlp() with chunk=4 and the rule that sequence_memory has by default."""


def moved(layer: nn.Module, seed: int = 0) -> nn.Module:
    """The layer in float64, none of whose parameters is at its neutral start."""
    generator = torch.Generator().manual_seed(seed)
    layer = layer.to(F64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=F64, generator=generator))
    return layer


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def convolved(weight: Tensor, rows: list[Tensor]) -> Tensor:
    """sum_s w_s x_{t-s} for the last t of `rows`; w_0 is the last column."""
    y = torch.zeros_like(rows[-1])
    for s in range(min(len(rows), weight.shape[1])):
        y = y + weight[:, -1 - s] * rows[-1 - s]
    return y


def normed(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return x / (x.pow(2).mean() + 1e-6).sqrt() * weight


def silu(x: Tensor) -> Tensor:
    return x / (1.0 + torch.exp(-x))


def turned(x: Tensor, position: int) -> Tensor:
    """Rotary positions, as complex numbers."""
    half = len(x) // 2
    angles = torch.tensor([position * 10_000.0 ** (-i / half) for i in range(half)], dtype=F64)
    turn = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turn.real, turn.imag])


def softmaxed(scores: list[Tensor], values: list[Tensor]) -> Tensor:
    weights = [torch.exp(score) for score in scores]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


class NaiveLayer:
    """A `SequenceMemory` over one row x [t, d] by `memory.naive`: outputs [t, d], reads and weights of each head."""

    def __init__(self, layer, choices: Choices, x: Tensor) -> None:
        self.layer, self.heads = layer, layer.heads
        projected: list[Tensor] = []
        q, k, v, gates = [], [], [], []
        for token in x:
            projected.append(layer.qkv.weight @ token)
            a, b, c = silu(convolved(layer.convolution.weight, projected)).view(3, self.heads, -1)
            q.append(torch.stack([head / head.norm() for head in a]))
            k.append(torch.stack([head / head.norm() for head in b]))
            v.append(c)
            gates.append((layer.gates.weight @ token + layer.gates.bias).view(3, self.heads).sigmoid())
        self.q, self.k, self.v = (torch.stack(part) for part in (q, k, v))  # [t, h, k]
        self.gates = torch.stack(gates)  # [t, 3, h]
        self.runs = [self.run(choices, head, slice(0, len(x))) for head in range(self.heads)]
        reads = torch.stack([run.reads for run in self.runs], 1)
        self.outputs = torch.stack([self.output(read, token) for read, token in zip(reads, x, strict=True)])

    def run(self, choices: Choices, head: int, at: slice, queries: Tensor | None = None):
        start: Maps = tuple(weight[head] for weight in self.layer.start)
        step, kept, retention = self.gates[at, :, head].unbind(1)
        asked = self.q[at, head] if queries is None else queries
        step = self.layer.step_bound * step
        return naive_memory(choices, start, self.k[at, head], self.v[at, head], asked, step, kept, retention.log())

    def output(self, reads: Tensor, token: Tensor) -> Tensor:
        """Heads' reads [h, k] and the layer's input [d] -> [d]."""
        out = self.layer.output
        merged = torch.cat([normed(read) for read in reads]) * out.norm
        return out.project.weight @ (merged * silu(out.gate.weight @ token))


def gradients(y: Tensor, layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of a fixed random combination of y, for every parameter and x."""
    leaves = {"x": x, **dict(layer.named_parameters())}
    found = torch.autograd.grad((y * normal(*y.shape, seed=7)).sum(), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(1.0, float(tensor.abs().max()))
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-10, atol=1e-10 * scale, msg=lambda text, name=name: f"{name}: {text}"
        )

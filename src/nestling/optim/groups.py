"""Which parameters are matrices to orthogonalise, and several optimizers as one."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .named import M3, Named

NamedParameters = list[tuple[str, nn.Parameter]]


def split_parameters(model: nn.Module) -> tuple[NamedParameters, NamedParameters]:
    """(matrices, rest): weights of two and more dims, but for those of embeddings and of maps tied to them; and those,
    biases and other vectors. Only parameters that require gradients."""
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in trained if p.dim() >= 2 and id(p) not in embedded]
    chosen = {id(p) for _, p in matrices}
    return matrices, [(name, p) for name, p in trained if id(p) not in chosen]


class Joined(torch.optim.Optimizer):
    """Several optimizers as one: their groups one after the other, their steps in turn. Groups are shared, so that
    a scheduler of this optimizer changes theirs. Raises ValueError where a parameter is in two of them."""

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        if not self.optimizers:
            raise ValueError("Joined needs at least one optimizer")
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        seen: set[int] = set()
        for parameter in (p for group in groups for p in group["params"]):
            if id(parameter) in seen:
                raise ValueError(f"a parameter of shape {list(parameter.shape)} is in two of the optimizers")
            seen.add(id(parameter))
        super().__init__([{"params": group["params"]} for group in groups], {})
        self.param_groups = groups

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = state_dict.get("optimizers", [])
        if len(own) != len(self.optimizers):
            raise ValueError(f"the state is of {len(own)} optimizers, needed {len(self.optimizers)}")
        for optimizer, state in zip(self.optimizers, own, strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def for_model(
    model: nn.Module,
    matrices: Callable[[NamedParameters], Named] = M3,
    rest: Callable[[NamedParameters], torch.optim.Optimizer] | None = None,
) -> Joined:
    """The `matrices` of a model by one optimizer and the `rest` by another, torch's own AdamW (fused where there is a
    GPU, foreach elsewhere) if none is given: `for_model(model, functools.partial(Muon, lr=0.02))`."""
    wide, narrow = split_parameters(model)
    optimizers: list[torch.optim.Optimizer] = [matrices(wide)] if wide else []
    if narrow:
        optimizers.append((rest or _adamw)(narrow))
    return Joined(optimizers)


def _adamw(params: NamedParameters) -> torch.optim.Optimizer:
    on_gpu = all(p.is_cuda for _, p in params)
    return torch.optim.AdamW(params, weight_decay=0.0, fused=on_gpu or None, foreach=None if on_gpu else True)

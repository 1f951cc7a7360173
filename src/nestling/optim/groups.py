"""Which parameters are matrices to orthogonalise, and several optimizers as one."""

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import RuleOptimizer
from .finite import finite
from .named import M3

NamedParameters = list[tuple[str, nn.Parameter]]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def split_parameters(model: nn.Module) -> tuple[NamedParameters, NamedParameters]:
    """(matrices, rest): weights of two and more dims, but for those of embeddings, of maps tied to them and of grouped
    convolutions, which are no one map; and those, biases and other vectors. Only parameters that require gradients."""
    apart = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    apart |= {id(m.weight) for m in model.modules() if isinstance(m, CONVOLUTIONS) and m.groups > 1}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in trained if p.dim() >= 2 and id(p) not in apart]
    chosen = {id(p) for _, p in matrices}
    return matrices, [(name, p) for name, p in trained if id(p) not in chosen]


class _States(MutableMapping[Tensor, Any]):
    """The states of several optimizers seen as one; each parameter's lies with the optimizer that steps it."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers

    def _of(self, parameter: Tensor) -> Any:
        for optimizer in self.optimizers:
            if any(parameter is own for group in optimizer.param_groups for own in group["params"]):
                return optimizer.state
        raise KeyError(parameter)

    def __getitem__(self, parameter: Tensor) -> Any:
        return self._of(parameter)[parameter]

    def __setitem__(self, parameter: Tensor, state: Any) -> None:
        self._of(parameter)[parameter] = state

    def __delitem__(self, parameter: Tensor) -> None:
        del self._of(parameter)[parameter]

    def __iter__(self) -> Iterator[Tensor]:
        return chain.from_iterable(optimizer.state for optimizer in self.optimizers)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self.optimizers)


class Joined(torch.optim.Optimizer):
    """Several optimizers as one: their groups one after the other, their steps in turn. Groups and states are shared,
    so that a scheduler of this optimizer changes theirs; `state_dict` is torch's, over all groups.

    A gradient that is not finite raises FloatingPointError, or the whole step is skipped and counted in `skipped`,
    before any of them has stepped; groups of torch's own optimizers do as the first group of rules says. `capture` is
    that of all members that have one. Raises ValueError where a parameter is in two of them, and for a group added
    here, which would be nobody's to step.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.__setstate__({"optimizers": list(optimizers), "skipped": 0})
        if not self.optimizers:
            raise ValueError("Joined needs at least one optimizer")
        seen: set[int] = set()
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if id(parameter) in seen:
                raise ValueError(f"a parameter of shape {list(parameter.shape)} is in two of the optimizers")
            seen.add(id(parameter))

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers, "skipped": self.skipped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.optimizers: list[torch.optim.Optimizer] = state["optimizers"]
        self.skipped: int = state["skipped"]
        # what every member knows: a scheduler asks here whether there is a momentum to change
        known = [optimizer.defaults.items() for optimizer in self.optimizers]
        first = dict(known[0]) if known else {}
        shared = {name: value for name, value in first.items() if all(name in dict(other) for other in known)}
        super().__setstate__(state | {"defaults": shared})
        self.state = _States(self.optimizers)  # type: ignore[assignment]
        self._gather()

    def _gather(self) -> None:
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise ValueError(
            "which optimizer is to step the group? Give it to one of .optimizers, and join them again: "
            "joined.optimizers[0].add_param_group(group); joined = Joined(joined.optimizers)"
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        said = [group["nonfinite"] for group in self.param_groups if "nonfinite" in group]
        if finite(self.param_groups, said[0] if said else "raise"):
            for optimizer in self.optimizers:
                optimizer.step()
        else:
            self.skipped += 1
        return loss

    @contextmanager
    def capture(self, module: nn.Module) -> Iterator[None]:
        """`RuleOptimizer.capture` of every member that has it."""
        with ExitStack() as captures:
            for optimizer in self.optimizers:
                if isinstance(optimizer, (RuleOptimizer, Joined)):
                    captures.enter_context(optimizer.capture(module))
            yield

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A state of torch's layout, or a list of them under "optimizers"."""
        states = state_dict["optimizers"] if "optimizers" in state_dict else self._apart(state_dict)
        if len(states) != len(self.optimizers):
            raise ValueError(f"the state is of {len(states)} optimizers, needed {len(self.optimizers)}")
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        self._gather()

    def _apart(self, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """The state of each optimizer: as many groups as it has, and what is told of their parameters."""
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups):
            raise ValueError(f"the state has {len(groups)} parameter groups, needed {len(self.param_groups)}")
        rest, states = iter(groups), []
        for optimizer in self.optimizers:
            own = [next(rest) for _ in optimizer.param_groups]
            numbers = {number for group in own for number in group["params"]}
            state = {number: kept for number, kept in state_dict["state"].items() if number in numbers}
            states.append({"state": state, "param_groups": own})
        return states


def for_model(
    model: nn.Module,
    matrices: Callable[[Any], torch.optim.Optimizer] = M3,
    rest: Callable[[NamedParameters], torch.optim.Optimizer] | None = None,
) -> Joined:
    """The `matrices` of a model by one optimizer and the `rest` by another: torch's own AdamW if none is given, fused
    where torch has that for their devices and dtypes, foreach elsewhere. Weights of convolutions are matrices
    [out, in * kernel], in a group of their own.
    `for_model(model, functools.partial(Muon, lr=0.02))`."""
    wide, narrow = split_parameters(model)
    filters = {id(m.weight) for m in model.modules() if isinstance(m, CONVOLUTIONS)}
    flat = [(name, p) for name, p in wide if id(p) in filters]
    groups: list[dict[str, Any]] = [{"params": [(name, p) for name, p in wide if id(p) not in filters]}]
    groups += [{"params": flat, "flat": True}] if flat else []
    groups = [group for group in groups if group["params"]]
    optimizers = [matrices(groups if flat else wide)] if wide else []
    if narrow:
        optimizers.append((rest or _adamw)(narrow))
    return Joined(optimizers)


FUSED = ("cpu", "cuda", "mps", "xpu")
"""Devices for whose real numbers torch has a fused AdamW; it says so itself at the first step only."""


def _adamw(params: NamedParameters) -> torch.optim.Optimizer:
    fused = all(p.device.type in FUSED and p.is_floating_point() for _, p in params)
    return torch.optim.AdamW(params, weight_decay=0.0, fused=fused or None, foreach=None if fused else True)

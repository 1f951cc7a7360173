"""Parameters that are sharded over processes (DTensors, as FSDP2 makes them): whole matrices dealt out to the ranks.

A rule that looks at a whole matrix is wrong on a shard of it (Newton-Schulz by more than half). So n matrices of one
shape, each cut in W parts, become n/W whole ones on every rank, are stepped there, once, and are cut again.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Is it a DTensor? Told by its attributes: torch.distributed is not imported for those who do not use it."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def like(part: Tensor, parameter: Tensor) -> Tensor:
    """A DTensor that is cut as the parameter is, of this rank's part; the part itself if the parameter is whole."""
    if not is_sharded(parameter):
        return part
    return _distributed(part, parameter.device_mesh, parameter.placements, parameter.shape)  # type: ignore[attr-defined]


def averaged(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The mean over the ranks that share a sharded parameter, as its gradient is; of a whole one the tensor itself."""
    if not is_sharded(parameter):
        return tensor
    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    total = tensor.clone()
    for dim in range(mesh.ndim):
        torch.distributed.all_reduce(total, group=mesh.get_group(dim))
    return total / mesh.size()


def everywhere(true: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Of booleans, whether each is true on all ranks that share the first sharded parameter."""
    mesh: Any = next((p.device_mesh for p in parameters if is_sharded(p)), None)  # type: ignore[attr-defined]
    if mesh is None:
        return true
    counted = true.to(torch.int32)
    for dim in range(mesh.ndim):
        torch.distributed.all_reduce(counted, torch.distributed.ReduceOp.MIN, group=mesh.get_group(dim))
    return counted.bool()


class Deal(NamedTuple):
    """How a number of parameters of one shape, each cut over a mesh, are dealt out whole."""

    number: int
    mesh: Any
    cut: tuple[Any, ...]  # placements of the stack [number, *shape]: cut as the parameters are
    dealt: tuple[Any, ...]  # and those where the first dim is cut instead
    shape: torch.Size  # of one parameter

    def whole(self, parts: list[Tensor]) -> Tensor:
        """This rank's share [n, *shape] of the whole tensors, from its parts of all of them."""
        stack = _distributed(torch.stack(parts), self.mesh, self.cut, (self.number, *self.shape))
        return stack.redistribute(self.mesh, self.dealt).to_local()

    def parts(self, whole: Tensor) -> list[Tensor]:
        """This rank's parts of all, from its share of the whole ones."""
        stack = _distributed(whole, self.mesh, self.dealt, (self.number, *self.shape))
        return _each(stack.redistribute(self.mesh, self.cut).to_local())

    def share(self, all_of_them: list[Tensor]) -> Tensor:
        """This rank's share [n, ...] of tensors that every rank has."""
        stack = torch.stack(all_of_them)
        everywhere = _distributed(stack, self.mesh, self._copied(), stack.shape)
        return everywhere.redistribute(self.mesh, self.dealt).to_local()

    def copies(self, share: Tensor) -> list[Tensor]:
        """All of them on every rank, from its share."""
        stack = _distributed(share, self.mesh, self.dealt, (self.number, *share.shape[1:]))
        return _each(stack.redistribute(self.mesh, self._copied()).to_local())

    def _copied(self) -> tuple[Any, ...]:
        from torch.distributed.tensor import Replicate

        return (Replicate(),) * len(self.cut)


def deal(parameters: list[Tensor]) -> Deal:
    """How these parameters, of one shape and cut alike, are dealt out."""
    from torch.distributed.tensor import Replicate, Shard

    first: Any = parameters[0]
    cut = tuple(Shard(p.dim + 1) if p.is_shard() else Replicate() for p in first.placements)
    dealt = tuple(Shard(0) if p.is_shard() else Replicate() for p in first.placements)
    return Deal(len(parameters), first.device_mesh, cut, dealt, first.shape)


def _each(stack: Tensor) -> list[Tensor]:
    return [tensor.clone() for tensor in stack.unbind(0)]


def _distributed(part: Tensor, mesh: Any, placements: tuple[Any, ...], shape: Any) -> Any:
    from torch.distributed.tensor import DTensor

    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    return DTensor.from_local(part.contiguous(), mesh, placements, run_check=False, shape=size, stride=stride)

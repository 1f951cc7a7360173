"""Sequence states in files of their own, apart from the weights that they fit."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from nestling.memory.state import flatten, unflatten

from .files import contiguous, write_file

FORMAT = "1"


def fingerprint(module: nn.Module) -> str:
    """What a state says that it fits: a digest of every weight of the module, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())  # of any dtype
    return digest.hexdigest()[:16]


def save_state(path: Path | str, state: Any, module: nn.Module) -> None:
    """Write the sequence state of a layer or model, whole or not at all, with the fingerprint of its weights."""
    rows = str(len(next(iter(flatten(state).values()))))
    write_fitting(path, state, fingerprint(module), rows=rows)


def load_state(path: Path | str, module: Any) -> Any:
    """The state in a file, for the module with `init_state` that it was saved with.

    Raises ValueError naming the file where it is damaged, of another format, or of a module with other weights.
    """
    tensors, about = read_fitting(path, fingerprint(module), "state")
    return unflatten(module.init_state(int(about["rows"])), tensors)


def write_fitting(path: Path | str, state: Any, fits: str, **more: str) -> None:
    """Write a state, whole or not at all, with what it fits and what else is to be known of it."""
    write_file(Path(path), save(contiguous(flatten(state)), metadata={"format": FORMAT, "fits": fits, **more}))


def read_fitting(path: Path | str, fits: str, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that `write_fitting` wrote, and what was to be known of them. Raises ValueError naming the file where
    it is damaged, of another format, or fits something else."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a file of {what}, or damaged ({error})") from None
    if about.get("format") != FORMAT:
        raise ValueError(f"{path}: format {about.get('format')!r}; this version reads {FORMAT!r}")
    if about.get("fits") != fits:
        raise ValueError(
            f"{path}: {what} of {about.get('base', 'a model')} ({about.get('fits')}), but this model is {fits}"
        )
    return tensors, about

"""Sequence states in files of their own, apart from the weights that they fit."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

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
    tensors = contiguous(flatten(state))
    about = {"format": FORMAT, "fits": fingerprint(module), "rows": str(len(next(iter(tensors.values()))))}
    write_file(Path(path), save(tensors, metadata=about))


def load_state(path: Path | str, module: Any) -> Any:
    """The state in a file, for the module with `init_state` that it was saved with.

    Raises ValueError naming the file where it is damaged, of another format, or of a module with other weights.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a state file, or damaged ({error})") from None
    if about.get("format") != FORMAT:
        raise ValueError(f"{path}: format {about.get('format')!r}; this version reads {FORMAT!r}")
    fits = fingerprint(module)
    if about["fits"] != fits:
        raise ValueError(f"{path}: a state of a model with weights {about['fits']}, but these weights are {fits}")
    return unflatten(module.init_state(int(about["rows"])), tensors)

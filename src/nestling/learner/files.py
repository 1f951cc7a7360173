"""Files that are there whole or not at all: generations of a state, each a folder that appears by one rename."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, contiguous_format

Contents = Mapping[str, dict[str, Tensor] | str]
"""File name -> tensors (written as safetensors) or text."""


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one: temporary file, fsync, rename, fsync."""
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        _write_through(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_generation(root: Path, number: int, contents: Contents, *, keep: int = 2) -> Path:
    """Write the folder root/NNNNNNNNNNNN whole, then let go of all but the newest `keep`.

    Every file is on the disk before the folder takes its name, so that each generation that can be seen is
    complete, whenever the process is killed.
    """
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"{number:012d}"
    if final.exists():  # a number stands for one state
        return final
    temporary = root / f".{final.name}.tmp{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for name, content in contents.items():
            data = content.encode() if isinstance(content, str) else save(contiguous(content))
            _write_through(temporary / name, data)
        _sync_folder(temporary)
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(root)
    for old in _numbered(root)[:-keep]:  # out of sight first: no half-deleted generation is ever seen
        os.replace(old, root / f".{old.name}.old")
    for leftover in [*root.glob(".*.old"), *root.glob(".*.tmp*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    return final


class Generation(NamedTuple):
    """One generation: where it lies, its number, its tensors by file name (without .safetensors), its JSON files."""

    path: Path
    number: int
    tensors: dict[str, dict[str, Tensor]]
    data: dict[str, Any]


def newest(root: Path) -> Path | None:
    """The folder of the newest generation, if there is one."""
    folders = _numbered(root)
    return folders[-1] if folders else None


def read_generation(folder: Path) -> Generation:
    """Read a generation back. Raises ValueError naming a file that is damaged."""
    tensors: dict[str, dict[str, Tensor]] = {}
    data: dict[str, Any] = {}
    for file in sorted(folder.iterdir()):
        try:
            if file.suffix == ".safetensors":
                tensors[file.stem] = {name: tensor.clone() for name, tensor in load_file(file).items()}
            elif file.suffix == ".json":
                data[file.stem] = json.loads(file.read_text())
        except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: damaged, or not what its name says ({error})") from None
    return Generation(folder, int(folder.name), tensors, data)


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no memory with one another, as safetensors asks."""
    return {name: tensor.detach().clone(memory_format=contiguous_format) for name, tensor in tensors.items()}


def _numbered(root: Path) -> list[Path]:
    return sorted(folder for folder in root.glob("[0-9]*") if folder.is_dir() and folder.name.isdigit())


def _write_through(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

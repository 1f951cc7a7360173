"""Files that are there whole or not at all: generations of a state, each a folder that appears by one rename."""

import hashlib
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

CHECKSUMS = "checksums.json"


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one: temporary file, fsync, rename, fsync."""
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        _write_through(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_folder(final: Path, contents: Contents) -> None:
    """Write a folder whole, with the checksum of every file in it: each file is on the disk before the folder takes
    its name, so that a folder that can be seen is complete, whenever the process is killed."""
    temporary = final.with_name(f".{final.name}.tmp{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    sums: dict[str, str] = {}
    try:
        for name, content in contents.items():
            data = content.encode() if isinstance(content, str) else save(contiguous(content))
            sums[name] = hashlib.sha256(data).hexdigest()
            _write_through(temporary / name, data)
        _write_through(temporary / CHECKSUMS, json.dumps(sums, indent=2).encode())
        sync_folder(temporary)
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(final.parent)


def write_generation(root: Path, number: int, contents: Contents, *, keep: int | None = 2) -> Path:
    """Write the folder root/NNNNNNNNNNNN whole, then let go of all but the newest `keep` (None: of none)."""
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"{number:012d}"
    if final.exists():  # a number stands for one state
        return final
    write_folder(final, contents)
    remove_folders(numbered(root)[:-keep] if keep is not None else [])
    clear_leftovers(root)
    return final


def remove_folders(folders: list[Path]) -> None:
    """Remove folders so that no half-removed one is ever seen: first out of sight by a rename."""
    for folder in folders:
        hidden = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(folder, hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    for parent in {folder.parent for folder in folders}:
        sync_folder(parent)


def clear_leftovers(root: Path) -> None:
    """Remove what killed processes left half-written or half-removed in a folder. For its one writer only."""
    for leftover in leftovers(root):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def leftovers(root: Path) -> list[Path]:
    """What killed processes left half-written or half-removed in a folder, or what its writer has at hand."""
    return sorted([*root.glob(".*.old"), *root.glob(".*.tmp*")])


class Generation(NamedTuple):
    """One generation: where it lies, its number, its tensors by file name (without .safetensors), its JSON files."""

    path: Path
    number: int
    tensors: dict[str, dict[str, Tensor]]
    data: dict[str, Any]


def newest(root: Path) -> Path | None:
    """The folder of the newest generation, if there is one."""
    folders = numbered(root)
    return folders[-1] if folders else None


def read_generation(folder: Path) -> Generation:
    """Read a generation back. Raises ValueError naming a file that is damaged."""
    return Generation(folder, int(folder.name), *read_folder(folder))


def read_folder(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors and JSON of a folder, by file name. Raises ValueError naming a file that is damaged or missing;
    older folders have no checksums, and are taken as they are."""
    tensors: dict[str, dict[str, Tensor]] = {}
    data: dict[str, Any] = {}
    check_sums(folder)
    for file in sorted(folder.iterdir()):
        try:
            if file.suffix == ".safetensors":
                tensors[file.stem] = {name: tensor.clone() for name, tensor in load_file(file).items()}
            elif file.suffix == ".json" and file.name != CHECKSUMS:
                data[file.stem] = json.loads(file.read_text())
        except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: damaged, or not what its name says ({error})") from None
    return tensors, data


def check_sums(folder: Path) -> None:
    """Compare every file of a folder with its checksum. Raises ValueError naming the first that is not as it was
    written."""
    file = folder / CHECKSUMS
    if not file.exists():
        return
    try:
        sums = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: damaged ({error})") from None
    for name, expected in sums.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing")
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            raise ValueError(f"{folder / name}: damaged: not the bytes that were written")


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no memory with one another, as safetensors asks."""
    return {name: tensor.detach().clone(memory_format=contiguous_format) for name, tensor in tensors.items()}


def numbered(root: Path) -> list[Path]:
    """The generations in a folder, oldest first."""
    return sorted(folder for folder in root.glob("[0-9]*") if folder.is_dir() and folder.name.isdigit())


def _write_through(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_tree(folder: Path) -> None:
    """Wait until every file below a folder is on the disk."""
    for path in folder.rglob("*"):
        sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Wait until a folder (or a file) is on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

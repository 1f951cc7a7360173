"""Text as contiguous streams of bytes: row b of batch n + 1 continues row b of batch n."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Batch(NamedTuple):
    """tokens and their targets [b, t]; which tokens start a document; which targets count (the first byte of a
    document cannot be predicted from the one before)."""

    tokens: Tensor
    targets: Tensor
    reset: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Stream:
    """Documents end to end, cut into `rows` contiguous rows that are read side by side, around and around.

    reset_share: the share of rows that start afresh at a batch's edge, at random, so that memories are trained
    for the beginnings of documents too. A batch is a function of its number alone: nothing to save.
    """

    data: np.ndarray  # uint8 [n]
    starts: np.ndarray  # bool [n]
    rows: int
    length: int  # tokens a row and batch
    reset_share: float
    seed: int

    @classmethod
    def of(
        cls, documents: Sequence[bytes], *, rows: int, length: int, reset_share: float = 0.0, seed: int = 0
    ) -> "Stream":
        documents = [document for document in documents if document]
        data = np.frombuffer(b"".join(documents), dtype=np.uint8)
        if len(data) < rows * 2:
            raise ValueError(f"the text has {len(data)} bytes, too few for {rows} rows: at least {2 * rows} are needed")
        starts = np.zeros(len(data), dtype=bool)
        starts[np.cumsum([0, *(len(document) for document in documents[:-1])])] = True
        return cls(data, starts, rows, length, reset_share, seed)

    def batch(self, number: int) -> Batch:
        """Batch `number`, from 0."""
        n = len(self.data)
        first = np.arange(self.rows) * (n // self.rows) + number * self.length
        at = (first[:, None] + np.arange(self.length + 1)) % n
        data, starts = self.data[at].astype(np.int64), self.starts[at]
        reset = starts[:, :-1].copy()
        chance = np.random.default_rng((self.seed, number)).random(self.rows)
        reset[:, 0] |= (chance < self.reset_share) | (number == 0)
        return Batch(*(torch.from_numpy(part) for part in (data[:, :-1], data[:, 1:], reset, ~starts[:, 1:])))


def read_documents(paths: Sequence[Path | str]) -> list[bytes]:
    """The texts of `named_documents`."""
    return [document for _, document in named_documents(paths)]


def digest(documents: Sequence[bytes]) -> str:
    """A SHA-256 of the documents and of where each begins, in hex: equal texts in equal order, equal digests."""
    whole = hashlib.sha256()
    for document in documents:
        whole.update(hashlib.sha256(document).digest())
    return whole.hexdigest()


def named_documents(paths: Sequence[Path | str]) -> list[tuple[str, bytes]]:
    """Every file named, and every file below every folder named, as (its path, its bytes); in the order given, folders
    sorted.

    Raises ValueError naming a path that does not exist, a file that is empty, a folder without text. Hidden
    files and files with a zero byte in their first 8 KiB are not text, and are passed over inside folders.
    """
    documents: list[tuple[str, bytes]] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = [
                (str(file), document) for file in sorted(path.rglob("*")) if (document := _text_in_folder(file, path))
            ]
            if not found:
                raise ValueError(f"{path}: the folder has no text in it")
            documents += found
        elif path.is_file():
            document = path.read_bytes()
            if not document:
                raise ValueError(f"{path}: the file is empty")
            documents.append((str(path), document))
        else:
            raise ValueError(f"{path}: no such file or folder")
    return documents


def _text_in_folder(file: Path, folder: Path) -> bytes:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    if hidden or not file.is_file():
        return b""
    document = file.read_bytes()
    return b"" if b"\0" in document[:8192] else document

"""What is given to a life to learn, as entries of its journal."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from .event import Event
from .journal import Entry
from .kinds import Tokens

Given = str | bytes | bytearray | memoryview | Tensor
"""Text, bytes or tokens [n]."""
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def pieces_of(given: object) -> Iterable[Any]:
    """One piece, or the pieces of a document as they come. Raises ValueError for what is neither."""
    if isinstance(given, Given):
        return (given,)
    if isinstance(given, Iterable) and not isinstance(given, (Mapping, Set)):
        return given
    raise ValueError(_not_text(given))


def with_last(given: object) -> Iterator[tuple[Any, bool]]:
    """`pieces_of`, and of each whether it is the last."""
    pieces = iter(pieces_of(given))
    piece = next(pieces, None)
    while piece is not None:
        following = next(pieces, None)
        yield piece, following is None
        piece = following


def as_tokens(given: object, tokens: Tokens) -> Tensor:
    """Any input as tokens. Raises ValueError for what is no text, and for tokens that the model does not have."""
    if isinstance(given, str):
        return tokens.encode(given.encode())
    if isinstance(given, (bytes, bytearray)) or (isinstance(given, memoryview) and given.itemsize == 1):
        return tokens.encode(bytes(given))
    if not isinstance(given, Tensor):
        raise ValueError(_not_text(given))
    if given.dim() != 1 or given.dtype not in WHOLE:
        raise ValueError(f"tokens must be whole numbers [n], got {given.dtype} {list(given.shape)}")
    if given.numel() and (int(given.min()) < 0 or int(given.max()) >= tokens.size):
        raise ValueError(f"tokens must be in [0, {tokens.size}), got {int(given.min())} to {int(given.max())}")
    return given.long()


def _not_text(given: object) -> str:
    what = f"a memoryview of items {given.format!r}" if isinstance(given, memoryview) else f"a {type(given).__name__}"
    return f"what is read is str, bytes, a tensor of tokens [n], or an iterator of these; got {what}"


def entries_of(
    given: object, source: str, tokens: Tokens, *, ends: bool, derived: int | None, event_bytes: int
) -> list[Entry]:
    """The entries of one piece of a document, each of at most `event_bytes`. Text of a byte model is kept as it is,
    and everything else as its tokens. Raises ValueError for what is empty or has no name."""
    if not source:
        raise ValueError("source is empty; a source has a name, so that it can be forgotten")
    found = as_tokens(given, tokens)
    if not found.numel():
        raise ValueError(f"{source}: nothing to learn from: it is empty")
    if tokens.size == 256:
        whole, encoding, width = bytes(found.tolist()), "bytes", 1
    else:
        whole, encoding, width = found.to(torch.int32).numpy().tobytes(), "int32", 4
    size = max(width, event_bytes // width * width)
    parts = [whole[at : at + size] for at in range(0, len(whole), size)]
    last = len(parts) - 1
    return [
        Entry(source, part, len(part) // width, ends and i == last, encoding, derived=derived)
        for i, part in enumerate(parts)
    ]


def tokens_read(whole: Entry, path: Sequence[Event]) -> int:
    """How much of a document a life has read from its source, however it was cut: all of it, or the beginning of one
    that the path leaves open; else nothing."""
    width, begun = len(whole.content) // whole.tokens, list[Event]()
    for event in path:
        if event.kind != "learn":
            continue
        if event.source != whole.source:
            begun = []
            continue
        begun.append(event)
        if event.ends:
            if sum(e.tokens for e in begun) == whole.tokens and _begins(whole, begun, width):
                return whole.tokens
            begun = []
    size = sum(event.tokens for event in begun)
    return size if size < whole.tokens and _begins(whole, begun, width) else 0


def _begins(whole: Entry, begun: Sequence[Event], width: int) -> bool:
    """Whether a document begins with what some events read."""
    at = 0
    for event in begun:
        part, at = whole.content[at : at + event.tokens * width], at + event.tokens * width
        if hashlib.sha256(part).hexdigest() != event.blob:
            return False
    return True


def read_back(content: bytes, event: Event, tokens: Tokens) -> Tensor:
    """The tokens of an event, from what the journal kept of it; of a sleep, its bytes."""
    if event.kind == "sleep":
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)
    if event.encoding == "int32":
        return torch.frombuffer(bytearray(content), dtype=torch.int32).long() if content else torch.zeros(0).long()
    return tokens.encode(content)

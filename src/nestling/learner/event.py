"""What happened in a life, as it is journaled: events in a tree, each hashed together with all that came before it.

The state of a life is a pure function of the path from its birth to its head. A rollback moves the head and erases
nothing; forgetting takes events out of the tree. A chain hash says which path a snapshot is the state of, so that a
snapshot that no longer fits the journal is never taken for one that does.
"""

import hashlib
from typing import NamedTuple

BIRTH = 0
"""The id that stands for the beginning of a life, before its first event."""

KINDS = ("learn", "release", "sleep")
"""learn: read tokens and learn from them. release: trust a source that was quarantined. sleep: consolidate."""


class Event(NamedTuple):
    """One acknowledged step of a life."""

    id: int
    parent: int  # the event before it; BIRTH where there is none
    kind: str
    key: str  # made of its own source and content alone: what its random draws are keyed by
    chain: str  # hash of its path
    source: str
    blob: str  # sha256 of what was read, or ""
    encoding: str  # "bytes" or "int32"
    tokens: int
    ends: bool  # the document ends with it
    derived: int | None  # the event whose state wrote it, where the model itself did
    done: int  # tokens that have been learned
    pruned: bool = False  # its text is gone

    def link(self, chain: str) -> str:
        """The chain hash of a path that ends with this event, from that of the path before it."""
        words = (self.kind, self.key, self.source, self.blob, self.encoding)
        return hash_of(chain, *words, f"{self.tokens} {int(self.ends)} {self.derived}")


def event_key(source: str, ordinal: int, kind: str, blob: str, ends: bool) -> str:
    """The key of the `ordinal`-th event of a source: no event of another source changes it."""
    return hash_of(source, str(ordinal), kind, blob, str(int(ends)))


def birth_chain(model: str, seed: int) -> str:
    """The chain hash at birth: what the life began with."""
    return hash_of("birth", model, str(seed))


def hash_of(*words: str) -> str:
    """A hash of words, each with its length, so that no two lists of words run into the same text."""
    joined = b"".join(len(word.encode()).to_bytes(8, "big") + word.encode() for word in words)
    return hashlib.sha256(joined).hexdigest()[:32]

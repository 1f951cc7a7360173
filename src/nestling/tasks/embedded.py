"""Text that every Python ships with, as three bodies with a hold-out: English, Python source, Unicode names.

Nothing is downloaded, and modules of the standard library are read as files, never imported, but for
`pydoc_data.topics`, a plain dict of texts. The hold-out is by module: a module's docstrings and its source
fall on the same side. What is held out and shares `LEAK_BYTES` bytes with anything read, of any body, is
dropped.
"""

from __future__ import annotations

import ast
import functools
import io
import operator
import random
import re
import sysconfig
import tokenize
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import decode_source
from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = ["LEAK_BYTES", "READ_BYTES", "Body", "check_no_leak", "embedded_bodies", "shared_substring"]

LEAK_BYTES = 50  # no held-out part shares a substring this long with what is read
READ_BYTES: Mapping[str, int] = {"english": 2_000_000, "python": 400_000, "names": 400_000}

HELD_OUT_ONE_IN = 12  # modules and topics
NAMES_HELD_OUT_ONE_IN = 16
NAMES_RUN = 32  # code points of one document of names
READ_PARTS, HELD_OUT_PARTS = 16, 8  # no document fills more than one such part of what is asked
SMALLEST_BODY, SMALLEST_DOCUMENT = 1024, 128  # bytes

# Not in every installation, or tests, tables and copies.
LEFT_OUT_FOLDERS = frozenset({
    "__phello__", "__pycache__", "dist-packages", "distutils", "encodings", "ensurepip", "idlelib",
    "lib-dynload", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "tkinter", "turtledemo",
})  # fmt: skip
LEFT_OUT_MODULES = frozenset({
    "__hello__", "_compat_pickle", "_distutils_system_mod", "_opcode_metadata", "html.entities", "keyword",
    "re._casefix", "sitecustomize", "stringprep", "token", "usercustomize",
})  # fmt: skip
LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-")  # built with the interpreter

# Names that a rule makes from the code point, besides those that end in a number.
ALGORITHMIC_NAMES = (
    "CJK COMPATIBILITY IDEOGRAPH-",
    "CJK UNIFIED IDEOGRAPH-",
    "EGYPTIAN HIEROGLYPH",
    "HANGUL SYLLABLE ",
    "KHITAN SMALL SCRIPT CHARACTER-",
    "NUSHU CHARACTER-",
    "TANGUT ",
)
ENDS_IN_NUMBER = re.compile(r"[0-9]{2,}[A-Z]?$|-(?=[A-F]*[0-9])[0-9A-F]{4,5}$")

DOCTEST = re.compile(r"^ *>>>", re.MULTILINE)

DropLines = Callable[[bytes, set[int]], bytes]  # a document without the units that touch these lines (from 0)


@dataclass(frozen=True)
class Body:
    """One kind of text: documents to be read, in order, and documents that are never read."""

    name: str
    read: tuple[bytes, ...]
    held_out: tuple[bytes, ...]


class _Pool(NamedTuple):
    """All documents a body may be made of, made when asked for, and how one of them is shortened."""

    read: Iterable[bytes]
    held_out: Iterable[bytes]
    drop: DropLines


def embedded_bodies(
    *, read_bytes: Mapping[str, int] | None = None, held_out_bytes: int = 32_768, seed: int = 0
) -> dict[str, Body]:
    """The bodies "english", "python" and "names" of this Python, split and ordered by the seed.

    English is docstrings, without their doctests, and the topics of `pydoc`: about 1.5 million bytes. Python
    is the standard library's source without docstrings and comments; each document is valid by itself. Names
    are those of code points, a line each, with a document for each run of 32 code points. The split depends
    on the seed and on the installed standard library, not on the sizes.

    `read_bytes` replaces entries of `READ_BYTES`. These sizes are upper limits, and so is `held_out_bytes`,
    which is for each body, and of which at least three quarters are there.

    Raises:
        ValueError: an unknown body, a size below 1024, or more to hold out than the held-out modules have.
    """
    limits = _limits(read_bytes, held_out_bytes)
    stdlib = sysconfig.get_paths()["stdlib"]
    pools = {"english": _english(stdlib, seed), "python": _python(stdlib, seed), "names": _names(seed)}
    read = {name: _take(pool.read, limits[name], READ_PARTS, pool.drop) for name, pool in pools.items()}
    seen = _sorted_windows((b"".join(documents) for documents in read.values()), LEAK_BYTES)
    bodies = {}
    for name, pool in pools.items():
        held_out = _take(_unseen(pool, seen, held_out_bytes), held_out_bytes, HELD_OUT_PARTS, pool.drop)
        found = sum(map(len, held_out))
        if found < 0.75 * held_out_bytes:
            raise ValueError(
                f"held_out_bytes: body {name!r} can hold out {found} bytes with seed {seed} on this Python, "
                f"less than three quarters of {held_out_bytes}; ask for less"
            )
        bodies[name] = Body(name=name, read=read[name], held_out=held_out)
    check_no_leak(bodies)
    return bodies


def check_no_leak(bodies: Mapping[str, Body]) -> None:
    """Passes if no held-out document shares `LEAK_BYTES` bytes with what is read of any body.

    What is read of a body counts as one stream: a substring across the edge of two documents is found too.

    Raises:
        ValueError: naming the held-out body, the body that gives it away, and the substring.
    """
    streams = {body.name: b"".join(body.read) for body in bodies.values()}
    everything = [document for body in bodies.values() for document in body.held_out]
    if shared_substring(everything, streams.values()) is None:
        return
    for body in bodies.values():
        for name, stream in streams.items():
            leak = shared_substring(body.held_out, [stream])
            if leak is not None:
                raise ValueError(
                    f"a held-out document of body {body.name!r} shares {LEAK_BYTES} bytes with what is read "
                    f"of body {name!r}: {leak!r}; drop it from one of them"
                )


def shared_substring(held_out: Iterable[bytes], read: Iterable[bytes], length: int = LEAK_BYTES) -> bytes | None:
    """A substring of `length` bytes that is in a held-out document and in one that is read, or None.

    Windows are compared by a 64-bit hash, which misses none, and a match is confirmed on the bytes.
    """
    if length < 1:
        raise ValueError(f"length must be >= 1 byte, got {length}")
    texts = list(read)
    seen = _sorted_windows(texts, length)
    for document in held_out:
        for start in _seen_windows(document, seen, length):
            window = document[start : start + length]
            if any(window in text for text in texts):
                return window
    return None


def _window_hashes(text: bytes, length: int) -> np.ndarray:
    """[len(text) - length + 1] polynomial hashes mod 2**64, built from those of 1, 2, 4, ... bytes."""
    base = 0x9E3779B97F4A7C15

    def join(first: np.ndarray, second: np.ndarray, first_bytes: int, second_bytes: int) -> np.ndarray:
        count = max(len(text) - first_bytes - second_bytes + 1, 0)
        shift = np.uint64(pow(base, second_bytes, 2**64))
        return first[:count] * shift + second[first_bytes : first_bytes + count]

    power, power_bytes = np.frombuffer(text, np.uint8).astype(np.uint64), 1
    hashes, done = np.zeros(len(text) + 1, np.uint64), 0
    while True:
        if length & power_bytes:
            hashes, done = join(hashes, power, done, power_bytes), done + power_bytes
        if done == length:
            return hashes
        power, power_bytes = join(power, power, power_bytes, power_bytes), 2 * power_bytes


def _sorted_windows(texts: Iterable[bytes], length: int) -> np.ndarray:
    hashes = [_window_hashes(text, length) for text in texts]
    return np.sort(np.concatenate(hashes)) if hashes else np.zeros(0, np.uint64)


def _seen_windows(document: bytes, seen: np.ndarray, length: int) -> list[int]:
    """Starts of the document's windows whose hash is among the sorted ones."""
    hashes = _window_hashes(document, length)
    if not len(seen) or not len(hashes):
        return []
    nearest = np.minimum(np.searchsorted(seen, hashes), len(seen) - 1)
    return np.flatnonzero(seen[nearest] == hashes).tolist()


def _unseen(pool: _Pool, seen: np.ndarray, limit: int) -> Iterator[bytes]:
    """The pool's held-out documents without what holds the most of each window that has been seen."""
    for text in pool.held_out:
        # Twice the size to be kept: dropping shortens a document, and takes time by its length.
        document = _cut(text, 2 * _largest(limit, HELD_OUT_PARTS), pool.drop)
        while starts := _seen_windows(document, seen, LEAK_BYTES):
            lines = set()
            for start in starts:
                parts = document[start : start + LEAK_BYTES].split(b"\n")
                longest = max(enumerate(map(len, parts)), key=operator.itemgetter(1))[0]
                lines.add(document.count(b"\n", 0, start) + longest)
            shorter = pool.drop(document, lines)
            assert len(shorter) < len(document)  # a line of no unit would keep this going for ever
            document = shorter
        yield document


def _limits(read_bytes: Mapping[str, int] | None, held_out_bytes: int) -> dict[str, int]:
    given = dict(read_bytes or {})
    for name, size in given.items():
        if name not in READ_BYTES:
            known = ", ".join(map(repr, READ_BYTES))
            raise ValueError(f"read_bytes: unknown body {name!r}, known are {known}")
        if size < SMALLEST_BODY:
            raise ValueError(f"read_bytes[{name!r}] must be >= {SMALLEST_BODY} bytes, got {size}")
    if held_out_bytes < SMALLEST_BODY:
        raise ValueError(f"held_out_bytes must be >= {SMALLEST_BODY}, got {held_out_bytes}")
    return {**READ_BYTES, **given}


def _largest(limit: int, parts: int) -> int:
    return max(limit // parts, SMALLEST_BODY)


def _cut(document: bytes, limit: int, drop: DropLines) -> bytes:
    if len(document) <= limit:
        return document
    return drop(document, set(range(document.count(b"\n", 0, limit), document.count(b"\n") + 1)))


def _take(documents: Iterable[bytes], limit: int, parts: int, drop: DropLines) -> tuple[bytes, ...]:
    """Documents, cut to their largest size, until the limit is nearly reached."""
    taken, room = [], limit
    for document in documents:
        part = _cut(document, min(room, _largest(limit, parts)), drop)
        if len(part) >= SMALLEST_DOCUMENT:
            taken.append(part)
            room -= len(part)
        if room <= max(limit // 256, SMALLEST_DOCUMENT):
            break
    return tuple(taken)


def _split(units: Sequence[str], seed: int, what: str) -> tuple[list[str], list[str]]:
    """The units to read and those to hold out, each shuffled."""
    shuffled = list(units)
    random.Random(f"{seed} {what}").shuffle(shuffled)
    count = -(-len(shuffled) // HELD_OUT_ONE_IN)
    return shuffled[count:], shuffled[:count]


@functools.cache
def _module_paths(stdlib: str) -> dict[str, Path]:
    """The file of each module of the standard library that is used, by dotted name, sorted."""
    root = Path(stdlib)
    paths = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        left_out = name in LEFT_OUT_MODULES or name.startswith(LEFT_OUT_PREFIXES)
        if LEFT_OUT_FOLDERS.isdisjoint(parts) and not left_out:
            paths[name] = path
    return dict(sorted(paths.items()))


def _parse(source: str | bytes) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an odd escape in somebody's string is not our caller's concern
        return ast.parse(source)


def _blocks(node: ast.AST) -> Iterator[tuple[ast.AST, list[ast.stmt]]]:
    """Each list of statements under the node, with the node that owns it; expressions are not entered."""
    for field in ("body", "orelse", "finalbody"):
        if block := getattr(node, field, None):
            yield node, block
            for statement in block:
                yield from _blocks(statement)
    for part in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
        yield from _blocks(part)


def _english(stdlib: str, seed: int) -> _Pool:
    modules = _split(list(_module_paths(stdlib)), seed, "modules")
    topics = _split(sorted(_topics()), seed, "topics")

    def documents(side: int) -> Iterator[bytes]:
        texts = [(name, _docstrings) for name in modules[side]] + [(name, _topic) for name in topics[side]]
        random.Random(f"{seed} english {side}").shuffle(texts)
        seen: set[str] = set()
        for name, source in texts:
            fresh = []
            for text in source(stdlib, name):
                if len(text) < LEAK_BYTES or text not in seen:
                    fresh.append(text)
                    seen.add(text)
            yield _encoded("\n\n".join(fresh))

    return _Pool(documents(0), documents(1), _drop_paragraphs)


def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics  # half a megabyte, only when asked for

    return topics


def _topic(stdlib: str, name: str) -> list[str]:
    return _paragraphs(_topics()[name])


@functools.cache
def _docstrings(stdlib: str, name: str) -> list[str]:
    """Paragraphs of a module's docstrings, in the order of the source, without doctests."""
    tree = _parse(_module_paths(stdlib)[name].read_bytes())
    owners = (node for node, _ in _blocks(tree))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in owners if isinstance(node, kinds))
    return [paragraph for text in texts if text for paragraph in _paragraphs(text)]


def _paragraphs(text: str) -> list[str]:
    """Paragraphs, each up to its first line of a doctest."""
    parts = (DOCTEST.split(part, maxsplit=1)[0].rstrip() for part in re.split(r"\n\s*\n", text))
    return [part for part in parts if part.strip()]


def _drop_paragraphs(document: bytes, lines: set[int]) -> bytes:
    kept, start = [], 0
    for paragraph in document.removesuffix(b"\n").split(b"\n\n"):
        end = start + paragraph.count(b"\n") + 1
        if lines.isdisjoint(range(start, end)):
            kept.append(paragraph)
        start = end + 1
    return b"\n\n".join(kept) + b"\n" if kept else b""


def _encoded(text: str) -> bytes:
    text = text.strip("\n")
    return (text + "\n").encode("utf-8", "replace") if text else b""  # a lone surrogate becomes "?"


def _python(stdlib: str, seed: int) -> _Pool:
    read, held_out = _split(list(_module_paths(stdlib)), seed, "modules")
    return _Pool((_code(stdlib, m) for m in read), (_code(stdlib, m) for m in held_out), _drop_statements)


@functools.cache
def _code(stdlib: str, name: str) -> bytes:
    return _without_comments(_module_paths(stdlib)[name].read_bytes())


def _without_comments(source: bytes) -> bytes:
    """Python source without comments, docstrings, other strings that stand alone and repeated blank lines."""
    text = decode_source(source)
    lines = text.split("\n")
    touched = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
            touched.add(row - 1)
    for node, replacement in reversed(list(_bare_strings(_parse(text)))):
        rows = _lines(node)
        before = lines[rows[0]].encode()[: node.col_offset].decode()
        after = lines[rows[-1]].encode()[node.end_col_offset :].decode()
        for row in rows:
            lines[row] = ""
        lines[rows[0]] = before + replacement + after
        touched.update(rows)
    return _single_blank(line for row, line in enumerate(lines) if line.strip() or row not in touched)


def _bare_strings(tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    """Statements that are only a string, with what has to stand in their place."""
    for owner, block in _blocks(tree):
        bare = [isinstance(node, ast.Expr) and _is_string(node.value) for node in block]
        for index, node in enumerate(block):
            alone = index == 0 and all(bare) and not isinstance(owner, ast.Module)
            followed = index + 1 < len(block) and block[index + 1].lineno == node.end_lineno
            if bare[index]:
                yield node, "..." if alone or followed else ""


def _is_string(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _single_blank(lines: Iterable[str]) -> bytes:
    """The lines without blank ones that follow another, or that follow the header of a block."""
    kept: list[str] = []
    for line in lines:
        if line.strip():
            kept.append(line)
        elif kept and kept[-1] and not kept[-1].endswith(":"):
            kept.append("")
    return _encoded("\n".join(kept))


def _drop_statements(source: bytes, lines: set[int]) -> bytes:
    """The source without the touched statements of the top level.

    Of a class whose header is not touched, only the touched statements of its body go.
    """
    dropped = {row for span in _touched(_parse(source).body, lines) for row in span}
    kept = (line for row, line in enumerate(source.decode().split("\n")) if row not in dropped)
    return _single_blank(kept)


def _touched(block: list[ast.stmt], lines: set[int]) -> list[range]:
    spans = []
    for node in block:
        span = _lines(node)
        if lines.isdisjoint(span):
            continue
        spans_inside = []
        if isinstance(node, ast.ClassDef) and lines.isdisjoint(range(span[0], _lines(node.body[0])[0])):
            spans_inside = _touched(node.body, lines)
            if all(_lines(member) in spans_inside for member in node.body):
                spans_inside = []  # a class needs a body
        spans += spans_inside or [span]
    return spans


def _lines(node: ast.stmt) -> range:
    """The lines of a statement, from 0, with its decorators."""
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
    return range(first - 1, node.end_lineno or node.lineno)


def _names(seed: int) -> _Pool:
    """One run in every 16 neighbours is held out, so that each script has runs on both sides."""
    generator = random.Random(f"{seed} names")
    read: list[bytes] = []
    held_out = []
    runs = _name_runs()
    for start in range(0, len(runs), NAMES_HELD_OUT_ONE_IN):
        neighbours = list(runs[start : start + NAMES_HELD_OUT_ONE_IN])
        held_out.append(neighbours.pop(generator.randrange(len(neighbours))))
        read += neighbours
    generator.shuffle(read)
    generator.shuffle(held_out)
    return _Pool(read, held_out, _drop_lines)


@functools.cache
def _name_runs() -> tuple[bytes, ...]:
    runs: dict[int, list[str]] = {}
    for code in range(0x110000):
        name = unicodedata.name(chr(code), "")
        if name and not name.startswith(ALGORITHMIC_NAMES) and not ENDS_IN_NUMBER.search(name):
            runs.setdefault(code // NAMES_RUN, []).append(name)
    return tuple(_encoded("\n".join(names)) for names in runs.values())


def _drop_lines(document: bytes, lines: set[int]) -> bytes:
    return b"".join(line for row, line in enumerate(document.splitlines(keepends=True)) if row not in lines)

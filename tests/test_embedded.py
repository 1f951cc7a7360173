"""The embedded text: no leak, one side for each module, valid Python, the same every time."""

import ast
import hashlib
import io
import os
import random
import re
import subprocess
import sys
import sysconfig
import tokenize

import pytest

from nestling.tasks import embedded
from nestling.tasks.embedded import Body, check_no_leak, embedded_bodies, shared_substring

SMALL = {"english": 60_000, "python": 30_000, "names": 30_000}


@pytest.fixture(scope="module")
def bodies() -> dict[str, Body]:
    return embedded_bodies()


def size(documents: tuple[bytes, ...]) -> int:
    return sum(map(len, documents))


def windows(text: bytes, length: int) -> set[bytes]:
    return {text[start : start + length] for start in range(len(text) - length + 1)}


def one_body(name: str, read: bytes, held_out: bytes) -> Body:
    return Body(name=name, read=(read,), held_out=(held_out,))


def bytes_of(seed: int, count: int) -> bytes:
    return random.Random(seed).randbytes(count)


def test_leak_of_50_bytes_is_found_and_of_49_is_not():
    leak = bytes_of(1, 50)
    read = bytes_of(2, 5_000) + leak + bytes_of(3, 700)
    assert shared_substring([bytes_of(4, 99), bytes_of(5, 300) + leak + b"?"], [b"", read]) == leak
    assert shared_substring([leak], [leak]) == leak
    assert shared_substring([bytes_of(5, 300) + leak[1:] + b"?"], [read]) is None
    assert shared_substring([bytes_of(5, 300) + leak[:-1]], [read]) is None
    assert shared_substring([bytes_of(5, 300) + leak[1:]], [read], length=49) == leak[1:]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 12, 31, 50])
def test_shared_substring_agrees_with_sets_of_windows(length):
    generator = random.Random(length)
    outcomes = set()

    def texts(alphabet: bytes) -> list[bytes]:
        return [bytes(generator.choices(alphabet, k=generator.randrange(120))) for _ in range(3)]

    for _ in range(60):
        held_out = texts(generator.choice([b"ab", b"\0\1\xff", bytes(range(128))]))
        read = texts(generator.choice([b"ab", b"\0\1\xff", bytes(range(128, 256))]))
        if generator.random() < 0.5:
            read[1] = read[1][:9] + held_out[2] + read[1][9:]
        shared = set().union(*(windows(text, length) for text in held_out)) & set().union(
            *(windows(text, length) for text in read)
        )
        found = shared_substring(held_out, read, length)
        assert (found is None) == (not shared)
        assert found is None or found in shared
        outcomes.add(found is None)
    assert outcomes == {True, False}


@pytest.mark.parametrize("nothing", [[], [b""], [b"x" * 49]])
def test_too_short_texts_share_nothing(nothing):
    assert shared_substring(nothing, [b"x" * 100]) is None
    assert shared_substring([b"x" * 100], nothing) is None


def test_length_below_one_is_refused():
    with pytest.raises(ValueError, match="length must be >= 1 byte, got 0"):
        shared_substring([b"a"], [b"a"], 0)


def test_check_no_leak_names_both_bodies_and_the_substring():
    leak = b"a sentence of fifty bytes that has been read before"[:50]
    held = one_body("names", b"r" * 80, b"then " + leak)
    given_away = one_body("english", leak + b"!", b"s" * 80)
    with pytest.raises(ValueError, match=rf"'names' shares 50 bytes.*'english': {leak!r}"):
        check_no_leak({"names": held, "english": given_away})
    check_no_leak({"names": held, "english": one_body("english", leak[1:] + b"!", b"s" * 80)})


def test_check_no_leak_looks_across_the_edge_of_documents_read():
    leak = bytes_of(7, 50)
    split = Body(name="python", read=(b"ab" + leak[:20], leak[20:] + b"cd"), held_out=(leak,))
    with pytest.raises(ValueError, match="'python'"):
        check_no_leak({"python": split})


def test_no_held_out_window_is_read_by_sets_of_windows(bodies):
    held_out = set().union(*(windows(text, 50) for body in bodies.values() for text in body.held_out))
    for body in bodies.values():
        stream = b"".join(body.read)
        leaks = (stream[start : start + 50] for start in range(len(stream) - 49))
        assert held_out.isdisjoint(leaks)


def test_sizes_are_near_those_asked(bodies):
    assert list(bodies) == ["english", "python", "names"]
    for name, asked in {"python": 400_000, "names": 400_000}.items():
        assert 0.99 * asked <= size(bodies[name].read) <= asked
    assert 1_200_000 <= size(bodies["english"].read) <= 2_000_000
    for name, body in bodies.items():
        assert body.name == name
        assert 0.95 * 32_768 <= size(body.held_out) <= 32_768
        assert len(body.held_out) >= 8
        assert max(map(len, body.held_out)) <= 32_768 // 8


def test_read_bytes_replaces_single_sizes_and_keeps_the_split(bodies):
    fewer = embedded_bodies(read_bytes={"python": 50_000}, held_out_bytes=8_000)
    assert 0.9 * 50_000 <= size(fewer["python"].read) <= 50_000
    for name in ["english", "names"]:
        assert fewer[name].read == bodies[name].read
    for body in fewer.values():
        assert 0.75 * 8_000 <= size(body.held_out) <= 8_000


def test_python_parses_and_has_no_docstring_or_comment(bodies):
    for document in bodies["python"].read + bodies["python"].held_out:
        for node in ast.walk(ast.parse(document)):
            assert not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) or (
                node.value.value is Ellipsis
            )
        kinds = {token.type for token in tokenize.tokenize(io.BytesIO(document).readline)}
        assert tokenize.COMMENT not in kinds
        assert b"\n\n\n" not in document


def test_names_are_without_algorithmic_ones_and_whole(bodies):
    whole = [name for run in embedded._name_runs() for name in run.decode().splitlines()]
    assert {"LATIN SMALL LETTER A", "SKULL AND CROSSBONES", "NEW MOON WITH FACE"} < set(whole)
    numbered = r"IDEOGRAPH-|HANGUL SYLLABLE|EGYPTIAN HIEROGLYPH|TANGUT|NUSHU CHARACTER|-[0-9]+[A-F]+$|\d\d$"
    assert not [name for name in whole if re.search(numbered, name)]
    lines = b"".join(bodies["names"].read + bodies["names"].held_out).decode().splitlines()
    assert len(set(lines)) == len(lines)
    assert set(lines) < set(whole)


def test_each_script_is_read_where_it_is_held_out(bodies):
    read_words = {line.split()[0] for text in bodies["names"].read for line in text.splitlines()}
    held_lines = [line for text in bodies["names"].held_out for line in text.splitlines()]
    known = [line.split()[0] in read_words for line in held_lines]
    assert sum(known) > 0.8 * len(known)


def test_no_long_paragraph_of_english_is_read_twice(bodies):
    paragraphs = [text for document in bodies["english"].read for text in document.rstrip().split(b"\n\n")]
    long = [text for text in paragraphs if len(text) >= 60]
    assert len(set(long)) == len(long) > 5_000


def test_bodies_are_checked_before_they_are_returned(monkeypatch):
    def refuse(bodies):
        raise ValueError(f"checked {', '.join(bodies)}")

    monkeypatch.setattr(embedded, "check_no_leak", refuse)
    with pytest.raises(ValueError, match="checked english, python, names"):
        embedded_bodies(read_bytes=SMALL)


def test_seeds_give_different_splits(bodies):
    other = embedded_bodies(seed=1)
    for name, body in bodies.items():
        assert other[name].read != body.read
        assert set(other[name].held_out) != set(body.held_out)
        assert shared_substring(other[name].held_out, body.read) is not None


def test_two_calls_are_equal(bodies):
    assert embedded_bodies() == bodies


def digest(bodies: dict[str, Body]) -> str:
    return hashlib.sha256(repr(bodies).encode()).hexdigest()


def test_another_process_with_another_hash_order_and_locale_gives_the_same():
    program = (
        "import hashlib, runpy, sys\n"
        "bodies = runpy.run_path(sys.argv[1])['embedded_bodies'](read_bytes=eval(sys.argv[2]), seed=3)\n"
        "print(hashlib.sha256(repr(bodies).encode()).hexdigest())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, embedded.__file__, repr(SMALL)],
        env={**os.environ, "PYTHONHASHSEED": "77", "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == digest(embedded_bodies(read_bytes=SMALL, seed=3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"read_bytes": {"french": 5_000}}, r"read_bytes: unknown body 'french', known are 'english'"),
        ({"read_bytes": {"names": 12}}, r"read_bytes\['names'\] must be >= 1024 bytes, got 12"),
        ({"held_out_bytes": 0}, "held_out_bytes must be >= 1024, got 0"),
        ({"read_bytes": SMALL, "held_out_bytes": 3_000_000}, "held_out_bytes: body 'english' can hold out"),
    ],
)
def test_what_cannot_be_given_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        embedded_bodies(**arguments)


MODULE = '''#!/usr/bin/env python3
# -*- coding: latin-1 -*-
# {tag} {comment}
"""{tag}: {summary} caf\xe9."""

import os  # {comment}; "quoted"


class {tag}_Only:
    """{tag} {first}"""


class {tag}_Class(object):
    """{tag} {second}

    >>> {tag}_Class().{a}()  # a doctest
    '{b}'

    {tag} {third}
    """

    # {comment}
    {a} = "# not a {a} comment: {b} caf\xe9"; "{tag} {comment}"

    {b} = """no {a} # comment

    {b} either"""  # {comment}


    "{tag} {comment}"
    def {a}_method(self): "{tag} {fourth}"

    @property
    def {b}_method(self):
        "{tag} " "{fifth}"; return "{b}#{a}"


def {tag}_function({a}):
    """{tag} {sixth}"""
    # {comment}
    return [{a}, {b!r},  # {comment}
            "#{tag}"]


{tag}_values = {tag}_function("{third}"), {tag}_Class().{b}_method, {tag}_Class.{a}, {tag}_Class.{b}
'''


@pytest.fixture
def invented(tmp_path, monkeypatch):
    """A standard library of 60 modules whose every line is marked with the module's own words."""
    generator = random.Random(0)

    def word() -> str:
        return "".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=9))

    def text() -> str:
        return " ".join(word() for _ in range(20))

    fields = ["comment", "summary", "first", "second", "third", "fourth", "fifth", "sixth"]
    for index in range(60):
        texts = {field: text() for field in fields}
        source = MODULE.format(tag=f"tag{index:02}", a=word(), b=word(), **texts)
        folder = tmp_path / ("package" if index % 3 else ".")
        folder.mkdir(exist_ok=True)
        (folder / f"module{index:02}.py").write_bytes(source.encode("latin-1"))
    for place in ["test", "package/tests", "idlelib", "site-packages", "encodings", "lib2to3"]:
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / "left.py").write_text(f'"""tag99 {text()}"""\ntag99 = "{text()}"\n')
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def tags(documents: tuple[bytes, ...]) -> set[str]:
    return {tag.decode() for document in documents for tag in re.findall(rb"tag\d\d", document)}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_docstrings_and_source_of_a_module_fall_on_the_same_side(invented, seed):
    found = embedded_bodies(held_out_bytes=3_000, seed=seed)
    read = tags(found["english"].read) | tags(found["python"].read)
    held_out = tags(found["english"].held_out) | tags(found["python"].held_out)
    assert len(held_out) >= 2
    assert len(read) == 55  # one in twelve is held out
    assert not read & held_out
    assert tags(found["english"].read) == tags(found["python"].read)
    assert "tag99" not in read | held_out


def test_source_without_docstrings_and_comments_means_the_same(invented):
    documents = embedded_bodies(held_out_bytes=3_000)["python"].read
    assert len(documents) == 55
    for document in documents:
        (tag,) = tags((document,))
        original: dict[str, object] = {}
        stripped: dict[str, object] = {}
        (path,) = invented.rglob(f"module{tag[3:]}.py")
        exec(compile(path.read_bytes(), "original", "exec"), original)
        exec(compile(document, "stripped", "exec"), stripped)
        assert stripped[f"{tag}_values"] == original[f"{tag}_values"]
        assert b"class " + tag.encode() + b"_Only:\n    ...\n" in document
        assert original[f"{tag}_Class"].__doc__
        for value in [stripped[f"{tag}_Only"], stripped[f"{tag}_Class"], stripped[f"{tag}_function"]]:
            assert value.__doc__ is None
        assert stripped.get("__doc__") is None


def test_docstrings_are_whole_but_for_doctests(invented):
    documents = embedded_bodies(held_out_bytes=3_000)["english"].read
    for path in sorted(invented.rglob("module*.py")):
        source = path.read_bytes().decode("latin-1")
        tag = f"tag{path.stem[-2:]}"
        of_module = [text.decode() for text in documents if tag.encode() in text]
        if of_module:
            (text,) = of_module
            tree = ast.parse(source)
            of_owners = [ast.get_docstring(owner) for owner in (tree, tree.body[2])]
            assert text.startswith("\n\n".join(of_owners) + f"\n\n{tag} ")
            assert "doctest" not in text
            assert text.count(tag) == 7


def test_held_out_text_that_is_read_elsewhere_is_dropped_alone(invented):
    copied = "This very paragraph is copied from one module to all of the other ones, word for word."
    addition = f"""
def copied():
    '''{copied}'''
    return "{copied}"


class %s_Kept:
    kept = "%s"

    def copied(self):
        return "{copied}"
"""
    for path in sorted(invented.rglob("module*.py")):
        tag = f"tag{path.stem[-2:]}"
        path.write_bytes(path.read_bytes() + (addition % (tag, tag)).encode())
    found = embedded_bodies(held_out_bytes=3_000)
    for name in ["english", "python"]:
        assert any(copied.encode() in text for text in found[name].read)
        assert not any(copied.encode() in text for text in found[name].held_out)
        assert tags(found[name].held_out)
    (first, *_) = found["python"].held_out
    (tag,) = tags((first,))
    assert f'class {tag}_Kept:\n    kept = "{tag}"\n'.encode() in first

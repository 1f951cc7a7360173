"""Parts: frozen dataclasses that print as the line that builds them, compare, parse and round-trip."""

import ast
import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

P = TypeVar("P", bound="Part")

LATER = {"later": True}
"""Metadata of a field that was not there when models were first stored: at its default it stays out of their data, of
which digests are kept."""


class Part:
    """A frozen dataclass of choices with pure functions on it.

    A subclass that names a `family` starts one; every final leaf below it is a row in that family's dict
    (`Family.variants`) under its own class name, which is the name that users write.
    """

    variants: ClassVar[dict[str, type["Part"]]] = {}

    def __init_subclass__(cls, family: bool = False, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if family:
            cls.variants = {}
        elif not abstract:
            cls.variants[cls.__name__] = cls

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        values = [getattr(self, field.name) for field in fields]
        told = [value != field.default for value, field in zip(values, fields, strict=True)]
        arguments, positional = [], True
        for index, (field, value) in enumerate(zip(fields, values, strict=True)):
            if positional and any(told[index:]) and (field.default is dataclasses.MISSING or isinstance(value, Part)):
                arguments.append(repr(value))  # the leading parts, up to the last one that says something
                positional = any(told[index + 1 :])
                continue
            positional = False
            if told[index]:
                arguments.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(arguments)})"


def known(name: str, variants: Mapping[str, Any], what: str) -> Any:
    """The entry called `name`. Raises ValueError that lists what is known, with a guess at what was meant."""
    if name in variants:
        return variants[name]
    guess = difflib.get_close_matches(name, variants, n=1)
    hint = f"; did you mean {guess[0]!r}?" if guess else ""
    raise ValueError(f"unknown {what} {name!r}; known: {', '.join(sorted(variants))}{hint}")


def check_families(owner: Any) -> None:
    """Raises ValueError where a field of an expression holds a part of another family than its default is of, or a part
    where the default is none; where the default is None, or there is none, nothing is said."""
    for field in dataclasses.fields(owner):
        value, default = getattr(owner, field.name), field.default
        if default is None or default is dataclasses.MISSING:
            continue
        wanted, kind = type(default), "a plain value"
        if isinstance(default, Part):
            wanted = next(base for base in wanted.__mro__ if "variants" in vars(base))
            kind = f"one of {wanted.__name__}"
        if isinstance(value, Part) and not isinstance(value, wanted):
            said = f"must be {kind}, such as {default!r}, and cannot be {value!r}"
            raise ValueError(f"{type(owner).__name__}: {field.name} {said}")


def all_variants() -> dict[str, type[Part]]:
    """Every part of every family that has been imported, by name."""
    found: dict[str, type[Part]] = {}
    for family in Part.__subclasses__():
        found.update(family.variants)
    return found


def parse(text: str, family: type[P] = Part) -> P:  # type: ignore[assignment]
    """The part that an expression such as ``"every(512, retain(decay(), momentum()))"`` builds.

    Only names of parts, their arguments and plain numbers, strings, tuples and None are understood; nothing
    is evaluated. Raises ValueError naming the text, and what is allowed, when it is anything else.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise ValueError(f"{text!r} is not an expression of parts, such as 'retain(decay(), momentum())'") from None
    part = _build(tree, text)
    if not isinstance(part, family):
        raise ValueError(f"{text!r} is a {type(part).__name__}, but a {family.__name__} is needed here")
    return part


def _build(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        part = known(node.func.id, all_variants(), "part")
        arguments = [_build(argument, text) for argument in node.args]
        names = [word.arg for word in node.keywords]
        if None in names or len(set(names)) < len(names):
            raise ValueError(f"in {text!r}: every argument of {node.func.id} needs a name of its own")
        keywords = {str(word.arg): _build(word.value, text) for word in node.keywords}
        try:
            return part(*arguments, **keywords)
        except TypeError as error:
            raise ValueError(f"in {text!r}: {error}") from None
    if isinstance(node, ast.Tuple):
        return tuple(_build(element, text) for element in node.elts)
    if isinstance(node, ast.Name) and node.id == "inf":
        return float("inf")
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"in {text!r}: {ast.unparse(node)!r} is neither a part nor a plain value") from None

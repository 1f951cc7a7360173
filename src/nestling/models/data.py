"""Configurations as JSON and back: strict, with parts as tagged unions; errors that name the path."""

import dataclasses
import json
import math
from typing import Any, TypeVar

from nestling.memory import Part, all_variants, known, parse
from nestling.memory.part import LATER

T = TypeVar("T")


def to_data(config: Any) -> Any:
    """A configuration as plain data: parts become {"kind": name, ...}, infinity the string "inf"."""
    return _converter().unstructure(config)


def from_data(kind: type[T], data: Any, *, path: str = "config") -> T:
    """A configuration of class `kind` from plain data. A part may also be given as its expression, a string.

    Raises ValueError with every problem on a line of its own, each with its path: an unknown key, a value of the
    wrong type, a part that does not exist, a bound that is broken.
    """
    import cattrs  # not needed to import nestling

    try:
        return _converter().structure(data, kind)
    except cattrs.BaseValidationError as error:
        lines = cattrs.transform_error(error, path=path, format_exception=_say)
        raise ValueError("\n".join(_path_first(line) for line in lines)) from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def to_json(config: Any) -> str:
    """The configuration as JSON text."""
    return json.dumps(to_data(config), indent=2)


def _path_first(line: str) -> str:
    message, _, path = line.rpartition(" @ ")
    return f"{path}: {message}" if message else line


def _say(error: BaseException, kind: type | None) -> str:
    import cattrs

    if isinstance(error, cattrs.errors.ForbiddenExtraKeysError):
        allowed = [field.name for field in dataclasses.fields(error.cl)]
        unknown = ", ".join(sorted(error.extra_fields))
        return f"unknown key {unknown}; known: {', '.join(allowed)}"
    if isinstance(error, KeyError):
        return f"the key {error} is missing"
    return str(error)


def _scalar(kind: type, accepts: tuple[type, ...], name: str) -> Any:
    def check(value: Any, _: Any) -> Any:
        if kind is float and value in ("inf", "Infinity"):
            return math.inf
        if not isinstance(value, accepts) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"expected {name}, got {value!r}")
        return kind(value)

    return check


def _converter() -> Any:
    import cattrs
    from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override

    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind, accepts, name in (
        (int, (int,), "a whole number"),
        (float, (int, float), "a number"),
        (bool, (bool,), "true or false"),
        (str, (str,), "a string"),
    ):
        converter.register_structure_hook(kind, _scalar(kind, accepts, name))
    converter.register_unstructure_hook(float, lambda value: "inf" if value == math.inf else value)

    plain: dict[type, Any] = {}

    def structure_part(data: Any, family: type[Part]) -> Any:
        if isinstance(data, str):
            return parse(data, family)
        if not isinstance(data, dict) or "kind" not in data:
            raise ValueError(f"expected an expression or a table with a kind, got {data!r}")
        variants = {name: part for name, part in all_variants().items() if issubclass(part, family)}
        part = known(data["kind"], variants, family.__name__)
        if part not in plain:
            plain[part] = make_dict_structure_fn(part, converter, _cattrs_forbid_extra_keys=True)
        return plain[part]({key: value for key, value in data.items() if key != "kind"}, part)

    def unstructure_part(part: Part) -> Any:
        told = dataclasses.fields(part)  # type: ignore[arg-type]
        later = {field.name: override(omit_if_default=True) for field in told if field.metadata == LATER}
        fields = make_dict_unstructure_fn(type(part), converter, **later)(part)  # type: ignore[arg-type]
        return {"kind": type(part).__name__, **fields}

    is_part = lambda kind: isinstance(kind, type) and issubclass(kind, Part)  # noqa: E731
    converter.register_structure_hook_func(is_part, structure_part)
    converter.register_unstructure_hook_func(is_part, unstructure_part)
    return converter

"""Dataclasses <-> JSON, and recipe arguments from a command line; knows no class but those handed in."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

# A keyword of Python, so no field can be called that: an object with this key is never a plain mapping.
_CLASS = "class"


def to_json(value: Any, classes: Mapping[str, type], *, place: str = "config") -> Any:
    """`value` in plain JSON values; `from_json` with the same table inverts it exactly.

    Dataclasses and enums whose class stands in `classes` (name -> class) become {"class": name, ...}; tuples
    become lists; also None, bool, int, float (infinities and NaN included), str, slices, and mappings with
    string keys. Raises ValueError naming the place for anything else; `place` is what the message calls the
    root.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {_CLASS: "float", "value": repr(value)}
    if type(value) is slice:
        ends = {"start": value.start, "stop": value.stop, "step": value.step}
        return {
            _CLASS: "slice",
            **{name: to_json(end, classes, place=f"{place}.{name}") for name, end in ends.items()},
        }
    if type(value) is tuple:
        return [to_json(entry, classes, place=f"{place}[{number}]") for number, entry in enumerate(value)]
    if isinstance(value, enum.Enum):
        return {_CLASS: _name_of(value, classes, place), "name": value.name}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = {
            field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init
        }
        written = {name: to_json(entry, classes, place=f"{place}.{name}") for name, entry in entries.items()}
        return {_CLASS: _name_of(value, classes, place), **written}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key == _CLASS:
                raise ValueError(f"{place}: a mapping's keys are strings other than {_CLASS!r}, got {key!r}")
        return {key: to_json(entry, classes, place=f"{place}.{key}") for key, entry in value.items()}
    raise ValueError(
        f"{place}: a {type(value).__name__} cannot be written as JSON (of sequences, only tuples can)"
    )


def from_json(data: Any, classes: Mapping[str, type], *, place: str = "config") -> Any:
    """The value that `to_json` wrote as `data`; lists come back as tuples.

    A field that is absent takes its default. Class names are looked up in `classes` and nowhere else. Raises
    ValueError naming the place for an unknown class or key, a key that is missing, and what a constructor
    itself refuses.
    """
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if isinstance(data, (list, tuple)):
        return tuple(
            from_json(entry, classes, place=f"{place}[{number}]") for number, entry in enumerate(data)
        )
    if not isinstance(data, Mapping):
        raise ValueError(f"{place}: wanted a JSON value, got a {type(data).__name__}")
    entries = {k: from_json(entry, classes, place=f"{place}.{k}") for k, entry in data.items() if k != _CLASS}
    if _CLASS not in data:
        return entries
    name = data[_CLASS]
    if name == "slice":
        _check_keys(entries, allowed=("start", "stop", "step"), required=("start", "stop"), place=place)
        return slice(entries["start"], entries["stop"], entries.get("step"))
    if name == "float":
        _check_keys(entries, allowed=("value",), required=("value",), place=place)
        return _number(entries["value"], place)
    if not isinstance(name, str) or name not in classes:
        raise ValueError(f"{place}: unknown class {name!r}; known are {_listed(classes)}")
    return _construct(classes[name], entries, place)


def describe(value: Any) -> Any:
    """`value` in plain JSON values for the record, never to be read back.

    Of what `to_json` refuses, functions appear under their qualified name, paths as text, other objects under
    their class; nothing is raised for them.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value.name if isinstance(value, enum.Enum) else value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {_CLASS: type(value).__name__, **entries}
    if isinstance(value, (tuple, list)):
        return [describe(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): describe(entry) for key, entry in value.items()}
    if isinstance(value, slice):
        return {_CLASS: "slice", "start": describe(value.start), "stop": describe(value.stop)}
    if inspect.isroutine(value) or isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return {_CLASS: type(value).__name__}


def parse_arguments(function: Callable[..., Any], arguments: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments for `function` from texts such as "lr=2e-4", read by its signature's annotations.

    Annotations may be int ("1e6" is one), float, bool (true / false), str, Path, tuple ("1,2,3"), Literal, an
    enum (by name), and unions of these with None ("none"). Raises ValueError, with the whole signature, for
    an unknown or missing or repeated key and for a value that its annotation does not allow.
    """
    parameters = _parameters(function)
    hints = typing.get_type_hints(function)
    found: dict[str, Any] = {}
    for argument in arguments:
        key, sign, text = argument.partition("=")
        if not sign:
            raise ValueError(f"arguments look like key=value, got {argument!r}\n{signature(function)}")
        if key not in parameters:
            near = difflib.get_close_matches(key, parameters, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"unknown argument {key!r}{hint}\n{signature(function)}")
        if key in found:
            raise ValueError(f"argument {key!r} is given twice\n{signature(function)}")
        if key not in hints:
            raise ValueError(
                f"parameter {key!r} of {function.__name__} has no annotation to read {text!r} by"
            )
        try:
            found[key] = _parse(text, hints[key])
        except ValueError as error:
            raise ValueError(f"{key}={text}: {error}\n{signature(function)}") from None
    missing = [
        key
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty and key not in found
    ]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given\n{signature(function)}")
    return found


def signature(function: Callable[..., Any]) -> str:
    """The arguments that `parse_arguments` takes for `function`, one a line."""
    lines = [f"{function.__name__} takes:"]
    for name, parameter in _parameters(function).items():
        annotation, default = parameter.annotation, parameter.default
        line = f"  {name}"
        if annotation is not parameter.empty:
            line += f": {annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)}"
        if default is not parameter.empty:
            line += f" = {default!r}"
        lines.append(line)
    return "\n".join(lines)


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: p for name, p in inspect.signature(function).parameters.items() if p.kind in named}


def _name_of(value: Any, classes: Mapping[str, type], place: str) -> str:
    for name, known in classes.items():
        if known is type(value):
            return name
    raise ValueError(
        f"{place}: class {type(value).__name__} is not in the table; known are {_listed(classes)}"
    )


def _construct(known: type, entries: dict[str, Any], place: str) -> Any:
    if issubclass(known, enum.Enum):
        _check_keys(entries, allowed=("name",), required=("name",), place=place)
        if entries["name"] not in known.__members__:
            raise ValueError(
                f"{place}: {known.__name__} has {_listed(known.__members__)}, got {entries['name']!r}"
            )
        return known[entries["name"]]
    assert dataclasses.is_dataclass(known), f"{known} is neither a dataclass nor an enum"
    fields = [field for field in dataclasses.fields(known) if field.init]
    absent = dataclasses.MISSING
    required = [f.name for f in fields if f.default is absent and f.default_factory is absent]
    _check_keys(
        entries, allowed=[f.name for f in fields], required=required, place=f"{place} ({known.__name__})"
    )
    try:
        return known(**entries)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place} ({known.__name__}): {error}") from error


def _check_keys(
    entries: Mapping[str, Any], *, allowed: Sequence[str], required: Sequence[str], place: str
) -> None:
    unknown = [key for key in entries if key not in allowed]
    if unknown:
        raise ValueError(f"{place}: unknown key {unknown[0]!r}; allowed are {_listed(allowed)}")
    missing = [key for key in required if key not in entries]
    if missing:
        raise ValueError(f"{place}: key {missing[0]!r} is missing")


def _listed(names: Mapping[str, Any] | Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _number(text: Any, place: str) -> float:
    if text not in ("inf", "-inf", "nan"):
        raise ValueError(f"{place}: wanted 'inf', '-inf' or 'nan', got {text!r}")
    return float(text)


def _parse(text: str, wanted: Any) -> Any:
    """`text` as a value of the annotation `wanted`; ValueError says what is allowed."""
    origin, options = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, types.UnionType):
        return _parse_union(text, options)
    if origin is Literal:
        for option in options:
            if text == str(option):
                return option
        raise ValueError(f"wanted one of {', '.join(map(str, options))}")
    if wanted is tuple or origin is tuple:
        return _parse_tuple(text, options)
    if wanted is None or wanted is types.NoneType:
        if text.lower() == "none":
            return None
        raise ValueError("wanted none")
    if wanted is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ValueError("wanted true or false")
    if wanted is int:
        return _parse_int(text)
    if isinstance(wanted, type) and issubclass(wanted, enum.Enum):
        if text in wanted.__members__:
            return wanted[text]
        raise ValueError(f"wanted one of {_listed(wanted.__members__)}")
    if wanted in (float, str, Path):
        return wanted(text)
    raise ValueError(f"{inspect.formatannotation(wanted)} cannot be given on a command line")


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise ValueError(f"wanted a whole number, got {text!r}") from None
        return int(number)


def _parse_union(text: str, options: tuple[Any, ...]) -> Any:
    reasons = []
    # text fits str and Path always, so they come last; none comes first
    for option in sorted(options, key=lambda option: (option in (str, Path), option is not types.NoneType)):
        try:
            return _parse(text, option)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError("; or ".join(reasons))


def _parse_tuple(text: str, options: tuple[Any, ...]) -> tuple[Any, ...]:
    inner = text[1:-1] if text.startswith("(") and text.endswith(")") else text
    pieces = [piece.strip() for piece in inner.split(",")]
    if pieces[-1] == "":
        pieces.pop()
    if not options:
        return tuple(pieces)
    if len(options) == 2 and options[1] is Ellipsis:
        return tuple(_parse(piece, options[0]) for piece in pieces)
    if len(pieces) != len(options):
        raise ValueError(f"wanted {len(options)} values between commas, got {len(pieces)}")
    return tuple(_parse(piece, option) for piece, option in zip(pieces, options, strict=True))

"""Check plain values against the annotations of parameters."""

import datetime
import inspect
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from diffusion_lab.errors import ConfigError, check_number, shown
from diffusion_lab.instantiation.trust import PACKAGE


def annotation(target: Any, parameter: inspect.Parameter) -> Any:
    """Return the annotation of a parameter, or `Any` if it has none or it cannot be evaluated."""
    hint = parameter.annotation
    if hint is inspect.Parameter.empty:
        return Any
    if not isinstance(hint, str):
        return hint
    function = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    names = getattr(inspect.unwrap(function), "__globals__", {})
    holder = types.SimpleNamespace(__annotations__={"value": hint})
    try:
        return typing.get_type_hints(holder, globalns=names)["value"]
    except Exception:  # names that are imported only for type checking
        return Any


WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}


def coerce(value: Any, expected: Any, where: str) -> Any:
    """Return `value` if it matches the annotation. A number is converted to text where text is expected (a run named 2026).

    Args:
        value: a plain value.
        expected: the annotation.
        where: the key of the value, for error messages.

    Raises:
        ConfigError: if the value does not match the annotation, or is outside the range that an `Annotated` number states.
    """
    if _fits(value, expected):
        _check_ranges(value, expected, where)
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and _fits("", expected):
        return str(value)
    if value == "???":
        raise ConfigError(f"{where} has no value: write {where}=VALUE")
    raise ConfigError(f"{where}={shown(value)} has the wrong type: write {' or '.join(_words(expected))}")


def _check_ranges(value: Any, expected: Any, where: str) -> None:
    """Raise ConfigError for a number, also one in a list, outside the range that is the text of an `Annotated`."""
    for member in _members(expected):
        origin, arguments = typing.get_origin(member), typing.get_args(member)
        if origin is typing.Annotated and isinstance(arguments[1], str) and not isinstance(value, list | None):
            check_number(where, value, arguments[1], whole=arguments[0] is int)
        elif origin is list and isinstance(value, list):
            for element in value:
                _check_ranges(element, arguments[0], where)


def _members(expected: Any) -> tuple[Any, ...]:
    """Return the members of a union, including those of nested unions."""
    origin = typing.get_origin(expected)
    if origin in (typing.Union, types.UnionType):
        return tuple(m for member in typing.get_args(expected) for m in _members(member))
    return (expected,)


def class_members(expected: Any) -> tuple[type, ...]:
    """Return the classes of this package in an annotation; none if it also allows another object."""
    members = [m for m in _members(expected) if m not in (None, type(None))]
    ours = [m for m in members if isinstance(m, type) and m.__module__.split(".", 1)[0] == PACKAGE]
    return tuple(ours) if len(ours) == len(members) else ()


def _fits(value: Any, expected: Any) -> bool:
    """Whether a plain value matches a type. A type of which no plain value is an instance matches every value."""
    origin, arguments = typing.get_origin(expected) or expected, typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, member) for member in arguments)
    if origin is typing.Annotated:
        return _fits(value, arguments[0])
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if expected is None or origin is type(None):
        return value is None
    if origin in (bool, str):
        return isinstance(value, origin)
    if origin in (int, float):
        kinds = (int,) if origin is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    if origin in (list, tuple, set, Sequence, Iterable, Collection):
        inner = [a for a in arguments if a is not Ellipsis]
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and len(inner) == len(value) and Ellipsis not in arguments:
            return all(_fits(v, a) for v, a in zip(value, inner, strict=True))
        return len(inner) != 1 or all(_fits(v, inner[0]) for v in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    if origin is datetime.timedelta:
        return False
    if isinstance(origin, type) and origin.__module__.split(".", 1)[0] == PACKAGE:
        return isinstance(value, origin)  # an object built from a node, not a number, text or a plain mapping
    return True


def _words(expected: Any) -> list[str]:
    """Return the names of the allowed types or choices, for error messages."""
    words: list[str] = []
    for member in _members(expected):
        origin = typing.get_origin(member) or member
        if origin is typing.Literal:
            words += [str(choice) for choice in typing.get_args(member)]
        elif origin in (tuple, set, Sequence, Iterable, Collection):
            words.append(WORDS[list])
        elif origin is typing.Annotated:
            words.append(WORDS[typing.get_args(member)[0]])
        elif origin in WORDS or member is None:
            words.append(WORDS[type(None) if member is None else origin])
        else:
            words.append(f"a node with _target_ ({getattr(origin, '__name__', origin)})")
    words = list(dict.fromkeys(words))
    return [w for w in words if not (w == WORDS[int] and WORDS[float] in words)]

"""Check plain values against the annotations of parameters."""

import inspect
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from diffusion_lab.errors import ConfigError
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
        ConfigError: if the value does not match the annotation.
    """
    if _fits(value, expected):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and _fits("", expected):
        return str(value)
    if value == "???":
        raise ConfigError(f"{where} has no value: write {where}=VALUE")
    raise ConfigError(f"{where}={_shown(value)} has the wrong type: write {' or '.join(_words(expected))}")


def _shown(value: Any) -> str:
    """Return a value in the syntax of the command line."""
    return {True: "true", False: "false", None: "null"}[value] if isinstance(value, bool | None) else str(value)


def _members(expected: Any) -> tuple[Any, ...]:
    """Return the members of a union, including those of nested unions."""
    origin = typing.get_origin(expected)
    if origin in (typing.Union, types.UnionType):
        return tuple(m for member in typing.get_args(expected) for m in _members(member))
    return (expected,)


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
        elif origin in WORDS or member is None:
            words.append(WORDS[type(None) if member is None else origin])
        else:
            words.append(f"a node with _target_ ({getattr(origin, '__name__', origin)})")
    words = list(dict.fromkeys(words))
    return [w for w in words if not (w == WORDS[int] and WORDS[float] in words)]

"""Plain values against the annotations of parameters."""

import inspect
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from diffusion_lab.errors import ConfigError
from diffusion_lab.instantiation.trust import PACKAGE


def annotation(target: Any, parameter: inspect.Parameter) -> Any:
    """Return the annotation of a parameter; `Any` where it has none, or none that can be evaluated."""
    stated = parameter.annotation
    if stated is inspect.Parameter.empty:
        return Any
    if not isinstance(stated, str):
        return stated
    function = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    names = getattr(inspect.unwrap(function), "__globals__", {})
    holder = types.SimpleNamespace(__annotations__={"value": stated})
    try:
        return typing.get_type_hints(holder, globalns=names)["value"]
    except Exception:  # names that exist for the type checker alone
        return Any


WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}


def coerce(value: Any, expected: Any, where: str) -> Any:
    """`value`, where the annotation allows it; a number where text alone is expected becomes text (a run named 2026).

    Raises:
        ConfigError: the annotation excludes it.
    """
    if _fits(value, expected):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and _fits("", expected):
        return str(value)
    if value == "???":
        raise ConfigError(f"{where} has no value yet: write {where}=VALUE")
    raise ConfigError(f"{where}={_shown(value)} has the wrong type: {' or '.join(_words(expected))} is needed")


def _shown(value: Any) -> str:
    return (
        {True: "true", False: "false", None: "null"}.get(value, str(value))
        if isinstance(value, bool | None)
        else str(value)
    )


def _members(expected: Any) -> tuple[Any, ...]:
    origin = typing.get_origin(expected)
    if origin in (typing.Union, types.UnionType):
        return tuple(m for member in typing.get_args(expected) for m in _members(member))
    return (expected,)


def _fits(value: Any, expected: Any) -> bool:
    """Whether a plain value can be an argument of that type. Types that no plain value expresses accept everything."""
    return any(_fits_one(value, member) for member in _members(expected))


def _fits_one(value: Any, expected: Any) -> bool:
    origin, arguments = typing.get_origin(expected) or expected, typing.get_args(expected)
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
        return isinstance(
            value, origin
        )  # described by a node, which was built before, never by a number, text or a mapping
    return True


def _words(expected: Any) -> list[str]:
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

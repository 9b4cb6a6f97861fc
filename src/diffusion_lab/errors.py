"""The error of a wrong input, the check of a number against its range, and the type of nodes read from a file."""

import numbers
import re
from collections.abc import Sequence
from typing import Any

SEEDS = "[0, 18446744073709551615]"  # of every seed: 64 bits without a sign


def printable(text: str) -> str:
    """Return text as one line that a terminal only shows.

    A line break with the spaces around it becomes one space. A character that is not printable (the escape sequences of
    terminals, marks that reverse the direction of text, bytes of a file name that are not UTF-8) becomes its escape: \\x1b.
    """
    line = re.sub(r"\s*[\r\n]\s*", " ", text)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


class ConfigError(ValueError):
    """An input that the user can correct. The message states what was found, what is allowed and what to write.

    The command line prints it as one line and exits with code 2. Every other exception is a defect and keeps its traceback.
    The message may quote files and their names, so it is made printable here.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class DamagedFileError(ValueError):
    """Content that a reader refuses. The function that opened the file turns it into a ConfigError with the file's name."""


class UntrustedNode(dict[str, Any]):
    """A mapping read from a file. Only `instantiation.instantiate_untrusted` builds what its `_target_` names.

    Raises:
        ConfigError: a key that the file does not have.
    """

    def __missing__(self, key: str) -> Any:
        raise ConfigError(f"the configuration in the file has no {key}: take a file that src/train.py wrote")


def check_number(
    name: str, value: Any, interval: str, hint: str = "", *, whole: bool = False, optional: bool = False
) -> None:
    """Raise ConfigError unless `value` is a number in an interval. NaN, booleans, text and lists are in none.

    Every number of a public constructor is checked by this function, or by `check_numbers`.

    Args:
        name: the key that sets the value, for the message.
        value: any object.
        interval: "[0, 1)", "(0, inf]": a bracket includes the end, also an infinite one.
        hint: the end of the message.
        whole: allow integers alone.
        optional: allow None.
    """
    if not (value is None and optional) and not _inside(value, interval, whole):
        kind = ("null, or " if optional else "") + ("an integer" if whole else "a number")
        raise ConfigError(f"{name}={shown(value)}: write {kind} in {interval}{': ' * bool(hint)}{hint}")


def check_numbers(
    name: str, values: Any, interval: str, hint: str = "", *, whole: bool = False, length: int | None = None
) -> None:
    """Raise ConfigError unless `values` is a list or tuple of numbers in an interval; `length`: of that many."""
    fits = isinstance(values, Sequence) and not isinstance(values, str | bytes) and length in (None, len(values))
    if not (fits and all(_inside(value, interval, whole) for value in values)):
        kind = f"a list of {'' if length is None else f'{length} '}{'integers' if whole else 'numbers'}"
        raise ConfigError(f"{name}={shown(values)}: write {kind} in {interval}{': ' * bool(hint)}{hint}")


def shown(value: Any) -> str:
    """Return a value as a command line spells it, its first 60 characters."""
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value!s:.60}"


def _inside(value: Any, interval: str, whole: bool) -> bool:
    if not isinstance(value, numbers.Integral if whole else numbers.Real) or isinstance(value, bool):
        return False
    low, high = (int(end) if end.lstrip("-").isdigit() else float(end) for end in interval[1:-1].split(", "))
    number: Any = value
    return (low < number or (number == low and interval[0] == "[")) and (
        number < high or (number == high and interval[-1] == "]")
    )

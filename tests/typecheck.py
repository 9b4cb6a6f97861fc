"""Runtime type checks of the tests: beartype checks every annotation, jaxtyping's shapes and dtypes among them.

conftest.py installs jaxtyping's import hook with these names before the package is imported. Outside the tests annotations are
not evaluated at run time, and beartype is not imported.

A check costs several times as much as an operation on a small tensor, and a sampler calls the same functions at every step.
Therefore each test checks the first CALLS calls of each function: the checks of all calls took 60 % of the sampler tests' time.
Functions within functions are not checked, since their checks would be generated at every call of the outer one.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jaxtyping
import jaxtyping._decorator
from beartype import BeartypeConf, beartype

# `int` is accepted for float, as by static type checkers (PEP 484)
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))

# The modules of the package that are checked.
CHECKED = (
    "clipping",
    "conditions",
    "denoiser",
    "editing",
    "gaussian",
    "guidance",
    "likelihood",
    "losses",
    "metrics",
    "models",
    "noise",
    "objectives",
    "samplers",
    "schedules",
    "time_samplers",
    "variances",
    "weightings",
)

CALLS = 3
_jaxtyped = jaxtyping.jaxtyped
_calls: dict[Callable[..., Any], int] = {}


def begin_test() -> None:
    """Check the next CALLS calls of each function again."""
    _calls.clear()


def _jaxtyped_first_calls(function: Any = None, *, typechecker: Any) -> Any:
    """`jaxtyping.jaxtyped` with a check of a function's first CALLS calls in a test."""
    if function is None:
        return functools.partial(_jaxtyped_first_calls, typechecker=typechecker)
    if "<locals>" in getattr(function, "__qualname__", ""):
        return function
    checked_function = _jaxtyped(function, typechecker=typechecker)
    if not inspect.isfunction(function):  # of a class or property, jaxtyped passes the functions on to this one
        return checked_function

    @functools.wraps(function)
    def first_calls_checked(*args: Any, **kwargs: Any) -> Any:
        calls = _calls.get(function, 0)
        if calls >= CALLS:
            return function(*args, **kwargs)
        _calls[function] = calls + 1
        return checked_function(*args, **kwargs)

    return first_calls_checked


def install() -> None:
    """Check the modules of CHECKED, which have not been imported yet."""
    jaxtyping.jaxtyped = jaxtyping._decorator.jaxtyped = _jaxtyped_first_calls
    jaxtyping.install_import_hook([f"diffusion_lab.{module}" for module in CHECKED], "typecheck.checked")

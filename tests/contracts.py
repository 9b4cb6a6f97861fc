"""All subclasses of each base class, found by walking the package, so that a new class is tested without further changes."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

from diffusion_lab.objectives import Objective
from diffusion_lab.samplers.base import Sampler
from diffusion_lab.schedules import Linear, Schedule, Table
from diffusion_lab.variances import Variance
from diffusion_lab.weightings import Weighting

NEEDS_A_TABLE = {Table}  # concrete, but without defaults: its argument is the table itself


def _import(name: str) -> None:
    module = importlib.import_module(name)
    for submodule in pkgutil.iter_modules(getattr(module, "__path__", [])):
        _import(f"{name}.{submodule.name}")


def members(base: type, module: str) -> list[type]:
    """Return the concrete subclasses of `base` that the package defines, sorted by name."""
    _import(f"diffusion_lab.{module}")
    classes: set[type] = set()
    queue = [base]
    while queue:
        subclasses: list[type] = queue.pop().__subclasses__()
        queue += subclasses
        classes |= {c for c in subclasses if not inspect.isabstract(c) and c.__module__.startswith("diffusion_lab.")}
    return sorted(classes - NEEDS_A_TABLE, key=lambda c: c.__name__)


def takes(cls: type, argument: str) -> bool:
    """Return whether the constructor has the parameter."""
    return argument in inspect.signature(cls).parameters


def _schedules() -> Iterator[tuple[str, Schedule]]:
    for cls in members(Schedule, "schedules"):
        yield cls.__name__, cls()
        if issubclass(cls, Table):
            yield f"{cls.__name__}-zero", cls(zero_terminal_snr=True)  # type: ignore[call-arg]
            yield f"{cls.__name__}-40", cls(steps=40)  # type: ignore[call-arg]
            yield f"{cls.__name__}-40-zero", cls(steps=40, zero_terminal_snr=True)  # type: ignore[call-arg]
        elif takes(cls, "shift"):
            yield f"{cls.__name__}-shift", cls(shift=3.0)  # type: ignore[call-arg]
    yield "Linear-shift", Linear(shift=3.0)  # one table is enough: the base class implements the shift


SCHEDULES: dict[str, Schedule] = dict(_schedules())
TABLES: dict[str, Table] = {name: s for name, s in SCHEDULES.items() if isinstance(s, Table)}
OBJECTIVES: dict[str, Objective] = {c.__name__: c() for c in members(Objective, "objectives")}
WEIGHTINGS: dict[str, Weighting] = {c.__name__: c() for c in members(Weighting, "weightings")}
SAMPLERS: dict[str, type[Any]] = {c.__name__: c for c in members(Sampler, "samplers")}
VARIANCES: dict[str, type[Any]] = {c.__name__: c for c in members(Variance, "variances")}


def accepts(objective: Objective, schedule: Schedule) -> bool:
    """Return whether the objective works on the schedule."""
    try:
        objective.check(schedule)
    except ValueError:
        return False
    return True


PAIRS = [(s, o) for s in SCHEDULES for o in OBJECTIVES if accepts(OBJECTIVES[o], SCHEDULES[s])]

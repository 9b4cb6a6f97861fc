"""The house stands: imports run downwards, the mathematics is light, the public names exist."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "diffusion_lab"
# From the top: a room imports from those after it, never from those before.
ORDER = (
    *("cli", "commands", "composition", "reporting", "interop", "training", "metrics", "checkpoint", "instantiation"),
    *("generation", "data", "conditions", "editing", "likelihood", "samplers", "losses", "guidance", "clipping"),
    *("denoiser", "variances", "weightings", "gaussian", "objectives", "time_samplers", "schedules", "noise", "models"),
    *("device", "io", "processes", "renames", "errors"),
)
RANK = {room: -place for place, room in enumerate(ORDER)}
ALONE = {"models", "noise"}  # import errors.py and nothing else of the package
MATHEMATICS = ORDER[ORDER.index("editing") :]
HEAVY = ("pytorch_lightning", "lightning", "hydra", "omegaconf", "wandb")


def edges() -> set[tuple[str, str]]:
    """(room, room it imports), from every import statement in the package, also those inside functions."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative imports hide their direction; write diffusion_lab.…"
                names = [f"{node.module}.{a.name}" for a in node.names]
            for name in names:
                parts = name.split(".")
                if parts[0] == "diffusion_lab" and len(parts) > 1 and parts[1] != room and is_room(parts[1]):
                    found.add((room, parts[1]))
    return found


def is_room(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def rooms() -> set[str]:
    found = {p.stem for p in PACKAGE.glob("*.py")} | {
        p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()
    }
    return found - {"__init__"}


def test_every_room_has_its_floor() -> None:
    """A new room needs a place in ORDER."""
    assert rooms() <= {*RANK, *ALONE}


def test_imports_run_downwards() -> None:
    upward = {
        (room, below)
        for room, below in edges()
        if room not in ALONE and room in RANK and below in RANK and RANK[below] > RANK[room]
    }
    assert not upward


def test_the_order_has_no_cycle() -> None:
    """No room reaches itself, among those on one line either."""
    below: dict[str, set[str]] = {}
    for room, other in edges():
        below.setdefault(room, set()).add(other)
    for room in below:
        reached, waiting = set(), list(below[room])
        while waiting:
            if (here := waiting.pop()) not in reached:
                reached.add(here)
                waiting += below.get(here, ())
        assert room not in reached, room


def test_some_rooms_know_nobody() -> None:
    assert not {(room, other) for room, other in edges() if room in ALONE and other != "errors"}


def test_the_waist_of_the_hourglass() -> None:
    """Rooms above the denoiser depend on networks only through it; those that build or load one are listed."""
    assert not {
        (r, o)
        for r, o in edges()
        if o == "models" and r not in {"commands", "interop", "training", "metrics", "checkpoint"}
    }


@pytest.mark.integration
def test_the_mathematics_is_light() -> None:
    """Importing all of it, in a fresh process, imports neither Lightning nor Hydra nor W&B."""
    here = [m for m in MATHEMATICS if is_room(m)]
    assert {"schedules", "objectives", "samplers", "models"} <= set(here)
    code = f"""
import importlib, pkgutil, sys
def walk(name):
    module = importlib.import_module(name)
    for found in pkgutil.iter_modules(getattr(module, "__path__", [])):
        walk(f"{{name}}.{{found.name}}")
for room in {here!r}:
    walk("diffusion_lab." + room)
heavy = [m for m in {HEAVY!r} if m in sys.modules]
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_check_can_fail() -> None:
    """Edges are found, and those of a low room to a high one would count as upward."""
    assert ("samplers", "schedules") in edges()
    assert RANK["commands"] > RANK["samplers"] > RANK["schedules"]

"""No number of a public constructor is accepted that makes what it builds useless, and no refusal takes more than a line."""

import math
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from diffusion_lab.errors import SEEDS, ConfigError, check_number, check_numbers

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.integration
def test_every_number_of_every_constructor_is_refused_or_works() -> None:
    """In a process without the runtime type checks of the tests (see numbers_walk.py)."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])}
    walk = subprocess.run(
        [sys.executable, str(TESTS / "faults" / "numbers_walk.py")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
        check=False,
    )
    assert walk.returncode == 0, walk.stdout + walk.stderr
    cases = re.match(r"(\d+) cases, 0 faults", walk.stdout)
    assert cases is not None
    assert int(cases[1]) > 1000


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1)", (0, 0.5, np.float32(0.5), Fraction(1, 3)), (-1e-9, 1, 1.0, math.nan, True, "0.5", None, [0.5])),
        ("(0, inf]", (1e-300, 2**70, 1e30, math.inf), (0, 0.0, -math.inf, math.nan)),
        ("[-2, inf)", (-2, 2**70), (math.inf, -2.5)),
        (SEEDS, (0, 2**64 - 1), (2**64, -1, 2.0**64)),
    ],
)
def test_an_interval_is_that_of_mathematics(interval: str, inside: tuple, outside: tuple) -> None:
    for value in inside:
        check_number("key", value, interval)
    for value in outside:
        with pytest.raises(ConfigError, match=re.escape(f"in {interval}")):
            check_number("key", value, interval)


def test_whole_numbers_lists_and_null() -> None:
    check_number("key", np.int64(3), "[1, 3]", whole=True)
    check_number("key", None, "[1, 3]", optional=True)
    check_numbers("key", (1, 2), "[1, 3]", whole=True, length=2)
    with pytest.raises(ConfigError, match=r"^key=1.0: write null, or an integer in \[1, 3\]: hint$"):
        check_number("key", 1.0, "[1, 3]", "hint", whole=True, optional=True)
    for values in ("12", [1], [1, 2, 3], [1, 4], 1, None, [1, True]):
        with pytest.raises(ConfigError, match=r"write a list of 2 integers in \[1, 3\]$"):
            check_numbers("key", values, "[1, 3]", whole=True, length=2)

"""docs/reliability.md names tests that exist, and every file of tests/faults."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = (TESTS.parent / "docs" / "reliability.md").read_text()


def test_the_page_names_tests_that_exist() -> None:
    functions = set(
        re.findall(r"^def (test_\w+)", "\n".join(p.read_text() for p in TESTS.rglob("test_*.py")), re.MULTILINE)
    )
    assert set(re.findall(r"`(test_\w+)`", PAGE)) <= functions


def test_the_page_names_every_file_of_this_folder() -> None:
    links = set(re.findall(r"\(\.\./tests/faults/(\w+\.py)\)", PAGE))
    assert links == {path.name for path in Path(__file__).parent.glob("test_*.py")} - {Path(__file__).name}

"""docs/architecture.md: its paths exist, and its modules stand in the order of imports."""

import re
from pathlib import Path

from test_imports import ORDER

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
LINKS = re.findall(r"\]\(([^)]+)\)", PAGE.read_text())


def test_every_path_exists() -> None:
    missing = [link for link in LINKS if not (PAGE.parent / link).exists()]
    assert not missing
    assert len(LINKS) > 80


def test_modules_stand_in_the_order_of_imports() -> None:
    table = PAGE.read_text().split("\n## ")[1]
    modules = [link.rsplit("/", 1)[-1].removesuffix(".py") for link in re.findall(r"\]\((\.\./src/[^)]+)\)", table)]
    assert modules == sorted(modules, key=ORDER.index)
    assert len(modules) > 25


def test_every_group_of_one_class_is_linked() -> None:
    """Of optimizer, trainer and logger the classes are those of torch and Lightning."""
    linked = {Path(link).name for link in LINKS if link.startswith("../conf/")}
    groups = {path.parent.name for path in (ROOT / "conf").glob("*/custom.yaml")}
    assert groups - {"optimizer", "trainer", "logger"} <= linked

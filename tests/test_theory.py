"""docs/theory.md and its translation: names can be imported, files define them, tests exist, both have the same content."""

import ast
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = {"en": ROOT / "docs" / "theory.md", "zh": ROOT / "docs" / "theory.zh-CN.md"}
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
# Chinese words in the labels of equations. Numbers and names are not translated.
LABELS = {"算法": "Alg.", "定理": "Theorem", "表": "Table", "附录": "Appendix", "命题": "Prop.", "代码": "code"}
# Modules of which every public class must appear on the page; of `likelihood` it is every function.
CLASSES = ("schedules", "objectives", "weightings", "variances", "samplers", "guidance")
LINK = re.compile(r"\[`([^`]+)`\]\(([^)]+)\)")

both = pytest.mark.parametrize("language", DOCS)


class Row(NamedTuple):
    """An equation; code and tests are (name, relative link)."""

    label: str
    formulas: tuple[str, ...]
    code: tuple[tuple[str, str], ...]
    tests: tuple[tuple[str, str], ...]


@functools.cache
def text(language: str) -> str:
    return DOCS[language].read_text()


def sections(page: str) -> list[list[Row]]:
    """Return the rows of each table of three columns. Raises ValueError: a malformed third column."""
    found: list[list[Row]] = []
    for part in page.split("\n## ")[1:]:
        rows = []
        for line in part.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else []
            if len(cells) != 3 or cells[2].startswith(("Code", "代码")):
                continue
            links = LINK.findall(cells[2])
            if "<br>".join(f"[`{name}`]({link})" for name, link in links) != cells[2] and cells[2] != "—":
                raise ValueError(f"{cells[0]}: write code and tests as [`name`](link), separated by <br>, or a dash")
            tests = tuple(item for item in links if "::" in item[0])
            code = tuple(item for item in links if "::" not in item[0])
            if bool(code) != bool(tests):
                raise ValueError(f"{cells[0]} names code without a test, or a test without code")
            label = functools.reduce(lambda said, item: said.replace(*item), LABELS.items(), cells[0])
            rows.append(Row(label, tuple(map(wordless, formulas(cells[1]))), code, tests))
        found.append(rows)
    return [rows for rows in found if rows]


def rows(language: str) -> list[Row]:
    return [row for section in sections(text(language)) for row in section]


def formulas(page: str) -> list[str]:
    return re.findall(r"\$([^$]+)\$", page)


def wordless(formula: str) -> str:
    """Return a formula without its text, which is translated."""
    return re.sub(r"\\text\{[^}]*\}", r"\\text", formula)


def resolved(name: str) -> Any:
    """Return the object of a dotted name: an attribute of the longest prefix that is a module."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError as error:
            if not str(error.name).startswith(parts[0]):
                raise  # a dependency is missing, not the name
            continue
        return functools.reduce(getattr, parts[n:], found)
    raise ModuleNotFoundError(name)


@functools.cache
def definitions(path: Path) -> frozenset[str]:
    """Qualified names of the functions and classes that a file defines."""

    def walk(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield prefix + node.name
                yield from walk(node.body, f"{prefix}{node.name}.") if isinstance(node, ast.ClassDef) else ()

    return frozenset(walk(ast.parse(path.read_text()).body))


def wrong(row: Row, folder: Path) -> list[str]:
    """Return a description of each error in a row."""
    found = []
    for name, link in row.code:
        try:
            meant = resolved(name)
        except (AttributeError, ModuleNotFoundError):
            found.append(f"{name} does not exist")
            continue
        path = (folder / link).resolve()
        if not path.is_file():
            found.append(f"{link} does not exist")
        elif not name.startswith("diffusion_lab.") or meant.__qualname__ not in definitions(path):
            found.append(f"{link} does not define {name}")
        elif Path(str(importlib.import_module(meant.__module__).__file__)).resolve() != path:
            found.append(f"{name} comes from another file than {link}")
    for name, link in row.tests:
        file, function = name.split("::")
        path = (folder / link).resolve()
        if path != ROOT / file or not path.is_file():
            found.append(f"{link} is not {file}")
        elif function not in definitions(path) or not function.startswith("test_"):
            found.append(f"{file} has no test {function}")
    return found


@both
def test_every_row_names_code_and_tests_that_exist(language: str) -> None:
    faults = [f"{row.label}: {fault}" for row in rows(language) for fault in wrong(row, DOCS[language].parent)]
    assert not faults
    assert len(rows(language)) > 100


@pytest.mark.parametrize(
    ("cell", "fault"),
    [
        ("[`diffusion_lab.gaussian.posterier`](../src/diffusion_lab/gaussian.py)", "posterier does not exist"),
        ("[`diffusion_lab.gaussian.posterior`](../src/diffusion_lab/losses.py)", "does not define"),
        ("[`diffusion_lab.gaussian.posterior`](../src/diffusion_lab/gausian.py)", "gausian.py does not exist"),
        ("[`torch.nn.Module`](../src/diffusion_lab/gaussian.py)", "does not define"),
        ("[`diffusion_lab.objectives.EDM`](../src/diffusion_lab/weightings.py)", "another file"),
        ("[`tests/test_gaussian.py::test_nothing`](../tests/test_gaussian.py)", "has no test test_nothing"),
        ("[`tests/test_gaussian.py::naive`](../tests/test_gaussian.py)", "has no test naive"),
        ("[`tests/test_gaussian.py::test_refusals`](../tests/test_noise.py)", "is not tests/test_gaussian.py"),
    ],
)
def test_a_wrong_row_is_found(cell: str, fault: str) -> None:
    good = (
        "[`diffusion_lab.gaussian.kl`](../src/diffusion_lab/gaussian.py)",
        "[`tests/test_gaussian.py::test_kl_is_the_integral`](../tests/test_gaussian.py)",
    )
    ((row,),) = sections(f"\n## A\n\n| (1) | $x$ | {good[0]}<br>{good[1]}<br>{cell} |\n")
    (found,) = wrong(row, DOCS["en"].parent)
    assert fault in found
    for alone in (good[0], good[1], good[0] + good[1], "`diffusion_lab.gaussian.kl`"):
        with pytest.raises(ValueError, match=r"\(1\)"):
            sections(f"\n## A\n\n| (1) | $x$ | {alone} |\n")


def test_both_languages_have_the_same_rows() -> None:
    """The same sections, equations, formulas, code and tests, in the same order; the notation table's formulas, too."""
    english, chinese = (sections(text(language)) for language in DOCS)
    for ours, theirs in zip(english, chinese, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a == b
    first, second = (sorted(map(wordless, formulas(text(language)))) for language in DOCS)
    assert first == second


def public() -> set[object]:
    """Return the public classes of CLASSES (exported by a package, defined in a module) and the functions of `likelihood`."""
    found: set[object] = set()
    for room in CLASSES:
        module = importlib.import_module(f"diffusion_lab.{room}")
        names = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
        here = (getattr(module, name) for name in names)
        found |= {c for c in here if inspect.isclass(c) and _of(c, module)}
    likelihood = importlib.import_module("diffusion_lab.likelihood")
    return found | {v for v in (getattr(likelihood, name) for name in likelihood.__all__) if inspect.isfunction(v)}


def _of(cls: type, module: ModuleType) -> bool:
    return cls.__module__ == module.__name__ or cls.__module__.startswith(f"{module.__name__}.")


def test_no_public_class_is_left_out() -> None:
    named = [resolved(name) for row in rows("en") for name, _ in row.code]
    missing = [item for item in public() if item not in named]
    assert not missing, "add a row for each to docs/theory.md and docs/theory.zh-CN.md"
    assert len(public()) > 50


@pytest.mark.parametrize("page", [*DOCS.values(), *READMES], ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    broken = [link for link in links if not link.startswith("https://") and not (page.parent / link).exists()]
    assert not broken
    assert len(links) > 5


# What GitHub parses as Markdown before it parses formulas (a backslash before punctuation is an escape, an
# underscore after punctuation begins emphasis, a bar ends a cell), and macros that it does not support.
PITFALLS = {
    r"\\[^A-Za-z]": "escape",
    r"[^A-Za-z0-9]_": "emphasis",
    r"[|*`<>~#]": "Markdown",
    r"\\operatorname": "macro",
}


@both
def test_formulas_survive_github(language: str) -> None:
    lines = [line for line in text(language).splitlines() if "$" in line]
    assert len(lines) > 100
    for line in lines:
        assert line.startswith("| "), "formulas are only allowed in tables"
        assert line.count("$") % 2 == 0, line
        for formula in formulas(line):
            assert formula == formula.strip()
            assert formula.count("{") == formula.count("}"), formula
            for pattern, what in PITFALLS.items():
                assert not re.search(pattern, formula), f"{what}: {formula}"


# ------------------------------------------------------------------------------------------------------ the Chinese README


def blocks(page: Path) -> list[tuple[str, list[str]]]:
    """Return (language, lines without comments) of every code block; docstrings are kept."""
    return [
        (kind, [re.sub(r"(^|\s+)#\s.*$", "", line).rstrip() for line in body.splitlines()])
        for kind, body in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), flags=re.DOTALL)
    ]


def test_the_readmes_have_the_same_code() -> None:
    english, chinese = map(blocks, READMES)
    for a, b in zip(english, chinese, strict=True):
        assert a == b
    assert sum(kind == "bash" for kind, _ in english) >= 5


def test_the_readmes_have_the_same_links() -> None:
    """Return the number of sections, and pictures and links except those between the languages."""

    def shape(page: Path) -> tuple[int, list[str]]:
        words = page.read_text()
        links = [link.replace(".zh-CN", "") for link in re.findall(r"\]\(([^)]+)\)", words)]
        return len(re.findall(r"^## ", words, re.MULTILINE)), sorted(links)

    english, chinese = map(shape, READMES)
    assert english == chinese
    for page, other in (READMES, READMES[::-1]):
        assert f"]({other.name})" in "\n".join(page.read_text().splitlines()[:6])

"""docs/from_diffusers.md: every command composes, and every name that an error message translates is on the page."""

import re
import shlex
from typing import NamedTuple

import pytest
from command import ROOT
from omegaconf import OmegaConf

from diffusion_lab import composition, renames
from diffusion_lab.cli.checks import check_configuration
from diffusion_lab.commands.train import build

PAGE = (ROOT / "docs" / "from_diffusers.md").read_text()


class Row(NamedTuple):
    """One line of a table: the command, the cell of the other library, and the overrides here."""

    command: str
    there: str
    here: str


def _rows() -> list[Row]:
    found = []
    for section in PAGE.split("\n## ")[1:]:
        command = re.search(r"^`python src/(\w+)\.py ", section, flags=re.MULTILINE)
        for line in section.splitlines() if command else []:
            cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else []
            if len(cells) == 3 and cells[0] != "library":
                found.append(Row(command.group(1), cells[1], cells[2].strip("`")))
    return found


ROWS = _rows()


def _merge(line: dict[str, str], other: dict[str, str]) -> bool:
    """Whether two command lines can be composed as one: in common groups the same options, no key with two values."""
    groups, others = ({key.lstrip("+").split(".")[0] for key in keys} for keys in (line, other))
    common = groups & others
    return all(line.get(k) == other.get(k) for k in common) and all(
        line[k] == other[k] for k in line.keys() & other.keys()
    )


def _lines(command: str) -> list[dict[str, str]]:
    """Overrides of that command as KEY → VALUE, merged into few lines, since composing each would take half a minute."""
    merged: list[dict[str, str]] = []
    for here in dict.fromkeys(row.here for row in ROWS if row.command == command):
        line = dict(part.split("=", 1) for part in shlex.split(here))
        fitting = next((other for other in merged if _merge(line, other)), None)
        if fitting is None:
            merged.append(line)
        else:
            fitting |= line
    return merged


@pytest.mark.parametrize("command", ["train", "sample"])
def test_every_command_composes(command):
    """Groups, keys and types; of a training run each node against its constructor's signature."""
    assert sum(row.command == command for row in ROWS) > 20
    for line in _lines(command):
        config = composition.composed(command, [f"{key}={value}" for key, value in line.items()])
        check_configuration(config, command)
        if command == "train":
            plain = {k: v for k, v in OmegaConf.to_container(config, resolve=False).items() if k != "hydra"}
            build.check_nodes(OmegaConf.to_container(OmegaConf.create({**plain, "run_dir": "."}), resolve=True))


@pytest.mark.parametrize("name", renames.FOREIGN_KEYS)
def test_every_foreign_key_is_on_the_page(name):
    """With what the error message names."""
    (*expected,) = re.findall(r"[\w.]+=", renames.FOREIGN_KEYS[name])
    rows = [row.here for row in ROWS if re.search(rf"(?<!\w){name}(?!\w)", row.there)]
    assert rows
    assert all(any(key in here for here in rows) for key in expected), (rows, expected)


@pytest.mark.parametrize(("group", "option"), renames.FOREIGN_OPTIONS)
def test_every_foreign_option_is_on_the_page(group, option):
    expected = f"{group}={renames.FOREIGN_OPTIONS[group, option]}"
    rows = [row.here for row in ROWS if re.search(rf"(?<!\w){re.escape(option)}(?!\w)", row.there)]
    assert any(expected in here for here in rows), (rows, expected)


def test_the_program_runs():
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(compile(program, "from_diffusers.md", "exec"), {"__name__": "page"})


RENAMED = {
    **renames.GROUPS,
    **renames.KEYS,
    **{f"{key}={old}": f"{key}={new}" for (key, old), new in {**renames.OPTIONS, **renames.VALUES}.items()},
}


@pytest.mark.parametrize("old", RENAMED)
def test_every_renamed_name_is_in_the_changelog(old):
    """In one row with the new name."""
    rows = [line.split("|") for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("| ")]
    assert any(f"`{old}`" in row[1] and f"`{RENAMED[old]}`" in row[2] for row in rows)

"""Print the help of a command: groups with their options, and keys with their values and the comments of conf/."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffusion_lab import composition
from diffusion_lab.cli.schema import COMMANDS
from diffusion_lab.instantiation import CONF

WIDTH = 44  # width of KEY: VALUE in characters; the comment follows


def show(name: str, overrides: Sequence[str], config_dir: str | None) -> None:
    """Print the help of a command, with the values that this command line sets."""
    config = composition.composed(name, overrides, config_dir)
    choices = dict(config.hydra.runtime.choices)
    groups = [
        g for g in composition.groups_of(CONF / f"{name}.yaml") if (CONF / g).is_dir() and "/" not in g and g != "hydra"
    ]
    print(str(config.hydra.help.template).rstrip())
    if groups:
        print("\nGroups (GROUP=OPTION):\n")
        for group in sorted(groups):
            print(f"  {group}: {', '.join(composition.options(group, config_dir))}")
    print("\nKeys (KEY=VALUE; +KEY=VALUE adds an argument of the class of a group):\n")
    comments = dict(_comments(name, choices))
    plain: Any = OmegaConf.to_container(config, resolve=False)
    for key, value in _leaves({k: plain[k] for k in COMMANDS[name].__annotations__ if k in plain}):
        line = f"  {key}: {_shown(value)}"
        comment = comments.get(key, "")
        print(f"{line:<{WIDTH}} # {comment}" if comment else line)
    print(
        "\n--multirun runs a sweep over comma-separated values; --config-dir DIR adds options to groups; --cfg job prints the"
    )
    print("configuration and exits; --hydra-help prints the help of Hydra.")


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, child in value.items():
        if isinstance(child, dict) and child:
            yield from _leaves(child, f"{prefix}{key}.")
        elif key not in ("_convert_", "_partial_"):
            yield f"{prefix}{key}", child


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else "null" if value is None else str(value)


def _comments(name: str, choices: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, comment) for every line with a comment in the selected files of conf/."""
    yield from _file_comments(CONF / f"{name}.yaml", "")
    for group, option in choices.items():
        for stem in option if isinstance(option, (list, tuple)) else [option]:
            path = CONF / str(group) / f"{stem}.yaml"
            if path.is_file() and not str(group).startswith("hydra"):
                for file in (*_bases(path), path):
                    yield from _file_comments(file, str(group))
    for group in composition.LISTS:  # every file of these groups declares its package
        for path in sorted((CONF / group).glob("*.yaml")):
            yield from _file_comments(path, "")


def _bases(path: Path) -> list[Path]:
    """Return the files in the defaults list of a file, recursively, bases first."""
    content = OmegaConf.load(path)
    entries = list(content.get("defaults", [])) if isinstance(content, DictConfig) else []
    names = [str(entry).split("@")[0] for entry in entries if not isinstance(entry, DictConfig) and entry != "_self_"]
    files = [path.parent / f"{name}.yaml" for name in names]
    return [base for file in files if file.is_file() for base in (*_bases(file), file)]


def _file_comments(path: Path, package: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, comment) of one file. Keys are nested by indentation, since files of conf/ are block mappings."""
    stack: list[tuple[int, str]] = []
    in_defaults = False
    for line in path.read_text().splitlines():
        if line.startswith("# @package "):
            package = line.split()[-1].removeprefix("_global_")
        body, _, comment = line.partition(" #")
        text = body.strip()
        if not text or text.startswith(("#", "-")) or ":" not in text:
            continue
        indent, key = len(body) - len(body.lstrip()), text.split(":", 1)[0].strip("'\"")
        in_defaults = key == "defaults" if indent == 0 else in_defaults
        stack = [(i, k) for i, k in stack if i < indent] + [(indent, key)]
        if comment.strip() and not in_defaults:
            yield ".".join([*([package] if package else []), *(k for _, k in stack)]), comment.strip()

"""Wrong command lines, made from the files of conf/: every key of every option with wrong values, and every root key."""

import random
from collections.abc import Iterator, Mapping
from typing import Any

from command import unresolved
from omegaconf import OmegaConf

from diffusion_lab.cli.schema import COMMANDS
from diffusion_lab.instantiation import CONF

WRONG = (
    "-1",
    "0",
    "0.5",
    "nan",
    "inf",
    "1e30",
    str(2**70),
    "abc",
    "null",
    "[]",
    "[1]",
    "{}",
    "true",
    "${nothing}",
    "${oc.env:HOME}",
    "''",
)
# Options that need files that are not here, or a network that is not tiny.
ELSEWHERE = {
    "data": ("digits",),
    "model": ("unet_digits", "unet_classic"),
    "trainer": ("cpu",),
    "logger": ("csv", "tensorboard"),
    "quality": ("none",),
}
GROUPS = (
    "data", "condition", "model", "schedule", "objective", "weighting", "loss", "time_sampler", "sampler", "variance", "clip",
    "optimizer", "lr_scheduler", "callbacks", "trainer", "logger", "quality",
)  # fmt: skip
# Values that are right, but take long.
SLOW = ("trainer.max_steps", "data.batch_size=0.5")


def leaves(node: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Yield the dotted key of every value of a node."""
    for key, value in node.items():
        if str(key).startswith("_") and key != "_target_":
            continue
        yield f"{prefix}.{key}"
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}.{key}")


def training_lines() -> list[tuple[str, ...]]:
    """Return command lines of train.py, each with one wrong value."""
    lines: list[tuple[str, ...]] = []
    for group in GROUPS:
        lines += [(f"{group}={value}",) for value in WRONG]
        for path in sorted((CONF / group).glob("*.yaml")):
            if path.stem == "custom" or path.stem not in ELSEWHERE.get(group, (path.stem,)):
                continue
            node: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
            node.pop("defaults", None)
            package = "" if path.read_text().startswith("# @package _global_") else group
            for key in leaves(node, package):
                if package and not key.startswith(SLOW):
                    lines += [(f"{group}={path.stem}", f"{key}={value}") for value in WRONG]
                    lines += [(f"{group}={path.stem}", f"~{key}"), (f"{group}={path.stem}", f"+{key}.more=1")]
    for key, value in unresolved("train").items():
        if key not in (*GROUPS, "run_dir") and not isinstance(value, Mapping):
            lines += [(f"{key}={wrong}",) for wrong in WRONG] + [(f"~{key}",)]
    for key in leaves(unresolved("train")["validation"], "validation"):
        lines += [(f"{key}={wrong}",) for wrong in WRONG] + [(f"~{key}",)]
    return lines


def other_lines() -> list[tuple[str, tuple[str, ...]]]:
    """Return (command, arguments), each with one wrong value; the checkpoint does not exist, so that all are refused."""
    lines = []
    for name in ("sample", "evaluate", "fit_variance", "export"):
        for key in COMMANDS[name].__annotations__:
            lines += [(name, ("ckpt=nowhere", f"{key}={wrong}")) for wrong in WRONG] + [
                (name, ("ckpt=nowhere", f"~{key}"))
            ]
    return [line for line in lines if not line[1][1].startswith(("run_dir", "~run_dir"))]


def drawn(lines: list[Any], n: int) -> list[Any]:
    """Return n of the lines, the same in every run; all of them if there are fewer."""
    return random.Random(0).sample(lines, min(n, len(lines)))

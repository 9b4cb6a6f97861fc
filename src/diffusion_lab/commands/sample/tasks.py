"""The tasks of `src/sample.py` and their options, checked before torch is imported."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_lab.errors import ConfigError

NEEDS = {  # options that a task requires
    "generate": (),
    "interpolate": (),
    "encode": ("image",),
    "decode": ("latents",),
    "inpaint": ("image", "mask"),
    "edit": ("image",),
    "trajectory": (),
}
MAY = {"interpolate": ("images",)}  # options that a task accepts
PATHS = {
    "image": "an image file of the checkpoint's size (for task=encode also a folder or an .npz)",
    "mask": "an image of the same size, white where pixels are generated",
    "latents": "latents.npz of task=encode",
    "images": "two image files [A,B]",
}


def check(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for options that are invalid for every checkpoint."""
    task = settings["task"]
    if task not in NEEDS:
        raise ConfigError(f"task={task} is unknown: write task=generate, or one of {', '.join(list(NEEDS)[1:])}")
    if not settings["ckpt"]:
        raise ConfigError("ckpt= is not set: write ckpt=PATH with a checkpoint or a run folder, or ckpt=latest")
    for key, what in PATHS.items():
        value = settings[key]
        if value is None:
            if key in NEEDS[task]:
                raise ConfigError(f"task={task} needs {key}=PATH, {what}")
        elif key not in (*NEEDS[task], *MAY.get(task, ())):
            users = [t for t in NEEDS if key in (*NEEDS[t], *MAY.get(t, ()))]
            raise ConfigError(
                f"{key}= is not an option of task={task}: remove it, or write task={' or task='.join(users)}"
            )
        else:
            _check_paths(key, value)
    if task == "interpolate" and settings["n"] is not None and settings["n"] < 2:
        raise ConfigError(f"n={settings['n']}: task=interpolate writes both ends: write at least n=2")
    if task == "edit" and not 0 < settings["strength"] <= 1:
        raise ConfigError(
            f"strength={settings['strength']} is outside (0, 1]: write a time up to which noise is added, e.g. strength=0.5"
        )


def _check_paths(key: str, value: Any) -> None:
    """Raise ConfigError unless the value names existing files, two of them for images=."""
    paths = value if isinstance(value, list) else [value]
    if key == "images" and (len(paths) != 2 or not all(isinstance(path, str) for path in paths)):
        raise ConfigError(f"images={value} is not a list of two files: write images=[A.png,B.png]")
    for path in paths:
        if not Path(path).exists():
            raise ConfigError(f"{key}={path}: no such file: write {key}= with {PATHS[key]}")

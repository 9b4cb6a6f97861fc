"""Files of checkpoints: find one, read it safely, select its weights."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffusion_lab.checkpoint.upgrade import FORMAT, upgraded
from diffusion_lab.errors import ConfigError

EXPORTED = "diffusion_lab"  # the key of the configuration in a .safetensors file of src/export.py


def find(path: str | Path) -> Path:
    """Return the checkpoint file of `path`: itself, last.ckpt (else best.ckpt) of a run folder, or that of the latest run.

    Raises:
        ConfigError: no such file.
    """
    place = Path(path)
    if str(path) == "latest":
        files = [
            *Path("outputs/train").glob("*/checkpoints/last.ckpt"),
            *Path("outputs/multirun").glob("*/*/checkpoints/last.ckpt"),
        ]
        if not files:
            raise ConfigError(
                "ckpt=latest finds no run below outputs/train: train one first, or name a checkpoint file"
            )
        return max(files, key=lambda file: file.stat().st_mtime)
    if place.is_dir():
        for name in ("checkpoints/last.ckpt", "checkpoints/best.ckpt", "last.ckpt", "best.ckpt"):
            if (place / name).is_file():
                return place / name
        raise ConfigError(f"the folder {place} holds no checkpoints/last.ckpt: name a run folder or a checkpoint file")
    if not place.is_file():
        raise ConfigError(f"there is no checkpoint at {place}: name a file, a run folder (outputs/train/…), or latest")
    return place


def read(path: Path) -> dict[str, Any]:
    """Return a checkpoint's tensors and plain values, in the present format.

    A file of src/export.py is returned as a checkpoint with one set of weights.

    Raises:
        ConfigError: a truncated or damaged file, or no checkpoint of this project.
    """
    if path.suffix == ".safetensors":
        return _exported(path)
    if not zipfile.is_zipfile(path):
        raise ConfigError(
            f"{path} is not a whole checkpoint: truncated, or something else; take another file (best.ckpt?)"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"{path} cannot be read as a checkpoint of tensors and plain values ({reason})") from None
    written = checkpoint.get("diffusion_lab", {}).get("format") if isinstance(checkpoint, dict) else None
    if written not in (1, 2, FORMAT):
        raise ConfigError(f"{path} is no checkpoint of diffusion-lab: name one that src/train.py wrote")
    return checkpoint if written == FORMAT else upgraded(checkpoint)


def _exported(path: Path) -> dict[str, Any]:
    stored = metadata(path)
    if stored is None:
        raise ConfigError(
            f"{path} holds weights without their configuration: train.py init= can begin from them; "
            "to sample take what src/export.py wrote, or a checkpoint"
        )
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    kind, _, decay = str(stored["weights"]).partition(" ")
    if kind == "ema":
        return {**stored, "ema": {decay: tensors}, "state_dict": {}}
    return {**stored, "ema": {}, "state_dict": {f"network.{name}": tensor for name, tensor in tensors.items()}}


def metadata(path: Path) -> dict[str, Any] | None:
    """The metadata of src/export.py in a .safetensors file; None for weights of other projects. ConfigError: a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(EXPORTED)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a whole .safetensors file: fetch it again ({error})") from error
    if text is None:
        return None
    try:
        stored: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} holds a damaged configuration: export it again ({error})") from None
    written = stored.get("diffusion_lab", {}).get("format")
    if written not in (1, 2, FORMAT) or not {"config", "weights", "global_step"} <= stored.keys():
        raise ConfigError(f"{path} is of another version of diffusion-lab: export it again")
    return stored if written == FORMAT else upgraded(stored)


def select(checkpoint: dict[str, Any], weights: str | float) -> tuple[str, dict[str, Tensor]]:
    """Return the name and the state dict of the network's weights.

    Args:
        checkpoint: of `read`.
        weights: "ema" (the first average; raw weights where there is none), "raw", or the decay of an average.

    Raises:
        ConfigError: an average that the checkpoint does not hold.
    """
    weights = weights if isinstance(weights, str) else f"{weights:g}"  # weights=0.999 arrives as a number
    averages = checkpoint.get("ema") or {}
    if weights == "ema" and averages:
        weights = next(iter(averages))
    if weights in averages:
        return f"ema {weights}", averages[weights]
    if weights not in ("ema", "raw"):
        raise ConfigError(f"weights={weights} is not in the checkpoint: write {', '.join(['ema', 'raw', *averages])}")
    prefix = "network."
    raw = {key.removeprefix(prefix): v for key, v in checkpoint["state_dict"].items() if key.startswith(prefix)}
    return "raw", raw

"""Find a checkpoint's file, read it with `weights_only=True`, and select its weights."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from diffusion_lab.checkpoint import archive
from diffusion_lab.checkpoint.upgrade import FORMAT, upgraded
from diffusion_lab.errors import ConfigError
from diffusion_lab.io import parse_plain, require_file

REMEDY = "take another file (best.ckpt?)"
EXPORTED = "diffusion_lab"  # the key of the configuration in a .safetensors file of src/export.py


def find(path: str | Path) -> Path:
    """Return the checkpoint's file.

    Args:
        path: a file, a run folder (its last.ckpt, else best.ckpt), or "latest" for the newest run in outputs/.

    Raises:
        ConfigError: if there is no such file.
    """
    place = Path(path)
    if str(path) == "latest":
        files = [
            *Path("outputs/train").glob("*/checkpoints/last.ckpt"),
            *Path("outputs/multirun").glob("*/*/checkpoints/last.ckpt"),
        ]
        if not files:
            raise ConfigError(
                "ckpt=latest: no run in outputs/train: train one first, or write ckpt=FILE with a checkpoint"
            )
        return max(files, key=lambda file: file.stat().st_mtime)
    if place.is_dir():
        for name in ("checkpoints/last.ckpt", "checkpoints/best.ckpt", "last.ckpt", "best.ckpt"):
            if (place / name).is_file():
                return place / name
        raise ConfigError(
            f"the folder {place} does not contain checkpoints/last.ckpt: name a run folder or a checkpoint file"
        )
    if not place.is_file():
        raise ConfigError(f"no checkpoint at {place}: name a file, a run folder (outputs/train/…), or latest")
    return place


def read(path: Path) -> dict[str, Any]:
    """Return a checkpoint's tensors and plain values, converted to the current format.

    A file written by src/export.py is returned as a checkpoint with one set of weights.

    Raises:
        ConfigError: if the file is truncated, damaged, or not a checkpoint of this project.
    """
    if path.suffix == ".safetensors":
        return _exported(path)
    content = archive.read(path, "checkpoint", REMEDY)
    version = submapping(content, "diffusion_lab").get("format")
    if version not in (1, 2, FORMAT):
        raise ConfigError(f"{path} is not a checkpoint of diffusion-lab: name a file written by src/train.py")
    _check_entries(content, path)
    return content if version == FORMAT else upgraded(content)


def submapping(mapping: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return `mapping[key]` if it is a mapping, else {}."""
    value = mapping.get(key)
    return value if isinstance(value, Mapping) else {}


def _exported(path: Path) -> dict[str, Any]:
    """Return a file written by src/export.py as a checkpoint with one set of weights."""
    stored = metadata(path)
    if stored is None:
        raise ConfigError(
            f"{path} contains weights without a configuration and can only initialize a training (train.py init={path}): "
            "to sample, write ckpt= with a checkpoint or a file written by src/export.py"
        )
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    archive.check_hash({**stored, "tensors": tensors}, path, "export", "export it again")
    kind, _, decay = str(stored["weights"]).partition(" ")
    weights = {"ema": {decay: tensors}, "state_dict": {}}
    if kind != "ema":
        weights = {"ema": {}, "state_dict": {f"network.{name}": tensor for name, tensor in tensors.items()}}
    content = {**stored, **weights}
    return content if stored["diffusion_lab"]["format"] == FORMAT else upgraded(content)


def exported(content: Mapping[str, Any], weights: str, tensors: Mapping[str, Tensor]) -> bytes:
    """Return the bytes of a .safetensors file: weights with the entries of their checkpoint that are needed to sample.

    Args:
        content: from `read`.
        weights: name of the weights, from `select`.
        tensors: of the network, contiguous.
    """
    keys = ("config", "choices", "class_names", "global_step", "diffusion_lab")
    # The hash is that of the metadata as JSON, in which a tuple is a list.
    stored = json.loads(json.dumps({**{key: content[key] for key in keys if key in content}, "weights": weights}))
    ordered = {name: tensors[name] for name in sorted(tensors)}
    stored[archive.HASH] = archive.digest({**stored, "tensors": ordered})
    return save(ordered, metadata={EXPORTED: json.dumps(stored)})


def metadata(path: Path) -> dict[str, Any] | None:
    """Return the metadata that src/export.py wrote to a .safetensors file; None for weights of other projects.

    Raises:
        ConfigError: if the file is damaged, or its format belongs to another version.
    """
    require_file(path)
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(EXPORTED)
    except Exception as error:  # beside SafetensorError, the parser raises those of Rust and of the file system
        raise ConfigError(f"{path} is truncated or not a .safetensors file: download it again ({error})") from error
    if text is None:
        return None
    stored = parse_plain(text, json.loads, f"the configuration in {path}")
    version = submapping(stored, "diffusion_lab").get("format") if isinstance(stored, dict) else None
    if version not in (1, 2, FORMAT) or not {"config", "weights", "global_step"} <= stored.keys():
        raise ConfigError(f"{path} was written by another version of diffusion-lab: export it again")
    _check_entries({"state_dict": {}, **stored}, path)
    return stored


def _is_weights(name: Any) -> bool:
    """Whether a name of weights is "raw" or "ema DECAY"."""
    return name == "raw" or (isinstance(name, str) and name.startswith("ema ") and _is_decay(name[4:]))


def _is_decay(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[0-9.e-]{1,20}", name) is not None


ENTRIES: dict[str, tuple[type, Any]] = {  # of a checkpoint: its type, and the type of its values
    "config": (dict, None),
    "global_step": (int, None),
    "state_dict": (dict, Tensor),
    "ema": (dict, dict),
    "composed": (dict, None),
    "choices": (dict, str),
    "overrides": (list, str),
    "class_names": (list, str),
    "times": (dict, None),
    "wandb_id": (str, None),
    "loss_sums": (Tensor, None),
}
REQUIRED = ("config", "global_step", "state_dict")


def _check_entries(content: Mapping[str, Any], path: Path) -> None:
    """Raise ConfigError for a checkpoint whose entries are missing or of another type."""
    for name, (kind, of) in ENTRIES.items():
        value = content.get(name)
        if value is None and name not in REQUIRED:
            continue
        inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        if (
            not isinstance(value, kind)
            or isinstance(value, bool)
            or (of and not all(isinstance(v, of) for v in inside))
        ):
            raise ConfigError(f"{path} has no {name} as src/train.py writes it: {REMEDY}")
    if not all(map(_is_decay, content.get("ema") or {})) or not _is_weights(content.get("weights", "raw")):
        raise ConfigError(f"{path} has averages whose names are not decays: {REMEDY}")
    averages = [tensor for state in (content.get("ema") or {}).values() for tensor in state.values()]
    if not all(isinstance(tensor, Tensor) for tensor in averages) or content["global_step"] < 0:
        raise ConfigError(f"{path} has averages that are not tensors, or a negative step: {REMEDY}")


def select(checkpoint: dict[str, Any], weights: str | float) -> tuple[str, dict[str, Tensor]]:
    """Return the name and the state dict of the network's weights.

    Args:
        checkpoint: the result of `read`.
        weights: "ema" (the first average, or the raw weights if there is no average), "raw", or the decay of an average.

    Raises:
        ConfigError: if the checkpoint has no such average.
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

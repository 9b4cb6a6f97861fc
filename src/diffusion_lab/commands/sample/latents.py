"""latents.npz: states at t = 1, with what tells whether a checkpoint can decode them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.checkpoint.fits import fingerprint
from diffusion_lab.commands.sample.context import SamplingContext, write_arrays
from diffusion_lab.data.inputs import arrays
from diffusion_lab.errors import ConfigError

CONDITION = "condition_"  # what the names of the conditions begin with


def save(work: SamplingContext, latents: Tensor, condition: Mapping[str, Tensor]) -> None:
    """Writes latents.npz: arr_0 float32 (N, C, H, W), t, seed, schedule, ckpt, weights (their SHA-256), and the conditions."""
    told: dict[str, Any] = {
        "t": np.float64(1),
        "seed": np.uint64(work.settings["seed"]),
        "schedule": np.str_(json.dumps(work.run.config["schedule"], sort_keys=True)),
        "ckpt": np.str_(work.run.path),
        "weights": np.str_(fingerprint(work.run)),
    }
    told |= {CONDITION + name: value.numpy() for name, value in condition.items()}
    write_arrays(work.out / "latents.npz", latents.float().numpy(), **told)


def load(work: SamplingContext, path: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """(latents, conditions) that `save` wrote. ValueError: no such file, another shape, other weights."""
    found = arrays("latents", path)
    if not {"arr_0", "t", "schedule", "ckpt", "weights"} <= set(found) or found["t"] != 1:
        raise ConfigError(f"latents={path} is not what sample.py writes: make it by task=encode")
    latents, shape = found["arr_0"], work.run.shape
    if latents.ndim != 4 or latents.shape[1:] != shape or not np.isfinite(latents).all():
        raise ConfigError(
            f"latents={path} holds {'×'.join(map(str, latents.shape[1:]))} latents where the checkpoint's images are "
            f"{'×'.join(map(str, shape))}: encode with this checkpoint, or write ckpt={found['ckpt']}"
        )
    if str(found["weights"]) != fingerprint(work.run):
        raise ConfigError(
            f"latents={path} belongs to other weights than these ({work.run.path}, {work.run.weights}): encode with them, or "
            f"write ckpt={found['ckpt']}"
        )
    conditions = {name.removeprefix(CONDITION): v for name, v in found.items() if name.startswith(CONDITION)}
    return torch.from_numpy(latents).float(), {name: torch.from_numpy(v) for name, v in conditions.items()}

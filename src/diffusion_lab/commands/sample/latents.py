"""Write and read latents.npz: states at t = 1, with their schedule and the hash of the weights."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.checkpoint.fits import fingerprint
from diffusion_lab.commands.sample.context import SamplingContext, write_arrays
from diffusion_lab.data.npz import tensor_of
from diffusion_lab.errors import ConfigError
from diffusion_lab.io import read_npz

CONDITION = "condition_"  # prefix of the arrays of conditions


def save_latents(context: SamplingContext, latents: Tensor, condition: Mapping[str, Tensor]) -> None:
    """Write latents.npz: arr_0 float32 (N, C, H, W), t, seed, schedule, ckpt, weights (a fingerprint), and the conditions."""
    metadata: dict[str, Any] = {
        "t": np.float64(1),
        "seed": np.uint64(context.settings["seed"]),
        "schedule": np.str_(json.dumps(context.run.config["schedule"], sort_keys=True)),
        "ckpt": np.str_(context.run.path),
        "weights": np.str_(fingerprint(context.run)),
    }
    metadata |= {CONDITION + name: value.numpy() for name, value in condition.items()}
    write_arrays(context.out / "latents.npz", latents.float().numpy(), **metadata)


def load_latents(context: SamplingContext, path: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Read latents and conditions written by `save_latents`.

    Raises:
        ConfigError: if the file is missing, the shape differs from the checkpoint's, or the file belongs to other weights.
    """
    arrays = read_npz(path, "latents")
    if not {"arr_0", "t", "schedule", "ckpt", "weights"} <= set(arrays) or not np.array_equal(arrays["t"], 1.0):
        raise ConfigError(
            f"latents={path} was not written by sample.py: write latents= with latents.npz of task=encode"
        )
    latents, shape = arrays["arr_0"], context.run.shape
    if (
        latents.dtype != np.float32
        or latents.ndim != 4
        or not len(latents)
        or latents.shape[1:] != shape
        or not np.isfinite(latents).all()
    ):
        raise ConfigError(
            f"latents={path} has {'×'.join(map(str, latents.shape[1:]))} latents where the checkpoint's images are "
            f"{'×'.join(map(str, shape))}: encode with this checkpoint, or write ckpt={shlex.quote(str(arrays['ckpt']))}"
        )
    if str(arrays["weights"]) != fingerprint(context.run):
        raise ConfigError(
            f"latents={path} belongs to other weights than these ({context.run.path}, {context.run.weights}): encode with "
            f"them, or write ckpt={shlex.quote(str(arrays['ckpt']))}"
        )
    conditions = {name.removeprefix(CONDITION): v for name, v in arrays.items() if name.startswith(CONDITION)}
    where = f"latents={path}"
    return torch.from_numpy(latents).float(), {name: tensor_of(v, name, where) for name, v in conditions.items()}

"""`src/export.py`: one file of weights with the configuration that rebuilds their network."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save

from diffusion_lab import checkpoint as checkpoints
from diffusion_lab.checkpoint import EXPORTED
from diffusion_lab.errors import ConfigError
from diffusion_lab.interop.diffusers import to_diffusers
from diffusion_lab.io import os_errors, write_file
from diffusion_lab.models.unet import UNet


def run(config: DictConfig) -> int:
    """Writes the file; returns the exit code."""
    with os_errors():
        settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        out = Path(settings["out"])
        if out.suffix != ".safetensors":
            raise ConfigError(f"out={out}: name a file that ends in .safetensors")
        if out.exists() and not settings["overwrite"]:
            raise ConfigError(f"{out} exists: write overwrite=true, or another out=")
        found = checkpoints.find(settings["ckpt"] or "latest")
        loaded = checkpoints.load_checkpoint(found, settings["weights"], settings["trust"])
        network = loaded.denoiser.network
        if settings["diffusers"]:
            if not isinstance(network, UNet):
                raise ConfigError(f"{type(network).__name__} has no namesake in diffusers: leave diffusers= out")
            tensors, told = to_diffusers(network), {}
        else:
            source = checkpoints.read(found)
            kept = {
                key: source[key]
                for key in ("config", "choices", "class_names", "global_step", "diffusion_lab")
                if key in source
            }
            tensors = network.state_dict()  # type: ignore[attr-defined]
            told = {EXPORTED: json.dumps({**kept, "weights": loaded.weights})}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}  # channels_last is not
        write_file(out, save(tensors, metadata=told or None))
    count = sum(tensor.numel() for tensor in tensors.values())
    print(f"{found} ({loaded.weights}, step {loaded.step:,}): {count:,} numbers, {out.stat().st_size / 2**20:.1f} MiB")
    print(f"written to {out}")
    return 0

"""`src/export.py`: write the weights of a checkpoint and their configuration to one .safetensors file."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save

from diffusion_lab import checkpoint as checkpoints
from diffusion_lab.checkpoint import EXPORTED
from diffusion_lab.errors import ConfigError
from diffusion_lab.interop.diffusers import to_diffusers
from diffusion_lab.io import os_errors, write_new_file
from diffusion_lab.models.unet import UNet


def run(config: DictConfig) -> int:
    """Write the file; return the exit code."""
    with os_errors():
        settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        out = Path(settings["out"])
        if out.suffix != ".safetensors":
            raise ConfigError(f"out={out}: name a file that ends in .safetensors")
        if out.exists() and not settings["overwrite"]:
            raise ConfigError(f"{out} exists: write overwrite=true, or another out=")
        file = checkpoints.find(settings["ckpt"] or "latest")
        loaded = checkpoints.load_checkpoint(file, settings["weights"], settings["trust"])
        network = loaded.denoiser.network
        if settings["diffusers"]:
            if not isinstance(network, UNet):
                raise ConfigError(f"{type(network).__name__} has no counterpart in diffusers: leave diffusers= out")
            tensors, metadata = to_diffusers(network), {}
        else:
            content = checkpoints.read(file)
            keys = ("config", "choices", "class_names", "global_step", "diffusion_lab")
            header = {key: content[key] for key in keys if key in content}
            tensors = network.state_dict()  # type: ignore[attr-defined]
            metadata = {EXPORTED: json.dumps({**header, "weights": loaded.weights})}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}  # channels_last ones are not
        write_new_file(out, save(tensors, metadata=metadata or None), bool(settings["overwrite"]))
    count = sum(tensor.numel() for tensor in tensors.values())
    print(f"{file} ({loaded.weights}, step {loaded.step:,}): {count:,} numbers, {out.stat().st_size / 2**20:.1f} MiB")
    print(f"written to {out}")
    return 0

"""Write the weights of a checkpoint and their configuration to a .safetensors file (`src/export.py`)."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save

from diffusion_lab import checkpoint as checkpoints
from diffusion_lab.errors import ConfigError
from diffusion_lab.interop.diffusers import to_diffusers
from diffusion_lab.io import os_errors, write_new_file
from diffusion_lab.models.unet import UNet


def run(config: DictConfig) -> int:
    """Write the file, and return the exit code."""
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
                raise ConfigError(f"{type(network).__name__} has no counterpart in diffusers: write diffusers=false")
            tensors = to_diffusers(network)
            content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        else:
            # channels_last tensors are not contiguous
            tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}  # type: ignore[attr-defined]
            content = checkpoints.exported(checkpoints.read(file), loaded.weights, tensors)
        write_new_file(out, content, bool(settings["overwrite"]))
    count = sum(tensor.numel() for tensor in tensors.values())
    print(f"{file} ({loaded.weights}, step {loaded.step:,}): {count:,} numbers, {out.stat().st_size / 2**20:.1f} MiB")
    print(f"written to {out}")
    return 0

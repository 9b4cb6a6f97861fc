"""`src/sample.py`: images from a checkpoint."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from diffusion_lab.data.pictures import grid, save_png, to_uint8
from diffusion_lab.runs import conditions, files
from diffusion_lab.runs.checkpoints import load_checkpoint, rewrapped
from diffusion_lab.runs.cli import refusals
from diffusion_lab.runs.device import device
from diffusion_lab.runs.guidance import guided
from diffusion_lab.runs.instantiate import instantiate
from diffusion_lab.runs.variances import sampler_for
from diffusion_lab.samplers import Sampler

SHOWN = 400  # images of grid.png at most


def run(config: DictConfig) -> int:
    """Samples as configured and writes grid.png, samples.npz and images/*.png; returns the exit code."""
    with refusals(OSError):
        settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        if settings["task"] != "generate":
            raise ValueError(f"task={settings['task']} is unknown: write task=generate")
        if not settings["ckpt"]:
            raise ValueError("name what to sample from: ckpt=PATH of a checkpoint or a run folder, or ckpt=latest")
        out = Path(settings["out"] or settings["run_dir"])
        files.refuse_filled(out, "out", settings["overwrite"])
        loaded = load_checkpoint(settings["ckpt"], settings["weights"], settings["trust"])
        loaded = rewrapped(loaded, clip=instantiate(settings.get("clip")))
        sampler, loaded = sampler_for(settings["sampler"], loaded)
        loaded = guided(settings.get("guidance"), loaded)
        sampler.check(loaded.denoiser)
        condition = conditions.asked(settings, loaded, settings["n"])
        images = loaded.to(device(settings["device"])).sample(
            settings["n"],
            sampler,
            seed=settings["seed"],
            batch_size=settings["batch_size"],
            condition=condition,
            progress=True,
        )
        write(out, images, condition.get("label"), settings["save_images"])
    print(
        f"{len(images)} images, {named(sampler)}, {sampler.nfe} network evaluations each, weights {loaded.weights}, "
        f"step {loaded.step:,}, seed {settings['seed']}\nlook at  {out / 'grid.png'}"
    )
    return 0


def named(sampler: Sampler) -> str:
    """A sampler's name, with that of the variance where it has one."""
    variance = getattr(sampler, "variance", None)
    return type(sampler).__name__ + ("" if variance is None else f" with {type(variance).__name__}")


def write(out: Path, images: Tensor, asked: Tensor | None, save_images: bool) -> None:
    """grid.png, samples.npz (arr_0 uint8 N×H×W×C, arr_1 int64 labels) and images/00000.png …; images (N, C, H, W) in [−1, 1]."""
    pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
    arrays = [pixels] if asked is None else [pixels, asked.numpy()]
    packed = io.BytesIO()
    np.savez_compressed(packed, *arrays)
    files.write(out / "samples.npz", packed.getvalue())
    if save_images:
        digits = max(5, len(str(len(pixels) - 1)))
        for i, picture in enumerate(pixels):
            save_png(out / "images" / f"{i:0{digits}d}.png", picture)
    save_png(out / "grid.png", grid(images[:SHOWN]))

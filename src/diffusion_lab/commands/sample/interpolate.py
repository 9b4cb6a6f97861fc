"""task=interpolate: images along the great circle between two latents."""

from pathlib import Path

import torch
from torch import Tensor

from diffusion_lab.commands.sample.context import SamplingContext, write
from diffusion_lab.commands.sample.latents import save
from diffusion_lab.data.inputs import read_one
from diffusion_lab.data.pictures import grid, save_png
from diffusion_lab.editing import slerp
from diffusion_lab.errors import ConfigError
from diffusion_lab.samplers import prior

ROW = 16  # images that stand in one row


def do(work: SamplingContext) -> str:
    """Decodes n latents from that of A to that of B, both included; writes the images and latents.npz."""
    settings, n = work.settings, work.settings["n"]
    work.must_be_deterministic()
    labels = settings["labels"]
    if isinstance(labels, list) and len(set(map(str, labels))) > 1:
        raise ConfigError(f"labels={labels}: an interpolation is of one class, e.g. labels=[{labels[0]}]")
    ends = [read_one("images", Path(path), work.run.shape) for path in settings["images"] or ()]
    condition = {name: value.expand(n, *value.shape[1:]).clone() for name, value in work.condition(1).items()}
    if ends:
        a, b = work.encoded(torch.cat(ends), {name: value[:2] for name, value in condition.items()}).x
    else:
        a, b = _noises(work)
    latents = slerp(a, b, torch.linspace(0, 1, n, dtype=torch.float64))
    images, nfe, _ = work.decoded(latents, condition)
    write(work.out, images, condition.get("label"), settings["save_images"])
    if n <= ROW:
        save_png(work.out / "grid.png", grid(images, n))
    save(work, latents, condition)
    between = " and ".join(settings["images"]) if ends else f"noises 0 and 1 of seed {settings['seed']}"
    return work.said(f"{n} images between {between}, both ends among them", nfe)


def _noises(work: SamplingContext) -> Tensor:
    """The states that images 0 and 1 of task=generate begin with."""
    return prior(work.run.denoiser.schedule, work.noise(torch.arange(2)))

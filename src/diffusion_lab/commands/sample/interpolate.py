"""task=interpolate: decode latents along the great circle between two latents."""

from pathlib import Path

import torch

from diffusion_lab.commands.sample.context import SamplingContext, write_samples
from diffusion_lab.commands.sample.latents import save_latents
from diffusion_lab.data.inputs import read_one
from diffusion_lab.data.pictures import grid, save_png
from diffusion_lab.editing import slerp
from diffusion_lab.errors import ConfigError
from diffusion_lab.generation import initial_state

ROW = 16  # maximum number of images for a grid.png with one row


def run_task(context: SamplingContext) -> str:
    """Decode n latents from that of A to that of B, including both, and write the images and latents.npz."""
    settings, n, run = context.settings, context.settings["n"], context.run
    context.require_deterministic()
    labels = settings["labels"]
    if isinstance(labels, list) and len(set(map(str, labels))) > 1:
        raise ConfigError(f"labels={labels}: task=interpolate needs one class: write e.g. labels=[{labels[0]}]")
    ends = [read_one("images", Path(path), run.shape) for path in settings["images"] or ()]
    condition = {name: value.expand(n, *value.shape[1:]).clone() for name, value in context.condition(1).items()}
    if ends:
        a, b = context.encode(torch.cat(ends), {name: value[:2] for name, value in condition.items()}).x
    else:  # the initial states of images 0 and 1 of task=generate
        a, b = initial_state(run.denoiser, run.shape, torch.arange(2), settings["seed"])
    latents = slerp(a, b, torch.linspace(0, 1, n, dtype=torch.float64))
    images, nfe, _ = context.decode(latents, condition)
    write_samples(context.out, images, condition.get("label"), settings["save_images"])
    if n <= ROW:
        save_png(context.out / "grid.png", grid(images, n))
    save_latents(context, latents, condition)
    between = " and ".join(settings["images"]) if ends else f"noises 0 and 1 of seed {settings['seed']}"
    return context.summary(f"{n} images between {between}, including both", nfe)

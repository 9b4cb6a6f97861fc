"""task=decode: latents.npz to images."""

from pathlib import Path

from diffusion_lab.commands.sample.context import SamplingContext, write_samples
from diffusion_lab.commands.sample.latents import load_latents


def run_task(context: SamplingContext) -> str:
    """Decode latents=, under the conditions that they were encoded with, or under labels= where it is given."""
    latents, condition = load_latents(context, Path(context.settings["latents"]))
    if context.settings["labels"] != "cycle":
        condition = context.condition(len(latents))
    images, nfe, _ = context.decode(latents, condition)
    write_samples(context.out, images, condition.get("label"), context.settings["save_images"])
    return context.summary(f"{len(images)} images from latents", nfe)

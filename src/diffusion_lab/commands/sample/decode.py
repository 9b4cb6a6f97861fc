"""task=decode: integrate the states in latents.npz to images."""

from pathlib import Path

from diffusion_lab.commands.sample.context import SamplingContext, write_samples
from diffusion_lab.commands.sample.latents import load_latents


def run_task(context: SamplingContext) -> str:
    """Decode latents=, conditioned as when they were encoded, or on labels= if it is set."""
    latents, condition = load_latents(context, Path(context.settings["latents"]))
    if context.settings["labels"] != "cycle":
        condition = context.condition(len(latents))
    images, nfe, _ = context.decode(latents, condition)
    write_samples(context.out, images, condition.get("label"), context.settings["save_images"])
    return context.summary(f"{len(images)} images from latents", nfe)

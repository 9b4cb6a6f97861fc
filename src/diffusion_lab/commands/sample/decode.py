"""task=decode: latents.npz to images."""

from pathlib import Path

from diffusion_lab.commands.sample.context import SamplingContext, write
from diffusion_lab.commands.sample.latents import load


def do(work: SamplingContext) -> str:
    """Decodes latents=, under the conditions that they were encoded with, or under those that labels= asks for."""
    latents, condition = load(work, Path(work.settings["latents"]))
    if work.settings["labels"] != "cycle":
        condition = work.condition(len(latents))
    images, nfe, _ = work.decoded(latents, condition)
    write(work.out, images, condition.get("label"), work.settings["save_images"])
    return work.said(f"{len(images)} images from latents", nfe)

"""task=encode: real images to noise along the probability-flow ODE (DDIM inversion), and what the way back loses."""

import json
from pathlib import Path

import numpy as np
from torch import Tensor

from diffusion_lab import io as files
from diffusion_lab.commands.sample.context import SHOWN, SamplingContext, named, visible, write
from diffusion_lab.commands.sample.latents import save
from diffusion_lab.data.inputs import read
from diffusion_lab.data.pictures import Panel, save_sheet

LEVELS = 127.5  # levels of 255 in a unit of [−1, 1]


def do(work: SamplingContext) -> str:
    """Encodes image=, decodes it again, and writes latents.npz, the reconstructions, sheet.png and error.json."""
    work.must_be_deterministic()
    images, labels = read("image", Path(work.settings["image"]), work.run.shape)
    condition = work.condition(len(images), labels)
    latents, forth, _ = work.encoded(images, condition)
    back, nfe, _ = work.decoded(latents, condition)
    errors = round_trip(images, back)
    write(work.out, back, condition.get("label"), work.settings["save_images"])
    save(work, latents, condition)
    panels = [("original", images), ("latents", visible(latents, *work.ends())), ("decoded again", back)]
    save_sheet(work.out / "sheet.png", [Panel(caption, pictures[:SHOWN]) for caption, pictures in panels])
    report = {"sampler": named(work.sampler), "steps": work.sampler.steps, "nfe": forth + nfe, **errors}
    files.write(work.out / "error.json", json.dumps(report, indent=1))
    return work.said(
        f"{len(images)} images to latents.npz and back: off by {errors['rmse']:.2f} levels of 255 (root mean square), "
        f"{errors['max']:.1f} at most",
        nfe,
        "sheet.png",
    )


def round_trip(images: Tensor, back: Tensor) -> dict[str, float | list[float]]:
    """The error of the way back in levels of 255: over all, at most, and of each image."""
    gap = (back.double() - images.double()) * LEVELS
    each = gap.square().flatten(1).mean(1).sqrt()
    return {
        "rmse": float(gap.square().mean().sqrt()),
        "max": float(gap.abs().max()),
        "each": np.round(each, 4).tolist(),
    }

"""task=encode: integrate images to noise along the probability-flow ODE (DDIM inversion), and measure the error."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.commands.sample.context import SHOWN, SamplingContext, describe, to_visible, write_samples
from diffusion_lab.commands.sample.latents import save_latents
from diffusion_lab.data.inputs import read
from diffusion_lab.data.pictures import Panel, save_sheet
from diffusion_lab.io import write_file

LEVELS = 127.5  # 8-bit levels per unit of [−1, 1]


def run_task(context: SamplingContext) -> str:
    """Encode image= and decode it. Write latents.npz, the reconstructions, sheet.png and error.json."""
    context.require_deterministic()
    images, labels = read("image", Path(context.settings["image"]), context.run.shape)
    condition = context.condition(len(images), labels)
    latents, nfe_encode, _ = context.encode(images, condition)
    decoded, nfe, _ = context.decode(latents, condition)
    errors = round_trip(images, decoded)
    write_samples(context.out, decoded, condition.get("label"), context.settings["save_images"])
    save_latents(context, latents, condition)
    ends = context.run.denoiser.schedule.alpha_sigma(torch.ones((), dtype=torch.float64))
    panels = [("original", images), ("latents", to_visible(latents, *ends)), ("decoded again", decoded)]
    save_sheet(context.out / "sheet.png", [Panel(caption, pictures[:SHOWN]) for caption, pictures in panels])
    sampler = context.sampler
    report = {"sampler": describe(sampler), "steps": sampler.steps, "nfe": nfe_encode + nfe, **errors}
    write_file(context.out / "error.json", json.dumps(report, indent=1))
    return context.summary(
        f"{len(images)} images to latents.npz and back: root mean square error {errors['rmse']:.2f} levels of 255, "
        f"at most {errors['max']:.1f}",
        nfe,
        "sheet.png",
    )


def round_trip(images: Tensor, decoded: Tensor) -> dict[str, float | list[float]]:
    """Return the error of decoded images in 8-bit levels: "rmse" over all images, "max", and a list "each" of RMSEs per image."""
    error = (decoded.double() - images.double()) * LEVELS
    each = error.square().flatten(1).mean(1).sqrt()
    return {
        "rmse": float(error.square().mean().sqrt()),
        "max": float(error.abs().max()),
        "each": np.round(each, 4).tolist(),
    }

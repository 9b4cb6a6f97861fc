"""task=inpaint: generate the masked pixels of an image (RePaint, Lugmayr et al. 2022)."""

from pathlib import Path

import torch

from diffusion_lab.commands.sample.context import SHOWN, SamplingContext, write_samples
from diffusion_lab.data.inputs import read_one
from diffusion_lab.data.pictures import Panel, save_sheet
from diffusion_lab.editing import inpaint, passes
from diffusion_lab.errors import ConfigError
from diffusion_lab.generation import initial_state, join


def run_task(context: SamplingContext) -> str:
    """Generate n variants of the pixels of image= where mask= is white, and write them and sheet.png."""
    settings, n, run = context.settings, context.settings["n"], context.run
    known = read_one("image", Path(settings["image"]), run.shape)
    mask = (read_one("mask", Path(settings["mask"]), (1, *run.shape[1:])) > 0).float()
    if not bool(mask.any()):
        raise ConfigError(f"mask={settings['mask']} has no white pixel: paint the region to generate white")
    jump_length, resample = (int(settings["inpaint"][key]) for key in ("jump_length", "resample"))
    segments = passes(len(context.sampler.time_grid(run.denoiser)) - 1, jump_length, resample)
    condition = context.condition(n)
    images, nfe, _ = join(
        inpaint(
            context.sampler,
            run.denoiser,
            initial_state(run.denoiser, run.shape, batch.indices, settings["seed"]),
            known.to(run.device),
            mask.to(run.device),
            seed=settings["seed"],
            index=batch.indices,
            condition=batch.condition,
            jump_length=jump_length,
            resample=resample,
            progress=batch.progress,
        )
        for batch in context.batches(n, condition)
    )
    images = images.clamp(-1, 1)
    write_samples(context.out, images, condition.get("label"), settings["save_images"])
    panels = [("original", known), ("known", torch.where(mask > 0, 0.0, known)), ("generated", images[:SHOWN])]
    save_sheet(context.out / "sheet.png", [Panel(*panel) for panel in panels])
    share, repeats = float(mask.mean()), sum(segment.again for segment in segments)
    what = f"{n} images with {share:.0%} of the pixels generated, {repeats} resampled segments"
    return context.summary(what, nfe, "sheet.png")

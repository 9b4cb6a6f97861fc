"""task=inpaint: what a mask hides, made anew to fit what it shows."""

from pathlib import Path

import torch
from torch import Tensor

from diffusion_lab.commands.sample.context import SHOWN, SamplingContext, write
from diffusion_lab.data.inputs import read_one
from diffusion_lab.data.pictures import Panel, save_sheet
from diffusion_lab.editing import inpaint, passes
from diffusion_lab.errors import ConfigError
from diffusion_lab.samplers import Samples


def do(work: SamplingContext) -> str:
    """Makes n variants of image= that differ where mask= is white; writes them and sheet.png."""
    settings, n, denoiser = work.settings, work.settings["n"], work.run.denoiser
    known = read_one("image", Path(settings["image"]), work.run.shape)
    mask = (read_one("mask", Path(settings["mask"]), (1, *work.run.shape[1:])) > 0).float()
    if not bool(mask.any()):
        raise ConfigError(f"mask={settings['mask']} is black everywhere: paint white what is to be generated")
    jumps = (int(settings["inpaint"]["jump_length"]), int(settings["inpaint"]["resample"]))
    way = passes(len(work.sampler.time_grid(denoiser)) - 1, *jumps)
    condition = work.condition(n)

    def make(index: Tensor, condition: dict[str, Tensor], progress: bool) -> Samples:
        samples = inpaint(
            work.sampler,
            denoiser,
            known.to(index.device),
            mask.to(index.device),
            seed=settings["seed"],
            index=index,
            condition=condition,
            jump_length=jumps[0],
            resample=jumps[1],
            progress=progress,
        )
        return samples._replace(x=samples.x.clamp(-1, 1))

    images, nfe, _ = work.samples(n, make, condition)
    write(work.out, images, condition.get("label"), settings["save_images"])
    panels = [("original", known), ("known", torch.where(mask > 0, 0.0, known)), ("generated", images[:SHOWN])]
    save_sheet(work.out / "sheet.png", [Panel(*panel) for panel in panels])
    hidden, again = float(mask.mean()), sum(part.again for part in way)
    return work.said(f"{n} images with {hidden:.0%} of the pixels generated, {again} times back up", nfe, "sheet.png")

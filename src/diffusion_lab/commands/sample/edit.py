"""task=edit: an image noised to a time and sampled from there (SDEdit, Meng et al. 2022)."""

from pathlib import Path

import torch
from torch import Tensor

from diffusion_lab.commands.sample.context import SHOWN, SamplingContext, visible, write
from diffusion_lab.data.inputs import read_one
from diffusion_lab.data.pictures import Panel, save_sheet


def do(work: SamplingContext) -> str:
    """Makes n variants of image= that keep what survives noise of time strength=; writes them and sheet.png."""
    settings, n, schedule = work.settings, work.settings["n"], work.run.denoiser.schedule
    t = torch.tensor(float(settings["strength"]), dtype=torch.float64)
    x0 = read_one("image", Path(settings["image"]), work.run.shape)
    work.sampler.time_grid(work.run.denoiser, float(t))  # refuses a time without so many steps below it
    condition = work.condition(n)

    def make(index: Tensor, condition: dict[str, Tensor], progress: bool) -> Tensor:
        return schedule.corrupt(x0.to(index.device), work.noise(index), t)

    states = work.batched(n, make, condition)
    images, nfe, _ = work.decoded(states, condition, start=float(t))
    write(work.out, images, condition.get("label"), settings["save_images"])
    seen = visible(states[:SHOWN], *schedule.alpha_sigma(t))
    panels = [("original", x0), (f"noised to t = {float(t):g}", seen), ("edited", images[:SHOWN])]
    save_sheet(work.out / "sheet.png", [Panel(*panel) for panel in panels])
    return work.said(f"{n} edits from t={float(t):g}", nfe, "sheet.png")

"""task=edit: noise an image to a time and sample from there (SDEdit, Meng et al. 2022)."""

from pathlib import Path

import torch

from diffusion_lab.commands.sample.context import SHOWN, SamplingContext, to_visible, write_samples
from diffusion_lab.data.inputs import read_one
from diffusion_lab.data.pictures import Panel, save_sheet
from diffusion_lab.generation import initial_noise


def run_task(context: SamplingContext) -> str:
    """Add noise to image= up to time strength=, sample n images from there, and write them and sheet.png."""
    settings, n, run = context.settings, context.settings["n"], context.run
    schedule = run.denoiser.schedule
    x0 = read_one("image", Path(settings["image"]), run.shape)
    times = context.sampler.time_grid(run.denoiser, float(settings["strength"]))
    t = times[0]  # strength=, or for grid=leading its largest time below that
    condition = context.condition(n)
    states = schedule.corrupt(x0, initial_noise(run.shape, torch.arange(n), settings["seed"]), t)
    images, nfe, _ = context.decode(states, condition, times=times)
    write_samples(context.out, images, condition.get("label"), settings["save_images"])
    noised = to_visible(states[:SHOWN], *schedule.alpha_sigma(t))
    panels = [("original", x0), (f"noised to t = {float(t):g}", noised), ("edited", images[:SHOWN])]
    save_sheet(context.out / "sheet.png", [Panel(*panel) for panel in panels])
    return context.summary(f"{n} edits from t={float(t):g}", nfe, "sheet.png")

"""task=trajectory: record x_t and the estimate of x_0 at the steps of a sampler."""

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.commands.sample.context import SamplingContext, to_visible, write_samples
from diffusion_lab.data.pictures import Panel, grid, save_animation, save_sheet, to_uint8
from diffusion_lab.denoiser import Prediction
from diffusion_lab.generation import generate, join
from diffusion_lab.schedules import Schedule

SHOWN = 36  # maximum number of images in the animation
FRAMES = 60  # maximum number of frames
STRIP = (4, 10)  # numbers of images and of steps in strip.png
ROWS = ("x_t", "estimate of x_0")


class Film:
    """Callback of a sampler that records (x_t, x̂_0) of the first images as uint8, at FRAMES to 2·FRAMES evenly spaced steps."""

    def __init__(self, schedule: Schedule, count: int) -> None:
        self.schedule, self.count, self.stride = schedule, count, 1
        self.moments: list[Tensor] = []

    def __call__(self, i: int, t: float, x: Tensor, prediction: Prediction) -> None:
        if i % self.stride:
            return
        shown = to_visible(x[: self.count], *self.schedule.alpha_sigma(torch.tensor(t, dtype=torch.float64)))
        self.moments.append(torch.stack([to_uint8(v[: self.count]).cpu() for v in (shown, prediction.x0)], 1))
        if len(self.moments) >= 2 * FRAMES:
            self.moments, self.stride = self.moments[::2], 2 * self.stride

    def end(self, images: Tensor, frames: int = FRAMES) -> Tensor:
        """Return `frames` recorded steps followed by the final images, uint8 (frames + 1, B, 2, C, H, W)."""
        result = to_uint8(images[: self.count]).cpu()[:, None].expand(-1, 2, -1, -1, -1)
        chosen = torch.linspace(0, len(self.moments) - 1, frames).round().long().tolist()
        return torch.stack([*(self.moments[k] for k in chosen), result])


def run_task(context: SamplingContext) -> str:
    """Sample the same images as task=generate, and write them, trajectory.gif and strip.png."""
    settings, n, run = context.settings, context.settings["n"], context.run
    condition, parts, films = context.condition(n), [], []
    for batch in context.batches(n, condition):
        film = Film(run.denoiser.schedule, max(0, SHOWN - int(batch.indices[0])))
        callback = film if film.count else None
        samples = generate(run.denoiser, context.sampler, run.shape, batch, seed=settings["seed"], callback=callback)
        parts.append(samples)
        films.append((film, samples.x[: film.count]))
    images, nfe, _ = join(parts)
    films = [(film, x) for film, x in films if film.count]
    frames = min([FRAMES, *(len(film.moments) for film, _ in films)])  # batches of an adaptive solver differ
    moments = torch.cat([film.end(x, frames) for film, x in films], 1).float() / 127.5 - 1
    write_samples(context.out, images, condition.get("label"), settings["save_images"])
    save_animation(context.out / "trajectory.gif", [_side_by_side(moment[:, 0], moment[:, 1]) for moment in moments])
    chosen = torch.linspace(0, len(moments) - 1, STRIP[1]).round().long().unique()
    strips = moments[chosen, : STRIP[0]].transpose(0, 1)  # (images, moments, 2, C, H, W)
    panels = [(f"image {i}, {row}", strip[:, k]) for i, strip in enumerate(strips) for k, row in enumerate(ROWS)]
    save_sheet(context.out / "strip.png", [Panel(caption, strip, len(chosen)) for caption, strip in panels])
    return context.summary(f"{n} images with their trajectories", nfe, "trajectory.gif")


def _side_by_side(left: Tensor, right: Tensor) -> np.ndarray:
    """Return two grids side by side, with a gap between them."""
    a, b = grid(left), grid(right)
    return np.hstack([a, np.full((len(a), 12, 3), 255, np.uint8), b])

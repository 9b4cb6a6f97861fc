"""task=trajectory: images on their way from noise, x_t and the estimate of x_0."""

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.commands.sample.context import SamplingContext, visible, write
from diffusion_lab.data.pictures import Panel, grid, save_animation, save_sheet, to_uint8
from diffusion_lab.denoiser import Prediction
from diffusion_lab.samplers import Samples, prior
from diffusion_lab.schedules import Schedule

SHOWN = 36  # images of the animation at most
FRAMES = 60  # moments of it at most
STRIP = (4, 10)  # images and moments of the strip
WHAT = ("x_t", "estimate of x_0")


class Film:
    """A callback that keeps (x_t, x̂_0) of the first images as uint8, between FRAMES and 2 FRAMES moments evenly spread."""

    def __init__(self, schedule: Schedule, most: int) -> None:
        self.schedule, self.most, self.stride = schedule, most, 1
        self.moments: list[Tensor] = []

    def __call__(self, i: int, t: float, x: Tensor, prediction: Prediction) -> None:
        if i % self.stride:
            return
        seen = visible(x[: self.most], *self.schedule.alpha_sigma(torch.tensor(t, dtype=torch.float64)))
        self.moments.append(torch.stack([to_uint8(v[: self.most]).cpu() for v in (seen, prediction.x0)], 1))
        if len(self.moments) >= 2 * FRAMES:
            self.moments, self.stride = self.moments[::2], 2 * self.stride

    def end(self, images: Tensor, frames: int = FRAMES) -> Tensor:
        """uint8 (frames + 1, B, 2, C, H, W): the moments, and last the images that came out."""
        result = to_uint8(images[: self.most]).cpu()[:, None].expand(-1, 2, -1, -1, -1)
        chosen = torch.linspace(0, len(self.moments) - 1, frames).round().long().tolist()
        return torch.stack([*(self.moments[k] for k in chosen), result])


def do(work: SamplingContext) -> str:
    """Samples n images as task=generate does; writes them, trajectory.gif and strip.png."""
    settings, n, schedule = work.settings, work.settings["n"], work.run.denoiser.schedule
    condition, films = work.condition(n), []

    def make(index: Tensor, condition: dict[str, Tensor], progress: bool) -> Samples:
        film = Film(schedule, max(0, SHOWN - int(index[0])))
        samples = work.sampler(
            work.run.denoiser,
            prior(schedule, work.noise(index)),
            seed=settings["seed"],
            index=index,
            condition=condition,
            callback=film if film.most else None,
            progress=progress,
        )
        x = samples.x.clamp(-1, 1)
        films.append((film, x[: film.most]))
        return samples._replace(x=x)

    images, nfe, _ = work.samples(n, make, condition)
    shot = [(film, x) for film, x in films if film.most]
    frames = min([FRAMES, *(len(film.moments) for film, _ in shot)])  # of an adaptive solver batches differ
    moments = torch.cat([film.end(x, frames) for film, x in shot], 1).float() / 127.5 - 1
    write(work.out, images, condition.get("label"), settings["save_images"])
    save_animation(work.out / "trajectory.gif", [_side_by_side(moment[:, 0], moment[:, 1]) for moment in moments])
    some = torch.linspace(0, len(moments) - 1, STRIP[1]).round().long().unique()
    strips = moments[some, : STRIP[0]].transpose(0, 1)  # (images, moments, 2, C, H, W)
    panels = [(f"image {i}, {what}", strip[:, k]) for i, strip in enumerate(strips) for k, what in enumerate(WHAT)]
    save_sheet(work.out / "strip.png", [Panel(caption, strip, len(some)) for caption, strip in panels])
    return work.said(f"{n} images on their way", nfe, "trajectory.gif")


def _side_by_side(left: Tensor, right: Tensor) -> np.ndarray:
    """Two grids with a gap between."""
    a, b = grid(left), grid(right)
    return np.hstack([a, np.full((len(a), 12, 3), 255, np.uint8), b])

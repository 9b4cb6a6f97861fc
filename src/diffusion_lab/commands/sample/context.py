"""What all tasks share: the checkpoint with its sampler and guidance, images in, images out."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_lab import io as files
from diffusion_lab.checkpoint import Make, MakeSamples, Run, load_checkpoint, with_clip
from diffusion_lab.checkpoint.fits import sampler_for
from diffusion_lab.checkpoint.guidance import guided
from diffusion_lab.commands import conditions
from diffusion_lab.data.pictures import class_grid, grid, save_png, to_uint8
from diffusion_lab.device import device
from diffusion_lab.errors import ConfigError
from diffusion_lab.instantiation import instantiate
from diffusion_lab.noise import normal
from diffusion_lab.samplers import Sampler, Samples
from diffusion_lab.schedules import append_dims_like

SHOWN = 400  # images of grid.png at most
CLASSES = 40  # classes at most that get rows of their own there


@dataclass(frozen=True)
class SamplingContext:
    """A task's tools: the options, the run on its device, guided as asked, and the sampler, which fit each other."""

    settings: Mapping[str, Any]
    run: Run
    sampler: Sampler

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "SamplingContext":
        """As the options say. ValueError: a checkpoint, sampler, clipping, guidance or device that cannot be."""
        where = device(settings["device"])
        run = load_checkpoint(settings["ckpt"], settings["weights"], settings["trust"])
        run = with_clip(run, clip=instantiate(settings["clip"], "clip"))
        sampler, run = sampler_for(settings["sampler"], run)
        run = guided(settings.get("guidance"), run)
        sampler.check(run.denoiser)
        return cls(settings, run.to(where), sampler)

    @property
    def out(self) -> Path:
        """The folder that the task writes into."""
        return Path(self.settings["out"] or self.settings["run_dir"])

    def condition(self, n: int, labels: Sequence[int] | None = None) -> dict[str, Tensor]:
        """What is asked of a conditional network for n images; `labels` stand in for labels=cycle."""
        settings = dict(self.settings)
        if labels is not None and settings["labels"] == "cycle" and self.run.num_classes is not None:
            settings["labels"] = list(labels)
        return conditions.asked(settings, self.run, n)

    def batched(self, n: int, make: Make, condition: Mapping[str, Tensor]) -> Tensor:
        """As `Run.batched`, with a bar."""
        return self.run.batched(n, make, self.settings["batch_size"], condition, progress=True)

    def samples(self, n: int, make: MakeSamples, condition: Mapping[str, Tensor]) -> Samples:
        """As `Run.batched_samples`, with a bar."""
        return self.run.batched_samples(n, make, self.settings["batch_size"], condition, progress=True)

    def noise(self, index: Tensor) -> Tensor:
        """The noise that images int64 (B,) begin with."""
        return normal(self.run.shape, seed=self.settings["seed"], index=index)

    def ends(self) -> tuple[float, float]:
        """(α, σ) at t = 1, where latents live."""
        alpha, sigma = self.run.denoiser.schedule.alpha_sigma(torch.ones((), dtype=torch.float64))
        return float(alpha), float(sigma)

    def must_be_deterministic(self) -> None:
        """Raise ValueError unless the sampler runs from data to noise as well."""
        if not self.sampler.deterministic:
            raise ConfigError(
                f"task={self.settings['task']} needs a deterministic sampler, and {named(self.sampler)} as configured is "
                "stochastic: write sampler=ddim variance=fixed_small, or sampler=heun"
            )
        self.sampler.time_grid(self.run.denoiser, 0.0, 1.0)  # refuses a grid that cannot encode

    def encoded(self, images: Tensor, condition: Mapping[str, Tensor]) -> Samples:
        """Encode images (N, C, H, W) along the probability-flow ODE: the states at t = 1."""

        def make(index: Tensor, condition: dict[str, Tensor], progress: bool) -> Samples:
            x0 = images[index.cpu()].to(index.device)
            return self.sampler(
                self.run.denoiser, x0, index=index, condition=condition, start=0.0, stop=1.0, progress=progress
            )

        return self.samples(len(images), make, condition)

    def decoded(self, states: Tensor, condition: Mapping[str, Tensor], start: float = 1.0) -> Samples:
        """Decode states (N, C, H, W) at time `start` to images in [−1, 1]."""

        def make(index: Tensor, condition: dict[str, Tensor], progress: bool) -> Samples:
            x = states[index.cpu()].to(index.device)
            seed = self.settings["seed"]
            samples = self.sampler(
                self.run.denoiser, x, seed=seed, index=index, condition=condition, start=start, progress=progress
            )
            return samples._replace(x=samples.x.clamp(-1, 1))

        return self.samples(len(states), make, condition)

    def said(self, what: str, nfe: int, look: str = "grid.png") -> str:
        """The summary that a task prints at its end; nfe: network evaluations of an image."""
        return (
            f"{what}, {named(self.sampler)}, {nfe} network evaluations each, weights {self.run.weights}, "
            f"step {self.run.step:,}, seed {self.settings['seed']}\nlook at  {self.out / look}"
        )


def named(sampler: Sampler) -> str:
    """A sampler's name, with that of the variance where it has one."""
    variance = getattr(sampler, "variance", None)
    return type(sampler).__name__ + ("" if variance is None else f" with {type(variance).__name__}")


def visible(states: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """States α x_0 + σ ε (B, …) scaled for the eye, in [−1, 1]: over √(α² + σ²), and noise of 2 deviations is black or white."""
    alpha, sigma = (torch.as_tensor(v, dtype=torch.float64) for v in (alpha, sigma))
    size = (alpha.square() + (2 * sigma).square()).sqrt()
    return (states / append_dims_like(size, states)).clamp(-1, 1)


def write(out: Path, images: Tensor, asked: Tensor | None, save_images: bool) -> None:
    """grid.png, samples.npz (arr_0 uint8 N×H×W×C, arr_1 int64 labels) and images/00000.png …; images (N, C, H, W) in [−1, 1]."""
    pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
    write_arrays(out / "samples.npz", *([pixels] if asked is None else [pixels, asked.numpy()]))
    if save_images:
        digits = max(5, len(str(len(pixels) - 1)))
        for i, picture in enumerate(pixels):
            save_png(out / "images" / f"{i:0{digits}d}.png", picture)
    by_class = asked is not None and asked.ndim == 1 and 1 < len(asked.unique()) <= CLASSES
    if asked is not None and by_class:
        save_png(out / "grid.png", class_grid(images, asked, SHOWN))
    else:
        save_png(out / "grid.png", grid(images[:SHOWN]))


def write_arrays(path: Path, *arrays: np.ndarray, **more: Any) -> None:
    """An .npz of arr_0, arr_1, … and what has a name, whole or not at all."""
    packed = io.BytesIO()
    np.savez_compressed(packed, *arrays, **more)
    files.write(path, packed.getvalue())

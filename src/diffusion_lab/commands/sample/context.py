"""The checkpoint, sampler and guidance of a task of sample.py, and functions that write output files."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.checkpoint import Run, load_checkpoint, with_clip
from diffusion_lab.checkpoint.fits import sampler_for
from diffusion_lab.checkpoint.guidance import guided
from diffusion_lab.conditions import requested_condition
from diffusion_lab.data.inputs import read_condition
from diffusion_lab.data.pictures import class_grid, grid, save_png, to_uint8
from diffusion_lab.device import device
from diffusion_lab.errors import ConfigError
from diffusion_lab.generation import Batch, batches, decode, encode, join
from diffusion_lab.instantiation import instantiate
from diffusion_lab.io import write_file
from diffusion_lab.samplers import Sampler, Samples
from diffusion_lab.schedules import append_dims_like

SHOWN = 400  # maximum number of images in grid.png
CLASSES = 40  # maximum number of classes for which grid.png has one row per class


@dataclass(frozen=True)
class SamplingContext:
    """Options, run (with guidance, on its device) and sampler of a task."""

    settings: Mapping[str, Any]
    run: Run
    sampler: Sampler

    @classmethod
    def build(cls, settings: Mapping[str, Any]) -> "SamplingContext":
        """Load the checkpoint, and build clipping, variance, sampler and guidance.

        Raises:
            ConfigError: if the checkpoint is missing, the device is not available, or sampler or guidance cannot be used with
                the checkpoint.
        """
        target = device(settings["device"])
        run = load_checkpoint(settings["ckpt"], settings["weights"], settings["trust"])
        run = with_clip(run, clip=instantiate(settings["clip"], "clip"))
        sampler, run = sampler_for(settings["sampler"], run)
        run = guided(settings.get("guidance"), run)
        sampler.check(run.denoiser)
        return cls(settings, run.to(target), sampler)

    @property
    def out(self) -> Path:
        """Output folder."""
        return Path(self.settings["out"] or self.settings["run_dir"])

    def condition(self, n: int, labels: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Return the requested condition of n images. `labels` are used instead of labels=cycle."""
        condition, requested = self.run.condition, self.settings["labels"]
        if labels is not None and requested == "cycle" and self.run.num_classes is not None:
            requested = list(labels)
        batch = read_condition(self.settings["condition_data"], self.run.shape, condition)
        return requested_condition(condition, self.run.num_classes, n, requested, batch)

    def batches(self, n: int, condition: Mapping[str, Tensor]) -> Iterator[Batch]:
        """Yield batches of the indices and conditions of n images, with a progress bar."""
        return batches(n, self.settings["batch_size"], condition, self.run.device, progress=True)

    def require_deterministic(self) -> None:
        """Raise ConfigError unless the sampler can integrate from data to noise."""
        if not self.sampler.deterministic:
            raise ConfigError(
                f"task={self.settings['task']} needs a deterministic sampler, but {describe(self.sampler)} is stochastic: write "
                "sampler=ddim variance=fixed_small, or sampler=heun"
            )
        self.sampler.time_grid(self.run.denoiser, 0.0, 1.0)  # raises if the grid does not reach t = 1

    def encode(self, images: Tensor, condition: Mapping[str, Tensor]) -> Samples:
        """Integrate images (N, C, H, W) to their states at t = 1 along the probability-flow ODE."""
        denoiser, parts = self.run.denoiser, self.batches(len(images), condition)
        return join(encode(denoiser, self.sampler, _rows(images, batch), batch) for batch in parts)

    def decode(self, states: Tensor, condition: Mapping[str, Tensor], times: Tensor | None = None) -> Samples:
        """Integrate states (N, C, H, W) to images in [−1, 1]: along `times` from times[0], or from t = 1."""
        denoiser, seed, parts = self.run.denoiser, self.settings["seed"], self.batches(len(states), condition)
        return join(
            decode(denoiser, self.sampler, _rows(states, batch), batch, seed=seed, times=times) for batch in parts
        )

    def summary(self, what: str, nfe: int, look: str = "grid.png") -> str:
        """Return the summary that a task prints.

        Args:
            what: description of the result.
            nfe: number of network evaluations per image.
            look: name of the main output file.
        """
        return (
            f"{what}, {describe(self.sampler)}, {nfe} network evaluations each, weights {self.run.weights}, "
            f"step {self.run.step:,}, seed {self.settings['seed']}\nlook at  {self.out / look}"
        )


def _rows(states: Tensor, batch: Batch) -> Tensor:
    """Return the states of a batch on its device."""
    return states[batch.indices.cpu()].to(batch.indices.device)


def describe(sampler: Sampler) -> str:
    """Return the class name of a sampler, and that of its variance if it has one."""
    variance = getattr(sampler, "variance", None)
    return type(sampler).__name__ + ("" if variance is None else f" with {type(variance).__name__}")


def to_visible(states: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """Scale states α x_0 + σ ε (B, …) for display: divide by √(α² + (2σ)²), and clamp to [−1, 1]."""
    alpha, sigma = (torch.as_tensor(v, dtype=torch.float64) for v in (alpha, sigma))
    size = (alpha.square() + (2 * sigma).square()).sqrt()
    return (states / append_dims_like(size, states)).clamp(-1, 1)


def write_samples(out: Path, images: Tensor, labels: Tensor | None, save_images: bool) -> None:
    """Write images (N, C, H, W) in [−1, 1] as grid.png, samples.npz and images/00000.png, ….

    samples.npz contains arr_0, uint8 (N, H, W, C), and arr_1, int64 (N,), if there are labels.
    """
    pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
    write_arrays(out / "samples.npz", *([pixels] if labels is None else [pixels, labels.numpy()]))
    if save_images:
        digits = max(5, len(str(len(pixels) - 1)))
        for i, picture in enumerate(pixels):
            save_png(out / "images" / f"{i:0{digits}d}.png", picture)
    if labels is not None and labels.ndim == 1 and 1 < len(labels.unique()) <= CLASSES:
        save_png(out / "grid.png", class_grid(images, labels, SHOWN))
    else:
        save_png(out / "grid.png", grid(images[:SHOWN]))


def write_arrays(path: Path, *arrays: np.ndarray, **named: Any) -> None:
    """Write an .npz file with the arrays arr_0, arr_1, … and the named arrays."""
    packed = io.BytesIO()
    np.savez_compressed(packed, *arrays, **named)
    write_file(path, packed.getvalue())

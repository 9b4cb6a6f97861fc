"""Draw grids of samples during training."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from diffusion_lab.data.pictures import Panel, grid, save_sheet
from diffusion_lab.denoiser import Clip
from diffusion_lab.errors import SEEDS, ConfigError, check_number, check_numbers
from diffusion_lab.generation import Batch, generate
from diffusion_lab.noise import permutation
from diffusion_lab.samplers import Sampler
from diffusion_lab.training.callbacks.graceful_stop import GracefulStop
from diffusion_lab.training.callbacks.throughput import paused
from diffusion_lab.training.module import DiffusionModule

FIRST = 100  # step of the first grid
DATA = "data.png"


def is_due(step: int, every: int) -> bool:
    """Whether a grid is drawn at a step: 100, 200, 400, … below `every`, and its multiples."""
    doublings, rest = divmod(step, FIRST)
    early = step < every and rest == 0 and doublings.bit_count() == 1
    return step > 0 and (early or step % every == 0)


class Samples(pl.Callback):
    """Write grids of samples, `step_0001000.png`, during training, and log them by every logger of images.

    Grids are drawn at steps 100, 200, 400, …, doubled up to `every`, then every `every` steps, and at the end. `data.png` shows
    training images as the network receives them, after crop and resize, and is written before the first step.

    A file has a grid of samples for the averaged and for the raw weights, from the same noise, and a strip of x̂_0 at several
    steps of the sampler.

    Args:
        folder: of the files.
        sampler: any sampler.
        clip: the clipping of x̂_0.
        every: largest number of training steps between two files, at least 1.
        n: images of each grid and of `data.png`, in [1, 10000].
        seed: of the noise, the same for every file of a run.
        strip: number of images and of steps in the strip, e.g. [4, 10]; null for no strip.
    """

    def __init__(
        self,
        folder: str,
        sampler: Sampler,
        clip: Clip = 1.0,
        every: int = 1000,
        n: int = 64,
        seed: int = 0,
        strip: tuple[int, int] | None = (4, 10),
    ) -> None:
        check_number("callbacks.samples.every", every, "[1, 1000000000]", "at least 1 step", whole=True)
        check_number("callbacks.samples.n", n, "[1, 10000]", "at least 1 image", whole=True)
        check_number("callbacks.samples.seed", seed, SEEDS, whole=True)
        if strip is not None:
            check_numbers("callbacks.samples.strip", strip, "[1, 1000]", "or null for none", whole=True, length=2)
        self.folder, self.sampler, self.clip = Path(folder), sampler, clip
        self.every, self.n, self.seed, self.strip = every, n, seed, strip
        self.path: Path | None = None  # the newest grid
        self._drawn = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: DiffusionModule) -> None:  # type: ignore[override]
        self._drawn = trainer.global_step
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        try:
            path = self._write_data(trainer)
            print(f"look at  {path}: training images after crop and resize", flush=True)
        except OSError as error:  # a full disk; the training continues
            warnings.warn(f"no {DATA}: {error}", stacklevel=2)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: DiffusionModule, *_: Any) -> None:  # type: ignore[override]
        if is_due(trainer.global_step, self.every):
            with paused(trainer):
                self._draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: DiffusionModule) -> None:  # type: ignore[override]
        stopped = any(isinstance(c, GracefulStop) and c.received is not None for c in trainer.callbacks)  # type: ignore[attr-defined]
        if trainer.global_step and not stopped:  # an interrupted run is not sampled
            self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or step == self._drawn or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._drawn = step
        try:
            with module.evaluating():
                panels = self._panels(module)
            self._write(trainer, step, panels)
        except (
            ConfigError,
            torch.OutOfMemoryError,
            OSError,
        ) as error:  # NaN, too many images, a full disk: training goes on
            warnings.warn(f"no samples at step {step}: {error}", stacklevel=2)

    def _write_data(self, trainer: pl.Trainer) -> Path:
        """Write the first images of the training stream, unflipped; return the path."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        examples = data.examples("train")
        images = examples.take(permutation(len(examples), seed=data.seed).numpy()[: self.n])["image"]
        path = self.folder / DATA
        caption = f"{len(images)} of {len(examples):,} training images, {'x'.join(map(str, data.image_size))} pixels"
        save_sheet(path, [Panel(caption, images)])
        self._log(trainer, [("data", np.asarray(Image.open(path)), caption)])
        return path

    def _write(self, trainer: pl.Trainer, step: int, panels: list[Panel]) -> None:
        path = self.folder / f"step_{step:07d}.png"
        save_sheet(path, panels)
        self.path = path
        what = " | ".join(panel.caption for panel in panels if panel.columns is None)
        caption = f"step {step:,}, {type(self.sampler).__name__}, seed {self.seed}: {what}"
        pictures = [("samples", np.asarray(Image.open(path)), caption)]
        pictures += [("trajectory", grid(p.images, p.columns), p.caption) for p in panels if p.columns is not None]
        self._log(trainer, pictures)

    def _log(self, trainer: pl.Trainer, pictures: list[tuple[str, np.ndarray, str]]) -> None:
        """Log (name, pixels, caption) by every logger of images."""
        step = trainer.global_step
        for logger in trainer.loggers:
            for name, picture, caption in pictures:
                if isinstance(logger, WandbLogger):
                    logger.log_image(name, [picture], step=step, caption=[caption])
                elif isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image(name, picture, step, dataformats="HWC")

    def _panels(self, module: DiffusionModule) -> list[Panel]:
        data = module.trainer.datamodule  # type: ignore[attr-defined]
        shape = (data.channels, data.image_size[0], data.image_size[1])
        index = torch.arange(self.n, device=module.device)
        batch = Batch(index, module.requested_condition(index))
        panels: list[Panel] = []
        estimates: list[Tensor] = []
        shown, moments = self.strip or (0, 0)
        for name, denoiser in module.denoisers().items():
            first = not panels
            record = (lambda i, t, x, p: estimates.append(p.x0[:shown].cpu())) if first and shown else None
            with torch.autocast(module.device.type, enabled=False):
                denoiser = replace(denoiser, clip=self.clip)
                samples = generate(denoiser, self.sampler, shape, batch, seed=self.seed, callback=record)
            panels.append(Panel("raw weights" if name == "raw" else f"EMA {name}", samples.x.cpu()))
        if estimates:
            chosen = torch.linspace(0, len(estimates) - 1, min(moments, len(estimates))).round().long().tolist()
            strip = torch.stack([estimates[i] for i in chosen], dim=1).flatten(0, 1).float()
            panels.append(Panel("estimates of x0, from noise to data", strip, columns=len(chosen)))
        if "given" in batch.condition:
            panels.append(Panel("given", batch.condition["given"].float().cpu()))
        return panels

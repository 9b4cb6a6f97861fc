"""One class of every group from outside the package, as a user writes them: found on PYTHONPATH, chosen through --config-dir.

Each marks that it was used in `USED`, so that a test can see that its choice had effect.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torchmetrics import MeanMetric

from diffusion_lab.conditions import Label
from diffusion_lab.data.images import Examples
from diffusion_lab.data.sources import Dataset, Source
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.losses import L2
from diffusion_lab.objectives import PredV
from diffusion_lab.samplers import DDIM
from diffusion_lab.schedules import Cosine
from diffusion_lab.time_samplers import Stratified
from diffusion_lab.training.optim import LRSchedule
from diffusion_lab.variances import FixedSmall
from diffusion_lab.weightings import Native

USED: set[str] = set()


class Schedule(Cosine):
    def __init__(self, steps: int = 100) -> None:
        super().__init__(steps=steps)
        USED.add("schedule")


class Objective(PredV):
    def target(self, *given: Any) -> Tensor:
        USED.add("objective")
        return super().target(*given)


class Weighting(Native):
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, *given: Any) -> Tensor:
        USED.add("weighting")
        return self.factor * super().__call__(*given)


class Loss(L2):
    def elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        USED.add("loss")
        return super().elementwise(output, target)


class TimeSampler(Stratified):
    def __call__(self, *given: Any, **more: Any) -> Tensor:
        USED.add("time_sampler")
        return super().__call__(*given, **more)


class Sampler(DDIM):
    def __init__(self, steps: int = 3) -> None:
        super().__init__(steps)

    def integrate(self, *given: Any, **more: Any) -> Tensor:
        USED.add("sampler")
        return super().integrate(*given, **more)


class Variance(FixedSmall):
    def __init__(self) -> None:
        USED.add("variance")


class Clip:
    def __init__(self, limit: float) -> None:
        self.limit = limit

    def __call__(self, x0: Tensor) -> Tensor:
        USED.add("clip")
        return x0.clamp(-self.limit, self.limit)


def guidance(denoiser: Denoiser, shift: float) -> Denoiser:
    """Append an output transform that adds a constant."""

    def shifted(evaluate: Any, x_t: Tensor, t: Tensor, previous: Tensor | None, condition: dict[str, Tensor]) -> Any:
        USED.add("guidance")
        output = evaluate(x_t, t, previous, **condition)
        return output._replace(y=output.y + shift)

    return replace(denoiser, on_output=(*denoiser.on_output, shifted))


class Condition(Label):
    def __call__(self, batch: Mapping[str, Any], seed: int | None = None) -> dict[str, Tensor]:
        USED.add("condition")
        return super().__call__(batch, seed)


class Network(nn.Module):
    def __init__(self, channels: int, num_classes: int, width: int = 4) -> None:
        super().__init__()
        self.label = nn.Embedding(num_classes + 1, width)
        self.mix = nn.Conv2d(channels + width, channels, 3, padding=1)

    def forward(self, x: Tensor, c: Tensor, label: Tensor) -> Tensor:
        USED.add("model")
        told = self.label(label)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        mixed: Tensor = self.mix(torch.cat([x, told], 1))
        return mixed


class Data(Source):
    def __init__(self, level: int) -> None:
        self.level = level

    def load(self, root: Path, shape: tuple[int, int, int], *, download: bool) -> Dataset:
        USED.add("data")
        labels = np.arange(60) % 3
        images = np.full((60, *shape), self.level, np.uint8)
        images[:, :, :4] = labels[:, None, None, None] * 60
        return Dataset(Examples(images, labels.astype(np.int64)), ("a", "b", "c"))


class Optimizer(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        USED.add("optimizer")
        return super().step(closure)


class LRScheduler(LRSchedule):
    def after(self, progress: float) -> float:
        USED.add("lr_scheduler")
        return 1.0 - 0.5 * progress


class Callback(pl.Callback):
    def __init__(self, note: str) -> None:
        self.note = note

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self.note == "stop" and trainer.global_step == 2:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        USED.add("callbacks")


class Logger(CSVLogger):
    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir, name="outside", version="")

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        USED.add("logger")
        super().log_metrics(metrics, step)


class Brightness(MeanMetric):
    """The mean byte of the samples, scaled."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def update(self, images: Tensor) -> None:
        USED.add("metrics")
        super().update(images * self.scale)

"""Log images per second, peak memory and the remaining hours."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch

from diffusion_lab.training.module import DiffusionModule


class Throughput(pl.Callback):
    """Log `speed/images_per_s` (all processes), `speed/peak_memory_gib` (this process) and `speed/hours_to_go`.

    The rate is measured over the training steps since the previous row and excludes validation and the time that other callbacks
    pass to `pause`. The remaining time includes both. Lightning's `ThroughputMonitor` excludes only validation, synchronizes the
    GPU after every batch, and logs neither memory nor the remaining time.
    """

    def __init__(self) -> None:
        self.images_per_s = float("nan")
        self.hours_to_go = float("nan")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begun, self._begun_step = time.perf_counter(), trainer.global_step
        self._paused = 0.0
        self._row = (self._begun, self._begun_step, 0.0)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pause = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if hasattr(self, "_paused"):
            self._paused += time.perf_counter() - self._pause

    def pause(self, seconds: float) -> None:
        """Exclude `seconds` from the rate. Called by other callbacks with the time that they have used."""
        if hasattr(self, "_paused"):
            self._paused += seconds

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: DiffusionModule, *_: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        then, then_step, then_paused = self._row
        if step == then_step or step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        self._row = (now, step, self._paused)
        seconds = now - then - (self._paused - then_paused)
        self.images_per_s = (step - then_step) * pl_module.batch_size / seconds
        left = max(trainer.max_steps - step, 0)
        self.hours_to_go = left * (now - self._begun) / (step - self._begun_step) / 3600
        pl_module.log_row(
            {
                "speed/images_per_s": self.images_per_s,
                "speed/peak_memory_gib": peak_memory(pl_module.device) / 2**30,
                "speed/hours_to_go": self.hours_to_go,
            }
        )


@contextmanager
def paused(trainer: pl.Trainer) -> Iterator[None]:
    """Exclude the time of the block from the rate of every `Throughput` of the run."""
    begin = time.perf_counter()
    yield
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Throughput):
            callback.pause(time.perf_counter() - begin)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

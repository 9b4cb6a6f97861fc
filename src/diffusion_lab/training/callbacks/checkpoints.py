"""Write checkpoints/last.ckpt and checkpoints/best.ckpt."""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from diffusion_lab.errors import check_number
from diffusion_lab.processes import Interrupted
from diffusion_lab.training.callbacks.graceful_stop import GracefulStop
from diffusion_lab.training.callbacks.loss_logger import LossLogger, weights_are_finite
from diffusion_lab.training.module import DiffusionModule
from diffusion_lab.training.optim import evaluation_weights


class Checkpoints(pl.Callback):
    """Write `last.ckpt` every `every` steps and at the end, `best.ckpt` whenever the monitored value is the lowest so far.

    Files are written before the next batch, when the rows, validation, quality metric and grid of their step are done: whatever
    a kill interrupts, a resumed run repeats. Two exceptions: a run that ends writes at its end, and a stop signal during a
    validation, or before one that is due, writes last.ckpt and ends the run at once; a resumed run begins with that validation.

    Lightning's `ModelCheckpoint` does less in five ways:

    - Its last.ckpt is that of the last interval; this one has the last step, also of an interrupted run.
    - It writes weights that are NaN or Inf or whose loss is, and takes a NaN metric as a candidate for the best.
    - It reads the monitored value at intervals or validations; `consider` takes that of `QualityMonitor` at any step.
    - It writes before other callbacks have finished the step.
    - It does not switch schedule-free optimizers to their evaluation weights.

    Args:
        folder: of the files.
        every: steps between two writes of last.ckpt.
        monitor: the logged value that best.ckpt minimizes; "quality" is that of `QualityMonitor`, whatever its label.

    Attributes:
        best: the lowest value so far.
        latest: the newest value and its step.
    """

    def __init__(self, folder: str, every: int = 1000, monitor: str = "val/loss") -> None:
        check_number("callbacks.checkpoints.every", every, "[1, 1000000000]", "at least 1 step", whole=True)
        self.folder, self.every, self.monitor = Path(folder), every, monitor
        self.best: float | None = None
        self.latest: tuple[float, int] | None = None
        self._saved = -1  # the step of last.ckpt
        self._improved = False  # whether `best` is lower than that of best.ckpt
        self._carried = True  # whether a resumed run keeps the best value

    @property
    def last_path(self) -> Path:
        return self.folder / "last.ckpt"

    @property
    def best_path(self) -> Path:
        return self.folder / "best.ckpt"

    def on_train_start(self, trainer: pl.Trainer, pl_module: DiffusionModule) -> None:  # type: ignore[override]
        self._saved = trainer.global_step if trainer.global_step else -1
        pl_module.between_draws = lambda: self._save_if_stopped(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._write_best(trainer)
        step = trainer.global_step
        if step and step % self.every == 0 and step != self._saved and not _is_diverged(trainer):
            self._write_last(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save_if_stopped(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and self.monitor in trainer.callback_metrics:
            self.consider(trainer, float(trainer.callback_metrics[self.monitor]), self.monitor)

    def consider(self, trainer: pl.Trainer, value: float, *names: str) -> None:
        """Write best.ckpt before the next batch if `monitor` is among `names` and `value` is the lowest so far.

        Must be called by every process, with the same value.

        Args:
            trainer: the trainer.
            value: the value of the metric.
            names: the names of the metric.
        """
        if self.monitor not in names:
            return
        self.latest = (value, trainer.global_step)
        if math.isfinite(value) and (self.best is None or value < self.best):
            self.best, self._improved = value, True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write_best(trainer)
        if trainer.global_step != self._saved and not _is_diverged(trainer):
            self._write_last(trainer)

    def _save_if_stopped(self, trainer: pl.Trainer) -> None:
        """If the run is to stop, save at the start of a validation, or between two parts of it, and end at once."""
        stop = next((c for c in trainer.callbacks if isinstance(c, GracefulStop)), None)  # type: ignore[attr-defined]
        if trainer.sanity_checking or trainer.world_size > 1 or stop is None or stop.received is None:
            return  # several processes would have to agree in every part
        self._write_last(trainer)
        raise Interrupted(stop.received)

    def _write_best(self, trainer: pl.Trainer) -> None:
        if self._improved:
            self._write(trainer, self.best_path)
            self._improved = False

    def _write_last(self, trainer: pl.Trainer) -> None:
        self._write(trainer, self.last_path)
        self._saved = trainer.global_step

    def _write(self, trainer: pl.Trainer, path: Path) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning removes the loggers, too
            return
        if not weights_are_finite(trainer):
            if trainer.is_global_zero:
                warnings.warn(
                    f"{path} is not written: the weights at step {trainer.global_step:,} are NaN or Inf", stacklevel=2
                )
            return
        try:
            with evaluation_weights(trainer.optimizers):
                trainer.save_checkpoint(path)  # on every process, since a sharded strategy gathers here
        except OSError as error:
            raise OSError(
                error.errno, f"could not write {path} ({error.strerror}), the previous file is kept: free disk space"
            ) from error
        trainer.strategy.barrier("checkpoint")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "monitor": self.monitor}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # The command has copied the best.ckpt that the value belongs to, unless the two measure different things.
        self._carried = trainer.strategy.broadcast(self.best_path.is_file())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._carried and state_dict.get("monitor", self.monitor) == self.monitor:
            best = state_dict.get("best")
            self.best = best if isinstance(best, float) else None


def measured_by(config: Mapping[str, Any]) -> list[Any]:
    """Return the parts of a configuration that the value of `monitor` depends on, apart from the weights."""
    callbacks = config["callbacks"]
    monitor = (callbacks.get("checkpoints") or {}).get("monitor", "val/loss")
    if monitor == "val/loss":
        groups = ("data", "condition", "schedule", "objective", "weighting", "loss", "variance")
        return [monitor, config["validation"]["draws"], *(config[group] for group in groups)]
    return [monitor, config["data"], callbacks.get("quality")]


def _is_diverged(trainer: pl.Trainer) -> bool:
    """Whether the training loss is NaN or Inf, in which case the checkpoint must not be overwritten."""
    return any(isinstance(c, LossLogger) and c.diverged is not None for c in trainer.callbacks)  # type: ignore[attr-defined]

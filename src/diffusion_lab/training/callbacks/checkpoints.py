"""Write checkpoints/last.ckpt and checkpoints/best.ckpt."""

import math
import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from diffusion_lab.errors import check_number
from diffusion_lab.training.callbacks.loss_logger import LossLogger
from diffusion_lab.training.optim import evaluation_weights


class Checkpoints(pl.Callback):
    """Write `last.ckpt` every `every` steps and at the end, `best.ckpt` whenever the monitored value is the lowest so far.

    Lightning's `ModelCheckpoint` does less in five ways:

    - Its last.ckpt is that of the last interval; this one has the last step, also of an interrupted run.
    - It writes weights whose loss is NaN or Inf, and takes a NaN metric as a candidate for the best.
    - It reads the monitored value at intervals or validations; `consider` takes that of `QualityMonitor` at any step.
    - It moves files from the system's temporary folder, which may be on another disk. Here a file is written to a temporary
      name in `folder` and renamed, so that an interruption or a full disk keeps the file before.
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
        self._saved_best: float | None = None  # the best value in it

    @property
    def last_path(self) -> Path:
        return self.folder / "last.ckpt"

    @property
    def best_path(self) -> Path:
        return self.folder / "best.ckpt"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved = trainer.global_step if trainer.global_step else -1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step and step % self.every == 0 and step != self._saved and not _is_diverged(trainer):
            self._write_last(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if self.monitor in trainer.callback_metrics:
            self.consider(trainer, float(trainer.callback_metrics[self.monitor]), self.monitor)
        best = self._saved_best != self.best
        plateau = any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs)
        if (
            self._saved == trainer.global_step
            and trainer.global_step
            and (best or plateau)
            and not _is_diverged(trainer)
        ):
            self._write_last(trainer)  # again, since a resumed run does not repeat this validation

    def consider(self, trainer: pl.Trainer, value: float, *names: str) -> None:
        """Write best.ckpt if `monitor` is among `names` and `value` is the lowest so far.

        Every process calls it with the same value.
        """
        if self.monitor not in names:
            return
        self.latest = (value, trainer.global_step)
        if math.isfinite(value) and (self.best is None or value < self.best):
            self.best = value
            self._write(trainer, self.best_path)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step != self._saved and not _is_diverged(trainer):
            self._write_last(trainer)

    def _write_last(self, trainer: pl.Trainer) -> None:
        self._write(trainer, self.last_path)
        self._saved, self._saved_best = trainer.global_step, self.best

    def _write(self, trainer: pl.Trainer, path: Path) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # a dry run, for which Lightning removes loggers, too
            return
        partial = path.with_name(f".{path.name}.partial")
        try:
            with evaluation_weights(trainer.optimizers):
                trainer.save_checkpoint(partial)  # on every process, since a sharded strategy gathers here
            if trainer.is_global_zero:
                os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OSError(
                error.errno, f"could not write {path} ({error.strerror}): the file before is kept; free disk space"
            ) from error
        trainer.strategy.barrier("checkpoint")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "monitor": self.monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("monitor", self.monitor) == self.monitor:  # values of two metrics do not compare
            self.best = state_dict["best"]


def _is_diverged(trainer: pl.Trainer) -> bool:
    """Whether the training loss is NaN or Inf: such weights must not overwrite the checkpoint."""
    return any(isinstance(c, LossLogger) and c.diverged is not None for c in trainer.callbacks)  # type: ignore[attr-defined]

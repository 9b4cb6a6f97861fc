"""Progress bar for training."""

import sys
from typing import Any

import pytorch_lightning as pl

from diffusion_lab.io import progress_bar
from diffusion_lab.training.callbacks.throughput import Throughput


class Progress(pl.Callback):
    """Show optimizer steps out of `trainer.max_steps`, the losses, images per second and the remaining time.

    Lightning's `TQDMProgressBar` and `RichProgressBar` count the batches of an epoch, including the parts of accumulated
    batches. On an endless stream of batches they show neither a total nor the remaining time.
    """

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            total = trainer.max_steps if trainer.max_steps > 0 else None
            # The remaining time is computed from the mean of the run, validations and grids included (smoothing=0).
            options: dict[str, Any] = {"initial": trainer.global_step, "mininterval": _interval(), "miniters": 1}
            options |= {"smoothing": 0, "bar_format": _FORMAT}
            self._bar = progress_bar(total, "training", "step", leave=True, dynamic_ncols=True, **options)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._bar is None:
            return
        self._bar.update(trainer.global_step - self._bar.n)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            shown = {
                key: f"{float(trainer.callback_metrics[name]):.4f}"
                for key, name in _SHOWN
                if name in trainer.callback_metrics
            }
            speed = next((c.images_per_s for c in trainer.callbacks if isinstance(c, Throughput)), None)  # type: ignore[attr-defined]
            self._bar.set_postfix({**shown, **({} if speed is None else {"images/s": f"{speed:,.0f}"})}, refresh=False)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _interval() -> float:
    """Return the seconds between two refreshes, longer in a log file than on a terminal."""
    return 0.2 if sys.stderr.isatty() else 20.0


_FORMAT = (
    "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {elapsed} passed, about {remaining} left{postfix}"
)
_SHOWN = (("loss", "train/loss"), ("val", "val/loss"))

"""Ends a trial of a search whose figure is behind that of the others."""

from collections.abc import Callable

import pytorch_lightning as pl

from diffusion_lab.training.callbacks.checkpoints import Checkpoints
from diffusion_lab.training.module import DiffusionModule


class Pruning(pl.Callback):
    """Reports every new value of the figure that best.ckpt goes by, and stops the run when told to.

    Args:
        report: (value, step) → whether to stop.

    Attributes:
        pruned: whether it did.
    """

    def __init__(self, report: Callable[[float, int], bool]) -> None:
        self.report, self.pruned = report, False
        self._told = -1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: DiffusionModule, *_: object) -> None:  # type: ignore[override]
        kept = next((c for c in trainer.callbacks if isinstance(c, Checkpoints)), None)  # type: ignore[attr-defined]
        if kept is None or kept.latest is None:
            return
        value, step = kept.latest
        if step > self._told and step < trainer.max_steps:  # the last one is the result
            self._told = step
            if self.report(value, step):
                self.pruned = trainer.should_stop = True

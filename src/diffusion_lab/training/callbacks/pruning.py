"""Stop unpromising trials of a hyperparameter search."""

from collections.abc import Callable

import pytorch_lightning as pl

from diffusion_lab.training.callbacks.checkpoints import Checkpoints
from diffusion_lab.training.module import DiffusionModule


class Pruning(pl.Callback):
    """Report every new value of the metric that `Checkpoints` monitors, and stop the run if the search prunes it.

    Args:
        report: called with (value, step); returns whether to stop.

    Attributes:
        pruned: whether the run was stopped.
    """

    def __init__(self, report: Callable[[float, int], bool]) -> None:
        self.report, self.pruned = report, False
        self._reported = -1  # the step of the last report

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: DiffusionModule, *_: object) -> None:  # type: ignore[override]
        kept = next((c for c in trainer.callbacks if isinstance(c, Checkpoints)), None)  # type: ignore[attr-defined]
        if kept is None or kept.latest is None:
            return
        value, step = kept.latest
        # The run returns the value of the last step as its result
        if step > self._reported and step < trainer.max_steps:
            self._reported = step
            if self.report(value, step):
                self.pruned = trainer.should_stop = True

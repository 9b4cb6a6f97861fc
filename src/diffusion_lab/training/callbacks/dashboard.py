"""What W&B is told of a run beside its numbers: which of them count as its result, and the gradients on demand."""

import pytorch_lightning as pl
from pytorch_lightning.loggers import WandbLogger

from diffusion_lab.errors import ConfigError
from diffusion_lab.training.callbacks.quality import Quality
from diffusion_lab.training.module import DiffusionModule


class Dashboard(pl.Callback):
    """Defines the summaries of a W&B run: the lowest validation loss and distance, the last value of all others. Does nothing
    without one.

    Args:
        gradients: steps between two histograms of the gradients of every weight, 0 for none (they take a few per cent of a step).

    Raises:
        ValueError: a negative number of steps.
    """

    def __init__(self, gradients: int = 0) -> None:
        if gradients < 0:
            raise ConfigError(f"logger.wandb.gradients={gradients} must be a number of steps, or 0 for none")
        self.gradients = gradients

    def on_train_start(self, trainer: pl.Trainer, pl_module: DiffusionModule) -> None:  # type: ignore[override]
        quality = [c.label for c in trainer.callbacks if isinstance(c, Quality)]  # type: ignore[attr-defined]
        for logger in trainer.loggers if trainer.is_global_zero else []:
            if isinstance(logger, WandbLogger):
                for name in ("val/loss", *quality):
                    logger.experiment.define_metric(name, step_metric="trainer/global_step", summary="min")
                logger.experiment.define_metric("speed/images_per_s", summary="mean")
                if self.gradients:
                    logger.watch(pl_module.network, log="gradients", log_freq=self.gradients, log_graph=False)

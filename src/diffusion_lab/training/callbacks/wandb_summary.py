"""Define the summary of a W&B run, and log histograms of gradients."""

import pytorch_lightning as pl
from pytorch_lightning.loggers import WandbLogger

from diffusion_lab.training.callbacks.quality_monitor import QualityMonitor
from diffusion_lab.training.module import DiffusionModule


class WandbSummary(pl.Callback):
    """Define the summary of a W&B run, and log histograms of the gradients every `logger.wandb.gradients` steps.

    The summary contains the lowest validation loss and quality metric, the mean rate, and the last value of every other metric.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: DiffusionModule) -> None:  # type: ignore[override]
        quality = [c.label for c in trainer.callbacks if isinstance(c, QualityMonitor)]  # type: ignore[attr-defined]
        for logger in trainer.loggers if trainer.is_global_zero else []:
            if isinstance(logger, WandbLogger):
                for name in ("val/loss", *quality):
                    logger.experiment.define_metric(name, step_metric="trainer/global_step", summary="min")
                logger.experiment.define_metric("speed/images_per_s", summary="mean")
                if steps := getattr(logger, "gradients", 0):
                    logger.watch(pl_module.network, log="gradients", log_freq=steps, log_graph=False)

"""Log the training loss, over all images and for bins of ln SNR."""

import math
import sys
from itertools import pairwise
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import WandbLogger

from diffusion_lab.errors import ConfigError, check_numbers
from diffusion_lab.processes import Interrupted
from diffusion_lab.schedules import to_device
from diffusion_lab.training.module import DiffusionModule
from diffusion_lab.training.sharding import local


class LossLogger(pl.Callback):
    """Log `train/loss`, the mean over all images since the previous row, and the same mean for each bin of ln SNR = 2λ.

    Sums are kept on the device and reduced over the processes once per row. If the loss is NaN or Inf, a warning is printed (and
    sent as a W&B alert); the run stops after two such rows in succession.

    Args:
        edges: increasing edges of the bins of ln SNR, logged as `train/loss_snr/LOW_HIGH`; None for no bins.

    Attributes:
        diverged: the step since which the loss is NaN or Inf; None if the last logged loss is finite.

    Raises:
        ConfigError: if the edges do not increase.
    """

    def __init__(self, edges: list[float] | None = None) -> None:
        if edges is not None:
            check_numbers("callbacks.losses.edges", edges, "[-100, 100]", "or null for none")
        if edges is not None and sorted(set(edges)) != list(edges):
            raise ConfigError(f"callbacks.losses.edges={edges} must increase: write e.g. [-4,0,4]")
        self.edges = edges or []
        bounds = ["-inf", *(f"{edge:g}" for edge in self.edges), "inf"]
        self._bounds = torch.tensor(self.edges, dtype=torch.float64)
        self.diverged: int | None = None
        self._restored: torch.Tensor | None = None
        self._stopped_at = torch.zeros(1, dtype=torch.int64)  # a tensor is shared with spawned processes
        self._reset(torch.device("cpu"))
        self.names = [f"train/loss_snr/{low}_{high}" for low, high in pairwise(bounds)]

    @property
    def nonfinite_since(self) -> int | None:
        """The step since which the loss is NaN or Inf, if the run was stopped because of it; else None."""
        return int(self._stopped_at) or None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reset(pl_module.device)
        if self._restored is not None and self._restored.shape == self._sums.shape and trainer.is_global_zero:
            self._sums += self._restored.to(pl_module.device)
        self._restored = None

    def _reset(self, device: torch.device) -> None:
        # For each bin: Σ weight · loss, Σ weight, number of images. The weight is 1 except with time_sampler=importance.
        self._sums = torch.zeros(3, len(self.edges) + 1, dtype=torch.float64, device=device)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, pl_module: DiffusionModule, outputs: dict[str, torch.Tensor], *_: Any
    ) -> None:
        each, t = outputs["each"].double(), outputs["t"]
        bins = to_device(torch.bucketize(2 * pl_module.schedule.lam(t), self._bounds), each.device)
        one = torch.ones_like(each)
        weight = outputs["weight"].double() if "weight" in outputs else one
        self._sums.index_add_(1, bins, torch.stack([weight * each, weight, one]))
        micro = (trainer.fit_loop.epoch_loop.batch_progress.current.ready) % trainer.accumulate_grad_batches
        if micro or trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        values = self._row(trainer)
        pl_module.log_row(values)
        self._reset(pl_module.device)
        self._check_finite(trainer, values["train/loss"])

    def _row(self, trainer: pl.Trainer) -> dict[str, float]:
        """Return the means over the images of all processes since the last row; {} if there are none."""
        total, weight, count = trainer.strategy.reduce(self._sums.clone(), reduce_op="sum")
        if not float(count.sum()):
            return {}
        values = {"train/loss": float(total.sum() / count.sum())}
        if self.edges:
            # NaN for a bin without images: Lightning would repeat the value of an earlier row where there is none.
            values |= dict(zip(self.names, (total / weight).tolist(), strict=True))
        return values

    def on_train_end(self, trainer: pl.Trainer, pl_module: DiffusionModule) -> None:  # type: ignore[override]
        """Log the steps since the last row; record a loss or weights that are NaN or Inf, however short the run."""
        values = self._row(trainer)
        if values:
            pl_module.log_row_now(values)
        finite = math.isfinite(values.get("train/loss", 0.0))
        if self.diverged is None and not (finite and weights_are_finite(trainer)):
            self.diverged = trainer.global_step
        if self.diverged is not None:
            self._stopped_at.fill_(self.diverged)

    def on_exception(  # type: ignore[override]
        self, trainer: pl.Trainer, pl_module: DiffusionModule, exception: BaseException
    ) -> None:
        """Log the steps since the last row of a run that a signal ends in a validation, after its checkpoint is written."""
        if isinstance(exception, Interrupted) and trainer.world_size == 1 and (values := self._row(trainer)):
            pl_module.log_row_now(values)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the sums since the last row, so that the next row of a resumed run equals that of an uninterrupted one."""
        checkpoint["loss_sums"] = trainer.strategy.reduce(self._sums.clone(), reduce_op="sum").cpu()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._restored = checkpoint.get("loss_sums")

    def _check_finite(self, trainer: pl.Trainer, loss: float) -> None:
        """Warn on a NaN or Inf loss; stop the run after two in succession."""
        if math.isfinite(loss):
            self.diverged = None
        elif self.diverged is not None:
            self._stopped_at.fill_(self.diverged)  # the same value on every process
            trainer.should_stop = True
        else:
            self.diverged = trainer.global_step
            if trainer.is_global_zero:
                text = f"train/loss is {loss} at step {trainer.global_step:,}: lower optimizer.lr=, or resume an earlier ckpt="
                print(f"warning: {text}", file=sys.stderr, flush=True)
                for logger in trainer.loggers:
                    if isinstance(logger, WandbLogger):
                        logger.experiment.alert(title="training loss is NaN or Inf", text=text)


def weights_are_finite(trainer: pl.Trainer) -> bool:
    """Whether all weights and averages are finite, on every process."""
    module: Any = trainer.lightning_module
    networks = (module.network, *module.averages.values())
    weights = [local(parameter.detach()) for network in networks for parameter in network.parameters()]
    finite = all(bool(torch.isfinite(weight).all()) for weight in weights)
    return bool(trainer.strategy.reduce_boolean_decision(finite, all=True))

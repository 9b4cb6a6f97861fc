"""Stop a run between two steps on Ctrl-C, SIGTERM, SIGHUP and SIGUSR1."""

from typing import Any

import pytorch_lightning as pl
import torch

from diffusion_lab.processes import protect_output, stop_signals
from diffusion_lab.training.optim import switch


class GracefulStop(pl.Callback):
    """Stop after the current step on a stop signal (`processes.StopSignals`) of any process.

    `Checkpoints` saves at the stop, and before a validation that is due. No further signal ends a run before that. SLURM sends
    SIGUSR1 before a job's time is over if the job was submitted with `--signal=USR1@120`.
    """

    AGREE = 10  # steps between two reductions over the processes

    def __init__(self) -> None:
        self._received = torch.zeros(1, dtype=torch.int64)  # a tensor, which is shared with spawned processes

    @property
    def received(self) -> int | None:
        """The signal that ended the run, or None; after the stop, the same on all processes."""
        return int(self._received) or stop_signals.received

    def record(self, number: int) -> None:
        """Stop for the signal `number`, e.g. in the process that has spawned the others."""
        self._received.fill_(number)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        protect_output()  # in a process that Lightning has spawned
        stop_signals.install()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        stop_signals.deferred = True
        stop_signals.install()  # again, since Lightning's handler of SIGTERM raises after the next step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready % trainer.accumulate_grad_batches:
            return  # accumulated gradients are not stored in checkpoints
        received = self.received or 0
        if trainer.world_size > 1:
            # All processes must stop at the same step. The reduction makes them wait, so it is rare.
            if trainer.global_step % self.AGREE:
                return
            local = torch.tensor(received, device=pl_module.device)
            received = int(trainer.strategy.reduce(local, reduce_op="max"))
        if received:
            self.record(received)
            trainer.should_stop = True  # `DiffusionModule` stops before the next batch
            if trainer.is_global_zero:
                print("\nstopping after this step", flush=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Switch schedule-free optimizers back to their training weights after an exception in validation."""
        switch(trainer.optimizers, "train")

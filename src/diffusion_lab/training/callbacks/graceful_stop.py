"""Stop a run between two steps on Ctrl-C, SIGTERM and SIGUSR1."""

import signal
import threading
from types import FrameType
from typing import Any

import pytorch_lightning as pl

from diffusion_lab.training.optim import switch


class GracefulStop(pl.Callback):
    """Stop after the current step on the first SIGINT, SIGTERM or SIGUSR1, and at once on the second.

    SLURM sends SIGUSR1 before a job's time is over if the job was submitted with `--signal=USR1@120`.

    Attributes:
        received: the signal that ended the run, or None.
    """

    AGREE = 10  # steps between two reductions over the processes

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():  # Python sets signal handlers there alone
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        print("\nstopping after this step; once more to stop at once", flush=True)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready % trainer.accumulate_grad_batches:
            return  # in the middle of an accumulated batch, whose gradients no checkpoint holds
        stop = self.received is not None
        if (
            trainer.world_size > 1
        ):  # all processes must stop at the same step; the reduction makes them wait, so it is rare
            if trainer.global_step % self.AGREE:
                return
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop:
            trainer.should_stop = True

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Switch schedule-free optimizers back to their training weights after an exception in validation."""
        switch(trainer.optimizers, "train")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

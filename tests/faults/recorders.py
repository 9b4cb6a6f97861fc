"""Callbacks that the runs of these tests name by `_target_=faults.recorders.…`."""

import os

import pytorch_lightning as pl


class SendAt(pl.Callback):
    """Sends a signal to its own process at the end of a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)

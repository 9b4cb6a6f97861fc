"""Callbacks that runs of the tests name by `_target_=training.recorders.…`: they leave what they observe in class attributes."""

import copy
import shutil

import pytorch_lightning as pl
import torch

from diffusion_lab.training.callbacks import Checkpoints


def weights(network):
    return {name: p.detach().clone() for name, p in network.named_parameters()}


class Rates(pl.Callback):
    """The learning rate of each step, and the first gradients and weights of a run."""

    rates: dict
    first: dict

    def on_fit_start(self, trainer, pl_module):
        Rates.rates, Rates.first = {}, {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        Rates.rates.setdefault(trainer.global_step, optimizer.param_groups[0]["lr"])
        if not Rates.first:
            gradients = {name: p.grad.clone() for name, p in pl_module.network.named_parameters()}
            Rates.first = {"gradients": gradients, "before": weights(pl_module.network)}

    def on_train_batch_end(self, trainer, pl_module, *_):
        Rates.first.setdefault("after", weights(pl_module.network))


class Keep(pl.Callback):
    """Keeps the last.ckpt of step 3 as third.ckpt: a run that ended there would have left it."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 3:
            (path,) = (c.last_path for c in trainer.callbacks if isinstance(c, Checkpoints))
            if path.is_file():  # not in the run that continues it
                shutil.copy(path, path.with_name("third.ckpt"))


class Modes(pl.Callback):
    """(hook, step) → whether a schedule-free optimizer is in training mode; the validation fails where `fail` is set."""

    seen: dict
    optimizer: object

    def __init__(self, fail: bool = False):
        self.fail = fail

    def _note(self, trainer, hook):
        Modes.seen[hook, trainer.global_step] = trainer.optimizers[0].param_groups[0]["train_mode"]

    def on_fit_start(self, trainer, *_):
        Modes.seen = {}

    def on_train_batch_start(self, trainer, *_):
        Modes.optimizer = trainer.optimizers[0]
        self._note(trainer, "train")

    def on_validation_batch_start(self, trainer, *_):
        self._note(trainer, "validation")
        if self.fail:
            raise ZeroDivisionError("in the validation")

    def on_save_checkpoint(self, trainer, *_):
        self._note(trainer, "save")


class Watcher(pl.Callback):
    """The weights and the average, in every hook after a step, compared with those recorded right after the update."""

    hooks: list

    def __init__(self, decay: float):
        self.decay = decay

    def on_train_start(self, trainer, pl_module):
        Watcher.hooks = []
        self.average = weights(pl_module.network)
        self.live = weights(pl_module.network)
        self._compare("on_train_start", pl_module)

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.live = weights(pl_module.network)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.live = weights(pl_module.network)
        d = min(self.decay, (1 + trainer.global_step) / (10 + trainer.global_step))
        self.average = {k: d * v + (1 - d) * self.live[k] for k, v in self.average.items()}
        self._compare("on_train_batch_end", pl_module)

    def _compare(self, hook, pl_module):
        (average,) = pl_module.averages.values()
        assert all(torch.equal(p, self.live[k]) for k, p in pl_module.network.named_parameters()), hook
        for k, p in average.named_parameters():
            torch.testing.assert_close(p, self.average[k], rtol=1e-5, atol=1e-7)
        Watcher.hooks.append(hook)

    def on_validation_start(self, trainer, pl_module):
        self._compare("on_validation_start", pl_module)

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self._compare("on_validation_batch_end", pl_module)

    def on_validation_epoch_end(self, trainer, pl_module):
        self._compare("on_validation_epoch_end", pl_module)

    def on_validation_end(self, trainer, pl_module):
        self._compare("on_validation_end", pl_module)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        stored = {k.removeprefix("network."): v for k, v in checkpoint["state_dict"].items()}
        # called by `Checkpoints` before this callback's on_train_batch_end
        assert all(torch.equal(stored[k], p) for k, p in pl_module.network.named_parameters())
        (average,) = pl_module.averages.values()
        assert not all(torch.equal(stored[k], p) for k, p in average.named_parameters())
        Watcher.hooks.append("on_save_checkpoint")

    def on_train_end(self, trainer, pl_module):
        Watcher.final = copy.deepcopy(self.live)
        self._compare("on_train_end", pl_module)

"""Exponential moving averages of the weights."""

import copy
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from torch import nn

from diffusion_lab.errors import ConfigError, check_numbers
from diffusion_lab.training.averages import WeightAverage
from diffusion_lab.training.module import DiffusionModule


class EMA(pl.Callback):
    """Average the weights after every optimizer step: θ̄ ← d θ̄ + (1 − d) θ.

    Parameters are averaged and buffers are copied. The averages are in eval mode, on the device of the trained network.

    Differences from Lightning's WeightAveraging and EMAWeightAveraging: several decays are supported; each average is a separate
    network, so that no weights are swapped; averages are not sharded under FSDP; the decay has a warm-up; a resumed run is exact.

    Args:
        decay: the decay d in [0, 1), or a list of decays. The first average is used for evaluation and sampling.
        warmup: whether to use min(d, (1 + n)/(10 + n)) at update n, which discards the random initialization in short runs.

    Raises:
        ConfigError: if a decay is outside [0, 1), or two decays are equal.
    """

    def __init__(self, decay: float | Sequence[float] = 0.9999, warmup: bool = True) -> None:
        self.decays: Sequence[Any] = list(decay) if isinstance(decay, list | tuple) else [decay]
        check_numbers("callbacks.ema.decay", self.decays, "[0, 1)", "one or several, e.g. 0.9999")
        if len(set(self.decays)) < max(1, len(self.decays)):
            raise ConfigError(f"callbacks.ema.decay={decay}: write one or several different numbers in [0, 1)")
        self.warmup = warmup
        self.updates = 0
        self.networks: dict[float, nn.Module] = {}
        self._averages: list[WeightAverage] = []
        self._restored = False

    def setup(self, trainer: pl.Trainer, pl_module: DiffusionModule, stage: str) -> None:  # type: ignore[override]
        for decay in self.decays:  # before FSDP shards the weights, since the averages are not sharded
            self.networks[decay] = copy.deepcopy(pl_module.network).requires_grad_(False).eval()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: DiffusionModule) -> None:  # type: ignore[override]
        self._averages = []
        for decay, network in self.networks.items():
            network.to(pl_module.device)
            self._averages.append(WeightAverage(network, pl_module.network, decay, self.warmup))
            pl_module.register_average(name(decay), network)

    def on_train_start(self, trainer: pl.Trainer, pl_module: DiffusionModule) -> None:  # type: ignore[override]
        if not self._restored:  # a new run, or one resumed from a checkpoint without averages
            for average in self._averages:
                average.reset()
        self._restored = False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: DiffusionModule, *_: Any) -> None:  # type: ignore[override]
        if trainer.global_step > self.updates:  # false between the parts of an accumulated batch
            self.updates = trainer.global_step
            for average in self._averages:
                average.update(self.updates)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["ema"] = {name(decay): network.state_dict() for decay, network in self.networks.items()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.updates = int(checkpoint["global_step"])
        if states := checkpoint.get("ema"):
            for decay, network in self.networks.items():
                nearest = min(states, key=lambda stored: abs(float(stored) - decay))
                if nearest != name(decay) and trainer.is_global_zero:
                    print(f"callbacks.ema.decay={name(decay)} starts from the stored average {nearest}", flush=True)
                network.load_state_dict(states[nearest])
            self._restored = True


def name(decay: float) -> str:
    """Return the name of an average in checkpoints and captions."""
    return f"{decay:g}"

"""Exponential moving averages of the weights."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import nn

from diffusion_lab.errors import ConfigError
from diffusion_lab.training.module import DiffusionModule
from diffusion_lab.training.sharding import whole


class EMA(pl.Callback):
    """θ̄ ← d θ̄ + (1 − d) θ after every optimiser step, one fused update for each decay.

    Each average is a network of its own, always in eval mode, on the device of the live one. Nothing is ever swapped into the
    live network, so nothing can be left there by an exception, seen by a callback in the wrong order, or trained by mistake.
    Only parameters are averaged; buffers are copied.

    Args:
        decay: d, or several; the first is what is evaluated and what samples show.
        warmup: begin with min(d, (1 + n)/(10 + n)) at the n-th update, so that the random start is forgotten in short runs.

    Raises:
        ValueError: a decay outside [0, 1), or given twice.
    """

    def __init__(self, decay: float | Sequence[float] = 0.9999, warmup: bool = True) -> None:
        self.decays = [decay] if isinstance(decay, (int, float)) else list(decay)
        if not self.decays or len(set(self.decays)) < len(self.decays) or not all(0 <= d < 1 for d in self.decays):
            raise ConfigError(
                f"callbacks.ema.decay={decay} must be one or several different numbers in [0, 1), e.g. 0.9999"
            )
        self.warmup = warmup
        self.updates = 0
        self.networks: dict[float, nn.Module] = {}
        self._pairs: dict[
            float, tuple[_Tensors, _Tensors]
        ] = {}  # listed once: walking the modules costs more than averaging
        self._restored = False

    def setup(self, trainer: pl.Trainer, pl_module: DiffusionModule, stage: str) -> None:  # type: ignore[override]
        for decay in self.decays:  # before the live weights are cut over processes, which averages are not
            self.networks[decay] = copy.deepcopy(pl_module.network).requires_grad_(False).eval()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: DiffusionModule) -> None:  # type: ignore[override]
        for decay, network in self.networks.items():
            network.to(pl_module.device)
            self._pairs[decay] = (_tensors(network), _tensors(pl_module.network))
            pl_module.register_average(name(decay), network)

    def on_train_start(self, trainer: pl.Trainer, pl_module: DiffusionModule) -> None:  # type: ignore[override]
        if not self._restored:  # a run that begins, or one resumed from a checkpoint without averages
            for average, live in self._pairs.values():
                _blend(average, live, 0.0)
        self._restored = False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: DiffusionModule, *_: Any) -> None:  # type: ignore[override]
        if trainer.global_step > self.updates:  # false between the parts of an accumulated batch
            self.updates = trainer.global_step
            self.update()

    def update(self) -> None:
        """One update of every average towards the live network; `updates` counts it already."""
        for decay, (average, live) in self._pairs.items():
            d = min(decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else decay
            _blend(average, live, d)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["ema"] = {name(decay): network.state_dict() for decay, network in self.networks.items()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.updates = int(checkpoint["global_step"])
        if held := checkpoint.get("ema"):
            for decay, network in self.networks.items():
                if name(decay) not in held:
                    raise ConfigError(
                        f"the checkpoint has no average with decay {decay}: write callbacks.ema.decay={', '.join(held)}"
                    )
                network.load_state_dict(held[name(decay)])
            self._restored = True


class _Tensors(NamedTuple):
    parameters: list[torch.Tensor]
    buffers: list[torch.Tensor]


def _tensors(network: nn.Module) -> _Tensors:
    return _Tensors(list(network.parameters()), list(network.buffers()))


@torch.no_grad()
def _blend(average: _Tensors, live: _Tensors, d: float) -> None:
    """θ̄ ← d θ̄ + (1 − d) θ; buffers are copied. d = 0 is a copy, bit for bit."""
    torch._foreach_lerp_(average.parameters, whole(live.parameters), 1 - d)
    if live.buffers:
        torch._foreach_copy_(average.buffers, live.buffers)


def name(decay: float) -> str:
    """The key of an average in a checkpoint, and its caption."""
    return f"{decay:g}"

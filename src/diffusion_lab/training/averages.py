"""Exponential moving average of a network's weights."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from diffusion_lab.errors import check_number
from diffusion_lab.training.sharding import whole

Pair = tuple[list[Tensor], list[Tensor]]  # of the average, of the live network


class WeightAverage:
    """θ̄ ← d θ̄ + (1 − d) θ, one fused operation for all parameters; buffers are copied.

    Args:
        network: θ̄, changed in place.
        live: θ, the network in training. Where FSDP has sharded it, all processes have to call `update` and `reset` together.
        decay: d, in [0, 1).
        warmup: use min(d, (1 + n)/(10 + n)) at update n, so that a short run does not keep its random initialization.
    """

    def __init__(self, network: nn.Module, live: nn.Module, decay: float, warmup: bool = True) -> None:
        check_number("decay", decay, "[0, 1)")
        self.network, self.decay, self.warmup = network, decay, warmup
        # Listed once: walking the modules takes longer than the update.
        self._parameters: Pair = list(network.parameters()), list(live.parameters())
        self._buffers: Pair = list(network.buffers()), list(live.buffers())

    def update(self, n: int) -> None:
        """Average with the live weights; n counts the updates from 1."""
        self._blend(min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay)

    def reset(self) -> None:
        """Copy the live weights, bit for bit."""
        self._blend(0.0)

    @torch.no_grad()
    def _blend(self, decay: float) -> None:
        average, live = self._parameters
        get_ema_multi_avg_fn(decay)(average, whole(live), None)
        if self._buffers[0]:
            torch._foreach_copy_(*self._buffers)

"""Exponential moving average of a network's weights."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from diffusion_lab.errors import check_number
from diffusion_lab.training.sharding import whole

Pair = tuple[list[Tensor], list[Tensor]]  # tensors of the average, and of the trained network


class WeightAverage:
    """θ̄ ← d θ̄ + (1 − d) θ, one fused operation for all parameters; buffers are copied.

    Args:
        network: the average θ̄, modified in place.
        live: the trained network θ. If FSDP has sharded it, all processes must call `update` and `reset`.
        decay: the decay d, in [0, 1).
        warmup: whether to use min(d, (1 + n)/(10 + n)) at update n, which discards the random initialization in short runs.
    """

    def __init__(self, network: nn.Module, live: nn.Module, decay: float, warmup: bool = True) -> None:
        check_number("decay", decay, "[0, 1)")
        self.network, self.decay, self.warmup = network, decay, warmup
        # Listed once: walking the modules takes longer than the update.
        self._parameters: Pair = list(network.parameters()), list(live.parameters())
        self._buffers: Pair = list(network.buffers()), list(live.buffers())

    def update(self, n: int) -> None:
        """Average with the current weights. n is the number of updates, including this one."""
        self._blend(min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay)

    def reset(self) -> None:
        """Set the average to the current weights, exactly."""
        self._blend(0.0)

    @torch.no_grad()
    def _blend(self, decay: float) -> None:
        average, live = self._parameters
        get_ema_multi_avg_fn(decay)(average, whole(live), None)
        if self._buffers[0]:
            torch._foreach_copy_(*self._buffers)

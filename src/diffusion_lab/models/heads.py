"""A second head on a trained network, for what its output does not say: the spread around it."""

import math

import torch
from torch import Tensor, nn

from diffusion_lab.errors import ConfigError
from diffusion_lab.models.base import UNetBase


class VarianceHead(nn.Module):
    """A frozen network and, on its last features, normalisation, SiLU and a 3×3 convolution to C more channels (Bao et al.
    2022, "Estimating the optimal covariance with imperfect mean in diffusion probabilistic models").

    The network stays in eval mode, without dropout, whatever mode the whole is put into. A learned variance of its own is
    left out: the channels beyond C are the head's. It starts from E ε² = 1 for "sn", else from 0.

    Args:
        network: one of this package.
        kind: what the head learns, "sn" or "npr"; the attribute `extra`.

    Raises:
        ValueError: a network that does not show its features.
    """

    def __init__(self, network: nn.Module, kind: str) -> None:
        super().__init__()
        if not isinstance(network, UNetBase):
            raise ConfigError(
                f"variance={kind} reads the last features of UNet or ClassicUNet, which {type(network).__name__} does not show: "
                "write variance=analytic, which needs the output alone"
            )
        self.network = network.requires_grad_(False)
        self.extra, self.self_conditioning = kind, network.self_conditioning
        self.channels, self.num_classes = network.channels, network.num_classes
        width = network.feature_channels
        last = nn.Conv2d(width, network.channels, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, 1.0 if kind == "sn" else 0.0)  # type: ignore[arg-type]
        self.head = nn.Sequential(nn.GroupNorm(math.gcd(32, width), width, eps=1e-6), nn.SiLU(), last)

    def train(self, mode: bool = True) -> "VarianceHead":
        super().train(mode)
        self.network.eval()
        return self

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        label: Tensor | None = None,
        previous: Tensor | None = None,
        given: Tensor | None = None,
    ) -> Tensor:
        """(B, 2C, H, W): the network's output, then the head's. Arguments as for the network."""
        features = self.network.features(x, c, label, previous, given)
        both = torch.cat([self.network.output_head(features)[:, : self.channels], self.head(features)], dim=1)
        return self.network.crop(both, x)

"""A second head on a trained network that predicts a variance."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffusion_lab.errors import ConfigError
from diffusion_lab.models.base import UNetBase


class VarianceHead(nn.Module):
    """A frozen network and a trainable head of C channels: normalization, SiLU and a 3×3 convolution on the last features.

    Bao et al. 2022, "Estimating the optimal covariance with imperfect mean in diffusion probabilistic models". The network stays
    in eval mode, without dropout, also after `train()`. If it has a learned variance, those channels are dropped and the
    head's take their place. The head is initialized to E ε² = 1 for "sn" and to 0 for "npr".

    Args:
        network: a U-Net of this package.
        kind: quantity that the head predicts, "sn" or "npr"; also the attribute `extra`.

    Raises:
        ConfigError: the network is not a `UNetBase`, so its features are not accessible.
    """

    def __init__(self, network: nn.Module, kind: str) -> None:
        super().__init__()
        if not isinstance(network, UNetBase):
            raise ConfigError(
                f"variance={kind} needs the last features of UNet or ClassicUNet, but the network is a {type(network).__name__}: "
                "write variance=analytic, which needs only the output"
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
        x: Float[Tensor, "b c h w"],
        c: Float[Tensor, " b"],
        label: Int[Tensor, " b"] | Float[Tensor, "b num_classes"] | None = None,
        previous: Float[Tensor, "b c h w"] | None = None,
        given: Float[Tensor, "b given_channels h w"] | None = None,
    ) -> Float[Tensor, "b 2*c h w"]:
        """Return the first C channels of the network, then the C channels of the head. Arguments as in `UNetBase.forward`."""
        features = self.network.features(x, c, label, previous, given)
        output = torch.cat([self.network.output_head(features)[:, : self.channels], self.head(features)], dim=1)
        return self.network.crop(output, x)

"""A network of a user's own, named by `_target_`: any module that takes (x, c, **condition)."""

import torch
from torch import Tensor, nn


class Own(nn.Module):
    """One convolution over the image and its time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels + 1, channels, 3, padding=1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        time = (c / 1000)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        return self.mix(torch.cat([x, time], dim=1))


class OwnVariance(Own):
    """The same with a second half for the variance."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.mix = nn.Conv2d(channels + 1, 2 * channels, 3, padding=1)

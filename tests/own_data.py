"""A custom data set with a further tensor per image, and a network with that input: the README's example of a condition."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffusion_lab.data.images import Examples
from diffusion_lab.data.sources import Dataset, Source


class Squares(Source):
    """Bright squares, with the side of each as a fraction of the image."""

    def load(self, root: Path, shape: tuple[int, int, int], *, download: bool) -> Dataset:
        sides = np.arange(60) % shape[1] + 1
        images = np.zeros((60, *shape), np.uint8)
        for image, side in zip(images, sides, strict=True):
            image[:, :side, :side] = 255
        size = (sides / shape[1]).astype(np.float32)
        attributes = np.stack([np.where(size > 0.5, 1, -1), np.where(sides % 2, 1, -1)], 1).astype(np.int8)
        return Dataset(Examples(images, attributes=attributes, more={"size": size}), attribute_names=("big", "odd"))


class SizedNetwork(nn.Module):
    """A convolution conditioned on time and size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels + 2, channels, 3, padding=1)

    def forward(self, x: Tensor, c: Tensor, size: Tensor) -> Tensor:
        condition = torch.stack([c / 1000, size], 1)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        out: Tensor = self.convolution(torch.cat([x, condition], 1))
        return out


class Noise(Source):
    """Twelve labeled images of noise: a substitute for a data set that is not available, with any options."""

    def __init__(self, **options: object) -> None:
        pass

    def load(self, root: Path, shape: tuple[int, int, int], *, download: bool) -> Dataset:
        images = np.random.default_rng(0).integers(0, 256, (12, *shape), np.uint8)
        attributes = np.ones((12, 40), np.int8)
        names = tuple(f"attribute {i}" for i in range(40))
        return Dataset(Examples(images, np.arange(12) % 10, attributes), tuple("0123456789"), names)

"""Classes of a user's own for `metrics`: a feature module for torchmetrics, and metrics with other results than a number."""

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class Pooled(nn.Module):
    """Means over 4×4 pixels of uint8 images (B, C, H, W), in 0 … 1: features (B, C·H·W/16)."""

    def __init__(self, num_features: int = 4) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        return nn.functional.avg_pool2d(images.double() / 255, 4).flatten(1)


class Colored(Pooled):
    """The same of images of three channels alone, by a convolution that refuses others: features (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 1, 1, bias=False)
        nn.init.constant_(self.mix.weight, 1 / 3).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(self.mix(images.float() / 255), 4).flatten(1)


class Extremes(Metric):
    """A mapping: the smallest and the largest byte, and how many images there were; one list without a reduction."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("seen", default=[], dist_reduce_fx=None)

    def update(self, images: Tensor) -> None:
        self.seen.append(images)

    def compute(self) -> dict[str, Tensor]:
        images = torch.cat(self.seen)
        return {"min": images.min(), "max": images.max(), "images": torch.tensor(len(images))}

"""A small convolutional classifier whose penultimate features measure small images where Inception's do not fit."""

from torch import Tensor, nn


class Classifier(nn.Module):
    """Three convolutions, two of them strided, 64 features, logits.

    Args:
        channels: of the images.
        num_classes: how many logits.
        width: channels of the first convolution; the others have twice as many.
        features: size of the penultimate layer.
    """

    def __init__(self, *, channels: int, num_classes: int, width: int = 32, features: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, features),
            nn.SiLU(),
        )
        self.head = nn.Linear(features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [−1, 1], H and W at least 4 → float (B, features)."""
        out: Tensor = self.body(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) → logits (B, num_classes)."""
        out: Tensor = self.head(self.features(x))
        return out

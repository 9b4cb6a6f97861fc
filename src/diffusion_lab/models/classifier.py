"""A small convolutional classifier: its features measure small images where Inception's do not fit, its gradients guide."""

from itertools import pairwise

from torch import Tensor, nn

from diffusion_lab.errors import ConfigError
from diffusion_lab.models.embeddings import Embedding

GROUPS = 8  # of the normalisation


class Classifier(nn.Module):
    """Three normalised convolutions, two of them strided, one hidden layer, logits; told the time, it classifies noisy images.

    The time c is what `schedule.conditioning(t)` gives; it scales and shifts the channels after each normalisation. Where it is
    ln(σ/α)/4 (time="fourier": ve, edm, on which α = 1 and σ grows to 50 and more) the image is divided by √(1 + e^{8c}) =
    √(1 + σ²/α²) first, so that every noise level has images of one size.

    Args:
        channels: of the images.
        num_classes: how many logits.
        width: channels of the first convolution, a multiple of 8; the others have twice as many.
        features: size of the hidden layer.
        time: None for clean images; "sinusoidal" for c in 0 … 1000, "fourier" for c = ln(σ/α)/4.

    Raises:
        ValueError: an unknown kind of time features.
    """

    def __init__(
        self, *, channels: int, num_classes: int, width: int = 32, features: int = 64, time: str | None = None
    ) -> None:
        super().__init__()
        self.time = time
        widths = [channels, width, 2 * width, 2 * width]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, stride=1 if i == 0 else 2)
            for i, (before, after) in enumerate(pairwise(widths))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, after) for after in widths[1:])
        self.activation = nn.SiLU()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.hidden = nn.Linear(8 * width, features)
        self.head = nn.Linear(features, num_classes)
        self.modulation = nn.ModuleList()
        if time is not None:
            self.embedding = Embedding(width, time, nn.SiLU, None)
            for after in widths[1:]:
                layer = nn.Linear(self.embedding.size, 2 * after)
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
                self.modulation.append(layer)

    def features(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """Hidden features.

        Args:
            x: (B, C, H, W), H and W at least 4: images in [−1, 1], or x_t where the classifier is told the time.
            c: float (B,), `schedule.conditioning(t)`, for a classifier that is told the time.

        Returns:
            float (B, features).

        Raises:
            ValueError: a time for a classifier of clean images, or none for one of noisy images.
        """
        if (c is None) != (self.time is None):
            raise ConfigError(
                "this classifier was trained on noisy images: pass c = schedule.conditioning(t)"
                if c is None
                else "this classifier was trained on clean images: train one with noisy=true"
            )
        if c is not None:
            if self.time == "fourier":
                x = x * (1 + (8 * c).exp()).rsqrt().to(x.dtype)[:, None, None, None]
            e = self.embedding(c)
        for i, convolution in enumerate(self.convolutions):
            x = self.norms[i](convolution(x))
            if c is not None:
                scale, shift = self.modulation[i](e)[:, :, None, None].chunk(2, dim=1)
                x = x * (1 + scale) + shift
            x = self.activation(x)
        out: Tensor = self.activation(self.hidden(self.pool(x)))
        return out

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes). Arguments as in `features`."""
        out: Tensor = self.head(self.features(x, c))
        return out

"""A small convolutional classifier, for Fréchet distances of small images and for classifier guidance."""

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from diffusion_lab.errors import ConfigError, check_number
from diffusion_lab.models.embeddings import Embedding
from diffusion_lab.models.options import require_memory

GROUPS = 8  # of the group normalization


class Classifier(nn.Module):
    """Three convolutions with group normalization, two of them strided, a hidden layer and logits.

    With `time` it classifies noisy images: the embedding of c = `schedule.conditioning(t)` scales and shifts the channels after
    each normalization. With time="fourier" (ve, edm: α = 1, σ up to 50 and more) the image is first divided by
    √(1 + e^{8c}) = √(1 + σ²/α²), so that its scale is the same at every noise level.

    Args:
        channels: C of the images.
        num_classes: K, the number of logits.
        width: channels of the first convolution, a multiple of 8 in [8, 65536]; the other convolutions have 2 · width.
        features: size of the hidden layer.
        time: None for clean images; "sinusoidal" for c in [0, 1000], "fourier" for c = ln(σ/α)/4.

    Raises:
        ConfigError: an unknown kind of time features, a number out of range.
    """

    def __init__(
        self, *, channels: int, num_classes: int, width: int = 32, features: int = 64, time: str | None = None
    ) -> None:
        super().__init__()
        check_number("channels", channels, "[1, 1024]", whole=True)
        check_number("num_classes", num_classes, "[1, 1000000]", whole=True)
        check_number("width", width, "[8, 65536]", f"a multiple of {GROUPS}", whole=True)
        check_number("features", features, "[1, 65536]", whole=True)
        if width % GROUPS:
            raise ConfigError(f"width={width}: write a multiple of {GROUPS}")
        require_memory(54 * width**2 + (8 * width + num_classes) * features, f"width={width} features={features}")
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

    def features(
        self, x: Float[Tensor, "b c h w"], c: Float[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b features"]:
        """Return the activations of the hidden layer.

        Args:
            x: images in [−1, 1], or x_t for a classifier of noisy images; H and W at least 4.
            c: `schedule.conditioning(t)`, for a classifier of noisy images.

        Raises:
            ConfigError: c for a classifier of clean images, or no c for a classifier of noisy images.
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

    def forward(
        self, x: Float[Tensor, "b c h w"], c: Float[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b num_classes"]:
        """Return the logits. Arguments as in `features`."""
        out: Tensor = self.head(self.features(x, c))
        return out

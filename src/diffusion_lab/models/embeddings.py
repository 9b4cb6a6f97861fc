"""Embeddings of the time-conditioning input c and of the label."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffusion_lab.errors import ConfigError, check_number
from diffusion_lab.models.options import choose


class Sinusoidal(nn.Module):
    """[sin(ωᵢ c), cos(ωᵢ c)], ωᵢ = 10⁴^(−i/(n/2 − 1)) for i < n/2, designed for c in [0, 1000] (Ho et al. 2020, appendix B).

    It works for c = ln(σ/α)/4, too: EDM's DDPM++ networks use it, and on the digits it trains slightly better than `Fourier`.

    Args:
        features: n, even, in [4, 65536].

    Raises:
        ConfigError: n is odd or out of range.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        check_number("model.width", features, "[4, 65536]", "even, for sinusoidal features", whole=True)
        if features % 2:
            raise ConfigError(f"sinusoidal features need an even width of at least 4, not width={features}")
        self.features = features

    def forward(self, c: Float[Tensor, " b"]) -> Float[Tensor, "b n"]:
        """Return the features of c in [−1, 1], in c's dtype."""
        half = self.features // 2
        # Not a buffer: `network.to(torch.bfloat16)` would round it, and adjacent times would become equal.
        i = torch.arange(half, device=c.device, dtype=c.dtype)
        angle = c[:, None] * torch.exp(i * -math.log(10_000) / (half - 1))
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class Fourier(nn.Module):
    """[sin(2π f c), cos(2π f c)] with fixed f ~ N(0, 16²), designed for c = ln(σ/α)/4 (Song et al. 2021).

    Args:
        features: n, even, in [2, 65536].

    Raises:
        ConfigError: n is odd or out of range.
    """

    frequencies: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        check_number("model.width", features, "[2, 65536]", "even, for Fourier features", whole=True)
        if features % 2:
            raise ConfigError(f"Fourier features need an even, positive width, not width={features}")
        # A separate generator gives the same frequencies in every run; a buffer stores them in the checkpoint.
        noise = torch.randn(features // 2, generator=torch.Generator().manual_seed(0), device="cpu")
        self.register_buffer("frequencies", 16 * noise)

    def forward(self, c: Float[Tensor, " b"]) -> Float[Tensor, "b n"]:
        """Return the features of c in [−1, 1], in c's dtype."""
        angle = c[:, None] * (2 * math.pi * self.frequencies.to(c.dtype))
        return torch.cat([angle.sin(), angle.cos()], dim=1)


FEATURES: dict[str, type[Sinusoidal] | type[Fourier]] = {"sinusoidal": Sinusoidal, "fourier": Fourier}


class Embedding(nn.Module):
    """(c, label) → e = act(W₂ act(W₁ features(c)) + row(label)). The activation is applied once here, not in each layer.

    Args:
        width: n, number of time features; e has size 4n.
        features: kind of time features, `sinusoidal` or `fourier`.
        activation: class of the activation function.
        num_classes: K, or None for a network without labels. The embedding table has K + 1 rows; row K is the null label.

    Raises:
        ConfigError: an unknown kind of features, a width that does not fit them, K below 1.
    """

    def __init__(self, width: int, features: str, activation: type[nn.Module], num_classes: int | None) -> None:
        super().__init__()
        check_number("model.num_classes", num_classes, "[1, 1000000]", "null without labels", whole=True, optional=True)
        check_number("model.width", width, "[2, 65536]", whole=True)
        self.features = choose("time features", features, FEATURES)(width)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, 4 * width)
        self.activation = activation()
        self.num_classes = num_classes
        self.size = 4 * width
        self.label = None if num_classes is None else nn.Embedding(num_classes + 1, self.size)

    def forward(
        self, c: Float[Tensor, " b"], label: Int[Tensor, " b"] | Float[Tensor, "b num_classes"] | None = None
    ) -> Float[Tensor, "b e"]:
        """Return e, (B, 4n), in the dtype of the weights, also under autocast.

        Args:
            c: time-conditioning input; half precision is converted to float32.
            label: class in [0, K], where K is the null label; or weights of the K rows (attributes in [−1, 1], 0: unknown), where
                all zeros are the null label. None: the null label for all images.

        Raises:
            ConfigError: a label for a network without labels, or of a wrong shape.
        """
        # float32, because bfloat16 rounds the times 0…999 to 507 values; the cost is negligible compared with a convolution.
        with torch.autocast(c.device.type, enabled=False):
            c = c.to(torch.promote_types(c.dtype, torch.float32))
            e = self.features(c).to(self.linear1.weight.dtype)
            e = self.linear2(self.activation(self.linear1(e)))
            if self.label is not None:
                e = e + self._row(self.label.weight, label, len(c))
            elif label is not None:
                raise ConfigError("got labels, but the network has none: build it with num_classes")
            out: Tensor = self.activation(e)
            return out

    def _row(self, table: Tensor, label: Tensor | None, batch: int) -> Tensor:
        """Return the embedding of the label, (B, 4n), or (1, 4n) if label is None."""
        classes = len(table) - 1
        if label is None:
            return table[classes:]
        if label.is_floating_point():
            if label.shape != (batch, classes):
                raise ConfigError(f"attributes have shape {tuple(label.shape)}: pass ({batch}, num_classes={classes})")
            unknown = (label == 0).all(dim=1, keepdim=True)
            return torch.cat([label, unknown], dim=1).to(table.dtype) @ table
        if label.shape != (batch,):
            raise ConfigError(f"labels have shape {tuple(label.shape)}: pass one for each of the {batch} images")
        return nn.functional.embedding(label, table)

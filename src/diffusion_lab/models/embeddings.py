"""What a network is told besides the image: the conditioning value c and the label, as one vector an image."""

import math

import torch
from torch import Tensor, nn

from diffusion_lab.errors import ConfigError
from diffusion_lab.models.options import choose


class Sinusoidal(nn.Module):
    """[sin(ωᵢ c), cos(ωᵢ c)], ωᵢ = 10⁴^(−i/(n/2 − 1)) for i < n/2: made for c in 0…1000 (Ho et al. 2020, appendix B).

    It serves c = ln(σ/α)/4 as well: EDM's DDPM++ networks have it, and on the digits it trains a little better than Fourier's.

    Args:
        features: n, even and at least 4.

    Raises:
        ValueError: for any other n.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        if features < 4 or features % 2:
            raise ConfigError(f"sinusoidal features come in pairs: width={features} must be even and at least 4")
        self.features = features

    def forward(self, c: Tensor) -> Tensor:
        """c float (B,) → (B, n) in [−1, 1], in c's dtype."""
        half = self.features // 2
        # Not a buffer: `network.to(torch.bfloat16)` would round it and merge neighbouring times.
        i = torch.arange(half, device=c.device, dtype=c.dtype)
        angle = c[:, None] * torch.exp(i * -math.log(10_000) / (half - 1))
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class Fourier(nn.Module):
    """[sin(2π f c), cos(2π f c)] with fixed f ~ N(0, 16²): made for c = ln(σ/α)/4, which spans a few units (Song et al. 2021).

    Args:
        features: n, even and at least 2.

    Raises:
        ValueError: for any other n.
    """

    frequencies: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        if features < 2 or features % 2:
            raise ConfigError(f"Fourier features come in pairs: width={features} must be even and positive")
        # A generator of its own: the same frequencies in every run, and in a buffer, so that a checkpoint carries them.
        noise = torch.randn(features // 2, generator=torch.Generator().manual_seed(0), device="cpu")
        self.register_buffer("frequencies", 16 * noise)

    def forward(self, c: Tensor) -> Tensor:
        """c float (B,) → (B, n) in [−1, 1], in c's dtype."""
        angle = c[:, None] * (2 * math.pi * self.frequencies.to(c.dtype))
        return torch.cat([angle.sin(), angle.cos()], dim=1)


FEATURES: dict[str, type[Sinusoidal] | type[Fourier]] = {"sinusoidal": Sinusoidal, "fourier": Fourier}


class Embedding(nn.Module):
    """(c, label) → e = act(W₂ act(W₁ features(c)) + row(label)), activated once here for all the layers that read it.

    Args:
        width: number of time features n; e has 4n entries.
        features: `sinusoidal` or `fourier`.
        activation: the class of the non-linearity.
        num_classes: K, or None for a network without labels. The table has K + 1 rows, the last for "no label".

    Raises:
        ValueError: an unknown kind of features, an unfit width or number of classes.
    """

    def __init__(self, width: int, features: str, activation: type[nn.Module], num_classes: int | None) -> None:
        super().__init__()
        if num_classes is not None and num_classes < 1:
            raise ConfigError(f"num_classes={num_classes}: write at least 1, or null for a network without labels")
        self.features = choose("time features", features, FEATURES)(width)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, 4 * width)
        self.activation = activation()
        self.num_classes = num_classes
        self.size = 4 * width
        self.label = None if num_classes is None else nn.Embedding(num_classes + 1, self.size)

    def forward(self, c: Tensor, label: Tensor | None = None) -> Tensor:
        """Embed.

        Args:
            c: float (B,); half precision is widened to float32 first.
            label: int64 (B,) in [0, K], K for "no label"; or float (B, K), a weight for each row (attributes in [−1, 1],
                0 unknown), where a row of zeros is "no label"; None is "no label" for all.

        Returns:
            (B, 4n) in the dtype of the weights, whatever autocast is on.

        Raises:
            ValueError: a label for a network without labels, or of another shape.
        """
        # bfloat16 merges the times 0…999 to 507 values; this costs nothing beside one convolution.
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
        """The label's vector (B, 4n) or, for no label at all, (1, 4n)."""
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

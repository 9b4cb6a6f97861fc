"""The layers of the U-Net. Images are (B, C, H, W) in either memory format; no layer copies them from one to the other."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.errors import ConfigError


@dataclass(frozen=True)
class BlockConfig:
    """What the blocks of one network have in common; the arguments of `UNet`, where they are explained."""

    embedding: int
    groups: int
    dropout: float
    scale_shift: bool
    activation: type[nn.Module]
    heads: int
    head_channels: int | None

    def norm(self, channels: int) -> nn.GroupNorm:
        """Group normalisation of (B, C, …); ValueError if the groups do not divide C."""
        if self.groups < 1 or channels % self.groups:
            fit = [g for g in range(1, channels + 1) if channels % g == 0 and g <= 64]
            raise ConfigError(f"groups={self.groups} does not divide {channels} channels: write one of {fit}")
        return nn.GroupNorm(self.groups, channels, eps=1e-6)

    def heads_of(self, channels: int) -> int:
        """Number of attention heads on C channels; ValueError if they do not divide C."""
        by_size = self.head_channels is not None
        name, divisor = ("head_channels", self.head_channels or 0) if by_size else ("heads", self.heads)
        if divisor < 1 or channels % divisor:
            raise ConfigError(f"{name}={divisor} does not divide {channels} channels: write a divisor of it")
        return channels // divisor if by_size else divisor


class Residual(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), told e between the convolutions: h + We, or (1 + W₁e) norm(h) + W₂e.

    Ho et al. 2020, appendix B ("additive"); Nichol & Dhariwal 2021, section 3 ("scale_shift").
    """

    def __init__(self, inputs: int, outputs: int, style: BlockConfig) -> None:
        super().__init__()
        self.scale_shift = style.scale_shift
        self.activation = style.activation()
        self.norm1 = style.norm(inputs)
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.condition = nn.Linear(style.embedding, 2 * outputs if style.scale_shift else outputs)
        self.norm2 = style.norm(outputs)
        # nn.Dropout(0) still draws and multiplies in training.
        self.dropout = nn.Dropout(style.dropout) if style.dropout else nn.Identity()
        self.last = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x (B, C_in, H, W), e (B, E) → (B, C_out, H, W)."""
        h = self.first(self.activation(self.norm1(x)))
        condition = self.condition(e)[:, :, None, None]
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + condition)
        out: Tensor = self.skip(x) + self.last(self.dropout(self.activation(h)))
        return out


class Attention(nn.Module):
    """x + W softmax(q kᵀ/√d) v over all pixels, q, k and v linear in norm(x)."""

    def __init__(self, channels: int, style: BlockConfig) -> None:
        super().__init__()
        self.heads = style.heads_of(channels)
        self.norm = style.norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.last = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → the same shape."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C): a view if x is channels_last
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, HW, d)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = x + self.last(y).transpose(1, 2).unflatten(2, x.shape[2:])
        return out


class ResAttnBlock(nn.Module):
    """A residual block and, where the resolution asks for it, attention."""

    def __init__(self, inputs: int, outputs: int, style: BlockConfig, *, attention: bool) -> None:
        super().__init__()
        self.residual = Residual(inputs, outputs, style)
        self.attention = Attention(outputs, style) if attention else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x (B, C_in, H, W), e (B, E) → (B, C_out, H, W)."""
        out: Tensor = self.attention(self.residual(x, e))
        return out


class StridedConv(nn.Conv2d):
    """Halves an even (H, W) by a 3×3 convolution of stride 2, padded below and at the right as TensorFlow's SAME does."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → (B, C, H/2, W/2)."""
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class NearestConv(nn.Conv2d):
    """Doubles (H, W) by repeating pixels, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → (B, C, 2H, 2W)."""
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


DOWNSAMPLE: dict[str, Callable[[int], nn.Module]] = {
    "conv": StridedConv,
    "average": lambda _: nn.AvgPool2d(2),
    "max": lambda _: nn.MaxPool2d(2),
}
UPSAMPLE: dict[str, Callable[[int], nn.Module]] = {
    "nearest": NearestConv,
    "transposed": lambda channels: nn.ConvTranspose2d(channels, channels, 2, stride=2),
}

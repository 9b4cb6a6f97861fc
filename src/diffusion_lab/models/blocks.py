"""Layers of the U-Net. Every layer keeps the memory format (contiguous or channels_last) of its input."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_lab.errors import ConfigError, check_number


@dataclass(frozen=True)
class BlockConfig:
    """Configuration shared by the blocks of a network; see the arguments of `UNet`."""

    embedding: int  # E, size of the embedding
    groups: int
    dropout: float
    scale_shift: bool  # conditioning="scale_shift"
    activation: type[nn.Module]
    heads: int
    head_channels: int | None

    def __post_init__(self) -> None:
        check_number("model.width", self.embedding, "[1, 1000000]", whole=True)
        check_number("model.groups", self.groups, "[1, 65536]", whole=True)
        check_number("model.dropout", self.dropout, "[0, 1)")
        check_number("model.heads", self.heads, "[1, 65536]", whole=True)
        check_number("model.head_channels", self.head_channels, "[1, 65536]", whole=True, optional=True)

    def norm(self, channels: int) -> nn.GroupNorm:
        """Return a group normalization of `channels` channels.

        Raises:
            ConfigError: `groups` does not divide `channels`.
        """
        if channels % self.groups:
            divisors = [g for g in range(1, channels + 1) if channels % g == 0 and g <= 64]
            raise ConfigError(f"groups={self.groups} does not divide {channels} channels: write one of {divisors}")
        return nn.GroupNorm(self.groups, channels, eps=1e-6)

    def heads_of(self, channels: int) -> int:
        """Return the number of attention heads for `channels` channels.

        Raises:
            ConfigError: `heads` or `head_channels` does not divide `channels`.
        """
        by_size = self.head_channels is not None
        name, divisor = ("head_channels", self.head_channels or 0) if by_size else ("heads", self.heads)
        if channels % divisor:
            raise ConfigError(f"{name}={divisor} does not divide {channels} channels: write a divisor of {channels}")
        return channels // divisor if by_size else divisor


class Residual(nn.Module):
    """Residual block: x + conv(act(norm(conv(act(norm(x)))))), with the embedding e added between the convolutions.

    e enters as h + We ("additive": Ho et al. 2020, appendix B) or as (1 + W₁e) norm(h) + W₂e ("scale_shift": Nichol & Dhariwal
    2021, section 3).
    """

    def __init__(self, inputs: int, outputs: int, config: BlockConfig) -> None:
        super().__init__()
        self.scale_shift = config.scale_shift
        self.activation = config.activation()
        self.norm1 = config.norm(inputs)
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.condition = nn.Linear(config.embedding, 2 * outputs if config.scale_shift else outputs)
        self.norm2 = config.norm(outputs)
        # nn.Dropout(0) would still draw random numbers in training.
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.last = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Float[Tensor, "b c_in h w"], e: Float[Tensor, "b e"]) -> Float[Tensor, "b c_out h w"]:
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
    """Self-attention over all pixels: x + W softmax(q kᵀ/√d) v, with q, k and v linear in norm(x)."""

    def __init__(self, channels: int, config: BlockConfig) -> None:
        super().__init__()
        self.heads = config.heads_of(channels)
        self.norm = config.norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.last = nn.Linear(channels, channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C): a view if x is channels_last
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, HW, d)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = x + self.last(y).transpose(1, 2).unflatten(2, x.shape[2:])
        return out


class ResAttnBlock(nn.Module):
    """A residual block, followed by self-attention if `attention`."""

    def __init__(self, inputs: int, outputs: int, config: BlockConfig, *, attention: bool) -> None:
        super().__init__()
        self.residual = Residual(inputs, outputs, config)
        self.attention = Attention(outputs, config) if attention else nn.Identity()

    def forward(self, x: Float[Tensor, "b c_in h w"], e: Float[Tensor, "b e"]) -> Float[Tensor, "b c_out h w"]:
        out: Tensor = self.attention(self.residual(x, e))
        return out


class StridedConv(nn.Conv2d):
    """Halve an even (H, W) with a 3×3 convolution of stride 2, padded at the bottom and right as TensorFlow's SAME."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h//2 w//2"]:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class NearestConv(nn.Conv2d):
    """Double (H, W) by nearest-neighbor interpolation, followed by a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 2*h 2*w"]:
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

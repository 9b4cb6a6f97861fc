"""The U-Net of DDPM and its descendants (Ho et al. 2020, appendix B; Nichol & Dhariwal 2021; Song et al. 2021)."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion_lab.errors import ConfigError, check_number, check_numbers, shown
from diffusion_lab.models.base import UNetBase, initialize
from diffusion_lab.models.blocks import DOWNSAMPLE, UPSAMPLE, Attention, BlockConfig, ResAttnBlock, Residual
from diffusion_lab.models.embeddings import Embedding
from diffusion_lab.models.options import ACTIVATIONS, choose, require_memory


class Level(nn.Module):
    """The blocks of one resolution and the resampling to the next; for the last level the identity."""

    def __init__(self, units: list[ResAttnBlock], resample: nn.Module) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)
        self.resample = resample


class UNet(UNetBase):
    """U-Net of residual blocks and self-attention, with a skip connection from every down block to an up block.

    Ho et al. 2020, appendix B; options for Nichol & Dhariwal 2021 and later networks.

    Args:
        channels: C of the images.
        image_size: [H, W] of the training images; other sizes work too. `attention` refers to this size.
        width: channels of the first level, and number of time features; even, in [2, 65536].
        multipliers: channels of each level in units of `width`, each in [1, 64]; their number, at most 12, is that of levels.
        blocks: residual blocks of a down level, in [1, 64]; an up level has one more.
        attention: resolutions with self-attention, by the longer side of the feature map, e.g. [16].
        middle_attention: self-attention between the two middle blocks, at the lowest resolution.
        heads: number of attention heads; ignored with `head_channels`.
        head_channels: channels of an attention head.
        groups: groups of the group normalization; divides the channels of every level.
        dropout: dropout probability in [0, 1) before the second convolution of a block.
        conditioning: `additive` (DDPM) or `scale_shift` (improved DDPM).
        features: time features, `sinusoidal` for c in [0, 1000] or `fourier` for c = ln(σ/α)/4.
        downsample: `conv`, `average` or `max`.
        upsample: `nearest` (followed by a convolution) or `transposed`.
        activation: `silu`, `relu` or `gelu`.
        zero_init: initialize blocks as the identity and the output as zero.
        num_classes: K for a network with labels; label K is the null label.
        self_conditioning: take the previous x̂_0 as an additional input.
        learned_variance: return 2C channels.
        given_channels: channels of conditioning images (`given`), concatenated to x.
        channels_last: keep weights, and thereby feature maps, in channels_last memory format: 5 to 30 % faster on CPUs.
        gradient_checkpointing: recompute each block in the backward pass: less memory, a third more time.

    Raises:
        ConfigError: an unknown option, numbers that do not fit each other, attention at a resolution that does not occur,
            weights that exceed the memory.
    """

    def __init__(
        self,
        *,
        channels: int,
        image_size: Sequence[int],
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (16,),
        middle_attention: bool = True,
        heads: int = 1,
        head_channels: int | None = None,
        groups: int = 32,
        dropout: float = 0.0,
        conditioning: str = "additive",
        features: str = "sinusoidal",
        downsample: str = "conv",
        upsample: str = "nearest",
        activation: str = "silu",
        zero_init: bool = True,
        num_classes: int | None = None,
        self_conditioning: bool = False,
        learned_variance: bool = False,
        given_channels: int = 0,
        channels_last: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        check_number("model.width", width, "[2, 65536]", whole=True)
        check_numbers("model.multipliers", multipliers, "[1, 64]", whole=True)
        check_number("model.blocks", blocks, "[1, 64]", whole=True)
        check_numbers("model.attention", attention, "[1, 65536]", whole=True)
        if not 1 <= len(multipliers) <= 12:
            raise ConfigError(
                f"model.multipliers={shown(list(multipliers))}: write 1 to 12 of them, one for each level"
            )
        # of each residual block down and up: two 3×3 convolutions
        require_memory(
            sum((2 * blocks + 1) * 18 * (width * m) ** 2 for m in multipliers),
            f"model.width={width} model.multipliers={list(multipliers)} model.blocks={blocks}",
        )
        nonlinearity = choose("activation", activation, ACTIVATIONS)
        super().__init__(
            channels=channels,
            image_size=image_size,
            levels=len(multipliers),
            feature_channels=width * multipliers[0],
            embedding=Embedding(width, features, nonlinearity, num_classes),
            self_conditioning=self_conditioning,
            learned_variance=learned_variance,
            given_channels=given_channels,
        )
        config = BlockConfig(
            embedding=self.embedding.size,
            groups=groups,
            dropout=dropout,
            scale_shift=choose("conditioning", conditioning, {"additive": False, "scale_shift": True}),
            activation=nonlinearity,
            heads=heads,
            head_channels=head_channels,
        )
        shrink = choose("downsample", downsample, DOWNSAMPLE)
        grow = choose("upsample", upsample, UPSAMPLE)
        sides = self._sides(attention)
        widths = [width * m for m in multipliers]
        last = len(widths) - 1

        self.input = nn.Conv2d(self.in_channels, width, 3, padding=1)
        skips = [width]  # channels of the skip connections, last in first out
        self.down = nn.ModuleList()
        h = width
        for i, (out, side) in enumerate(zip(widths, sides, strict=True)):
            units = [
                ResAttnBlock(h if j == 0 else out, out, config, attention=side in attention) for j in range(blocks)
            ]
            self.down.append(Level(units, shrink(out) if i < last else nn.Identity()))
            skips += [out] * (blocks + (i < last))
            h = out
        self.middle = nn.ModuleList(
            [ResAttnBlock(h, h, config, attention=middle_attention), ResAttnBlock(h, h, config, attention=False)]
        )
        self.up = nn.ModuleList()
        for i, (out, side) in reversed(list(enumerate(zip(widths, sides, strict=True)))):
            units = []
            for _ in range(blocks + 1):
                units.append(ResAttnBlock(h + skips.pop(), out, config, attention=side in attention))
                h = out
            self.up.append(Level(units, grow(out) if i > 0 else nn.Identity()))
        self.norm = config.norm(self.feature_channels)
        self.activation = nonlinearity()
        self.output = nn.Conv2d(self.feature_channels, self.out_channels, 3, padding=1)

        self.gradient_checkpointing = gradient_checkpointing
        initialize(self, nn.init.xavier_uniform_)  # as in DDPM's code
        if zero_init:
            nn.init.zeros_(self.output.weight)
            for m in self.modules():
                if isinstance(m, Residual | Attention):
                    nn.init.zeros_(m.last.weight)
        if channels_last:
            self.to(memory_format=torch.channels_last)

    def _sides(self, attention: Sequence[int]) -> list[int]:
        """Return the longer side of each level's feature map, the allowed entries of `attention`."""
        longer = max(-(-size // self.side) * self.side for size in self.image_size)
        sides = [longer >> i for i in range(self.side.bit_length())]
        if missing := sorted(set(attention) - set(sides)):
            height, width = self.image_size
            raise ConfigError(
                f"attention={missing} never occurs with {height}×{width} images: write some of {sides}, or []"
            )
        return sides

    def body(
        self, x: Float[Tensor, "b in_channels h w"], e: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b feature_channels h w"]:
        h: Tensor = self.input(x)
        skips = [h]
        for i, level in enumerate(self.down):
            assert isinstance(level, Level)
            for unit in level.units:
                h = self._run(unit, h, e)
                skips.append(h)
            if i < len(self.down) - 1:
                h = level.resample(h)
                skips.append(h)
        for unit in self.middle:
            h = self._run(unit, h, e)
        for level in self.up:
            assert isinstance(level, Level)
            for unit in level.units:
                h = self._run(unit, torch.cat([h, skips.pop()], dim=1), e)
            h = level.resample(h)
        return h

    def output_head(self, features: Float[Tensor, "b feature_channels h w"]) -> Float[Tensor, "b out_channels h w"]:
        out: Tensor = self.output(self.activation(self.norm(features)))
        return out

    def _run(self, unit: nn.Module, h: Tensor, e: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(unit, h, e, use_reentrant=False)
        else:
            out = unit(h, e)
        return out


# Largest image side → options of the network for images up to this side.
PRESETS: dict[int, dict[str, Any]] = {
    12: {"width": 24, "multipliers": [1, 1, 1], "blocks": 1, "attention": [], "groups": 8, "channels_last": True},
    20: {"width": 32, "multipliers": [1, 2, 2], "blocks": 1, "attention": [], "groups": 8, "channels_last": True},
    48: {"width": 64, "multipliers": [1, 2, 2], "blocks": 2, "attention": [], "groups": 16, "dropout": 0.1},
    1 << 30: {
        "width": 64,
        "multipliers": [1, 2, 4, 4],
        "blocks": 2,
        "attention": [],
        "head_channels": 64,
        "dropout": 0.1,
    },
}


class UNetForImageSize(UNet):
    """A U-Net with options chosen by the image size, the default for a data set without a file in conf/model.

    Args:
        channels: C of the images.
        image_size: [H, W]; the longer side selects one of `PRESETS`.
        options: options of `UNet` that replace the preset's.

    Raises:
        ConfigError: as `UNet`.
    """

    def __init__(self, *, channels: int, image_size: Sequence[int], **options: Any) -> None:
        check_numbers("model.image_size", image_size, "[1, 65536]", "[height,width]", whole=True, length=2)
        preset = next(options for side, options in PRESETS.items() if max(image_size) <= side)
        super().__init__(channels=channels, image_size=image_size, **{**preset, **options})

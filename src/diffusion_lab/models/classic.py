"""The original U-Net (Ronneberger et al. 2015, figure 1) with time conditioning."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_lab.errors import check_number
from diffusion_lab.models.base import UNetBase, initialize
from diffusion_lab.models.embeddings import Embedding
from diffusion_lab.models.options import require_memory


class DoubleConv(nn.Module):
    """Two 3×3 convolutions, each followed by a ReLU; a linear projection of e is added after the first convolution."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.condition = nn.Linear(embedding, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.activation = nn.ReLU()

    def forward(self, x: Float[Tensor, "b c_in h w"], e: Float[Tensor, "b e"]) -> Float[Tensor, "b c_out h w"]:
        h = self.activation(self.conv1(x) + self.condition(e)[:, :, None, None])
        out: Tensor = self.activation(self.conv2(h))
        return out


class ClassicUNet(UNetBase):
    """The original U-Net with padded convolutions and time conditioning.

    Contracting path: double convolution, 2×2 max pooling, channels doubled. Expanding path: 2×2 transposed convolution, channels
    halved, skip connection concatenated, double convolution. Last a 1×1 convolution.

    Differences from the paper: convolutions are padded, so the output has the size of the input and skips are not cropped; every
    double convolution takes the embedding of time and label; there is no dropout. As in the paper there is no normalization.

    Args:
        channels: C of the images.
        image_size: [H, W] of the training images; other sizes work too.
        width: channels of the first level (64 in the paper), even, in [4, 65536].
        levels: number of resolutions (5 in the paper), in [1, 12].
        num_classes, self_conditioning, learned_variance, given_channels, channels_last: as in `UNet`.

    Raises:
        ConfigError: a number out of range, an odd width, weights that exceed the memory.
    """

    def __init__(
        self,
        *,
        channels: int,
        image_size: Sequence[int],
        width: int = 64,
        levels: int = 5,
        num_classes: int | None = None,
        self_conditioning: bool = False,
        learned_variance: bool = False,
        given_channels: int = 0,
        channels_last: bool = False,
    ) -> None:
        check_number("model.width", width, "[4, 65536]", whole=True)
        check_number("model.levels", levels, "[1, 12]", "each halves the image", whole=True)
        # of a level with c channels: two convolutions down and two up
        require_memory(
            sum(36 * (width * 2**i) ** 2 for i in range(levels)), f"model.width={width} model.levels={levels}"
        )
        super().__init__(
            channels=channels,
            image_size=image_size,
            levels=levels,
            feature_channels=width,
            embedding=Embedding(width, "sinusoidal", nn.ReLU, num_classes),
            self_conditioning=self_conditioning,
            learned_variance=learned_variance,
            given_channels=given_channels,
        )
        size = self.embedding.size
        widths = [width * 2**i for i in range(levels)]
        self.down = nn.ModuleList(
            DoubleConv(i, o, size) for i, o in zip([self.in_channels, *widths], widths, strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        self.grow = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in widths[-2::-1])
        self.up = nn.ModuleList(DoubleConv(2 * w, w, size) for w in widths[-2::-1])
        self.output = nn.Conv2d(width, self.out_channels, 1)
        # Standard deviation √(2/N), section 3 of the paper: needed for ReLUs without normalization.
        initialize(self, nn.init.kaiming_normal_)
        if channels_last:
            self.to(memory_format=torch.channels_last)

    def body(
        self, x: Float[Tensor, "b in_channels h w"], e: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b feature_channels h w"]:
        h, skips = x, []
        for i, block in enumerate(self.down):
            h = block(h if i == 0 else self.pool(h), e)
            skips.append(h)
        skips.pop()  # the lowest level has no skip connection
        for grow, block in zip(self.grow, self.up, strict=True):
            h = block(torch.cat([skips.pop(), grow(h)], dim=1), e)
        return h

    def output_head(self, features: Float[Tensor, "b feature_channels h w"]) -> Float[Tensor, "b out_channels h w"]:
        out: Tensor = self.output(features)
        return out

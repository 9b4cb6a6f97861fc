"""Base class of the U-Nets: signature, input checks, additional inputs, padding to a multiple of the lowest resolution."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffusion_lab.errors import ConfigError, check_number, check_numbers
from diffusion_lab.models.embeddings import Embedding


class UNetBase(nn.Module):
    """(x, c, label, previous, given) → output, for images of any size. A subclass implements `body` and `output_head`.

    Args:
        channels: C of the images, in [1, 1024].
        image_size: [H, W] of the training images, each in [1, 65536]; other sizes work too.
        levels: number of resolutions; H and W are padded to multiples of 2^(levels − 1).
        feature_channels: output channels of `body`.
        embedding: embeds c and the label.
        self_conditioning: concatenate the previous x̂_0 to the input, C more channels (Chen et al. 2022, "Analog bits").
        learned_variance: return 2C channels, the second half for the variance (Nichol & Dhariwal 2021).
        given_channels: channels of conditioning images, concatenated to the input (Saharia et al. 2021, "SR3");
            in [0, 1024], 0: none.

    Attributes:
        channels, image_size, num_classes, self_conditioning, given_channels: as the arguments.
        in_channels: input channels of `body`: C, or 2C with self-conditioning, plus `given_channels`.
        feature_channels: output channels of `body`, input channels of `output_head`.
        out_channels: output channels of `output_head`, C or 2C.
        extra: kind of the output channels beyond C: "learned" for a variance; None without them.
        side: H and W are padded to multiples of it.

    Raises:
        ConfigError: a number out of range.
    """

    def __init__(
        self,
        *,
        channels: int,
        image_size: Sequence[int],
        levels: int,
        feature_channels: int,
        embedding: Embedding,
        self_conditioning: bool,
        learned_variance: bool,
        given_channels: int = 0,
    ) -> None:
        super().__init__()
        check_number("model.channels", channels, "[1, 1024]", whole=True)
        check_numbers("model.image_size", image_size, "[1, 65536]", "[height,width]", whole=True, length=2)
        check_number("model.given_channels", given_channels, "[0, 1024]", whole=True)
        self.channels = channels
        self.image_size = (image_size[0], image_size[1])
        self.num_classes = embedding.num_classes
        self.self_conditioning = self_conditioning
        self.given_channels = given_channels
        self.in_channels = channels * (1 + self_conditioning) + given_channels
        self.out_channels = channels * (1 + learned_variance)
        self.feature_channels = feature_channels
        self.extra = "learned" if learned_variance else None
        self.side = 2 ** (levels - 1)
        self.embedding = embedding

    def body(
        self, x: Float[Tensor, "b in_channels h w"], e: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b feature_channels h w"]:
        """Return the features before the output head.

        Args:
            x: all input channels; H and W are multiples of `side`.
            e: the embedding of c and the label.
        """
        raise NotImplementedError

    def output_head(self, features: Float[Tensor, "b feature_channels h w"]) -> Float[Tensor, "b out_channels h w"]:
        """Return the output for the features of `body`."""
        raise NotImplementedError

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        c: Float[Tensor, " b"],
        label: Int[Tensor, " b"] | Float[Tensor, "b num_classes"] | None = None,
        previous: Float[Tensor, "b c h w"] | None = None,
        given: Float[Tensor, "b given_channels h w"] | None = None,
    ) -> Float[Tensor, "b out_channels h w"]:
        """Evaluate the network.

        Args:
            x: the scaled noisy images, of any H and W.
            c: time-conditioning input, `conditioning(t)` of the schedule or the objective.
            label: class in [0, num_classes], where num_classes is the null label, or attribute weights (see `Embedding`); None:
                the null label for all images.
            previous: the previous estimate of x_0, for a self-conditioning network; None: zeros.
            given: conditioning images, for a network with `given_channels`.

        Raises:
            ConfigError: a shape, label, `previous` or `given` that does not fit the arguments of the constructor.
        """
        return self.crop(self.output_head(self.features(x, c, label, previous, given)), x)

    def features(
        self,
        x: Float[Tensor, "b c h w"],
        c: Float[Tensor, " b"],
        label: Int[Tensor, " b"] | Float[Tensor, "b num_classes"] | None = None,
        previous: Float[Tensor, "b c h w"] | None = None,
        given: Float[Tensor, "b given_channels h w"] | None = None,
    ) -> Float[Tensor, "b feature_channels padded_h padded_w"]:
        """Return the input of `output_head`, of the padded size. Arguments as in `forward`."""
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ConfigError(
                f"the network takes images of shape (B, {self.channels}, H, W), not {tuple(x.shape)}: "
                "build it with the images' number of channels"
            )
        if c.shape != x.shape[:1]:
            raise ConfigError(f"c has shape {tuple(c.shape)}: pass one value for each of the {len(x)} images")
        if self.self_conditioning:
            x = torch.cat([x, torch.zeros_like(x) if previous is None else previous], dim=1)
        elif previous is not None:
            raise ConfigError("got `previous`, but the network does not take it: build it with self_conditioning=true")
        if (0 if given is None else given.shape[1]) != self.given_channels:
            channels = 0 if given is None else given.shape[1]
            raise ConfigError(
                f"`given` has {channels} channels, but the network takes {self.given_channels}: "
                f"build it with given_channels={channels}"
            )
        if given is not None:
            x = torch.cat([x, given.to(x.dtype)], dim=1)
        e = self.embedding(c, label)
        down, right, top, left = self._padding(x)
        # Zeros, as in the convolutions: reflection fails for small sizes and repeats noise.
        return self.body(F.pad(x, (left, right - left, top, down - top)) if down or right else x, e)

    def crop(
        self, y: Float[Tensor, "b out_channels padded_h padded_w"], x: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b out_channels h w"]:
        """Remove the padding of y, the output for images x."""
        down, right, top, left = self._padding(x)
        return y[:, :, top : top + x.shape[2], left : left + x.shape[3]] if down or right else y

    def _padding(self, x: Tensor) -> tuple[int, int, int, int]:
        """Return the rows and columns to add for multiples of `side`, and how many of them go to the top and left."""
        down, right = -x.shape[2] % self.side, -x.shape[3] % self.side
        return down, right, down // 2, right // 2


def initialize(network: nn.Module, weight: Callable[[Tensor], Tensor]) -> None:
    """Initialize every linear and convolutional layer in place: its weight with `weight`, its bias with zeros."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            weight(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

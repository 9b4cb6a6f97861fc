"""What every U-Net of this package shares: its signature, its checks, its second inputs and the padding to whole levels."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.errors import ConfigError
from diffusion_lab.models.embeddings import Embedding


class UNetBase(nn.Module):
    """(x, c, label, previous, given) → output, for images of any size; a subclass gives `body`, which sees whole
    multiples only, and `readout`.

    Args:
        channels: C of the images.
        image_size: [H, W] the network is meant for; other sizes work too.
        levels: number of resolutions; H and W are padded to multiples of 2^(levels − 1).
        feature_channels: of what `body` gives.
        embedding: of c and the label.
        self_conditioning: take the previous x̂_0 as C more input channels (Chen et al. 2022, "Analog bits").
        learned_variance: give 2C channels, the second half for the variance (Nichol & Dhariwal 2021).
        given_channels: of images that are given as a condition and read beside x (Saharia et al. 2021, "SR3"); 0 for none.

    Attributes:
        channels, image_size, num_classes, self_conditioning, given_channels: as stated.
        in_channels: what `body` takes, C or with self-conditioning 2C, and `given_channels` more.
        out_channels: what `readout` gives, C or 2C.
        feature_channels: of the last features, between the two.
        extra: what the channels beyond C are: "learned", a variance, or None where there are none.
        side: multiple to which H and W are padded.

    Raises:
        ValueError: sizes that are not positive.
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
        if channels < 1 or len(image_size) != 2 or min(image_size) < 1:
            raise ConfigError(f"channels={channels}, image_size={list(image_size)}: write a positive count and [H, W]")
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

    def body(self, x: Tensor, e: Tensor) -> Tensor:
        """The last features: x (B, in_channels, H, W), H and W multiples of `side`; e (B, E) → (B, feature_channels, H, W)."""
        raise NotImplementedError

    def output_head(self, features: Tensor) -> Tensor:
        """(B, feature_channels, H, W) → (B, out_channels, H, W)."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        label: Tensor | None = None,
        previous: Tensor | None = None,
        given: Tensor | None = None,
    ) -> Tensor:
        """Evaluate the network.

        Args:
            x: float (B, C, H, W), any H and W.
            c: float (B,), what the schedule's or the objective's `conditioning` says of the time.
            label: int64 (B,) in [0, num_classes], the last meaning "none"; None means none for all. See `Embedding`.
            previous: the last estimate of x_0, of x's shape, for a self-conditioned network; None is zeros.
            given: float (B, given_channels, H, W), images that it is told, for a network that reads some.

        Returns:
            float (B, out_channels, H, W).

        Raises:
            ValueError: a shape, label, `previous` or `given` that the network was not built for.
        """
        return self.crop(self.output_head(self.features(x, c, label, previous, given)), x)

    def features(
        self,
        x: Tensor,
        c: Tensor,
        label: Tensor | None = None,
        previous: Tensor | None = None,
        given: Tensor | None = None,
    ) -> Tensor:
        """What the output is read from, (B, feature_channels, H', W'), padded to whole levels. Arguments as for a call."""
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ConfigError(
                f"the network takes images of shape (B, {self.channels}, H, W), got {tuple(x.shape)}: "
                "build it with their number of channels"
            )
        if c.shape != x.shape[:1]:
            raise ConfigError(f"c has shape {tuple(c.shape)}: pass one value for each of the {len(x)} images")
        if self.self_conditioning:
            x = torch.cat([x, torch.zeros_like(x) if previous is None else previous], dim=1)
        elif previous is not None:
            raise ConfigError("got `previous`, but the network does not read it: build it with self_conditioning=true")
        if (0 if given is None else given.shape[1]) != self.given_channels:
            has = "none" if given is None else f"{given.shape[1]} channels"
            raise ConfigError(
                f"`given` has {has}, and the network reads {self.given_channels}: set given_channels to fit"
            )
        if given is not None:
            x = torch.cat([x, given.to(x.dtype)], dim=1)
        e = self.embedding(c, label)
        down, right, top, left = self._padding(x)
        # Zeros, as the convolutions pad: unlike reflection they fit every size, and they repeat none of the noise.
        return self.body(F.pad(x, (left, right - left, top, down - top)) if down or right else x, e)

    def crop(self, y: Tensor, x: Tensor) -> Tensor:
        """y, of the padded size, at the size of the images x."""
        down, right, top, left = self._padding(x)
        return y[:, :, top : top + x.shape[2], left : left + x.shape[3]] if down or right else y

    def _padding(self, x: Tensor) -> tuple[int, int, int, int]:
        """Rows and columns that are missing to whole multiples of `side`, and how many of them come first."""
        down, right = -x.shape[2] % self.side, -x.shape[3] % self.side
        return down, right, down // 2, right // 2


def initialise(network: nn.Module, weight: Callable[[Tensor], Tensor]) -> None:
    """Give every linear and convolutional layer weights by `weight`, in place, and zero biases."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            weight(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

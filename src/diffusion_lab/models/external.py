"""Adapter for networks of other libraries.

A network is any `torch.nn.Module` that is called as `(x, c, **condition)`, with x (B, C, H, W) and c (B,), and returns C or 2C
channels: write its class as `_target_` and its arguments into a file in `conf/model`. `External` adapts networks that take the
label by another keyword or wrap their result, such as diffusers' `UNet2DModel`.
"""

from jaxtyping import Float, Int
from torch import Tensor, nn

from diffusion_lab.errors import ConfigError


class External(nn.Module):
    """Adapt another library's network to the signature (x, c, label).

    Args:
        module: called as `module(x, c)` or, with a label, as `module(x, c, **{label: …})`.
        label: keyword of the label, e.g. `class_labels` in diffusers; None for a network without labels.
    """

    self_conditioning = False

    def __init__(self, module: nn.Module, label: str | None = None) -> None:
        super().__init__()
        self.module = module
        self.label = label

    def forward(
        self, x: Float[Tensor, "b c h w"], c: Float[Tensor, " b"], label: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b out_channels h w"]:
        """Return the result of `module`, or the attribute `sample` of the result.

        Raises:
            ConfigError: if a label is passed but the network has no keyword for it, or the result is neither a tensor nor has a
                tensor `sample`.
        """
        if label is None:
            result = self.module(x, c)
        elif self.label is None:
            raise ConfigError(
                "got labels, but `label` is None: write the network's keyword for them, e.g. label=class_labels"
            )
        else:
            result = self.module(x, c, **{self.label: label})
        out = result if isinstance(result, Tensor) else getattr(result, "sample", None)
        if not isinstance(out, Tensor):
            raise ConfigError(
                f"{type(self.module).__name__} returned {type(result).__name__}: wrap it to return a tensor"
            )
        return out

"""Networks of other libraries.

A network is any `torch.nn.Module` that is called as `(x, c, **condition)`, x (B, C, H, W) and c (B,), and returns C or 2C
channels: name its class by `_target_` in a file of `conf/model`, with its arguments. `External` adapts those whose label has
another keyword or that wrap their result, such as diffusers' `UNet2DModel`.
"""

from torch import Tensor, nn

from diffusion_lab.errors import ConfigError


class External(nn.Module):
    """Gives another library's network the signature of this one's.

    Args:
        module: called as `module(x, c)` or, with a label, `module(x, c, **{label: …})`.
        label: the keyword of the label, e.g. `class_labels` in diffusers; None for a network without labels.
    """

    self_conditioning = False

    def __init__(self, module: nn.Module, label: str | None = None) -> None:
        super().__init__()
        self.module = module
        self.label = label

    def forward(self, x: Tensor, c: Tensor, label: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), c (B,) → the result itself, or its field `sample`.

        Raises:
            ValueError: a label for a network without labels; a result that is neither.
        """
        if label is None:
            result = self.module(x, c)
        elif self.label is None:
            raise ConfigError("got labels, but this external network has none: name its keyword by `label`")
        else:
            result = self.module(x, c, **{self.label: label})
        out = result if isinstance(result, Tensor) else getattr(result, "sample", None)
        if not isinstance(out, Tensor):
            raise ConfigError(
                f"{type(self.module).__name__} returned {type(result).__name__}: wrap it to return a tensor"
            )
        return out

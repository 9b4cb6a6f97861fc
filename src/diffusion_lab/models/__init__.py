"""Networks: `(x, c, label, previous) → output`. They import nothing of the other rooms and know no schedule or objective.

| class | what it is |
|---|---|
| `UNet` | DDPM's network and its descendants, by options |
| `UNetForImageSize` | the same, its options chosen by the image size |
| `ClassicUNet` | the original contracting and expanding path |
| `VarianceHead` | a frozen network with C more channels, for its variance |
| `External` | a network of another library |

Any other `torch.nn.Module` of that signature will do: see `external`.
"""

from diffusion_lab.models.classic import ClassicUNet
from diffusion_lab.models.external import External
from diffusion_lab.models.heads import VarianceHead
from diffusion_lab.models.unet import UNet, UNetForImageSize

__all__ = [
    "ClassicUNet",
    "External",
    "UNet",
    "UNetForImageSize",
    "VarianceHead",
]

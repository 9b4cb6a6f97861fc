"""Networks: `(x, c, label, previous) → output`. They do not depend on a schedule or an objective, and import only errors.py.

| class | description |
|---|---|
| `UNet` | the U-Net of DDPM, improved DDPM and their successors, selected by options |
| `UNetForImageSize` | `UNet` with options chosen by the image size |
| `ClassicUNet` | the original U-Net (Ronneberger et al. 2015) |
| `VarianceHead` | a frozen network with a second head of C channels for the variance |
| `External` | adapter for a network of another library |

Any other `torch.nn.Module` with this signature works as well: see external.py.
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

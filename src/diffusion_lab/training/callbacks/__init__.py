"""Callbacks, one file each."""

from diffusion_lab.training.callbacks.checkpoints import Checkpoints
from diffusion_lab.training.callbacks.dashboard import Dashboard
from diffusion_lab.training.callbacks.ema import EMA
from diffusion_lab.training.callbacks.interrupt import Interrupt
from diffusion_lab.training.callbacks.losses import Losses
from diffusion_lab.training.callbacks.progress import Progress
from diffusion_lab.training.callbacks.pruning import Pruning
from diffusion_lab.training.callbacks.quality import Quality
from diffusion_lab.training.callbacks.samples import Samples
from diffusion_lab.training.callbacks.throughput import Throughput

__all__ = [
    "EMA",
    "Checkpoints",
    "Dashboard",
    "Interrupt",
    "Losses",
    "Progress",
    "Pruning",
    "Quality",
    "Samples",
    "Throughput",
]

"""Callbacks for training."""

from diffusion_lab.training.callbacks.checkpoints import Checkpoints
from diffusion_lab.training.callbacks.ema import EMA
from diffusion_lab.training.callbacks.graceful_stop import GracefulStop
from diffusion_lab.training.callbacks.loss_logger import LossLogger
from diffusion_lab.training.callbacks.progress import Progress
from diffusion_lab.training.callbacks.pruning import Pruning
from diffusion_lab.training.callbacks.quality_monitor import QualityMonitor
from diffusion_lab.training.callbacks.samples import Samples
from diffusion_lab.training.callbacks.throughput import Throughput
from diffusion_lab.training.callbacks.wandb_summary import WandbSummary

__all__ = [
    "EMA",
    "Checkpoints",
    "GracefulStop",
    "LossLogger",
    "Progress",
    "Pruning",
    "QualityMonitor",
    "Samples",
    "Throughput",
    "WandbSummary",
]

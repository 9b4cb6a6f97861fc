"""Plain training loop for small networks: the classifier of a data set, a variance head."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from diffusion_lab.errors import ConfigError
from diffusion_lab.io import progress as show_progress
from diffusion_lab.training.averages import WeightAverage

ROW = 100  # steps that a row of losses averages


def train_steps(
    loss_of_step: Callable[[int], Tensor],
    steps: int,
    optimizer: Optimizer,
    *,
    name: str,
    remedy: str,
    scheduler: LRScheduler | None = None,
    average: WeightAverage | None = None,
    progress: bool = True,
) -> list[tuple[int, float]]:
    """Minimize a loss by a number of optimizer steps.

    Args:
        loss_of_step: step, from 0, → loss, a 0-d tensor.
        steps: number of steps.
        optimizer: of the parameters to train.
        name: of the trained network, for the progress bar and the error message.
        remedy: an imperative for the error message.
        scheduler: of the learning rate, stepped after every optimizer step.
        average: updated after every optimizer step.
        progress: show a progress bar.

    Returns:
        (step, mean loss since the previous row), every 100 steps and at the end.

    Raises:
        ConfigError: the mean loss of a row is NaN or Inf.
    """
    rows: list[tuple[int, float]] = []
    total: Tensor | float = 0.0
    for step in show_progress(range(steps), f"training the {name}", "step", progress):
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if average is not None:
            average.update(step + 1)
        total += loss.detach().to(torch.float64)  # stays on its device: no synchronization but at a row
        if (step + 1) % ROW == 0 or step == steps - 1:
            mean = float(total) / (step % ROW + 1)
            if not math.isfinite(mean):
                raise ConfigError(f"the training loss of the {name} is {mean} at step {step + 1}: {remedy}")
            rows.append((step + 1, mean))
            total = 0.0
    return rows

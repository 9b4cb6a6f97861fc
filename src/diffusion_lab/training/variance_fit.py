"""Fit the optimal variance of a trained network: second moments of ε̂ in one pass, or a second head."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.conditions import Condition
from diffusion_lab.data.images import Examples
from diffusion_lab.data.stream import BatchStream
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import ConfigError, check_number
from diffusion_lab.io import progress as show_progress
from diffusion_lab.losses import head_loss
from diffusion_lab.models import VarianceHead
from diffusion_lab.noise import Stream, normal, permutation
from diffusion_lab.schedules import Schedule
from diffusion_lab.time_samplers import TimeSampler
from diffusion_lab.training.averages import WeightAverage
from diffusion_lab.training.draws import training_draw
from diffusion_lab.training.loop import train_steps

CURVE_NODES = 1000  # of a continuous curve


def fit_times(schedule: Schedule, count: int | None = None) -> Tensor:
    """Return evenly spaced times for the moments, ending at 1: nodes of a table, or points of a curve; float64 (N,).

    Args:
        schedule: the curve.
        count: N; None uses all nodes of a table, or 1000 points of a continuous curve.

    Raises:
        ConfigError: fewer than 1, or more than the table has nodes.
    """
    available = schedule.steps or CURVE_NODES
    interval = f"[1, {schedule.steps or 100_000}]"
    check_number("nodes", count, interval, "nodes=null (count) for all nodes", whole=True, optional=True)
    n = available if count is None else count
    times = torch.arange(1, n + 1, dtype=torch.float64) / n
    return (times * available).round() / available if schedule.steps is not None else times


@torch.no_grad()
def second_moments(
    denoiser: Denoiser,
    examples: Examples,
    times: Tensor,
    n: int,
    condition: Condition,
    *,
    seed: int = 0,
    batch_size: int = 256,
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
) -> Tensor:
    """Return Σ mean(ε̂² − ε²) over n images for each time, and their number: float64 (2, N) on the CPU, this process's share.

    The sum of all processes' shares is the input of `moments`. Evaluation k has time k mod N, the k-th image of keyed epochs
    laid end to end, and noise keyed by k, so that the sum does not depend on the number of processes.

    E mean(ε²) = 1 is known, so the sample's deviation from it is subtracted: near t = 1, where ε̂ ≈ ε, it is nearly all of the
    variance of the estimate.

    Args:
        denoiser: in eval mode; its clipping is not applied.
        examples: images, with labels if the condition needs them.
        times: float64 (N,).
        n: images for each time.
        condition: the network's keyword arguments; labels are not dropped.
        seed: random seed of noise and image order.
        batch_size: evaluations at a time; the result does not depend on it.
        rank, world: this process takes the evaluations rank, rank + world, …
        progress: show a progress bar.
    """
    denoiser = replace(denoiser, clip=None)
    device = next((p.device for p in denoiser.network.parameters()), torch.device("cpu"))  # type: ignore[attr-defined]
    sums = torch.zeros(2, len(times), dtype=torch.float64)
    keys = torch.arange(rank, n * len(times), world)
    image_order = _ImageOrder(len(examples), seed)
    for k in show_progress(keys.split(batch_size), "second moments", "batch", progress):
        batch = examples.take(image_order(k))
        x0 = batch["image"].to(device, torch.float64)
        noise = normal(tuple(x0.shape[1:]), seed=seed, index=k.to(device), stream=Stream.VARIANCE, dtype=torch.float64)
        node = k % len(times)
        t, arguments = times[node], {name: v.to(device) for name, v in condition(batch).items()}
        x_t = denoiser.schedule.corrupt(x0, noise, t)
        previous = denoiser(x_t, t, **arguments).x0 if denoiser.self_conditioning else None
        predicted = denoiser(x_t, t, previous, **arguments).noise
        difference = (predicted.square() - noise.square()).flatten(1).mean(1).cpu()
        sums.index_add_(1, node, torch.stack([difference, torch.ones_like(difference)]))
    return sums


def moments(sums: Tensor) -> Tensor:
    """Return E mean(ε̂²), float64 (N,), from the sums (2, N) of all processes.

    Raises:
        ConfigError: NaN or Inf.
    """
    value = 1 + sums[0] / sums[1]
    if not bool(value.isfinite().all()):
        raise ConfigError(
            "the network output is NaN or Inf: fit in float32, or take a checkpoint from before the training diverged"
        )
    return value


class _ImageOrder:
    """Return the index of the k-th image of the concatenated shuffled epochs."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._orders: dict[int, Tensor] = {}  # of at most two epochs

    def __call__(self, k: Tensor) -> Any:
        epoch, position = k // self.count, k % self.count
        index = torch.empty_like(k)
        for e in epoch.unique().tolist():
            if e not in self._orders:
                self._orders = {**dict(list(self._orders.items())[-1:]), e: self._order(e)}
            index[epoch == e] = self._orders[e][position[epoch == e]]
        return index.numpy()

    def _order(self, epoch: int) -> Tensor:
        return permutation(self.count, seed=self.seed, draw=epoch + 1, stream=Stream.VARIANCE)


def train_head(
    denoiser: Denoiser,
    kind: str,
    stream: BatchStream,
    time_sampler: TimeSampler,
    condition: Condition,
    *,
    steps: int,
    lr: float = 1e-4,
    decay: float | None = 0.999,
    seed: int = 0,
    progress: bool = False,
) -> list[tuple[int, float]]:
    """Train the head of `denoiser.network`, a `VarianceHead`, by Adam. With `decay`, the averaged weights are loaded at the end.

    t, ε and label drops are keyed as in training.

    Args:
        denoiser: the denoiser, without clipping.
        kind: "sn" or "npr".
        stream: training batches.
        time_sampler: distribution of t, as in the training of the network.
        condition: computes the keyword arguments of the network from a batch.
        steps: number of steps.
        lr: learning rate.
        decay: decay d of the average of the head, with the warm-up min(d, (1 + n)/(10 + n)); None for no average.
        seed: random seed of all noise.
        progress: show a progress bar.

    Returns:
        (step, mean loss since the previous row), every 100 steps and at the end.

    Raises:
        ConfigError: the loss is NaN or Inf.
    """
    network = denoiser.network
    assert isinstance(network, VarianceHead)
    device = next(network.parameters()).device
    average = None if decay is None else WeightAverage(copy.deepcopy(network.head), network.head, decay)
    batches = iter(stream)

    def loss_of_step(step: int) -> Tensor:
        batch = {
            name: v.to(device) if isinstance(v, Tensor) and name != "position" else v
            for name, v in next(batches).items()
        }
        draw = training_draw(denoiser, time_sampler, condition, batch, batch_size=stream.batch_size, seed=seed)
        return head_loss(denoiser, kind, batch["image"], draw.noise, draw.t, draw.previous, **draw.condition).mean()

    network.train()
    rows = train_steps(
        loss_of_step,
        steps,
        torch.optim.Adam(network.head.parameters(), lr),
        name=f"variance head {kind}",
        remedy="lower lr=, or fit in float32",
        average=average,
        progress=progress,
    )
    if average is not None:
        network.head.load_state_dict(average.network.state_dict())
    network.eval()
    return rows

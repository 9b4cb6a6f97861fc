"""Fitting the optimal variance of a trained network: its second moments in one pass, or a second head. Plain torch."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.conditions import Condition
from diffusion_lab.data.images import Examples
from diffusion_lab.data.stream import BatchStream
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import ConfigError
from diffusion_lab.io import progress as show_progress
from diffusion_lab.losses import head_loss
from diffusion_lab.models import VarianceHead
from diffusion_lab.noise import Stream, normal, permutation
from diffusion_lab.schedules import Schedule
from diffusion_lab.time_samplers import TimeSampler
from diffusion_lab.training.draws import training_draw

WHOLE = 1000  # times of a continuous curve
ROW = 100  # steps of a head's training in a row of its losses


def fit_times(schedule: Schedule, count: int | None = None) -> Tensor:
    """Where the moments are measured: `count` nodes of a table evenly spread, or times of a curve, the last 1; float64 (N,).

    Raises:
        ValueError: fewer than 1, or more than the table has.
    """
    most = schedule.steps or WHOLE
    n = most if count is None else count
    if n < 1 or (schedule.steps is not None and n > most):
        raise ConfigError(f"nodes={n} is outside 1 … {most}: write nodes=null for all of them")
    ends = torch.arange(1, n + 1, dtype=torch.float64) / n
    return (ends * most).round() / most if schedule.steps is not None else ends


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
    """Σ mean(ε̂² − ε²) over n images for each time, and their number: float64 (2, N) on the CPU, this process's share.

    Add the shares of all processes; `moments` makes E mean(ε̂²) of the sum. Evaluation k is of time k mod N, of the k-th image
    of keyed epochs laid end to end, with noise keyed by k: so all processes together do what one does alone.

    E mean(ε²) = 1 is known, so its error in the sample is taken away: near t = 1, where ε̂ ≈ ε, nearly all of the spread is.

    Args:
        denoiser: its clipping plays no part. In eval mode.
        examples: images, and labels if the condition wants them.
        times: float64 (N,).
        n: images for each time.
        condition: which labels reach the network; none is dropped.
        seed: of noise and order.
        batch_size: evaluations at a time; changes nothing.
        rank, world: this process takes the evaluations rank, rank + world, …
        progress: show a bar.
    """
    denoiser = replace(denoiser, clip=None)
    device = next((p.device for p in denoiser.network.parameters()), torch.device("cpu"))  # type: ignore[attr-defined]
    sums = torch.zeros(2, len(times), dtype=torch.float64)
    keys = torch.arange(rank, n * len(times), world)
    places = _Places(len(examples), seed)
    for k in show_progress(keys.split(batch_size), "second moments", "batch", progress):
        batch = examples.take(places(k))
        x0 = batch["image"].to(device, torch.float64)
        noise = normal(tuple(x0.shape[1:]), seed=seed, index=k.to(device), stream=Stream.VARIANCE, dtype=torch.float64)
        which = k % len(times)
        t, given = times[which], {name: v.to(device) for name, v in condition(batch).items()}
        x_t = denoiser.schedule.corrupt(x0, noise, t)
        previous = denoiser(x_t, t, **given).x0 if denoiser.self_conditioning else None
        guess = denoiser(x_t, t, previous, **given).noise
        each = (guess.square() - noise.square()).flatten(1).mean(1).cpu()
        sums.index_add_(1, which, torch.stack([each, torch.ones_like(each)]))
    return sums


def moments(sums: Tensor) -> Tensor:
    """E mean(ε̂²), float64 (N,), of the sums of all processes; ValueError where the network gave NaN."""
    value = 1 + sums[0] / sums[1]
    if not bool(value.isfinite().all()):
        raise ConfigError(
            "the network gave NaN or infinity: fit in float32, or take a checkpoint from before the training diverged"
        )
    return value


class _Places:
    """The k-th image of keyed epochs laid end to end."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._orders: dict[int, Tensor] = {}

    def __call__(self, k: Tensor) -> Any:
        epoch, place = k // self.count, k % self.count
        index = torch.empty_like(k)
        for e in epoch.unique().tolist():
            if e not in self._orders:
                self._orders = {**dict(list(self._orders.items())[-1:]), e: self._order(e)}
            index[epoch == e] = self._orders[e][place[epoch == e]]
        return index.numpy()

    def _order(self, epoch: int) -> Tensor:
        return permutation(self.count, seed=self.seed, draw=epoch + 1, stream=Stream.VARIANCE)


def train_head(
    denoiser: Denoiser,
    kind: str,
    stream: BatchStream,
    times: TimeSampler,
    condition: Condition,
    *,
    steps: int,
    lr: float = 1e-4,
    decay: float | None = 0.999,
    seed: int = 0,
    progress: bool = False,
) -> list[tuple[int, float]]:
    """Train the head of `denoiser.network`, a `VarianceHead`, by Adam. Its weights end as their average, if there is one.

    t, ε and label drops are keyed as in training.

    Args:
        denoiser: without clipping.
        kind: "sn" or "npr".
        stream: training batches.
        times: how t is drawn, as for the network itself.
        condition: which tensors of a batch reach the network.
        steps: how many.
        lr: learning rate.
        decay: of the head's average, begun as the networks' averages are: min(d, (1 + n)/(10 + n)); None for no average.
        seed: of all noise.
        progress: show a bar.

    Returns:
        (step, mean loss since the last row) each 100 steps and at the end.

    Raises:
        ValueError: a loss that is not finite.
    """
    network = denoiser.network
    assert isinstance(network, VarianceHead)
    device, head = next(network.parameters()).device, list(network.head.parameters())
    average = [p.detach().clone() for p in head]
    optimiser, total = torch.optim.Adam(head, lr), torch.zeros((), dtype=torch.float64, device=device)
    rows: list[tuple[int, float]] = []
    network.train()
    batches = iter(stream)
    for step in show_progress(range(steps), f"head {kind}", "step", progress):
        batch = next(batches)
        batch = {name: v.to(device) if isinstance(v, Tensor) and name != "position" else v for name, v in batch.items()}
        loss = _head_step(denoiser, kind, batch, times, condition, stream.batch_size, seed)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        total += loss.detach()
        if decay is not None:
            d = min(decay, (2 + step) / (11 + step))
            torch._foreach_lerp_(average, [p.detach() for p in head], 1 - d)
        if (step + 1) % ROW == 0 or step == steps - 1:
            rows.append((step + 1, float(total) / (step % ROW + 1)))
            if not math.isfinite(rows[-1][1]):
                raise ConfigError(
                    f"the loss of the head is {rows[-1][1]} at step {step + 1}: lower lr=, or fit in float32"
                )
            total.zero_()
    if decay is not None:
        torch._foreach_copy_([p.detach() for p in head], average)
    network.eval()
    return rows


def _head_step(
    denoiser: Denoiser,
    kind: str,
    batch: dict[str, Any],
    times: TimeSampler,
    condition: Condition,
    batch_size: int,
    seed: int,
) -> Tensor:
    """The loss of one step."""
    t, noise, previous, arguments = training_draw(denoiser, times, condition, batch, batch_size=batch_size, seed=seed)
    return head_loss(denoiser, kind, batch["image"], noise, t, previous, **arguments).mean()

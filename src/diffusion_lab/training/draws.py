"""From a batch to (t, ε, x̂_0 of self-conditioning, condition): the random draws of a training step.

All are keyed by (seed, step, position in the global batch), so that they depend neither on the number of processes nor on
what was drawn before.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_lab.conditions import Condition
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.noise import Stream, normal, uniform
from diffusion_lab.schedules import append_dims_like, to_device
from diffusion_lab.time_samplers import Stratified, TimeSampler

VALIDATION_SEED = 0  # t and ε of validation are the same in every run, so that runs compare


class Draw(NamedTuple):
    """The random inputs of one loss."""

    t: Tensor  # float64 (B,) on the CPU
    noise: Tensor  # ε, (B, C, H, W)
    previous: Tensor | None  # x̂_0 for a self-conditioning network, (B, C, H, W)
    condition: dict[str, Tensor]  # keyword arguments for the network


def training_draw(
    denoiser: Denoiser,
    time_sampler: TimeSampler,
    condition: Condition,
    batch: Mapping[str, Any],
    *,
    batch_size: int,
    seed: int,
) -> Draw:
    """Draw for a batch of `BatchStream`.

    Args:
        denoiser: its first estimate is `previous`, where it is self-conditioning.
        time_sampler: of t.
        condition: its labels are dropped at random.
        batch: "image" (B, C, H, W), "position" int64 (B,), "step", and what the condition is made of.
        batch_size: of the global batch.
        seed: of all draws.
    """
    x0, position, step = batch["image"], batch["position"], batch["step"]
    t = time_sampler(denoiser.schedule, position, batch_size, seed=seed, step=step)
    noise = _noise(x0, position, seed, step)
    arguments = condition(batch, seed=seed)
    previous = None
    if denoiser.self_conditioning:
        # A detached first estimate for one half of the examples, zeros for the other (Chen et al. 2023).
        with torch.no_grad():
            estimate = denoiser(denoiser.schedule.corrupt(x0, noise, t), t, **arguments).x0
        coin = uniform((), seed=seed, index=position, draw=step, stream=Stream.SELF) < 0.5
        previous = append_dims_like(coin, estimate) * estimate
    return Draw(t, noise, previous, arguments)


def validation_draw(
    denoiser: Denoiser, condition: Condition, batch: Mapping[str, Any], *, images: int, draw: int
) -> Draw:
    """Draw number `draw` for a batch of `EvalBatches` out of `images`: stratified t, no dropped labels, no `previous`."""
    index = batch["index"]
    t = Stratified()(denoiser.schedule, index, images, seed=VALIDATION_SEED, step=draw)
    return Draw(t, _noise(batch["image"], index, VALIDATION_SEED, draw), None, condition(batch))


def _noise(x0: Tensor, index: Tensor, seed: int, draw: int) -> Tensor:
    key = to_device(index, x0.device)
    return normal(tuple(x0.shape[1:]), seed=seed, index=key, draw=draw, stream=Stream.NOISE)

"""Generate images from a seed, an index and a condition. x_T is drawn only in this module.

Image i depends on the seed, i and its condition, not on the batch size or the number of processes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.errors import ConfigError, check_number
from diffusion_lab.io import progress as show_progress
from diffusion_lab.noise import Draws, normal
from diffusion_lab.samplers import Sampler, Samples, prior
from diffusion_lab.samplers.base import Callback

Shape = tuple[int, int, int]  # (C, H, W)


class Batch(NamedTuple):
    """The images of one call of a sampler."""

    indices: Tensor  # int64 (B,), the number of each image, on the network's device
    condition: dict[str, Tensor]  # keyword arguments for the network, B rows each, on its device
    progress: bool = False  # whether the sampler shows its progress bar


def batch_of(
    block: range, condition: Mapping[str, Tensor] | None, device: torch.device | str, progress: bool = False
) -> Batch:
    """Return the images of `block` with their rows of `condition`, which has a row for every image of the set."""
    index = torch.arange(block.start, block.stop, device=device)
    rows = {name: value[block.start : block.stop].to(device) for name, value in (condition or {}).items()}
    return Batch(index, rows, progress)


def batches(
    n: int,
    size: int | None = None,
    condition: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Iterator[Batch]:
    """Yield the images 0 … n − 1 in batches.

    Args:
        n: number of images.
        size: images of a batch; None generates all images in one batch.
        condition: keyword arguments for the network, each with n rows.
        device: the device of the network.
        progress: show a bar over the batches, or the sampler's where there is one batch.

    Raises:
        ConfigError: n < 1, size < 1, or a condition of another number of rows.
    """
    check_number("n", n, "[1, 1000000000]", "at least 1", whole=True)
    check_number("batch_size", size, "[1, 1000000]", "at least 1", whole=True, optional=True)
    for name, value in (condition or {}).items():
        if len(value) != n:
            raise ConfigError(f"condition {name} has {len(value)} rows for n={n} images: pass one row for each image")
    starts = range(0, n, min(size or n, n))
    for start in show_progress(starts, "sampling", "batch", progress and len(starts) > 1):
        yield batch_of(range(start, min(start + starts.step, n)), condition, device, progress and len(starts) == 1)


def join(parts: Iterable[Samples]) -> Samples:
    """Concatenate batches on the CPU. nfe is the maximum over the batches: they differ only under an adaptive sampler."""
    states, nfe = zip(*((part.x.cpu(), part.nfe) for part in parts), strict=True)
    return Samples(torch.cat(states), max(nfe))


def initial_noise(shape: Shape, index: Tensor, seed: int) -> Tensor:
    """Draw the initial noise ε of images `index`, int64 (B,): standard normal (B, C, H, W)."""
    return normal(shape, seed=seed, index=index)


def initial_state(denoiser: Denoiser, shape: Shape, index: Tensor, seed: int) -> Tensor:
    """Draw x_T = σ(1) ε of images `index`, int64 (B,): (B, C, H, W)."""
    return prior(denoiser.schedule, initial_noise(shape, index, seed))


def generate(
    denoiser: Denoiser,
    sampler: Sampler,
    shape: Shape,
    batch: Batch,
    *,
    seed: int = 0,
    callback: Callback | None = None,
) -> Samples:
    """Sample a batch of images from noise, x float32 (B, C, H, W) in [−1, 1].

    Args:
        denoiser: its network on the batch's device, in eval mode.
        sampler: the sampler to use.
        shape: (C, H, W) of an image.
        batch: a batch returned by `batches` or `batch_of`.
        seed: random seed of all noise.
        callback: called by the sampler at every step.

    Raises:
        ConfigError: NaN or Inf from the network, with the number of the first image; a sampler that cannot use the denoiser.
    """
    x_T = initial_state(denoiser, shape, batch.indices, seed)
    return decode(denoiser, sampler, x_T, batch, seed=seed, callback=callback)


def decode(
    denoiser: Denoiser,
    sampler: Sampler,
    states: Tensor,
    batch: Batch,
    *,
    seed: int = 0,
    times: Tensor | None = None,
    callback: Callback | None = None,
) -> Samples:
    """Integrate states (B, C, H, W) to images, x float32 in [−1, 1]. Other arguments and errors as for `generate`.

    Args:
        states: at times[0], or without `times` at t = 1.
        times: the times of the sampler, as from its `time_grid`; None: those of its grid from 1 to 0.
    """

    def sample(callback: Callback | None, progress: bool = False) -> Samples:
        options: dict[str, Any] = {"condition": batch.condition, "callback": callback, "progress": progress}
        if times is None:
            return sampler(denoiser, states, seed=seed, index=batch.indices, **options)
        noise = Draws(tuple(states.shape[1:]), seed, batch.indices, states.dtype)
        return sampler.integrate_grid(denoiser, states, times, noise=noise, **options)

    try:
        samples = sample(callback, batch.progress)
    except ConfigError as error:
        row = _first_nonfinite(sample, states)
        if row is None:
            raise
        raise ConfigError(f"image {int(batch.indices[row])}: {error}") from error
    return samples._replace(x=samples.x.float().clamp(-1, 1))


def encode(denoiser: Denoiser, sampler: Sampler, images: Tensor, batch: Batch) -> Samples:
    """Integrate images (B, C, H, W) in [−1, 1] to their states at t = 1.

    Raises:
        ConfigError: a stochastic sampler, or NaN or Inf from the network.
    """
    return sampler(
        denoiser,
        images,
        index=batch.indices,
        condition=batch.condition,
        start=0.0,
        stop=1.0,
        progress=batch.progress,
    )


def _first_nonfinite(sample: Callable[[Callback], Samples], states: Tensor) -> int | None:
    """Sample a refused batch again and return its first row whose x̂_0 was NaN or Inf; None if all were finite."""
    finite = torch.ones(len(states), dtype=torch.bool, device=states.device)

    def watch(i: int, t: float, x: Tensor, prediction: Prediction) -> None:
        finite.logical_and_(prediction.x0.isfinite().flatten(1).all(1))

    with suppress(ConfigError):
        sample(watch)
    rows = (~finite).nonzero()[:, 0].tolist()
    return rows[0] if rows else None

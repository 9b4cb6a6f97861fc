"""Training of the classifier of a data set, on clean images or on x_t."""

import functools
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_lab.checkpoint.classifiers import pack_classifier
from diffusion_lab.data.images import Examples
from diffusion_lab.metrics.classifier import Noise, Recipe
from diffusion_lab.models.classifier import Classifier
from diffusion_lab.noise import Stream, normal, permutation, uniform
from diffusion_lab.schedules import Schedule
from diffusion_lab.time_samplers import Stratified
from diffusion_lab.training.loop import train_steps

BINS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0)  # edges in ln SNR, for the accuracy on noisy images


def train_classifier(
    train: Examples,
    held_out: Examples,
    name: str,
    class_names: tuple[str, ...],
    recipe: Recipe,
    noise: Noise | None,
    device: torch.device,
) -> bytes:
    """Train a classifier and measure its accuracy. All randomness is keyed: the result is the same on every run of a machine.

    Args:
        train: labeled training images.
        held_out: labeled images for the accuracy; may be empty.
        name: of the data set, stored in the file.
        class_names: of its classes; may be empty.
        recipe: hyperparameters.
        noise: train on x_t of this schedule; None trains on clean images.
        device: of the training.

    Returns:
        The content of the classifier's file.

    Raises:
        ConfigError: the loss is NaN or Inf.
    """
    assert train.labels is not None
    shape = tuple(int(v) for v in train.images.shape[1:])
    classes = max(len(class_names), int(train.labels.max()) + 1)
    model: dict[str, Any] = {
        "channels": shape[0],
        "num_classes": classes,
        "width": recipe.width,
        "features": recipe.features,
        "time": None if noise is None else _time_features(noise.schedule),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Classifier(**model).to(device)
    _fit(network, train, recipe, noise, device)
    network.eval()
    accuracy, by_noise = _accuracy(network, held_out, noise, device) if len(held_out) else (None, {})
    config = {
        "data": {"name": name, "shape": list(shape), "classes": classes, "class_names": list(class_names)},
        "model": model,
        "schedule": None if noise is None else dict(noise.node),
        "recipe": asdict(recipe),
    }
    return pack_classifier(network, config, accuracy, by_noise)


def _time_features(schedule: Schedule) -> str:
    """Return `Classifier`'s option that fits the time conditioning: up to 1000 on a table, a few units for ln(σ/α)/4."""
    return "sinusoidal" if float(schedule.conditioning(torch.tensor(0.5, dtype=torch.float64))) > 10 else "fourier"


def _fit(network: Classifier, data: Examples, recipe: Recipe, noise: Noise | None, device: torch.device) -> None:
    """Minimize the cross entropy by AdamW with a one-cycle rate. About half a minute for the digits on two cores."""
    labels = data.labels
    assert labels is not None
    batch_size = min(recipe.batch, len(data))
    per_epoch = len(data) // batch_size
    steps = max(1, min(recipe.epochs, recipe.steps // per_epoch)) * per_epoch
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.rate, weight_decay=0.05, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps)
    position = torch.arange(batch_size)

    @functools.lru_cache(maxsize=1)
    def order(epoch: int) -> Any:
        return permutation(len(data), seed=0, draw=epoch, stream=Stream.SHUFFLE).numpy()

    def loss_of_step(step: int) -> Tensor:
        epoch, i = divmod(step, per_epoch)
        index = order(epoch)[i * batch_size : (i + 1) * batch_size]
        coins = uniform((3,), seed=0, index=position, draw=step, stream=Stream.FLIP)
        flip = (coins[:, 0] < 0.5).numpy() if recipe.flip else None
        x = data.take(index, flip)["image"].to(device)
        x = _shift(x, (coins[:, 1:] * 3).long().to(device))
        if noise is None:
            logits = network(x)
        else:
            t = Stratified()(noise.schedule, position, batch_size, seed=0, step=step)
            logits = _noisy_logits(network, noise.schedule, x, t, position, step)
        return F.cross_entropy(logits, torch.from_numpy(labels[index]).to(device))

    remedy = "write device=cpu, or another schedule="
    train_steps(loss_of_step, steps, optimizer, name="classifier", remedy=remedy, scheduler=scheduler)


def _shift(x: Tensor, offset: Tensor) -> Tensor:
    """Move images down and right by offset − 1 pixels, offset int64 (B, 2) in 0 … 2; the border is filled with black."""
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1), value=-1.0)
    row = (2 - offset[:, :1] + torch.arange(height, device=x.device))[:, None, :, None]
    column = (2 - offset[:, 1:] + torch.arange(width, device=x.device))[:, None, None, :]
    image, channel = (torch.arange(n, device=x.device) for n in x.shape[:2])
    return padded[image[:, None, None, None], channel[None, :, None, None], row, column]


def _noisy_logits(network: Classifier, schedule: Schedule, x: Tensor, t: Tensor, index: Tensor, draw: int) -> Tensor:
    """Logits of x_t, its ε keyed by (index, draw)."""
    noise = normal(tuple(x.shape[1:]), seed=0, index=index.to(x.device), draw=draw, stream=Stream.NOISE)
    return network(schedule.corrupt(x, noise, t), schedule.conditioning(t).float().to(x.device))


@torch.no_grad()
def _accuracy(
    network: Classifier, held_out: Examples, noise: Noise | None, device: torch.device
) -> tuple[float, dict[str, float]]:
    """Return the accuracy on held-out images; for noisy ones, that over all times and that in each bin of ln SNR."""
    hits: list[Tensor] = []
    snr: list[Tensor] = []
    draws = 1 if noise is None else max(1, min(20, 20_000 // len(held_out)))  # noise levels of each image
    for draw in range(draws):
        for start in range(0, len(held_out), 1024):
            index = np.arange(start, min(start + 1024, len(held_out)))
            batch = held_out.take(index)
            x, label = batch["image"].to(device), batch["label"].to(device)
            if noise is None:
                logits = network(x)
            else:
                key = torch.from_numpy(index)
                t = Stratified()(noise.schedule, key, len(held_out), seed=1, step=draw)
                # Draws from 2³¹ on: never the ε of a training step.
                logits = _noisy_logits(network, noise.schedule, x, t, key, 2**31 + draw)
                snr.append(2 * noise.schedule.lam(t))
            hits.append((logits.argmax(1) == label).cpu())
    hit = torch.cat(hits).double()  # torchmetrics' accuracy is float32: 0.6 would be stored as 0.6000000238
    if noise is None:
        return float(hit.mean()), {}
    bins = torch.bucketize(torch.cat(snr).double(), torch.tensor(BINS, dtype=torch.float64))
    names = ["-inf", *(f"{edge:g}" for edge in BINS), "inf"]
    by_noise = {
        f"{names[b]}…{names[b + 1]}": float(hit[bins == b].mean())
        for b in reversed(range(len(BINS) + 1))
        if bool((bins == b).any())
    }
    return float(hit.mean()), by_noise

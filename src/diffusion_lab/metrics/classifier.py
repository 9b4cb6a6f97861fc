"""The project's own classifier: trained on demand, on clean images or on x_t, kept in a file that is keyed by what made it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_lab.checkpoint.classifiers import TrainedClassifier, load_classifier, pack_classifier
from diffusion_lab.data.images import Examples, Rows, to_float
from diffusion_lab.errors import ConfigError
from diffusion_lab.io import claimed, progress_bar
from diffusion_lab.metrics.extractors import Extractor, Features, digest
from diffusion_lab.models.classifier import Classifier
from diffusion_lab.noise import Stream, normal, permutation, uniform
from diffusion_lab.schedules import Schedule
from diffusion_lab.time_samplers import Stratified

if TYPE_CHECKING:  # it imports Lightning, which processes that only measure need not wait for
    from diffusion_lab.data.datamodule import DataModule

VERSION = 3  # of the training below: a change makes older files another key
CONFIDENT = 0.9  # the probability from which an image counts as recognised
BINS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0)  # of ln SNR, for the accuracy on noisy images
SPREAD = 10_000  # images of a set, evenly spaced, that its fingerprint is taken of: a second at most


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained: AdamW, a one-cycle rate, every image shifted by up to a pixel at random.

    epochs: passes over the training images, as far as `steps` allow.
    steps: at most so many.
    """

    epochs: int = 60
    steps: int = 4_000
    batch: int = 128
    rate: float = 3e-3
    width: int = 32
    features: int = 64
    flip: bool = False  # mirror at random


NOISY = Recipe(epochs=240, steps=12_000)  # every image at many noise levels


class Noise(NamedTuple):
    """What a classifier of noisy images is trained on: a schedule, and the plain node that rebuilds it."""

    schedule: Schedule
    node: Mapping[str, Any]


def fingerprint(images: np.ndarray | Rows) -> str:
    """16 hexadecimal digits of at most 10,000 evenly spaced images, their number and shape."""
    shape = tuple(images.shape)
    chosen = np.unique(np.linspace(0, len(images) - 1, min(len(images), SPREAD)).round().astype(np.int64))
    found = hashlib.sha256(json.dumps(shape).encode())
    for part in np.array_split(chosen, -(-len(chosen) // 500)):
        found.update(np.ascontiguousarray(images[part]).tobytes())
    return found.hexdigest()[:16]


def file_of(train: Examples, folder: Path, name: str, recipe: Recipe, noise: Noise | None = None) -> Path:
    """Where the classifier of these images, this recipe and this noise is kept.

    Raises:
        ValueError: images without labels.
    """
    if train.labels is None or not len(train.labels):
        raise ConfigError(
            "the classifier needs a labelled data set, and this one has no labels: write extractor=inception"
        )
    node = None if noise is None else dict(noise.node)
    made = [
        VERSION,
        asdict(recipe),
        fingerprint(train.images),
        hashlib.sha256(train.labels.tobytes()).hexdigest(),
        node,
    ]
    key = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:8]
    return folder / f"classifier-{name}{'' if noise is None else '-noisy'}-{key}.pt"


def load_or_train(
    train: Examples,
    held: Examples,
    folder: Path,
    *,
    name: str = "images",
    class_names: tuple[str, ...] = (),
    recipe: Recipe | None = None,
    noise: Noise | None = None,
    device: str | torch.device = "cpu",
) -> TrainedClassifier:
    """The classifier of a data set: from its file if there is one, else trained and written. Processes wait for one another.

    Args:
        train: what it learns.
        held: what the accuracy is measured on; may be empty.
        folder: where the file is.
        name: of the data set.
        class_names: of its classes.
        recipe: None is the standard one for clean or noisy images.
        noise: train on x_t along this schedule.
        device: where it is trained; it comes back on the CPU.

    Raises:
        ValueError: no labels, or a folder that cannot be written.
    """
    recipe = recipe or (Recipe() if noise is None else NOISY)
    path = file_of(train, folder, name, recipe, noise)
    try:
        if not path.is_file():
            with claimed(path) as file:
                if file is not None:
                    file.write(_made(train, held, name, class_names, recipe, noise, torch.device(device)))
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error}): write cache=FOLDER on another disk") from error
    return load_classifier(path)


def for_dataset(
    data: "DataModule",
    folder: Path,
    device: str | torch.device = "cpu",
    noise: Noise | None = None,
    steps: int | None = None,
) -> TrainedClassifier:
    """The classifier of a data set, the same for every run on it: trained on all but the test images, or but the validation
    images where no others are held out; those in colour are mirrored at random.

    Args:
        data: set up.
        folder: where the file is.
        device: where it is trained if it must be.
        noise: train on x_t along this schedule.
        steps: at most so many of training, but one pass over the images at least; None is the recipe's number.

    Raises:
        ValueError: as `load_or_train`.
    """
    tested = data.size("test") > 0
    recipe = replace(Recipe() if noise is None else NOISY, flip=data.channels == 3)
    recipe = recipe if steps is None else replace(recipe, steps=steps)
    return load_or_train(
        data.examples("train+val" if tested else "train"),
        data.examples("test" if tested else "val"),
        folder,
        name=type(data.source).__name__.lower(),
        class_names=data.class_names,
        recipe=recipe,
        noise=noise,
        device=device,
    )


class ClassifierExtractor(Extractor):
    """The hidden features and the logits of a classifier of clean images."""

    name, judges = "classifier", True

    def __init__(self, trained: TrainedClassifier) -> None:
        if trained.network.time is not None:
            raise ConfigError(
                f"{trained.path} classifies noisy images: measure with one that was trained with noisy=false"
            )
        super().__init__(trained.network)
        self.trained, self.key = trained, digest(trained.network)
        self.dim, self.classes = trained.network.hidden.out_features, trained.network.head.out_features

    def extract(self, images: Tensor) -> Features:
        network = self.trained.network
        hidden = network.features(to_float(images))
        return Features(hidden, network.head(hidden))


# training -----------------------------------------------------------------------------------------------------------------


def _made(
    train: Examples,
    held: Examples,
    name: str,
    class_names: tuple[str, ...],
    recipe: Recipe,
    noise: Noise | None,
    device: torch.device,
) -> bytes:
    """The file's content."""
    assert train.labels is not None
    shape = tuple(int(v) for v in train.images.shape[1:])
    classes = max(len(class_names), int(train.labels.max()) + 1)
    model: dict[str, Any] = {
        "channels": shape[0],
        "num_classes": classes,
        "width": recipe.width,
        "features": recipe.features,
        "time": None if noise is None else _time(noise.schedule),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Classifier(**model).to(device)
    _fit(network, train, recipe, noise, device)
    network.eval()
    accuracy, by_noise = _accuracy(network, held, noise, device) if len(held) else (None, {})
    config = {
        "data": {"name": name, "shape": list(shape), "classes": classes, "class_names": list(class_names)},
        "model": model,
        "schedule": None if noise is None else dict(noise.node),
        "recipe": asdict(recipe),
    }
    return pack_classifier(network, config, accuracy, by_noise)


def _time(schedule: Schedule) -> str:
    """The features that fit what the network is told: up to 1000 along a table, a few units for ln(σ/α)/4."""
    return "sinusoidal" if float(schedule.conditioning(torch.tensor(0.5, dtype=torch.float64))) > 10 else "fourier"


def _fit(network: Classifier, data: Examples, recipe: Recipe, noise: Noise | None, device: torch.device) -> None:
    """About half a minute for the digits on two cores. Keyed as all training is: the same on every run of one machine."""
    assert data.labels is not None
    batch = min(recipe.batch, len(data))
    per_epoch = len(data) // batch
    epochs = max(1, min(recipe.epochs, recipe.steps // per_epoch))
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.rate, weight_decay=0.05, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=epochs * per_epoch)
    position = torch.arange(batch)
    with progress_bar(epochs * per_epoch, "training the classifier", "step") as bar:
        for step in range(epochs * per_epoch):
            epoch, i = divmod(step, per_epoch)
            if i == 0:
                order = permutation(len(data), seed=0, draw=epoch, stream=Stream.SHUFFLE).numpy()
            chosen = order[i * batch : (i + 1) * batch]
            coins = uniform((3,), seed=0, index=position, draw=step, stream=Stream.FLIP)
            flip = (coins[:, 0] < 0.5).numpy() if recipe.flip else None
            x = data.take(chosen, flip)["image"].to(device)
            x = _shifted(x, (coins[:, 1:] * 3).long().to(device))
            label = torch.from_numpy(data.labels[chosen]).to(device)
            if noise is None:
                out = network(x)
            else:
                t = Stratified()(noise.schedule, position, batch, seed=0, step=step)
                out = network(
                    _noisy(noise.schedule, x, t, position, step), noise.schedule.conditioning(t).float().to(device)
                )
            loss = F.cross_entropy(out, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            bar.update()


def _shifted(x: Tensor, by: Tensor) -> Tensor:
    """Images moved by by − 1 pixels, by int64 (B, 2) in 0 … 2, down and right; what comes in is black."""
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1), value=-1.0)
    row = (2 - by[:, :1] + torch.arange(height, device=x.device))[:, None, :, None]
    column = (2 - by[:, 1:] + torch.arange(width, device=x.device))[:, None, None, :]
    image, channel = (torch.arange(n, device=x.device) for n in x.shape[:2])
    return padded[image[:, None, None, None], channel[None, :, None, None], row, column]


def _noisy(schedule: Schedule, x: Tensor, t: Tensor, index: Tensor, draw: int) -> Tensor:
    """x_t, its ε keyed by (index, draw)."""
    noise = normal(tuple(x.shape[1:]), seed=0, index=index.to(x.device), draw=draw, stream=Stream.NOISE)
    return schedule.corrupt(x, noise, t)


@torch.no_grad()
def _accuracy(
    network: Classifier, held: Examples, noise: Noise | None, device: torch.device
) -> tuple[float, dict[str, float]]:
    """The share of held-out images that it gets right; for noisy ones, over all times and for each bin of ln SNR."""
    assert held.labels is not None
    right: list[Tensor] = []
    snr: list[Tensor] = []
    draws = 1 if noise is None else max(1, min(20, 20_000 // len(held)))  # noise levels of each image
    for draw in range(draws):
        for start in range(0, len(held), 1024):
            index = np.arange(start, min(start + 1024, len(held)))
            batch = held.take(index)
            x, label = batch["image"].to(device), batch["label"].to(device)
            if noise is None:
                out = network(x)
            else:
                key = torch.from_numpy(index)
                t = Stratified()(noise.schedule, key, len(held), seed=1, step=draw)
                x = _noisy(noise.schedule, x, t, key, 2**31 + draw)  # other draws than those of the training
                out = network(x, noise.schedule.conditioning(t).float().to(device))
                snr.append(2 * noise.schedule.lam(t))
            right.append((out.argmax(1) == label).double().cpu())
    found = torch.cat(right)
    if noise is None:
        return float(found.mean()), {}
    bins = torch.bucketize(torch.cat(snr).double(), torch.tensor(BINS, dtype=torch.float64))
    names = ["-inf", *(f"{edge:g}" for edge in BINS), "inf"]
    by_noise = {
        f"{names[b]}…{names[b + 1]}": float(found[bins == b].mean())
        for b in reversed(range(len(BINS) + 1))
        if bool((bins == b).any())
    }
    return float(found.mean()), by_noise

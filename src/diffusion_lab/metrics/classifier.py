"""Features of a classifier of the data set's own classes, and the cached file of that classifier."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from diffusion_lab.checkpoint.classifiers import TrainedClassifier, load_classifier
from diffusion_lab.data.datamodule import DataModule
from diffusion_lab.data.images import Examples, Rows, to_float
from diffusion_lab.errors import ConfigError, check_number
from diffusion_lab.io import claimed
from diffusion_lab.metrics.extractors import Extractor, Features, digest
from diffusion_lab.schedules import Schedule

VERSION = 3  # of the training, part of a file's key: increase it where the training changes
CONFIDENT = 0.9  # smallest probability of the first class at which an image counts as confidently classified
SPREAD = 10_000  # images of a set that its fingerprint covers, evenly spaced: a second at most


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters: AdamW, a one-cycle rate, every image shifted by up to a pixel at random.

    All fields are part of a file's key: a renamed one makes every cached classifier unreachable.

    Args:
        epochs: passes over the training images, at most `steps` steps.
        steps: largest number of steps.
        batch: images of a step.
        rate: largest learning rate.
        width: of the network.
        features: of the extractor, D.
        flip: mirror images at random.
    """

    epochs: int = 60
    steps: int = 4_000
    batch: int = 128
    rate: float = 3e-3
    width: int = 32
    features: int = 64
    flip: bool = False

    def __post_init__(self) -> None:
        check_number("epochs", self.epochs, "[1, 1000000]", whole=True)
        check_number("steps", self.steps, "[1, 1000000000]", whole=True)
        check_number("batch", self.batch, "[1, 1000000]", whole=True)
        check_number("rate", self.rate, "(0, 1]")
        check_number("width", self.width, "[8, 65536]", whole=True)
        check_number("features", self.features, "[1, 65536]", whole=True)


NOISY = Recipe(epochs=240, steps=12_000)  # longer: every image at many noise levels


class Noise(NamedTuple):
    """The schedule of a classifier of noisy images, and the configuration node that rebuilds it."""

    schedule: Schedule
    node: Mapping[str, Any]


# (train, held_out, name, class_names, recipe, noise, device) → content of the file: `training.classifier.train_classifier`.
# A parameter of the functions below, because metrics do not import the training.
TrainFunction = Callable[
    [Examples, Examples, str, tuple[str, ...], Recipe, Noise | None, torch.device],
    bytes,
]


def fingerprint(images: np.ndarray | Rows) -> str:
    """Return 16 hexadecimal digits of a hash of the shape and of at most 10,000 evenly spaced images, uint8 (N, C, H, W)."""
    shape = tuple(images.shape)
    index = np.unique(np.linspace(0, len(images) - 1, min(len(images), SPREAD)).round().astype(np.int64))
    sha = hashlib.sha256(json.dumps(shape).encode())
    for part in np.array_split(index, -(-len(index) // 500)):
        sha.update(np.ascontiguousarray(images[part]).tobytes())
    return sha.hexdigest()[:16]


def file_of(train: Examples, folder: Path, name: str, recipe: Recipe, noise: Noise | None = None) -> Path:
    """Return the path of the classifier of these images, this recipe and this noise.

    Raises:
        ConfigError: images without labels.
    """
    if train.labels is None or not len(train.labels):
        raise ConfigError(
            "the classifier needs a labeled data set, and this one has no labels: write extractor=inception"
        )
    content = [
        VERSION,
        asdict(recipe),
        fingerprint(train.images),
        hashlib.sha256(train.labels.tobytes()).hexdigest(),
        None if noise is None else dict(noise.node),
    ]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    return folder / f"classifier-{name}{'' if noise is None else '-noisy'}-{key}.pt"


def load_or_train(
    train: Examples,
    held_out: Examples,
    folder: Path,
    train_function: TrainFunction,
    *,
    name: str = "images",
    class_names: tuple[str, ...] = (),
    recipe: Recipe | None = None,
    noise: Noise | None = None,
    device: str | torch.device = "cpu",
) -> TrainedClassifier:
    """Load a classifier from its file, or train it and write the file. Processes that need the same file wait for each other.

    Args:
        train: labeled training images.
        held_out: labeled images for the accuracy; may be empty.
        folder: of the file.
        train_function: see `TrainFunction`; called where the file is missing.
        name: of the data set.
        class_names: of its classes.
        recipe: hyperparameters; None is the default for clean or noisy images.
        noise: train on x_t of this schedule.
        device: of the training; the returned classifier is on the CPU.

    Raises:
        ConfigError: no labels, or a folder that cannot be written.
    """
    recipe = recipe or (Recipe() if noise is None else NOISY)
    path = file_of(train, folder, name, recipe, noise)
    try:
        if not path.is_file():
            with claimed(path) as file:
                if file is not None:
                    file.write(train_function(train, held_out, name, class_names, recipe, noise, torch.device(device)))
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error}): write cache=FOLDER on another disk") from error
    return load_classifier(path)


def for_dataset(
    data: DataModule,
    folder: Path,
    train_function: TrainFunction,
    device: str | torch.device = "cpu",
    noise: Noise | None = None,
    steps: int | None = None,
) -> TrainedClassifier:
    """Load or train the classifier of a data set, the same for every run on it.

    It is trained on all images but the test images, or but the validation images where there are no test images. Color images
    are mirrored at random.

    Args:
        data: after `setup`.
        folder: of the file.
        train_function: see `TrainFunction`; called where the file is missing.
        device: of the training.
        noise: train on x_t of this schedule.
        steps: largest number of steps, but one pass over the images at least; None is the recipe's.

    Raises:
        ConfigError: as `load_or_train`.
    """
    has_test = data.size("test") > 0
    recipe = replace(Recipe() if noise is None else NOISY, flip=data.channels == 3)
    recipe = recipe if steps is None else replace(recipe, steps=steps)
    return load_or_train(
        data.examples("train+val" if has_test else "train"),
        data.examples("test" if has_test else "val"),
        folder,
        train_function,
        name=type(data.source).__name__.lower(),
        class_names=data.class_names,
        recipe=recipe,
        noise=noise,
        device=device,
    )


class ClassifierExtractor(Extractor):
    """Hidden features and logits of a classifier of clean images.

    Args:
        trained: the classifier.

    Raises:
        ConfigError: a classifier of noisy images.
    """

    name, has_class_logits = "classifier", True

    def __init__(self, trained: TrainedClassifier) -> None:
        if trained.network.time is not None:
            raise ConfigError(
                f"{trained.path} is a classifier of noisy images: write the path of one that was trained with noisy=false"
            )
        super().__init__(trained.network)
        self.trained, self.key = trained, digest(trained.network)
        self.dim, self.classes = trained.network.hidden.out_features, trained.network.head.out_features

    def extract(self, images: UInt8[Tensor, "b c h w"]) -> Features:
        network = self.trained.network
        hidden = network.features(to_float(images))
        return Features(hidden, network.head(hidden))

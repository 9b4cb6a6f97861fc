"""Train or load a classifier of the classes of a data set, and extract its features."""

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
from diffusion_lab.errors import ConfigError
from diffusion_lab.io import claimed
from diffusion_lab.metrics.extractors import Extractor, Features, digest
from diffusion_lab.schedules import Schedule

VERSION = 3  # version of the training, part of the key of a file: increase it when the training changes
CONFIDENT = 0.9  # an image is confidently classified if the largest probability is at least this
SPREAD = 10_000  # maximum number of evenly spaced images for a fingerprint, which takes at most a second


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a classifier, which is trained with AdamW, a one-cycle learning rate and random shifts by one pixel.

    All fields are part of the key of a file. If a field is renamed, cached classifiers are not used any more.

    Args:
        epochs: number of passes over the training images, if this takes at most `steps` steps.
        steps: maximum number of steps.
        batch: number of images per step.
        rate: maximum learning rate.
        width: width of the network.
        features: number of features D of the extractor.
        flip: whether to mirror images at random.
    """

    epochs: int = 60
    steps: int = 4_000
    batch: int = 128
    rate: float = 3e-3
    width: int = 32
    features: int = 64
    flip: bool = False


NOISY = Recipe(epochs=240, steps=12_000)  # longer: every image at many noise levels


class Noise(NamedTuple):
    """The schedule of a classifier of noisy images, and the configuration node that rebuilds it."""

    schedule: Schedule
    node: Mapping[str, Any]


# (train, held_out, name, class_names, recipe, noise, device) → content of the file: `training.classifier.train_classifier`.
# It is passed as an argument, since metrics must not import training.
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
    """Return the path of the classifier for these images, this recipe and this noise.

    Raises:
        ConfigError: if the images have no labels.
    """
    if train.labels is None or not len(train.labels):
        raise ConfigError(
            "the classifier needs a labeled data set, but this one has no labels: write extractor=inception"
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
        folder: folder of the file.
        train_function: see `TrainFunction`. It is called if the file does not exist.
        name: name of the data set.
        class_names: names of the classes.
        recipe: hyperparameters; None for the default for clean or noisy images.
        noise: schedule of the noise; None for clean images.
        device: device for training. The returned classifier is on the CPU.

    Raises:
        ConfigError: if the images have no labels, or the folder is not writable.
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
    """Load or train the classifier of a data set, which is the same for every run on this data set.

    It is trained on all images except the test images, or except the validation images if there are no test images. Color
    images are mirrored at random.

    Args:
        data: the data set, after `setup`.
        folder: folder of the file.
        train_function: see `TrainFunction`. It is called if the file does not exist.
        device: device for training.
        noise: schedule of the noise; None for clean images.
        steps: maximum number of steps, but at least one pass over the images; None for that of the recipe.

    Raises:
        ConfigError: as for `load_or_train`.
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
        ConfigError: if the classifier was trained on noisy images.
    """

    name, has_class_logits = "classifier", True

    def __init__(self, trained: TrainedClassifier) -> None:
        if trained.network.time is not None:
            raise ConfigError(
                f"{trained.path} is a classifier of noisy images: write the path of one trained with noisy=false"
            )
        super().__init__(trained.network)
        self.trained, self.key = trained, digest(trained.network)
        self.dim, self.classes = trained.network.hidden.out_features, trained.network.head.out_features

    def extract(self, images: UInt8[Tensor, "b c h w"]) -> Features:
        network = self.trained.network
        hidden = network.features(to_float(images))
        return Features(hidden, network.head(hidden))

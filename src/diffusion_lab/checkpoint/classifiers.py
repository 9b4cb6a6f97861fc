"""Write and read files of trained classifiers."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_lab.checkpoint import archive
from diffusion_lab.checkpoint.build import fitting
from diffusion_lab.errors import ConfigError, DamagedFileError
from diffusion_lab.instantiation import untrusted
from diffusion_lab.models.classifier import Classifier

HEADER = {"format": 1, "kind": "classifier"}


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier in eval mode.

    Attributes:
        network: maps images (B, C, H, W) in [−1, 1] to logits; a classifier of noisy images is called with (x_t, c), where
            c = schedule.conditioning(t) has shape (B,).
        config: plain values: data (name, shape, classes), model, schedule (None for clean images), recipe.
        accuracy: accuracy on held-out images, in [0, 1]; None if no image was held out.
        by_noise: accuracy in each bin of ln SNR; empty for a classifier of clean images.
        path: the file from which the classifier was read.
    """

    network: Classifier
    config: dict[str, Any]
    accuracy: float | None
    by_noise: dict[str, float]
    path: Path


def pack_classifier(
    network: Classifier, config: dict[str, Any], accuracy: float | None, by_noise: dict[str, float]
) -> bytes:
    """Serialize a classifier for `load_classifier`. The arguments are those of `TrainedClassifier`."""
    state = {key: value.cpu() for key, value in network.state_dict().items()}
    saved = {"diffusion_lab": HEADER, "config": config, "state": state, "accuracy": accuracy, "by_noise": by_noise}
    return archive.packed(saved)


def load_classifier(path: Path) -> TrainedClassifier:
    """Read a classifier from its file, on the CPU.

    Raises:
        ConfigError: if the file is missing, damaged or not a classifier.
    """
    if not path.exists():
        raise ConfigError(f"no classifier at {path}: train one with src/train_classifier.py")
    remedy = "delete it and run again"
    saved = archive.read(path, "classifier", remedy)
    try:
        if saved["diffusion_lab"] != HEADER:
            raise KeyError("kind")
        config, state, accuracy, by_noise = (saved[key] for key in ("config", "state", "accuracy", "by_noise"))
        _check_config(config)
        if not isinstance(accuracy, float | None) or not all(
            isinstance(name, str) and name.isprintable() and isinstance(value, float)
            for name, value in by_noise.items()
        ):
            raise DamagedFileError("its accuracies are not numbers")
        network = fitting(functools.partial(Classifier, **config["model"]), state)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"{path} was not written by src/train_classifier.py ({reason}): {remedy}") from error
    return TrainedClassifier(network.eval().requires_grad_(False), untrusted(config), accuracy, by_noise, path)


def _check_config(config: dict[str, Any]) -> None:
    """Raise DamagedFileError for a configuration without the entries that this project writes."""
    data = config["data"]
    if not (
        isinstance(data["name"], str) and len(data["shape"]) == 3 and all(isinstance(n, int) for n in data["shape"])
    ):
        raise DamagedFileError("data has no name or shape")
    if not isinstance(data["classes"], int) or not isinstance(config["schedule"], dict | None):
        raise DamagedFileError("data.classes or schedule is missing")

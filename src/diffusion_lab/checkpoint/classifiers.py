"""Write and read files of trained classifiers."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_lab.errors import ConfigError
from diffusion_lab.models.classifier import Classifier

HEADER = {"format": 1, "kind": "classifier"}


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier in eval mode.

    Attributes:
        network: called with images in [−1, 1]; a classifier of noisy images with (x_t, c), c = schedule.conditioning(t) (B,).
        config: plain values: data (name, shape, classes), model, schedule (None for clean images), recipe.
        accuracy: on held-out images; None without any.
        by_noise: accuracy in each bin of ln SNR, for a classifier of noisy images.
        path: the file.
    """

    network: Classifier
    config: dict[str, Any]
    accuracy: float | None
    by_noise: dict[str, float]
    path: Path


def pack_classifier(
    network: Classifier, config: dict[str, Any], accuracy: float | None, by_noise: dict[str, float]
) -> bytes:
    """Return the content of a classifier's file. The arguments are attributes of `TrainedClassifier`."""
    state = {key: value.cpu() for key, value in network.state_dict().items()}
    saved = {"diffusion_lab": HEADER, "config": config, "state": state, "accuracy": accuracy, "by_noise": by_noise}
    packed = io.BytesIO()
    torch.save(saved, packed)
    return packed.getvalue()


def load_classifier(path: Path) -> TrainedClassifier:
    """Read a classifier from its file, on the CPU.

    Raises:
        ConfigError: a missing file, a damaged one, or one that is not a classifier's.
    """
    if not path.is_file():
        raise ConfigError(f"no classifier at {path}: train one with src/train_classifier.py")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["diffusion_lab"] != HEADER:
            raise KeyError("kind")
        config = saved["config"]
        network = Classifier(**config["model"])
        network.load_state_dict(saved["state"])
    except Exception as error:  # torch raises many types on other files
        raise ConfigError(
            f"{path} is no classifier of src/train_classifier.py, or damaged: delete it and run again"
        ) from error
    return TrainedClassifier(network.eval().requires_grad_(False), config, saved["accuracy"], saved["by_noise"], path)

"""A cache with a briefly trained classifier of the digits, for tests of commands that do not need its accuracy."""

import shutil
from dataclasses import replace
from pathlib import Path

from diffusion_lab.data.datamodule import DataModule
from diffusion_lab.data.sources import Digits
from diffusion_lab.metrics.classifier import Recipe, file_of, load_or_train
from diffusion_lab.training.classifier import train_classifier


def digits() -> DataModule:
    """The digits, split as in conf/data/digits.yaml."""
    data = DataModule(Digits(), channels=1, image_size=[8, 8], num_classes=10, val=0.1, test=0.1, stratify=True)
    data.setup()
    return data


def install(folder: Path) -> None:
    """Train a small classifier for two epochs; store it under the name of the fully trained one."""
    data = digits()
    train, held_out = data.examples("train+val"), data.examples("test")
    recipe = replace(Recipe(), epochs=2, width=8)
    trained = load_or_train(train, held_out, folder, train_classifier, name="digits", recipe=recipe)
    shutil.move(trained.path, file_of(train, folder, "digits", Recipe()))

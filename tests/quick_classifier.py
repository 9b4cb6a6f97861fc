"""Cache a classifier of the digits that was trained for two epochs, for tests that do not depend on its accuracy."""

import shutil
from dataclasses import replace
from pathlib import Path

from diffusion_lab.data.datamodule import DataModule
from diffusion_lab.data.sources import Digits
from diffusion_lab.metrics.classifier import Recipe, file_of, load_or_train


def digits() -> DataModule:
    """Return the digits, split as in conf/data/digits.yaml."""
    data = DataModule(Digits(), channels=1, image_size=[8, 8], num_classes=10, val=0.1, test=0.1, stratify=True)
    data.setup()
    return data


def install(folder: Path) -> None:
    """Train a small classifier for two epochs and store it under the name of the fully trained one."""
    data = digits()
    train, test = data.examples("train+val"), data.examples("test")
    quick = load_or_train(train, test, folder, name="digits", recipe=replace(Recipe(), epochs=2, width=8))
    shutil.move(quick.path, file_of(train, folder, "digits", Recipe()))

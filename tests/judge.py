"""A cache for commands that need the digits' classifier and not its accuracy."""

import shutil
from dataclasses import replace
from pathlib import Path

from diffusion_lab.data.datamodule import DataModule
from diffusion_lab.data.sources import Digits
from diffusion_lab.metrics.classifier import Recipe, file_of, load_or_train


def digits() -> DataModule:
    """The digits as conf/data/digits.yaml splits them."""
    data = DataModule(Digits(), channels=1, image_size=[8, 8], num_classes=10, val=0.1, test=0.1, stratify=True)
    data.setup()
    return data


def install(folder: Path) -> None:
    """Two epochs of a small classifier, under the name that the whole training would have."""
    data = digits()
    train, held = data.examples("train+val"), data.examples("test")
    quick = load_or_train(train, held, folder, name="digits", recipe=replace(Recipe(), epochs=2, width=8))
    shutil.move(quick.path, file_of(train, folder, "digits", Recipe()))

"""A tiny checkpoint, and a cache with a classifier that was hardly trained: for commands that need them, not their quality."""

import sys

import pytest
from command import ROOT, TINY
from hydra.core.global_hydra import GlobalHydra
from judge import install

from diffusion_lab.runs import cli


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """outputs/cache with the digits' classifier, two epochs of it."""
    folder = tmp_path_factory.mktemp("cache")
    install(folder)
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run folder: four steps, labels, an average of decay 0.5."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    before = sys.argv
    sys.argv = [
        str(ROOT / "src" / "train.py"),
        *TINY,
        "trainer.max_steps=4",
        "condition=label",
        "callbacks.ema.decay=0.5",
        f"hydra.run.dir={folder}",
    ]
    try:
        assert cli.main("train", "train:run") == 0
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
    return folder

"""A tiny checkpoint, and a cache with a classifier that was hardly trained: for commands that need them, not their quality."""

import pytest
from command import TINY, code
from quick_classifier import install


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
    chosen = ["trainer.max_steps=4", "condition=label", "callbacks.ema.decay=0.5", f"hydra.run.dir={folder}"]
    assert code("train", [*TINY, *chosen]) == 0
    return folder

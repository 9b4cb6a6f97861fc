"""Fixtures of the commands: a checkpoint of four steps, and a cache with a classifier of two epochs."""

import pytest
from command import TINY, code
from quick_classifier import install


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Return a cache folder with a classifier of the digits, trained for two epochs."""
    folder = tmp_path_factory.mktemp("cache")
    install(folder)
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Return the folder of a run of four steps with labels and an EMA of decay 0.5."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    chosen = ["trainer.max_steps=4", "condition=label", "callbacks.ema.decay=0.5", f"hydra.run.dir={folder}"]
    assert code("train", [*TINY, *chosen]) == 0
    return folder

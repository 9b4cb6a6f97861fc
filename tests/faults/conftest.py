"""Fixtures of the faults: an uninterrupted training."""

import pytest

from faults.runs import TRAIN, Uninterrupted, run, timed


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """Return an uninterrupted training, in the folder `run` below its own."""
    folder = tmp_path_factory.mktemp("whole") / "train"
    run("train", [*TRAIN, "trainer.max_steps=1", "hydra.run.dir=warm"], folder.with_name("warm"))  # starts the server
    return timed(folder, lambda: run("train", [*TRAIN, "hydra.run.dir=run"], folder))

"""Every published recipe and its counterpart on digits trains: two steps of its own loss, times, schedule and callbacks, on a
narrow network and a few images of noise of the right size."""

import csv
import math

import pytest
from command import command

from diffusion_lab import composition

pytestmark = pytest.mark.integration

NARROW = (
    "model.width=8",
    "model.groups=8",
    "model.blocks=1",
    "data.batch_size=4",
    "data.source._target_=own_data.Noise",
)
BRIEF = (
    "trainer=cpu",
    "trainer.max_steps=2",
    "trainer.log_every_n_steps=1",
    "validation.every=2",
    "validation.draws=1",
)
QUIET = ("logger=csv", "callbacks.samples=null", "callbacks.progress=null", "callbacks.checkpoints.every=2")


@pytest.mark.parametrize("name", composition.options("experiment"))
def test_two_steps_of_every_recipe(name, tmp_path, capfd):
    split = ["data.val=4", "data.test=0", "data.stratify=false"]
    arguments = [f"experiment={name}", *NARROW, *BRIEF, *QUIET, *split, f"hydra.run.dir={tmp_path / 'run'}"]
    code, _, err = command("train", arguments, capfd)
    assert code == 0, err
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len(losses) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert math.isfinite(float(next(row["val/loss"] for row in rows if row["val/loss"])))

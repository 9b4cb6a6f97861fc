"""Two processes train and validate the same run as one."""

import csv
import subprocess
import sys

import pytest
import torch
from command import ROOT, TINY, command

pytestmark = pytest.mark.ddp


def _rows(folder, name):
    with (folder / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


def _run(folder, *arguments):
    tiny = [a for a in TINY if a not in ("trainer=cpu", "trainer.val_every=0")]
    tiny += ["trainer.max_steps=20", "trainer.val_every=10", "callbacks.ema.decay=0.9"]
    resumed = any(a.startswith("ckpt=") for a in arguments)
    command = [
        sys.executable,
        str(ROOT / "src" / "train.py"),
        *([] if resumed else tiny),
        f"hydra.run.dir={folder}",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_one_and_two_processes_train_the_same_run(tmp_path):
    """The losses of 20 steps, and of the averaged weights in validation; also where the two are stopped and resumed. The times
    are drawn by importance, so that every process must know the losses of all."""
    one, begun, two = tmp_path / "one", tmp_path / "begun", tmp_path / "two"
    importance = ("times=importance", "times.history=2", "schedule.steps=4", "sampler.steps=4", "weighting=vlb")
    _run(one, *importance, "trainer=cpu")
    _run(begun, *importance, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_steps=10")
    done = _run(two, f"ckpt={begun}", "trainer.max_steps=20")
    assert "2 processes" in done.stdout
    for name in ("train/loss", "val/loss"):
        a, b = _rows(one, name), {**_rows(begun, name), **_rows(two, name)}
        assert a.keys() == b.keys()
        assert len(a) == (20 if name == "train/loss" else 2)
        for step in a:
            assert b[step] == pytest.approx(a[step], rel=1e-5), (name, step)
    history = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["times"] for run in (one, two)]
    torch.testing.assert_close(history[1], history[0], rtol=1e-5, atol=0)
    assert len(list(tmp_path.iterdir())) == 3  # no second folder of a second process


def test_a_sweep_with_several_processes_is_refused(tmp_path, capfd):
    arguments = ["--multirun", *TINY, "trainer=ddp", "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    code, _, err = command("train", arguments, capfd)
    assert code == 2
    assert "trainer.devices=1" in err

"""Two processes train and validate the same run as one."""

import csv
import subprocess
import sys

import pytest
import torch
from command import ROOT, TINY, command, train

pytestmark = pytest.mark.ddp


# or Adam scales up the rounding of biases that have no gradient, which is another where sums are cut into parts
QUIET = "optimizer.eps=1e-4"


def _rows(folder, name):
    with (folder / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


def _run(folder, *arguments, code=0):
    tiny = [a for a in TINY if a not in ("trainer=cpu", "trainer.val_every=0")]
    if any(a.startswith("callbacks.samples.") for a in arguments):
        tiny.remove("callbacks.samples=null")
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
    assert done.returncode == code, done.stderr[-3000:]
    return done


def test_one_and_two_processes_train_the_same_run(tmp_path):
    """The losses of 20 steps, and of the averaged weights in validation; also where the two are stopped and resumed. The times
    are drawn by importance, so that every process must know the losses of all."""
    one, begun, two = tmp_path / "one", tmp_path / "begun", tmp_path / "two"
    importance = ("times=importance", "times.history=2", "schedule.steps=4", "sampler.steps=4", "weighting=vlb", QUIET)
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


def test_weights_cut_over_two_processes_train_the_same_run(tmp_path, capfd):
    """FSDP, with dropped labels, self-conditioning and parts of a batch: what two processes began and one goes on with, and
    the other way round, has the losses, weights, averages and moments of one that did all. Samples are drawn on the way."""
    run = (
        "condition=label",
        "model.self_conditioning=true",
        "trainer.accumulate_grad_batches=2",
        "callbacks.ema.decay=0.9",
        "model.width=16",
        QUIET,
    )
    cut = ("trainer=fsdp", "trainer.accelerator=cpu")
    train(tmp_path / "one", *run, "trainer.max_steps=20", capfd=capfd)
    train(tmp_path / "half", *run, "trainer.max_steps=10", capfd=capfd)
    begun = _run(
        tmp_path / "begun",
        *run,
        *cut,
        "trainer.max_steps=10",
        "callbacks.samples.every=10",
        "callbacks.samples.n=2",
        "sampler.steps=2",
    )
    assert "2 processes" in begun.stdout
    assert (tmp_path / "begun" / "samples" / "step_0000010.png").is_file()
    train(tmp_path / "parted", f"ckpt={tmp_path / 'begun'}", "trainer.max_steps=20", "trainer=cpu", capfd=capfd)
    _run(tmp_path / "joined", f"ckpt={tmp_path / 'half'}", "trainer.max_steps=20", *cut)
    want, losses = (
        torch.load(tmp_path / "one" / "checkpoints" / "last.ckpt", weights_only=True),
        _rows(tmp_path / "one", "train/loss"),
    )
    for name in ("parted", "joined"):
        for step in range(11, 21):
            assert _rows(tmp_path / name, "train/loss")[step] == pytest.approx(losses[step], rel=1e-5), (name, step)
        got = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        for part in ("state_dict", "ema"):
            torch.testing.assert_close(got[part], want[part], rtol=1e-4, atol=1e-6)
        got, held = (c["optimizer_states"][0]["state"] for c in (got, want))
        torch.testing.assert_close(got, held, rtol=1e-3, atol=1e-6)


def test_spawned_processes_train_the_same_run_and_bring_back_how_it_ended(tmp_path, capfd):
    """What a spawned process knows is lost with it, unless it is in a file or in shared memory."""
    spawned = ("trainer=ddp_spawn", "trainer.accelerator=cpu")
    train(tmp_path / "one", QUIET, "callbacks.ema.decay=0.9", "trainer.max_steps=4", capfd=capfd)
    done = _run(tmp_path / "two", *spawned, QUIET, "trainer.max_steps=4")
    assert "2 processes" in done.stdout
    assert "4 steps done" in done.stdout
    one, two = (torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("one", "two"))
    torch.testing.assert_close(two["ema"], one["ema"], rtol=1e-4, atol=1e-6)
    lost = _run(tmp_path / "lost", *spawned, "optimizer.lr=1e30", "callbacks.ema.decay=0", code=1)
    assert "the loss is no number since step" in lost.stderr
    assert "Traceback" not in lost.stderr
    assert not (tmp_path / "lost" / "checkpoints" / "last.ckpt").exists()


def test_a_sweep_with_several_processes_is_refused(tmp_path, capfd):
    arguments = ["--multirun", *TINY, "trainer=ddp", "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    code, _, err = command("train", arguments, capfd)
    assert code == 2
    assert "trainer.devices=1" in err

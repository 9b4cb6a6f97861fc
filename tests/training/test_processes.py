"""Two processes train and validate the same run as one."""

import csv

import pytest
import together
import torch
from command import TINY, code, command, train

pytestmark = [pytest.mark.ddp, pytest.mark.integration]


# keeps Adam from amplifying rounding errors of biases with zero gradient, which differ where sums are split
QUIET = "optimizer.eps=1e-4"


def _rows(folder, name):
    with (folder / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


def _short(folder, *arguments):
    """Return the arguments of a run of 20 steps, or of a resumed one."""
    tiny = [a for a in TINY if a not in ("trainer=cpu", "validation.every=0")]
    if any(a.startswith("callbacks.samples.") for a in arguments):
        tiny.remove("callbacks.samples=null")
    tiny += ["trainer.max_steps=20", "validation.every=10", "callbacks.ema.decay=0.9"]
    resumed = any(a.startswith("ckpt=") for a in arguments)
    return [*([] if resumed else tiny), f"hydra.run.dir={folder}", *arguments]


def test_one_and_two_processes_train_the_same_run(tmp_path):
    """Training losses of 20 steps and validation losses of the averages are equal, also if the two are stopped and resumed.
    Times are drawn by importance sampling, which needs the losses gathered from all processes."""
    printed, one, begun, two = (tmp_path / name for name in ("printed", "one", "begun", "two"))
    importance = (
        "time_sampler=importance",
        "time_sampler.history=2",
        "schedule.steps=4",
        "sampler.steps=4",
        "weighting=vlb",
        QUIET,
    )
    assert code("train", _short(one, *importance, "trainer=cpu")) == 0
    cut = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_steps=10")
    together.train(printed, _short(begun, *importance, *cut))
    assert "2 processes" in together.train(
        printed, _short(two, f"ckpt={begun}", "trainer.max_steps=20"), by=together.srun
    )
    for name in ("train/loss", "val/loss"):
        a, b = _rows(one, name), {**_rows(begun, name), **_rows(two, name)}
        assert a.keys() == b.keys()
        assert len(a) == (20 if name == "train/loss" else 2)
        for step in a:
            assert b[step] == pytest.approx(a[step], rel=1e-5), (name, step)
    history = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["times"] for run in (one, two)]
    torch.testing.assert_close(history[1], history[0], rtol=1e-5, atol=0)
    assert len(list(tmp_path.iterdir())) == 4  # the second process creates no run folder


def test_weights_cut_over_two_processes_train_the_same_run(tmp_path, capfd):
    """FSDP with label dropout, self-conditioning and gradient accumulation: a run started on two processes and resumed on
    one, and the reverse, equals a single-process run in losses, weights, averages and moments."""
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
    grids = ("callbacks.samples.every=10", "callbacks.samples.n=2", "sampler.steps=2")
    begun = _short(tmp_path / "begun", *run, *cut, *grids, "trainer.max_steps=10")
    assert "2 processes" in together.train(tmp_path / "printed", begun)
    assert (tmp_path / "begun" / "samples" / "step_0000010.png").is_file()
    train(tmp_path / "parted", f"ckpt={tmp_path / 'begun'}", "trainer.max_steps=20", "trainer=cpu", capfd=capfd)
    joined = _short(tmp_path / "joined", f"ckpt={tmp_path / 'half'}", "trainer.max_steps=20", *cut)
    together.train(tmp_path / "printed", joined)
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


def test_spawned_processes_begin_the_same_run_and_bring_back_how_it_ended(tmp_path, capfd):
    """The state of a spawned process is lost when it exits, unless it is in a file or in shared memory."""
    one, lost = tmp_path / "one", tmp_path / "lost"
    train(one, "trainer.max_steps=1", capfd=capfd)
    spawned = ("trainer=ddp_spawn", "trainer.accelerator=cpu", "optimizer.lr=1e9", "callbacks.ema.decay=0")
    ended, out, err = command("train", _short(lost, *spawned), capfd)
    assert ended == 1
    assert "2 processes" in out
    assert "error: training loss is NaN or Inf since step" in err
    assert not (lost / "checkpoints" / "last.ckpt").exists()
    assert _rows(lost, "train/loss")[1] == pytest.approx(_rows(one, "train/loss")[1], rel=1e-5)


def test_a_sweep_with_several_processes_is_refused(tmp_path, capfd):
    arguments = ["--multirun", *TINY, "trainer=ddp", "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    code, _, err = command("train", arguments, capfd)
    assert code == 2
    assert "trainer.devices=1" in err

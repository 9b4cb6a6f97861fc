"""Whole runs: resumed, interrupted, accumulated, fine-tuned, swept. The smallest network, seconds each."""

import contextlib
import csv
import os
import re
import signal
import threading

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from command import TINY, command, composed, train
from faults.runs import assert_equal
from PIL import Image

from diffusion_lab.checkpoint import load_checkpoint
from diffusion_lab.commands.train import build
from diffusion_lab.noise import normal
from diffusion_lab.training.callbacks import GracefulStop
from diffusion_lab.training.callbacks.samples import is_due

pytestmark = pytest.mark.integration  # commands and trainings of seconds


def _state(path):
    return torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)


def _losses(path):
    with (path / "metrics.csv").open() as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}


class StopAt(pl.Callback):
    """Ends a run after `step` steps."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.should_stop = True


class SignalInValidation(pl.Callback):
    """Sends SIGTERM when the first validation starts."""

    def on_validation_start(self, *_):
        os.kill(os.getpid(), signal.SIGTERM)


class Start(pl.Callback):
    """Starts a timer with the first step."""

    def __init__(self, timer):
        self.timer = timer

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 1:
            self.timer.start()


@pytest.fixture
def also(monkeypatch):
    """`with also(callback):` adds a callback to the runs inside."""

    @contextlib.contextmanager
    def adding(callback):
        with monkeypatch.context() as patch:
            original = build.callbacks
            patch.setattr(build, "callbacks", lambda *given: [*original(*given), callback])
            yield

    return adding


VALIDATED = ("validation.every=3", "callbacks.checkpoints.every=1000")


# Times that depend on the losses before: with four nodes and a short history from the second step on.
IMPORTANCE = (
    "time_sampler=importance",
    "time_sampler.history=2",
    "schedule.steps=4",
    "sampler.steps=4",
    "weighting=vlb",
)


@pytest.mark.parametrize(("accumulate", "times"), [(1, ()), (2, IMPORTANCE)])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, capfd, also, accumulate, times):
    """With dropout, validation, accumulation, warm-up and a decaying rate: weights, averages, optimiser, losses, best score,
    and what importance sampling has learned."""
    options = (
        *times,
        *VALIDATED, "model.dropout=0.3", "lr_scheduler=cosine", "lr_scheduler.warmup=2", "trainer.max_steps=8",
        f"trainer.accumulate_grad_batches={accumulate}", "callbacks.ema.decay=[0.9,0.99]",
    )  # fmt: skip
    whole, first, second = tmp_path / "whole", tmp_path / "first", tmp_path / "second"
    train(whole, *options, capfd=capfd)
    with also(StopAt(5)):  # as a signal would, after 5 of the 8 steps
        train(first, *options, capfd=capfd)
    train(second, f"ckpt={first}", capfd=capfd)
    one, two = _state(whole), _state(second)
    assert one["global_step"] == two["global_step"] == 8
    for key in ("state_dict", "ema", "optimizer_states", "lr_schedulers", "times"):
        assert_equal(one[key], two[key], key)
    assert bool(one["times"]) == bool(times)
    if times:
        assert int(one["times"]["counts"].sum()) == 8 * 16
    assert _losses(whole) == _losses(second)  # the rows before the stop are carried over
    assert one["callbacks"]["Checkpoints"] == two["callbacks"]["Checkpoints"]


def _mean(losses, first, last):
    return pytest.approx(sum(losses[step] for step in range(first, last + 1)) / (last - first + 1), rel=1e-6)


def test_every_run_logs_the_steps_after_its_last_row(tmp_path, capfd, also):
    """However it ends, and although it is shorter than an interval. A resumed run has the rows of an uninterrupted one."""
    rare = ("trainer.log_every_n_steps=3", "data.val=0")
    train(tmp_path / "each", "trainer.max_steps=8", "data.val=0", capfd=capfd)
    each = _losses(tmp_path / "each")
    train(tmp_path / "short", *rare, "trainer.max_steps=2", capfd=capfd)
    assert _losses(tmp_path / "short") == {2: _mean(each, 1, 2)}
    with also(StopAt(5)):
        train(tmp_path / "stopped", *rare, "trainer.max_steps=8", capfd=capfd)
    assert _losses(tmp_path / "stopped") == {3: _mean(each, 1, 3), 5: _mean(each, 4, 5)}
    train(tmp_path / "resumed", f"ckpt={tmp_path / 'stopped'}", capfd=capfd)
    whole = {3: _mean(each, 1, 3), 6: _mean(each, 4, 6), 8: _mean(each, 7, 8)}
    assert _losses(tmp_path / "resumed") == whole


def test_a_run_that_a_signal_ends_in_its_first_validation_logs_its_steps(tmp_path, capfd, also):
    options = ("trainer.max_steps=8", "trainer.log_every_n_steps=50", "validation.every=2")
    with also(SignalInValidation()):
        got, _, err = command("train", [*TINY, *options, f"hydra.run.dir={tmp_path / 'run'}"], capfd)
    assert got == 143, err
    assert list(_losses(tmp_path / "run")) == [2]


def test_a_resumed_run_may_change_the_memory_format(tmp_path, capfd):
    """Adam's moments are read beside the weights, in the order of memory: they follow the weights' format."""
    half = ("model.channels_last=true", "trainer.max_steps=4")
    train(tmp_path / "half", *half, capfd=capfd)
    for name, channels_last in (("same", "true"), ("other", "false")):
        again = (f"ckpt={tmp_path / 'half'}", "trainer.max_steps=8", f"model.channels_last={channels_last}")
        train(tmp_path / name, *again, capfd=capfd)
    same, other = _losses(tmp_path / "same"), _losses(tmp_path / "other")
    assert len(same) == 8  # those of the first run included
    assert other == pytest.approx(same, rel=1e-5)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_bf16_trains_near_float32(tmp_path, capfd, clip):
    """With and without clipping, which Lightning refuses a fused optimiser: losses within 2 %, of bf16's 8 bits."""
    runs = {}
    for precision in ("32-true", "bf16-mixed"):
        asked = (f"trainer.precision={precision}", f"trainer.gradient_clip_val={clip}", "trainer.max_steps=4")
        train(tmp_path / precision, *asked, capfd=capfd)
        runs[precision] = _losses(tmp_path / precision)
    assert len(runs["bf16-mixed"]) == 4
    assert runs["bf16-mixed"] == pytest.approx(runs["32-true"], rel=0.02)
    assert runs["bf16-mixed"] != runs["32-true"]


def test_the_best_checkpoint_is_resumed_as_exactly(tmp_path, capfd):
    """It is written in the middle of a validation, which Lightning's loops must not run again or skip."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    train(whole, "validation.every=3", "trainer.max_steps=8", "callbacks.ema.decay=0.5", capfd=capfd)
    best = whole / "checkpoints" / "best.ckpt"
    step = torch.load(best, weights_only=True)["global_step"]
    assert step in (3, 6)
    train(again, f"ckpt={best}", capfd=capfd)
    one, two = _state(whole), _state(again)
    for key in ("state_dict", "ema", "optimizer_states", "lr_schedulers"):
        assert_equal(one[key], two[key], key)
    assert _losses(whole) == _losses(again)
    assert one["callbacks"]["Checkpoints"] == two["callbacks"]["Checkpoints"]


def test_accumulated_parts_train_the_same_run(tmp_path, capfd):
    """Importance sampling learns once a step, from all its parts."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, *IMPORTANCE, "trainer.max_steps=6", capfd=capfd)
    train(parts, *IMPORTANCE, "trainer.max_steps=6", "trainer.accumulate_grad_batches=4", capfd=capfd)
    one, four = _losses(whole), _losses(parts)
    torch.testing.assert_close(_state(parts)["times"], _state(whole)["times"], rtol=1e-5, atol=0)
    assert one.keys() == four.keys() == set(range(1, 7))
    for step in one:
        assert four[step] == pytest.approx(one[step], rel=1e-5)


def test_resuming_takes_the_configuration_of_the_checkpoint_and_overrides_on_top(tmp_path, capfd):
    first, second = tmp_path / "first", tmp_path / "second"
    train(first, "trainer.max_steps=2", "schedule=linear", "schedule.steps=50", "seed=7", capfd=capfd)
    code, _, err = command(
        "train", [f"ckpt={first}", f"hydra.run.dir={second}", "trainer.max_steps=4", "optimizer.lr=1e-5"], capfd
    )
    assert code == 0, err
    config = _state(second)["config"]
    assert config["schedule"]["_target_"].endswith(".Linear")
    assert (config["schedule"]["steps"], config["seed"]) == (50, 7)
    assert (config["trainer"]["max_steps"], config["optimizer"]["lr"]) == (4, 1e-5)
    assert config["callbacks"]["samples"] is None
    group = _state(second)["optimizer_states"][0]["param_groups"][0]
    assert (group["initial_lr"], group["lr"]) == (1e-5, 1e-5)


def test_a_run_leaves_what_it_promises_and_samples_from_it(tmp_path, capfd):
    run, out = tmp_path / "run", tmp_path / "out"
    outcome = train(
        run, "trainer.max_steps=4", "validation.every=2", "callbacks.ema.decay=0.9",
        "callbacks.samples={_target_: diffusion_lab.training.callbacks.Samples, folder: samples, every: 2, n: 4, sampler: "
        "{_target_: diffusion_lab.samplers.DDIM, steps: 3}, clip: '${clip}'}", "clip=none",
        capfd=capfd,
    )  # fmt: skip
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert sorted(p.name for p in (run / "samples").iterdir()) == [
        "data.png", "step_0000002.png", "step_0000004.png"
    ]  # fmt: skip
    assert (run / ".hydra" / "config.yaml").is_file()
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"step", "train/loss", "val/loss"} <= set(rows[0])
    assert "sample.py ckpt=" in outcome.out
    code, _, err = command("sample", [f"ckpt={run}", "n=5", "sampler.steps=3", f"out={out}", "batch_size=2"], capfd)
    assert code == 0, err
    assert sorted(p.name for p in out.iterdir()) == ["config.yaml", "grid.png", "images", "samples.npz"]
    assert len(list((out / "images").iterdir())) == 5


class FilesBeforeStep(pl.Callback):
    """Records the files of the run's grids before each step."""

    def __init__(self, folder):
        self.folder, self.files = folder, {}

    def on_train_batch_start(self, trainer, *_):
        self.files[trainer.global_step] = sorted(p.stem for p in self.folder.iterdir())


def test_grids_come_early_and_the_data_before_the_first_step(tmp_path, capfd, also):
    """At step 100, long before `every`, and at the end; the progress bar has the time left."""
    files = FilesBeforeStep(tmp_path / "run" / "samples")
    grids = "{_target_: diffusion_lab.training.callbacks.Samples, folder: samples, every: 5000, n: 4, strip: null, "
    grids += "sampler: {_target_: diffusion_lab.samplers.DDIM, steps: 1}}"
    with also(files):
        outcome = train(
            tmp_path / "run", "trainer.max_steps=102", "trainer.log_every_n_steps=50", f"callbacks.samples={grids}",
            "callbacks.progress={_target_: diffusion_lab.training.callbacks.Progress}", capfd=capfd,
        )  # fmt: skip
    assert files.files[0] == ["data"]
    new = [step for step in files.files if step and len(files.files[step]) > len(files.files[step - 1])]
    assert new == [100]
    assert max(p.stem for p in files.folder.iterdir()) == "step_0000102"
    assert f"look at  {files.folder / 'data.png'}: training images after crop and resize" in outcome.out
    assert re.search(r"102/102 steps, \d\d:\d\d passed, about 00:00 left, loss=0\.\d+", outcome.err)

    data = build.data(composed("train"))
    data.setup()
    images = {image.tobytes() for image in np.asarray(data.images("train"))}
    with Image.open(files.folder / "data.png") as picture:
        pixels = np.asarray(picture)[27:, 14:]  # below the caption, right of the margin
    corners = [(y, x) for y in (0, 42) for x in (0, 42)]  # four tiles of 8×8, enlarged by 5, with gaps of 2
    shown = [pixels[y : y + 40 : 5, x : x + 40 : 5, 0].tobytes() for y, x in corners]
    assert set(shown) <= images
    assert len(set(shown)) == 4


@pytest.mark.parametrize(("every", "steps"), [(800, [100, 200, 400, 800, 1600, 2400]), (90, [90, 180]), (1, [1, 2, 3])])
def test_grids_are_due_at_doubled_steps_and_at_multiples(every, steps):
    assert [step for step in range(steps[-1] + 1) if is_due(step, every)] == steps


def test_ema_and_best_are_of_the_averaged_weights(tmp_path, capfd):
    run = tmp_path / "run"
    train(run, "trainer.max_steps=4", "validation.every=2", "callbacks.ema.decay=0.9", capfd=capfd)
    state = _state(run)
    live = {k.removeprefix("network."): v for k, v in state["state_dict"].items()}
    assert live.keys() == state["ema"]["0.9"].keys()
    assert any(not torch.equal(live[k], v) for k, v in state["ema"]["0.9"].items())
    ema, raw = load_checkpoint(run, weights=0.9), load_checkpoint(run, weights="raw")
    assert (ema.weights, raw.weights) == ("ema 0.9", "raw")
    assert_equal(dict(ema.denoiser.network.state_dict()), dict(state["ema"]["0.9"]))
    assert_equal(dict(raw.denoiser.network.state_dict()), live)


def test_sampling_does_not_depend_on_the_batch_size(tmp_path, capfd):
    run = tmp_path / "run"
    train(run, "trainer.max_steps=1", capfd=capfd)
    loaded = load_checkpoint(run)
    whole, parts = loaded.sample(7, seed=3), loaded.sample(7, seed=3, batch_size=3)
    assert torch.allclose(whole, parts, atol=1e-4)
    assert not torch.allclose(whole, loaded.sample(7, seed=4), atol=1e-2)
    assert whole.dtype == torch.float32
    assert float(whole.abs().max()) <= 1
    index = torch.arange(7)
    assert torch.equal(normal((1, 8, 8), seed=3, index=index)[3:5], normal((1, 8, 8), seed=3, index=index[3:5]))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_prints_the_line_that_resumes(tmp_path, capfd, also, number, code):
    run = tmp_path / "run"
    timer = threading.Timer(0.5, os.kill, (os.getpid(), number))
    arguments = [*TINY, "trainer.max_steps=100000", "callbacks.checkpoints.every=100000", f"hydra.run.dir={run}"]
    with also(Start(timer)):  # with the first step: the signal must not arrive while the run is still being built
        got, out, err = command("train", arguments, capfd)
    assert got == code, err
    step = _state(run)["global_step"]
    assert 0 < step < 100000
    assert f"ckpt={run / 'checkpoints' / 'last.ckpt'}" in out
    assert not isinstance(getattr(signal.getsignal(number), "__self__", None), GracefulStop)
    again = tmp_path / "again"
    train(again, f"ckpt={run}", f"trainer.max_steps={step + 1}", capfd=capfd)
    assert _state(again)["global_step"] == step + 1


def test_a_time_limit_saves_and_prints_the_line_that_resumes(tmp_path, capfd):
    run = tmp_path / "run"
    outcome = train(run, "trainer.max_steps=100000", "trainer.max_time='00:00:00:02'", capfd=capfd)
    assert 0 < _state(run)["global_step"] < 100000
    assert "resume" in outcome.out


def test_fine_tuning_begins_with_the_averaged_weights_and_takes_other_classes(tmp_path, capfd):
    first, second = tmp_path / "first", tmp_path / "second"
    train(first, "trainer.max_steps=2", "condition=label", "callbacks.ema.decay=0.5", capfd=capfd)
    train(second, f"init={first}", "trainer.max_steps=1", "optimizer.lr=1e-30", "optimizer.weight_decay=0", capfd=capfd)
    begun, ema = _state(second)["state_dict"], _state(first)["ema"]["0.5"]
    shared = [key for key in ema if "label" not in key]
    assert shared
    for key in shared:
        assert torch.allclose(begun[f"network.{key}"], ema[key], rtol=0, atol=1e-25)
    assert not any("label" in key for key in begun)


def test_conditional_samples_take_the_labels_asked_for(tmp_path, capfd):
    run, out = tmp_path / "run", tmp_path / "out"
    train(run, "trainer.max_steps=1", "condition=label", capfd=capfd)
    arguments = [f"ckpt={run}", "n=5", "labels=[3,1]", "sampler.steps=2", f"out={out}", "save_images=false"]
    assert command("sample", arguments, capfd).code == 0
    import numpy as np

    with np.load(out / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (5, 8, 8, 1)
        assert arrays["arr_1"].tolist() == [3, 1, 3, 1, 3]
    bad = command("sample", [f"ckpt={run}", "labels=[10]", f"out={tmp_path / 'bad'}"], capfd)
    assert bad.code == 2
    assert "0 … 9" in bad.err


def test_a_sweep_runs_every_combination(tmp_path, capfd):
    sweep = tmp_path / "sweep"
    arguments = ["--multirun", *TINY, "trainer.max_steps=1", "schedule=linear,cosine", "objective=pred_noise,pred_v"]
    code, _, err = command("train", [*arguments, f"hydra.sweep.dir={sweep}"], capfd)
    assert code == 0, err
    got = {
        (c["schedule"]["_target_"].rsplit(".", 1)[-1], c["objective"]["_target_"].rsplit(".", 1)[-1])
        for c in (_state(sweep / str(i))["config"] for i in range(4))
    }
    assert got == {("Linear", "PredNoise"), ("Linear", "PredV"), ("Cosine", "PredNoise"), ("Cosine", "PredV")}

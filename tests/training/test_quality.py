"""QualityMonitor: its figure is that of evaluate.py, selects best.ckpt, and is prepared before the first step."""

import csv
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from command import ROOT, TINY, command, train
from quick_classifier import install

from diffusion_lab.commands.train import build
from diffusion_lab.metrics import extractors
from diffusion_lab.training.callbacks import Checkpoints, QualityMonitor

# Every 2 steps on 70 samples by 2 steps, at whatever cost.
QUALITY = (
    "quality=classifier",
    "callbacks.quality.every=2",
    "callbacks.quality.n=70",
    "callbacks.quality.batch_size=16",
    "callbacks.quality.share=1",
    "sampler.steps=2",
    "callbacks.ema.decay=0.5",
    "condition=label",
)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    install(folder)
    return f"callbacks.quality.cache={folder}"


def figures(folder, name="fd_classifier_70"):
    with (folder / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


@pytest.mark.integration
def test_the_figure_is_logged_decides_best_and_is_evaluate_s(tmp_path, cache, capfd):
    run, again, out = tmp_path / "run", tmp_path / "again", tmp_path / "out"
    outcome = train(run, *QUALITY, cache, "trainer.max_steps=5", capfd=capfd)
    logged = figures(run)
    assert sorted(logged) == [2, 4, 5]  # and at the last step
    assert sorted(figures(run, "confident_fraction_70")) == [2, 4, 5]
    assert "fd_classifier_70 every 2 steps (DDIM, train+val): about" in outcome.out
    assert "MiB each time" in outcome.out
    assert f"fd_classifier_70 {logged[5]:.4g}, best {min(logged.values()):.4g}" in outcome.out
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert logged[best["global_step"]] == min(logged.values())
    assert best["callbacks"]["Checkpoints"]["monitor"] == "quality"
    folder = cache.split("=")[1]
    evaluation = [f"ckpt={run}", f"cache={folder}", "n=70", "steps=[2]", "batch_size=16", f"out={out}", "device=cpu"]
    assert command("evaluate", evaluation, capfd).code == 0
    (row,) = json.loads((out / "metrics.json").read_text())
    assert row["metrics"]["fd_classifier"] == pytest.approx(logged[5], rel=1e-5)  # the last step's averaged weights
    train(again, f"ckpt={run}", f"+{cache}", "trainer.max_steps=6", capfd=capfd)
    resumed = torch.load(again / "checkpoints" / "last.ckpt", weights_only=True)
    assert resumed["callbacks"]["Checkpoints"]["best"] == pytest.approx(min(*logged.values(), *figures(again).values()))


@pytest.mark.integration
def test_clip_none_is_no_threshold_for_the_callbacks_and_the_commands(tmp_path, cache, capfd):
    """Grids, quality and evaluate.py sample without clipping, by the same figure; it is another one with clipping."""
    run, out = tmp_path / "run", tmp_path / "out"
    tiny = [a for a in TINY if a != "callbacks.samples=null"]
    grids = ["callbacks.samples.every=2", "callbacks.samples.n=4"]
    arguments = [*tiny, *QUALITY, *grids, cache, "clip=none", "trainer.max_steps=2", f"hydra.run.dir={run}"]
    assert command("train", arguments, capfd).code == 0
    assert (run / "samples" / "step_0000002.png").is_file()
    (figure,) = figures(run).values()
    evaluation = [f"ckpt={run}", f"cache={cache.split('=')[1]}", "n=70", "steps=[2]", "batch_size=16", "device=cpu"]
    evaluated = {}
    for clip, limit in (("none", []), ("static", ["clip.limit=0.1"])):
        arguments = [*evaluation, f"clip={clip}", *limit, f"out={out / clip}"]
        assert command("evaluate", arguments, capfd).code == 0
        (row,) = json.loads((out / clip / "metrics.json").read_text())
        evaluated[row["checkpoint"]["clip"]] = row["metrics"]["fd_classifier"]
        assert row["checkpoint"]["guidance"] is None
    assert evaluated["NoThreshold"] == pytest.approx(figure, rel=1e-5)
    assert evaluated["StaticThreshold"] != pytest.approx(figure, rel=1e-3)


@pytest.mark.integration
def test_a_run_with_it_trains_the_very_same_weights(tmp_path, cache, capfd):
    with_it, without = tmp_path / "with", tmp_path / "without"
    train(with_it, *QUALITY, cache, "trainer.max_steps=4", capfd=capfd)
    plain = [a for a in QUALITY if "quality" not in a]
    train(without, *plain, "trainer.max_steps=4", capfd=capfd)
    one, two = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (with_it, without))
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name])


def test_missing_requirements_are_refused_before_the_first_step(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "*")
    nowhere = dataclasses.replace(extractors.WEIGHTS, urls=("http://127.0.0.1:9/weights.pth",))
    monkeypatch.setattr(extractors, "WEIGHTS", nowhere)
    for i, (arguments, remedies) in enumerate(
        (
            (("quality=inception",), (extractors.WEIGHTS.name, str(tmp_path / "torch"), "http://127.0.0.1:9/")),
            (("quality=classifier", "data.num_classes=0"), ("labeled data set",)),
            (("quality=classifier", "callbacks.quality.split=tests"), ("split=tests",)),
            (("quality=classifier", "callbacks.quality.n=1"), ("an integer in [2, 10000000]",)),
        )
    ):
        run = tmp_path / f"run{i}"
        outcome = command("train", [*TINY, "trainer.max_steps=1", f"hydra.run.dir={run}", *arguments], capfd)
        assert outcome.code == 2
        assert all(remedy in outcome.err for remedy in remedies), outcome.err
        assert not (run / "checkpoints").exists()
        assert not (run / "metrics.csv").exists()


@pytest.mark.integration
def test_evaluations_that_would_take_too_much_of_the_time_are_warned_of(tmp_path, cache, capfd):
    quality = [a for a in QUALITY if "share" not in a]
    with pytest.warns(UserWarning, match=r"of the time: write callbacks\.quality\.every="):
        train(tmp_path / "run", *quality, cache, "trainer.max_steps=1", capfd=capfd)


@pytest.mark.integration
def test_an_evaluation_of_a_network_that_diverges_ends_no_training(tmp_path, cache, capfd):
    diverging = (*QUALITY, cache, "trainer.max_steps=2", "optimizer.lr=1e9", "trainer.gradient_clip_val=0")
    warning = "no fd_classifier_70 at step 2: .*image 0: the network returned NaN or infinity"
    with pytest.warns(UserWarning, match=warning):
        outcome = command("train", [*TINY, *diverging, f"hydra.run.dir={tmp_path / 'run'}"], capfd)
    assert "2 steps done" in outcome.out
    assert outcome.code == 1  # the last loss is NaN
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()  # such weights are not kept


@pytest.mark.integration
@pytest.mark.ddp
def test_two_processes_log_the_same_figure(tmp_path, cache, capfd):
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, *QUALITY, cache, "trainer.max_steps=2", capfd=capfd)
    ddp = [*(a for a in TINY if a != "trainer=cpu"), "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    line = [
        sys.executable,
        str(ROOT / "src" / "train.py"),
        *ddp,
        *QUALITY,
        cache,
        "trainer.max_steps=2",
        f"hydra.run.dir={two}",
    ]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = figures(one), figures(two)
    assert a.keys() == b.keys() == {2}
    assert b[2] == pytest.approx(a[2], rel=1e-4)  # the weights differ in their last bits
    assert (two / "checkpoints" / "best.ckpt").is_file()


def test_the_best_of_another_figure_is_no_bar():
    checkpoints = Checkpoints("somewhere", monitor="quality")
    checkpoints.load_state_dict({"best": 0.1, "monitor": "val/loss"})
    assert checkpoints.best is None
    checkpoints.load_state_dict({"best": 4.2, "monitor": "quality"})
    assert checkpoints.best == 4.2


def test_the_default_run_has_none():
    from command import composed

    assert not any(isinstance(c, QualityMonitor) for c in build.callbacks(composed("train"), ROOT))
    assert any(isinstance(c, QualityMonitor) for c in build.callbacks(composed("train", "quality=classifier"), ROOT))

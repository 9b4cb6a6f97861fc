"""What a user adds by `+key=` or `_target_=`: flags of Lightning's Trainer, loggers, callbacks; unknown keys are rejected."""

import csv
import inspect
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec

import offline_wandb
import pytest
import pytorch_lightning as pl
import torch
from command import ROOT, TINY, command, composed, train
from training.recorders import Watcher

from diffusion_lab.commands.train import build
from diffusion_lab.commands.train.trainer import build_trainer
from diffusion_lab.errors import ConfigError

MINE = "+callbacks.mine._target_=pytorch_lightning.callbacks."
WITHOUT_LOGGER = tuple(a for a in TINY if a != "logger=csv")
WANDB = ("logger=[csv,wandb]", "logger.wandb.mode=offline")


def weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def refused(run, remedy, capfd, *arguments, tiny=TINY):
    code, _, err = command("train", [*tiny, "trainer.max_steps=2", f"hydra.run.dir={run}", *arguments], capfd)
    assert code == 2, err
    assert err.count("\n") == 1
    assert remedy in err
    assert not run.exists()


# flags of the trainer -------------------------------------------------------------------------------------------------------

FLAGS = {
    "accelerator": "cpu", "strategy": "auto", "devices": 1, "num_nodes": 1, "precision": "bf16-mixed", "fast_dev_run": True,
    "max_epochs": 3, "min_epochs": 1, "max_steps": 7, "min_steps": 2, "max_time": "00:00:01:00", "limit_train_batches": 2,
    "limit_val_batches": 0.5, "limit_test_batches": 2, "limit_predict_batches": 2, "overfit_batches": 1,
    "val_check_interval": 2, "check_val_every_n_epoch": 2, "num_sanity_val_steps": 1, "log_every_n_steps": 3,
    "enable_checkpointing": True, "enable_progress_bar": True, "enable_model_summary": True, "accumulate_grad_batches": 2,
    "gradient_clip_val": 0.5, "gradient_clip_algorithm": "value", "deterministic": "warn", "benchmark": True,
    "inference_mode": False, "use_distributed_sampler": True, "profiler": "simple", "detect_anomaly": True,
    "plugins": [{"_target_": "pytorch_lightning.plugins.environments.LightningEnvironment"}], "sync_batchnorm": True,
    "reload_dataloaders_every_n_epochs": 1, "default_root_dir": "elsewhere", "enable_autolog_hparams": False,
    "model_registry": "mine",
}  # fmt: skip
REFUSED_FLAGS = {
    "logger": (False, "group logger"),
    "callbacks": ([], "group callbacks"),
    "barebones": (True, "barebones=true is not supported"),
}


def built(config, folder):
    build.check_nodes(config)
    return build_trainer(config, folder, [], [])


ATTRIBUTES = {"max_epochs", "max_steps", "min_steps", "limit_train_batches", "limit_test_batches", "default_root_dir"}


def test_every_flag_of_the_trainer_has_a_case():
    """A new flag of Lightning's needs a value in FLAGS, or a reason in REFUSED_FLAGS."""
    assert set(inspect.signature(pl.Trainer).parameters) == FLAGS.keys() | REFUSED_FLAGS.keys()


@pytest.fixture
def with_flag(tmp_path):
    """with_flag(name, value): the trainer that the configuration with this flag builds."""

    def call(flag, value):
        config = composed("train", "trainer=cpu")
        return built({**config, "trainer": {**config["trainer"], flag: value}}, tmp_path)

    yield call
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("flag", sorted(FLAGS.keys() - ATTRIBUTES))
def test_a_flag_of_the_trainer_is_accepted(flag, with_flag):
    assert isinstance(with_flag(flag, FLAGS[flag]), pl.Trainer)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("flag", sorted(ATTRIBUTES))
def test_a_flag_of_the_trainer_is_passed_on(flag, with_flag):
    assert getattr(with_flag(flag, FLAGS[flag]), flag) == FLAGS[flag]


@pytest.mark.parametrize("flag", REFUSED_FLAGS)
def test_a_flag_of_the_trainer_is_refused_with_the_reason(flag, with_flag):
    value, reason = REFUSED_FLAGS[flag]
    with pytest.raises(ConfigError, match=reason):
        with_flag(flag, value)


def test_a_dry_run_leaves_no_checkpoint(tmp_path, capfd):
    arguments = ("+trainer.fast_dev_run=true", *WANDB, "trainer.max_steps=4", f"hydra.run.dir={tmp_path / 'run'}")
    shown = [a for a in WITHOUT_LOGGER if a not in ("callbacks.samples=null", "callbacks.progress=null")]
    code, out, err = command("train", [*shown, *arguments], capfd)
    assert code == 0, err
    assert "Traceback" not in err
    assert "1 steps done" in out
    assert not list((tmp_path / "run").rglob("*.ckpt"))


@pytest.mark.integration
def test_flags_that_cut_the_stream_train_the_same_run(tmp_path, capfd):
    options = ("trainer.max_steps=4", "validation.every=2", "model.dropout=0.3")
    train(tmp_path / "whole", *options, capfd=capfd)
    cut = ("+trainer.limit_train_batches=1", "+trainer.limit_val_batches=1", "+trainer.enable_progress_bar=true")
    train(tmp_path / "cut", *options, *cut, capfd=capfd)
    parts = ("+trainer.limit_train_batches=2", "trainer.profiler=simple")
    train(tmp_path / "parts", *options, *parts, "+trainer.max_time=00:00:10:00", capfd=capfd)
    whole, one, two = (weights(tmp_path / name) for name in ("whole", "cut", "parts"))
    assert all(torch.equal(value, one[name]) and torch.equal(value, two[name]) for name, value in whole.items())
    assert list((tmp_path / "parts").glob("*profile*.txt"))
    with (tmp_path / "cut" / "metrics.csv").open() as file:
        assert len([row for row in csv.DictReader(file) if row["val/loss"]]) == 2


def test_overfit_batches_shows_the_same_images_with_new_noise(tmp_path):
    config = composed("train", *TINY)
    config = {**config, "trainer": {**config["trainer"], "overfit_batches": 2}}
    data = build.data(config)
    data.trainer = build_trainer(config, tmp_path, [], [])
    data.setup()
    stream = data.train_dataloader()
    first, second, third = (stream.batch(step) for step in (0, 1, 2))
    assert torch.equal(first["image"], third["image"])
    assert not torch.equal(first["image"], second["image"])
    assert third["step"] == 2  # which keys t and the noise


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (("+trainer.limit_train_batches=0.5",), "write a number of batches"),
        (("+trainer.limit_train_batches=0",), "write at least 1"),
        (("+trainer.limit_train_batches=3", "trainer.accumulate_grad_batches=2"), "limit_train_batches=2"),
        (("+trainer.overfit_batches=0.1",), "write a number of batches"),
        (("+trainer.barebones=true",), "barebones=true is not supported"),
    ],
)
def test_flags_without_a_meaning_are_refused(arguments, remedy, tmp_path, capfd):
    refused(tmp_path / "run", remedy, capfd, *arguments)


# unknown keys ---------------------------------------------------------------------------------------------------------

UNREAD = {
    ("+foo=1",): "unknown key foo",
    ("+trainer.foo=1",): "Trainer has no argument foo",
    ("+logger.mine.foo=1",): "+logger.mine._target_=",
    ("+callbacks.ema.foo=1",): "EMA has no argument foo",
    ("+callbacks.samples.sampler.foo=1", "trainer.max_steps=1"): "a node with _target_ (Sampler)",
    ("+data.source.foo=1",): "Digits has no argument foo",
    ("+validation.foo=1",): "unknown key validation.foo",
    ("logger=none", "+logger.wandb.entity=x"): "logger.wandb has no _target_",
    ("+logger.mlflow._target_=no.such.Logger",): "cannot be imported",
    ("logger=wandb", "+logger.wandb.nonsense=1"): "has no argument nonsense",
    ("+callbacks.mine._target_=torch.nn.Identity",): "is not a callback",
    ("+logger.mine._target_=torch.nn.Identity",): "is not a logger",
}


@pytest.mark.parametrize(("arguments", "remedy"), UNREAD.items(), ids=lambda value: str(value)[:50])
def test_a_key_that_nothing_reads_is_refused(arguments, remedy, tmp_path, capfd):
    tiny = [
        a for a in TINY if a != "callbacks.samples=null" and not (a == "logger=csv" and "logger=" in str(arguments))
    ]
    refused(tmp_path / "run", remedy, capfd, *arguments, tiny=tiny)


@pytest.mark.integration
def test_a_key_that_nothing_reads_is_refused_on_resuming_and_in_sweeps(tmp_path, capfd):
    train(tmp_path / "first", "trainer.max_steps=1", capfd=capfd)
    for key in ("foo", "trainer.foo", "callbacks.ema.foo"):
        refused(tmp_path / "again", "foo", capfd, f"ckpt={tmp_path / 'first'}", f"+{key}=1", tiny=())
    sweep = tmp_path / "sweep"
    code, _, err = command(
        "train", ["--multirun", *TINY, "+foo=1,2", "trainer.max_steps=1", f"hydra.sweep.dir={sweep}"], capfd
    )
    assert code == 2, err
    assert not sweep.exists()
    jobs = ["--multirun", *TINY, "+trainer.foo=1", "seed=1,2", "trainer.max_steps=1", f"hydra.sweep.dir={sweep}"]
    code, out, err = command("train", jobs, capfd)
    assert code == 1, err
    assert "2 refused" in out
    assert err.count("Trainer has no argument foo") == 2


# loggers --------------------------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_loggers_by_their_class_each_write_and_wandb_receives_its_arguments(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "their_logger.py").write_text(
        "from pytorch_lightning.loggers import CSVLogger\n\n\nclass Theirs(CSVLogger):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    second = ("+logger.mine._target_=pytorch_lightning.loggers.CSVLogger", "+logger.mine.name=second")
    theirs = ("+logger.theirs._target_=their_logger.Theirs", "+logger.theirs.name=third", "+logger.theirs.version=a")
    run = tmp_path / "run"
    all_of_them = ("logger=[wandb,tensorboard]", "logger.wandb.mode=offline", "+logger.wandb.entity=team")
    code, _, err = command(
        "train",
        [*WITHOUT_LOGGER, *all_of_them, *second, *theirs, "trainer.max_steps=2", f"hydra.run.dir={run}"],
        capfd,
    )
    assert code == 0, err
    until = time.monotonic() + 20
    # W&B's service writes after `finish` has returned
    while offline_wandb.read(run).run is None and time.monotonic() < until:
        time.sleep(0.2)
    assert offline_wandb.read(run).run.entity == "team"
    assert list((run / "tensorboard").glob("events.out.tfevents*"))
    (other,) = (run / "second").rglob("metrics.csv")
    rows = [
        list(csv.DictReader(path.read_text().splitlines()))
        for path in (run / "metrics.csv", other, run / "third/a/metrics.csv")
    ]
    assert rows[0] == rows[1] == rows[2]
    assert len(rows[0]) == 2


# callbacks ------------------------------------------------------------------------------------------------------------------

CALLBACKS = {
    "EarlyStopping": ("monitor=val/loss", "stopping_threshold=1e9"),
    "LearningRateMonitor": ("logging_interval=step",),
    "ModelCheckpoint": ("every_n_train_steps=1", "filename='{step}'", "save_top_k=-1"),
    "TQDMProgressBar": (),
    "ModelSummary": ("max_depth=1",),
    "Timer": ("duration=00:01:00:00",),
    "DeviceStatsMonitor": (),
}


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # of ModelCheckpoint, in the new run folder
def test_callbacks_of_lightning_train_by_their_class_and_resume(tmp_path, capfd):
    added = [f"+callbacks.{name}._target_=pytorch_lightning.callbacks.{name}" for name in CALLBACKS]
    added += [f"+callbacks.{name}.{argument}" for name, arguments in CALLBACKS.items() for argument in arguments]
    run = tmp_path / "run"
    train(run, *added, "validation.every=2", "trainer.max_steps=4", capfd=capfd)
    stored = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert stored["global_step"] == 2  # EarlyStopping ended it
    assert [p.name for p in sorted(run.rglob("step=*.ckpt"))] == ["step=1.ckpt", "step=2.ckpt"]
    assert "lr-AdamW" in (run / "metrics.csv").read_text().splitlines()[0]
    trust = "trust=[pytorch_lightning.callbacks]"
    train(tmp_path / "again", f"ckpt={run}", trust, "+callbacks.EarlyStopping.stopping_threshold=-1", capfd=capfd)
    assert torch.load(tmp_path / "again" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("GradientAccumulationScheduler", "scheduling={0: 2}"), "accumulate_grad_batches="),
        (("StochasticWeightAveraging", "swa_lrs=1e-3"), "callbacks.ema.decay="),
        (("BatchSizeFinder",), "data.batch_size="),
        (("LearningRateFinder",), "optimizer.lr="),
        (("ModelCheckpoint", "save_last=true"), "save_last=false"),
        (("ModelCheckpoint", "filename=last"), "another filename"),
        (("ModelCheckpoint", "filename=best"), "another filename"),
        (("OnExceptionCheckpoint", "dirpath=x", "filename=last"), "another filename"),
        (("EarlyStopping", "monitor=val/loss"), "validation.every=500"),
        (("EarlyStopping", "foo=1"), "EarlyStopping has no argument foo"),
        pytest.param(
            ("RichProgressBar",),
            "not installed",
            marks=pytest.mark.skipif(find_spec("rich") is not None, reason="rich is installed"),
        ),
    ],
    ids=str,
)
def test_callbacks_that_cannot_be_are_refused_with_the_reason(arguments, reason, tmp_path, capfd):
    name, *rest = arguments
    refused(tmp_path / "run", reason, capfd, MINE + name, *(f"+callbacks.mine.{one}" for one in rest))


@pytest.mark.integration
def test_a_callback_of_the_user_sees_the_weights_that_are_trained_in_every_hook(tmp_path, capfd):
    watcher = ("+callbacks.mine._target_=training.recorders.Watcher", "+callbacks.mine.decay=0.9")
    options = ("callbacks.ema.decay=0.9", "validation.every=2", "trainer.max_steps=4", "callbacks.checkpoints.every=3")
    train(tmp_path / "run", *watcher, *options, capfd=capfd)
    assert set(Watcher.hooks) == {
        "on_train_start", "on_train_batch_end", "on_validation_start", "on_validation_batch_end", "on_validation_epoch_end",
        "on_validation_end", "on_save_checkpoint", "on_train_end",
    }  # fmt: skip
    assert Watcher.hooks.count("on_train_batch_end") == 4
    train(tmp_path / "apart", "callbacks.ema=null", *options[1:], capfd=capfd)  # without averages or the callback
    assert all(torch.equal(value, weights(tmp_path / "apart")[k]) for k, value in weights(tmp_path / "run").items())
    assert all(
        torch.equal(value, Watcher.final[k.removeprefix("network.")]) for k, value in weights(tmp_path / "run").items()
    )


# what a start imports -------------------------------------------------------------------------------------------------------

STOPPER = """
import json, os, sys
import pytorch_lightning as pl


class Stop(pl.Callback):
    def on_train_batch_start(self, *_):
        json.dump(sorted(sys.modules), open(os.environ["MODULES"], "w"))
        os._exit(0)
"""
BASE = """
import json, os, sys, pytorch_lightning, sklearn.datasets
json.dump(sorted(sys.modules), open(os.environ["MODULES"], "w"))
"""


@pytest.mark.integration
def test_the_first_step_imports_no_library_that_lightning_does_not(tmp_path):
    (tmp_path / "stopper.py").write_text(STOPPER)
    path = os.pathsep.join([str(ROOT / "src"), str(tmp_path), os.environ.get("PYTHONPATH", "")])
    modules = []
    for name, arguments in {
        "base": ["-c", BASE],
        "first": [
            str(ROOT / "src" / "train.py"), "logger=csv", "trainer=cpu", f"hydra.run.dir={tmp_path / 'run'}",
            "+callbacks.stop._target_=stopper.Stop",
        ],
    }.items():  # fmt: skip
        env = {**os.environ, "PYTHONPATH": path, "MODULES": str(tmp_path / f"{name}.json"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        modules.append({m.split(".")[0] for m in json.loads((tmp_path / f"{name}.json").read_text())})
    base, first = modules
    heavy = {"wandb", "tensorboard", "matplotlib", "torchvision", "torch_fidelity", "diffusers", "scipy", "pandas"}
    assert (first - base) & heavy == set()

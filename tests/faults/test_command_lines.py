"""A wrong command line is refused in one line, with exit code 2, before anything is written; one that is right works."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from command import TINY, Outcome, command

from .command_lines import drawn, other_lines, training_lines

FULL = os.environ.get("FAULTS") == "full"
LONG = "n" * 300


def refused(outcome: Outcome, folder: Path, line: Sequence[str]) -> None:
    """Assert that the command was refused in one line and left nothing in `folder`, its working folder."""
    errors = [text for text in outcome.err.splitlines() if text.strip()]
    assert outcome.code == 2, (line, outcome.err)
    assert len(errors) == 1, (line, errors)
    assert errors[0].startswith("error: "), (line, errors)
    assert list(folder.iterdir()) == [], line


def tiny(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with those of a training run of a step, which they may replace."""
    keys = [argument.lstrip("+~").split("=")[0] for argument in arguments]
    kept = [a for a in (*TINY, "trainer.max_steps=1") if not any(a.startswith((f"{key}=", f"{key}.")) for key in keys)]
    return [*kept, *arguments]


# One of each kind; the messages are those that the user sees.
EARLY = {
    ("train", "schedule=null"): "write one of cosine",
    ("train", "callbacks=null"): "names no option",
    ("train", "hydra/launcher=null"): "write one of basic",
    ("train", "logger=[3]"): "write one of csv",
    ("train", "--multirun", "seed=range(1,1)"): "has no values",
    ("train", f"seed={2**64}"): "[0, 18446744073709551615]",
    ("train", "seed=${oc.env:HOME}"): "write an integer",
    ("train", "run_dir=/tmp"): "hydra.run.dir=FOLDER",
    ("train", "run_dir=null"): "hydra.run.dir=FOLDER",
    ("train", "hydra.run.dir=/proc/x"): "cannot be written",
    ("train", f"hydra.run.dir={LONG}"): "name too long",
    ("train", "~trainer.max_steps"): "trainer.max_steps=VALUE",
    ("train", "~data.batch_size"): "data.batch_size=VALUE",
    ("sample", "ckpt=nowhere", "out=/proc/x"): "out=/proc/x cannot be written",
    ("sample", "ckpt=nowhere", "strength=2"): "(0, 1]",
    ("sample", f"ckpt={LONG}"): "name too long",
    ("export", "ckpt=nowhere", "out=/proc/x.safetensors"): "cannot be written",
    ("evaluate", "ckpt=nowhere", "steps=[1.5]"): "steps=[1.5]",
    ("evaluate", "ckpt=nowhere", "steps=[0]"): "[1, 100000]",
    ("fit_variance", "ckpt=nowhere", "ema=2"): "ema=2: write a number in [0, 1)",
}


@pytest.mark.parametrize(("line", "remedy"), EARLY.items(), ids=str)
def test_what_no_run_can_be_is_refused_before_the_imports(line, remedy, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = command(line[0], line[1:], capfd)
    refused(outcome, tmp_path, line)
    assert remedy in outcome.err


LATE = {
    ("trainer.max_time=5",): "DD:HH:MM:SS",
    ("+trainer.max_time={}",): "is not a time",
    ("weighting._target_=diffusion_lab.losses.L2",): "diffusion_lab.weightings.Weighting",
    ("data.source._target_=diffusion_lab.losses.L2",): "diffusion_lab.data.sources.base.Source",
    ("model._target_=builtins.dict",): "torch.nn.modules.module.Module",
    ("+callbacks.x={}",): "callbacks.x has no _target_",
    ("trainer.num_nodes=2",): "srun or torchrun",
    ("model.width=1000000",): "[2, 65536]",
    ("model.width=65536",): "GiB of memory",
    ("model.channels=3",): "leave model.channels out",
    ("data.eval_batch_size=0",): "data.eval_batch_size=0",
    ("quality=classifier", "callbacks.quality.extractor=../../up"): "write classifier, inception",
    ("callbacks.checkpoints.monitor=nothing",): "not logged",
    ("ckpt=5",): "no checkpoint at 5",
    ("optimizer.weight_decay=inf",): "[-1e9, 1e9]",
    ("callbacks.samples._target_=torch.nn.Identity",): "callbacks.samples",
}


@pytest.mark.integration
@pytest.mark.parametrize(("arguments", "remedy"), LATE.items(), ids=str)
def test_what_a_constructor_refuses_leaves_no_folder(arguments, remedy, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = command("train", tiny(arguments), capfd)
    refused(outcome, tmp_path, arguments)
    assert remedy in outcome.err


@pytest.mark.integration
def test_folders_of_the_user_stay(tmp_path, capfd, monkeypatch):
    """An empty run folder and an empty parent that exist before a refused command exist after it; Hydra's record is removed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "mine").mkdir()
    assert command("train", tiny(["schedule.shift=-1"]), capfd).code == 2
    assert list((tmp_path / "outputs").iterdir()) == []
    assert command("train", tiny(["schedule.shift=-1", "hydra.run.dir=mine"]), capfd).code == 2
    assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.integration
def test_numbers_are_text_where_text_is_needed(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command("train", tiny(["hydra.run.dir=2025"]), capfd).code == 0
    assert command("sample", ["ckpt=2025", "out=2026", "n=1", "sampler.steps=1"], capfd).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2025", "2026"]


@pytest.mark.faults
@pytest.mark.parametrize("part", range(10))
def test_one_wrong_value_in_a_training_run(part, tmp_path, capfd, monkeypatch):
    """Of every key of every option: refused in one line, or a run that ends without a traceback."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for number, line in enumerate(drawn(training_lines(), 2700 if FULL else 540)[part::10]):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        outcome = command("train", tiny(line), capfd)
        if outcome.code == 2:
            refused(outcome, folder, line)
        else:
            assert "Traceback" not in outcome.err, (line, outcome.err)


@pytest.mark.faults
def test_one_wrong_value_with_a_checkpoint_that_does_not_exist(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, line in drawn(other_lines(), 300 if FULL else 60):
        refused(command(name, line, capfd), tmp_path, (name, *line))

"""Sweeps: what a job leaves, what is said at the end, other launchers, searches."""

import csv
import json
import os
import shlex
import shutil
from pathlib import Path

import optuna
import pytest
from command import ROOT, TINY, command
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from diffusion_lab import composition
from diffusion_lab.cli import entry, sweeps
from diffusion_lab.reporting.sections import command as report_command
from diffusion_lab.training.callbacks import Pruning
from diffusion_lab.training.loggers import identity

SHORT = (*TINY, "trainer.max_steps=4", "validation.every=2", "validation.draws=1")


def outcome(folder: Path, job: int) -> dict:
    return json.loads((folder / str(job) / sweeps.FILE).read_text())


def last_validation(folder: Path) -> float:
    with (folder / "metrics.csv").open() as file:
        return [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]][-1]


@pytest.mark.integration
def test_a_sweep_goes_on_after_jobs_that_fail_and_lists_them(tmp_path, capfd, monkeypatch):
    """A job that is refused (ε cannot start where α = 0) and one that is done; then a job with a defect."""
    bad = tmp_path / "bad"
    arguments = [*SHORT, "--multirun", "schedule.zero_terminal_snr=true", "objective=pred_noise,pred_v"]
    code, out, _ = command("train", [*arguments, f"hydra.sweep.dir={bad}"], capfd)
    assert code == 1
    assert outcome(bad, 0)["status"] == "refused"
    assert "2 jobs in" in out
    assert f"refused  0  objective=pred_noise: {outcome(bad, 0)['reason']}" in out
    done = outcome(bad, 1)
    assert (done["status"], done["code"], done["reason"], done["metric"]) == ("done", 0, None, "val/loss")
    with (bad / "1" / "metrics.csv").open() as file:
        lowest = min(float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"])
    assert done["value"] == pytest.approx(lowest, rel=1e-6)

    def defect(*_: object) -> None:
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr("diffusion_lab.commands.train.build.data", defect)
    broken = tmp_path / "broken"
    code, out, err = command("train", [*SHORT, "--multirun", "seed=0,1", f"hydra.sweep.dir={broken}"], capfd)
    assert code == 1
    assert [outcome(broken, i)["status"] for i in (0, 1)] == ["failed", "failed"]
    assert out.count(": RuntimeError: no such kernel\n") == 2
    assert "Traceback" in err  # a defect keeps its traceback, a refusal has none


def test_a_job_that_was_killed_is_listed(tmp_path, capsys):
    (tmp_path / "0" / ".hydra").mkdir(parents=True)
    (tmp_path / "0" / ".hydra" / "overrides.yaml").write_text("[seed=1]")
    assert sweeps.summarize(tmp_path) == 1
    assert "failed  0  seed=1: no result recorded" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf" / "sweep").glob("*.yaml")))
def test_every_sweep_composes_with_the_command_that_its_first_line_names(name):
    first = (ROOT / "conf" / "sweep" / f"{name}.yaml").read_text().splitlines()[1].removeprefix("# python src/")
    program, *words = first.split()
    arguments = [word for word in words if "=" in word]
    config = composition.composed(program.removesuffix(".py"), arguments[: arguments.index(f"sweep={name}") + 1])
    assert config.hydra.mode.name == "MULTIRUN"
    for key in config.hydra.sweeper.params:  # composed with its first value, so it exists
        assert OmegaConf.select(config, key) is not None


def test_the_command_of_a_job_is_that_run_alone():
    line = shlex.split(report_command(["sweep=learning_rate", "optimizer.lr=1e-3"]))
    assert line[:2] == ["python", "src/train.py"]
    config = composition.composed("train", line[2:])
    assert config.hydra.mode.name == "RUN"
    assert config.optimizer.lr == 1e-3


def test_a_sweep_over_an_unknown_key_is_refused_before_the_first_job(tmp_path, capfd, monkeypatch):
    sweep = tmp_path / "sweep"
    conf = tmp_path / "conf"
    shutil.copytree(ROOT / "conf", conf)
    (conf / "sweep" / "mine.yaml").write_text(
        "# @package _global_\nhydra: { mode: MULTIRUN, sweeper: { params: { optimizer.rl: '1e-3,2e-3' } } }\n"
    )
    monkeypatch.setattr(entry, "CONF", conf)
    monkeypatch.setattr(composition, "CONF", conf)
    for arguments in (["sweep=mine"], ["--multirun", "optimizer.rl=1e-3,2e-3"]):
        code, _, err = command("train", [*arguments, f"hydra.sweep.dir={sweep}"], capfd)
        assert code == 2
        assert "unknown key optimizer.rl (did you mean optimizer.lr?)" in err
        assert not sweep.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["optimizer.lr=interval(1e-4,1e-2)"], "hydra/sweeper=optuna"),
        (["hydra/launcher=slrum"], "hydra/launcher=slrum"),
        (["hydra/sweeper=optuna", "hydra.sweeper.sampler=grid", "seed=0,1"], "write tpe, random"),
        (["sweep=guidance_scale"], "python src/evaluate.py sweep=guidance_scale"),
    ],
)
def test_sweeps_that_cannot_be_are_one_line(arguments, said, tmp_path, capfd):
    code, _, err = command("train", ["--multirun", *arguments, f"hydra.sweep.dir={tmp_path / 'sweep'}"], capfd)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


# other launchers ------------------------------------------------------------------------------------------------------------


SWEEP = ("--multirun", *SHORT, "schedule.zero_terminal_snr=true")


@pytest.mark.integration
@pytest.mark.parametrize(
    "there",
    [
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "objective=pred_noise,pred_v"],
        ["hydra/launcher=submitit_local"],
    ],
)
def test_jobs_in_other_processes_are_the_same_runs(there, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]))
    sweep, alone = tmp_path / "sweep", tmp_path / "alone"
    code, out, _ = command("train", [*SWEEP, *there, f"hydra.sweep.dir={sweep}"], capfd)
    refused = "objective=pred_noise,pred_v" in there
    assert code == int(refused)
    assert ("1 refused, 1 done" if refused else "1 done") in out
    assert command("train", [*SWEEP, f"hydra.sweep.dir={alone}"], capfd).code == 0
    assert outcome(sweep, int(refused))["value"] == outcome(alone, 0)["value"]


# searches -------------------------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_a_search_finds_the_better_rate_and_goes_on_from_its_file(tmp_path, capfd):
    """Loss after four steps falls with the rate on this range, so the best of the trials is that of the highest rate."""
    study = tmp_path / "study.log"
    search = [
        *SHORT,
        "--multirun",
        "hydra/sweeper=optuna",
        "hydra.sweeper.pruner=none",
        f"hydra.sweeper.storage={study}",
    ]
    space = ["optimizer.lr=tag(log,interval(1e-5,3e-3))", "lr_scheduler.warmup=range(0,2)"]
    assert (
        command("train", [*search, *space, "hydra.sweeper.trials=3", f"hydra.sweep.dir={tmp_path / 'a'}"], capfd).code
        == 0
    )
    more = [*search, *space, "hydra.sweeper.trials=5", f"hydra.sweep.dir={tmp_path / 'b'}"]
    code, out, _ = command("train", more, capfd)
    assert code == 0
    assert "2 jobs in" in out
    backend = optuna.storages.journal.JournalFileBackend(str(study))
    trials = optuna.load_study(study_name="diffusion-lab", storage=optuna.storages.JournalStorage(backend)).trials
    assert [t.state.name for t in trials] == ["COMPLETE"] * 5
    assert trials[3].value == pytest.approx(outcome(tmp_path / "b", 3)["value"])
    still = [t for t in trials if int(t.params["lr_scheduler.warmup"]) == 0]
    best = min(still, key=lambda t: t.value)
    assert best.params["optimizer.lr"] == max(t.params["optimizer.lr"] for t in still)


def test_a_trial_behind_the_others_is_told_to_end(monkeypatch):
    from hydra_plugins import diffusion_lab_optuna as plugin

    study = plugin._study(plugin.OptunaConf())
    for _ in range(5):
        trial = study.ask()
        trial.report(0.5, step=2)
        study.tell(trial, 0.4)
    study.ask()
    monkeypatch.setitem(plugin._in_memory, "diffusion-lab", study)
    monkeypatch.setenv(plugin.TRIAL_ENV, "5")
    config = OmegaConf.create({"hydra": {"sweeper": OmegaConf.structured(plugin.OptunaConf())}})
    monkeypatch.setattr(HydraConfig.instance(), "cfg", config)
    report = plugin.reporter()
    assert report is not None
    assert not report(0.45, 2)
    study.ask()
    monkeypatch.setenv(plugin.TRIAL_ENV, "6")
    behind = plugin.reporter()
    assert behind is not None
    assert behind(0.55, 2)


def test_a_pruned_run_stops_at_the_figure_that_was_behind(tmp_path, capfd, monkeypatch):
    from diffusion_lab.commands import train

    monkeypatch.setattr(train, "added_callbacks", lambda settings: [Pruning(lambda value, step: value > 0)])
    code, out, _ = command("train", [*SHORT, "--multirun", "seed=3", f"hydra.sweep.dir={tmp_path}"], capfd)
    assert code == 0
    assert outcome(tmp_path, 0)["status"] == "pruned"
    assert "1 pruned" in out
    assert last_validation(tmp_path / "0") == pytest.approx(outcome(tmp_path, 0)["value"])
    assert "resume" in out  # 2 or 3 of 4 steps


# names ----------------------------------------------------------------------------------------------------------------------


def test_runs_are_named_by_the_choices_made():
    choices = {"schedule": "cosine", "objective": "pred_v", "data": "digits", "logger": "wandb"}
    overrides = ["objective=pred_v", "trainer.max_steps=5", "optimizer.lr=1e-3", "seed=1", "data.root=x"]
    who = identity(choices, overrides, Path("outputs/multirun/monday"), None)
    assert who.name == "cosine-pred_v trainer.max_steps=5 optimizer.lr=1e-3 seed=1"  # a sweep may be about any of them
    assert identity(choices, overrides, None, None).name == "cosine-pred_v optimizer.lr=1e-3 seed=1"
    decay = identity(choices, ["sweep=ema_decay", "callbacks.ema.decay=0.99", "loss=l1"], Path("x"), None)
    assert decay.name == "cosine-pred_v callbacks.ema.decay=0.99 loss=l1"
    assert who.group == "monday"
    assert who.tags == ["data=digits", "schedule=cosine", "objective=pred_v"]
    assert identity(choices, [], None, "abc").id == "abc"
    assert identity({**choices, "experiment": "ddpm_digits"}, [], None, None).name == "ddpm_digits-cosine-pred_v"

"""A new option of every group through --config-dir, its class on PYTHONPATH and nothing else: train, resume, sample, evaluate."""

import importlib
import json
import sys

import pytest
import yaml
from command import ROOT, command

from diffusion_lab import composition

OUTSIDE = ROOT / "tests" / "outside"
FLAG = f"--config-dir={OUTSIDE / 'conf'}"
# of train.py; guidance is sample.py's and evaluate.py's
GROUPS = [p.name for p in sorted((OUTSIDE / "conf").iterdir()) if p.name not in ("guidance", "logger", "metrics")]
CHOSEN = [*(f"{group}=outside" for group in GROUPS), "logger=[csv,outside]"]
QUIET = ["callbacks.progress=null", "callbacks.samples.n=2", "trainer=cpu", "trainer.log_every_n_steps=1"]


@pytest.fixture(autouse=True)
def parts(monkeypatch):
    """The module of the user's classes, on the path; `USED` holds what was used since the test began."""
    monkeypatch.syspath_prepend(str(OUTSIDE))
    module = importlib.import_module("outside_parts")
    module.USED.clear()
    yield module
    assert "outside_parts" in sys.modules


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three steps that chooses the option `outside` in every group."""
    from command import code

    folder = tmp_path_factory.mktemp("outside") / "run"
    sys.path.insert(0, str(OUTSIDE))
    try:
        arguments = [*CHOSEN, *QUIET, "trainer.max_steps=3", "validation.every=2", f"hydra.run.dir={folder}"]
        assert code("train", [FLAG, *arguments]) == 0
        used = set(importlib.import_module("outside_parts").USED)
    finally:
        sys.path.remove(str(OUTSIDE))
    return folder, used


def test_there_is_an_option_for_every_group_of_one_class():
    classes = {p.parent.name for p in (ROOT / "conf").glob("*/custom.yaml")} - {"trainer"}
    assert classes <= {p.name for p in (OUTSIDE / "conf").iterdir()}


@pytest.mark.integration
def test_training_uses_every_one(run):
    folder, used = run
    assert used >= {*GROUPS, "logger"}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for group in set(GROUPS) - {"callbacks", "data"}:
        assert config[group]["_target_"].startswith("outside_parts."), group
    assert config["model"]["num_classes"] == 3  # filled in from the data, since the constructor has it
    assert (folder / "outside" / "metrics.csv").is_file()


@pytest.mark.integration
def test_a_checkpoint_that_names_them_needs_trust(run, tmp_path, capfd):
    asked = [f"ckpt={run[0]}", "n=2", f"out={tmp_path / 'out'}"]
    outcome = command("sample", asked, capfd)
    assert outcome.code == 2
    assert "trust=[outside_parts]" in outcome.err
    assert not (tmp_path / "out").exists()
    assert command("sample", [*asked, "trust=[outside_parts]"], capfd).code == 0


@pytest.mark.integration
def test_sampling_and_evaluation_take_their_own_options(run, tmp_path, capfd, parts):
    asked = [f"ckpt={run[0]}", "trust=[outside_parts]"]
    chosen = ["sampler=outside", "variance=outside", "clip=outside", "guidance=outside", "n=2"]
    outcome = command("sample", [FLAG, *asked, *chosen, f"out={tmp_path / 'out'}"], capfd)
    assert outcome.code == 0, outcome.err
    assert {"sampler", "clip", "guidance", "model"} <= parts.USED
    parts.USED.clear()
    measured = ["samplers=[outside]", "steps=[2]", "clip=outside", "guidance=outside", "n=12", "extractor=classifier"]
    own = [f"cache={tmp_path / 'cache'}", f"out={tmp_path / 'metrics'}", "logger=[outside]"]
    own += ["metrics=[fd_classifier,outside]", "metrics.outside.scale=0.25"]
    outcome = command("evaluate", [FLAG, *asked, *measured, *own], capfd)
    assert outcome.code == 0, outcome.err
    assert {"sampler", "clip", "guidance", "data", "logger", "metrics"} <= parts.USED
    (row,) = json.loads((tmp_path / "metrics" / "metrics.json").read_text())
    assert 0 < row["metrics"]["outside"] < 64
    assert "fd_classifier" in row["metrics"]


@pytest.mark.integration
def test_a_resumed_run_goes_on_with_them(run, tmp_path, capfd, parts):
    asked = [f"ckpt={run[0]}", "trainer.max_steps=5", f"hydra.run.dir={tmp_path / 'again'}"]
    outcome = command("train", [FLAG, *asked], capfd)
    assert outcome.code == 2
    assert "trust=[outside_parts]" in outcome.err
    outcome = command("train", [FLAG, *asked, "trust=[outside_parts]"], capfd)
    assert outcome.code == 0, outcome.err
    assert {*GROUPS, "logger"} <= parts.USED
    assert "5 steps done" in outcome.out


@pytest.mark.integration
def test_the_line_that_resumes_names_trust_and_config_dir(tmp_path, capfd):
    arguments = [*CHOSEN, *QUIET, "trainer.max_steps=5", "callbacks.outside.note=stop"]
    outcome = command("train", [FLAG, *arguments, f"hydra.run.dir={tmp_path / 'run'}"], capfd)
    assert outcome.code == 0, outcome.err
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("resume")]
    assert "trust=[outside_parts]" in line
    assert f"--config-dir={OUTSIDE / 'conf'}" in line


@pytest.mark.integration
def test_what_this_command_line_names_is_trusted(run, tmp_path, capfd):
    """A class of the user's, added to the run of others while it is resumed, needs no trust."""
    first = tmp_path / "plain"
    small = ["model.width=8", "model.multipliers=[1]", *QUIET, "callbacks.samples=null", "logger=csv"]
    small.remove("callbacks.samples.n=2")
    assert command("train", [*small, "trainer.max_steps=1", f"hydra.run.dir={first}"], capfd).code == 0
    added = ["+callbacks.mine._target_=outside_parts.Callback", "+callbacks.mine.note=x"]
    asked = [f"ckpt={first}", "trainer.max_steps=2", f"hydra.run.dir={tmp_path / 'again'}"]
    outcome = command("train", [*asked, *added], capfd)
    assert outcome.code == 0, outcome.err


def test_a_searchpath_and_a_notebook_find_them(tmp_path, capfd):
    from hydra import compose, initialize_config_dir

    arguments = [f"hydra.searchpath=[file://{OUTSIDE / 'conf'}]", "schedule=outside", "--cfg", "job"]
    outcome = command("train", arguments, capfd)
    assert outcome.code == 0, outcome.err
    assert "outside_parts.Schedule" in outcome.out
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", ["schedule=linear", "model.width=8"])
    assert (config.schedule._target_, config.model.width) == ("diffusion_lab.schedules.Linear", 8)


@pytest.mark.integration
def test_a_glob_sweeps_over_the_options_and_a_custom_without_class_is_one_line(tmp_path, capfd):
    small = ["model.width=8", "model.multipliers=[1]", "trainer=cpu", "trainer.max_steps=1", "validation.every=0"]
    small += ["callbacks.progress=null", "callbacks.samples=null", "logger=csv", "--multirun"]
    sweep = tmp_path / "glob"
    arguments = [*small, "lr_scheduler=glob(*,exclude=custom)", "+logger.csv.prefix=x", f"hydra.sweep.dir={sweep}"]
    outcome = command("train", arguments, capfd)
    assert outcome.code == 0, outcome.err
    assert "3 jobs in" in outcome.out
    arguments = [*small, "loss=glob(*)", f"hydra.sweep.dir={tmp_path / 'custom'}"]
    outcome = command("train", arguments, capfd)
    assert outcome.code == 1
    assert "4 jobs in" in outcome.out
    assert "loss needs a class: write loss._target_=my_package.MyClass" in outcome.out


def test_help_lists_options_from_outside(capfd):
    outcome = command("train", [FLAG, "--help"], capfd)
    assert outcome.code == 0
    options = sorted([*composition.options("schedule"), "outside"])
    assert f"schedule: {', '.join(options)}" in outcome.out
    assert len(outcome.out.splitlines()) <= 190

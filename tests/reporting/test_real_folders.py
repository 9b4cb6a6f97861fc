"""src/report.py on an outputs/ folder that the commands themselves have written."""

import json
import shutil

import pytest
from command import TINY, code
from reported import Page

# Features without a network to train: the 64 pixels.
PIXELS = ("metrics=[fd]", "extractor={_target_: torch.nn.Flatten}")
MEASURED = (*PIXELS, "n=80", "device=cpu")
GRIDS = "callbacks.samples={_target_: diffusion_lab.training.callbacks.Samples, folder: samples, n: 4, strip: null, "
GRIDS += "sampler: {_target_: diffusion_lab.samplers.DDIM, steps: 1}}"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Two runs, of 60 steps and of 2, both evaluated, samples, and a sweep of evaluations, of which one is refused."""
    folder = tmp_path_factory.mktemp("project") / "outputs"
    cache = f"cache={folder / 'cache'}"

    def call(name, *arguments, expected=0):
        assert code(name, arguments) == expected

    short = ("trainer.max_steps=2", "objective=pred_noise", "+callbacks.lr._target_=pytorch_lightning.callbacks.Timer")
    for run, options in (("long", ("trainer.max_steps=60",)), ("short", short)):
        call("train", *TINY, GRIDS, "trainer.log_every_n_steps=50", *options, f"hydra.run.dir={folder / 'train' / run}")
        steps = ("samplers=[ddim]", "steps=[1,2]")
        out = f"out={folder / 'evaluate' / run}"
        call("evaluate", f"ckpt={folder / 'train' / run}", *MEASURED, *steps, cache, out)
    long = f"ckpt={folder / 'train' / 'long'}"
    call("sample", long, "n=4", "sampler.steps=1", "device=cpu", f"out={folder / 'sample' / 'grid'}")
    sweep = (
        "--multirun",
        "seed=1",
        "steps=[1]",
        "split=train+val,nowhere",
        f"hydra.sweep.dir={folder / 'multirun' / 'seeds'}",
    )
    call("evaluate", long, *MEASURED, cache, *sweep, expected=1)
    return folder


@pytest.fixture(scope="module")
def page(outputs):
    assert code("report", [str(outputs)]) == 0
    return Page((outputs / "report.html").read_text(encoding="utf-8"))


def values(folder, name):
    """The values of a metric in metrics.json, as the page formats them."""
    return [f"{row['metrics'][name]:.4g}" for row in json.loads((folder / "metrics.json").read_text())]


def test_evaluations_are_shown_with_their_run(outputs, page):
    """By out= and in a sweep, whose folders have config.yaml and metrics.csv as those of a run do."""
    rows = page.tables["evaluations"]
    column = rows[0].index("fd_flatten")
    shown = [(row[0], row[column]) for row in rows[1:]]
    single = [
        (f"run {run}", value) for run in ("long", "short") for value in values(outputs / "evaluate" / run, "fd_flatten")
    ]
    sweep = [("run long", value) for value in values(outputs / "multirun" / "seeds" / "0", "fd_flatten")]
    assert sorted(shown) == sorted(single + sweep)
    assert len(shown) == 5
    assert set(page.column("fd_flatten")) == {"run long", "run short"}


def test_an_evaluation_in_the_folder_of_its_run_is_shown(outputs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(outputs / "train" / "long", run)
    shutil.copy(outputs / "evaluate" / "long" / "metrics.json", run)
    assert code("report", [str(run)]) == 0
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert len(page.tables["evaluations"]) == 1 + 2
    assert list(page.column("fd_flatten")) == ["run run"]


def test_folders_of_other_commands_are_no_failed_runs(outputs, page):
    """Samples, caches and the report itself are not mentioned; a job that was refused is, with its own command."""
    assert {row[0] for row in page.tables["runs"][1:]} == {"run long", "run short"}
    assert "1 folder left out" in page.words
    assert f"{outputs / 'multirun' / 'seeds' / '1'}: refused: " in page.words
    assert any(text.startswith("python src/evaluate.py") and "split=nowhere" in text for text in page.codes)
    assert code("report", [str(outputs / "sample")]) == 0
    page = Page((outputs / "sample" / "report.html").read_text(encoding="utf-8"))
    assert "contains neither a run of src/train.py nor an evaluation of src/evaluate.py" in page.words

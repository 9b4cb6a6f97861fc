"""src/report.py on an outputs/ folder that the commands themselves have written."""

import json
import re
import shutil

import pytest
from command import TINY, code
from reported import Page, frame_page, open_page, script_result

from diffusion_lab.reporting import compare
from diffusion_lab.reporting.read import RunRecord

pytestmark = pytest.mark.integration

# Features without a network to train: the 64 pixels.
PIXELS = ("metrics=[fd]", "extractor={_target_: torch.nn.Flatten}")
MEASURED = (*PIXELS, "n=80", "device=cpu")
GRIDS = "callbacks.samples={_target_: diffusion_lab.training.callbacks.Samples, folder: samples, n: 4, strip: null, "
GRIDS += "sampler: {_target_: diffusion_lab.samplers.DDIM, steps: 1}}"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Two evaluated runs, samples, and a sweep of evaluations, of which one is refused.

    One run has 60 steps but does not train; the other has 25, fewer than half, and better samples.
    """
    folder = tmp_path_factory.mktemp("project") / "outputs"
    cache = f"cache={folder / 'cache'}"

    def call(name, *arguments, expected=0):
        assert code(name, arguments) == expected

    long = ("trainer.max_steps=60", "objective=pred_noise", "optimizer.lr=1e-12")
    short = (
        "trainer.max_steps=25",
        "+callbacks.timer._target_=pytorch_lightning.callbacks.Timer",
    )
    for run, options in (("long", long), ("short", short)):
        call("train", *TINY, GRIDS, "trainer.log_every_n_steps=50", *options, f"hydra.run.dir={folder / 'train' / run}")
        steps = ("samplers=[ddim]", "steps=[1,2]")
        out = f"out={folder / 'evaluate' / run}"
        call("evaluate", f"ckpt={folder / 'train' / run}", *MEASURED, *steps, cache, out)
    checkpoint = f"ckpt={folder / 'train' / 'long'}"
    call("sample", checkpoint, "n=4", "sampler.steps=1", "device=cpu", f"out={folder / 'sample' / 'grid'}")
    sweep = (
        "--multirun",
        "seed=1",
        "steps=[1]",
        "split=train+val,nowhere",
        f"hydra.sweep.dir={folder / 'multirun' / 'seeds'}",
    )
    call("evaluate", checkpoint, *MEASURED, cache, *sweep, expected=1)
    return folder


@pytest.fixture(scope="module")
def page(outputs):
    assert code("report", [str(outputs)]) == 0
    return Page((outputs / "report.html").read_text(encoding="utf-8"))


def values(folder, name):
    """The values of a metric in metrics.json, to the four digits of the page."""
    return [float(f"{row['metrics'][name]:.4g}") for row in json.loads((folder / "metrics.json").read_text())]


def test_evaluations_are_shown_with_their_run(outputs, page):
    """By out= and in a sweep, whose folders have config.yaml and metrics.csv as those of a run do."""
    rows = page.tables["evaluations"]
    column = rows[0].index("fd_flatten")
    shown = [(row[0], float(row[column])) for row in rows[1:]]
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


def test_a_short_run_is_not_the_best_and_plumbing_is_folded(outputs, page):
    """The headline, the columns, the cards and the legend have choices and metrics, without step counts and classes."""
    folders = {"long": ("evaluate/long", "multirun/seeds/0"), "short": ("evaluate/short",)}
    best = {run: min(v for f in of for v in values(outputs / f, "fd_flatten")) for run, of in folders.items()}
    assert best["short"] < best["long"]
    head, *rows = page.tables["runs"]
    assert head[:4] == ["run", "objective", "optimizer.lr", "fd_flatten"]
    assert "trainer.max_steps" not in head
    assert [row[0] for row in rows] == ["run long", "run short"]
    assert [a for _, a in page.elements if a.get("class") == "number best"] == []
    headline = page.words.split("2 runs. ")[1].split("not ranked.")[0]
    assert re.match(r"fd_flatten: [\d.]+ \(ddim, \d NFE\)", headline)
    assert float(headline.split()[1]) == best["long"]
    assert ", run long: pred_noise · lr=1e-12. 1 run has fewer than half the steps" in headline
    assert [run["label"] for run in page.data["runs"]] == ["pred_noise · lr=1e-12", "pred_v · lr=0.002"]
    execution = page.words.split("differences in execution and recording")[1]
    assert "trainer.max_steps" in execution
    assert "callbacks.timer" in execution


def test_every_evaluated_run_is_in_the_chart_of_the_metric(outputs, page):
    (chart,) = page.data["charts"]["nfe"]
    assert chart["name"] == "fd_flatten"
    lines = {
        (page.data["runs"][s["run"]]["name"], s["name"]): (s["x"], [float(f"{y:.4g}") for y in s["y"]])
        for s in chart["series"]
    }
    assert lines == {
        ("long", "ddim, seed 0"): ([1, 2], values(outputs / "evaluate" / "long", "fd_flatten")),
        ("long", "ddim, seed 1"): ([1], values(outputs / "multirun" / "seeds" / "0", "fd_flatten")),
        ("short", "ddim"): ([1, 2], values(outputs / "evaluate" / "short", "fd_flatten")),
    }


def test_a_key_of_execution_is_a_column_where_nothing_else_differs(tmp_path):
    def run(line):
        return RunRecord(tmp_path, line, {"trainer": {"max_steps": int(line[-1])}, "seed": 0}, [line], {}, {})

    runs = [run("trainer.max_steps=1"), run("trainer.max_steps=2")]
    assert [column.key for column in compare.choices(runs)] == ["trainer.max_steps"]
    assert compare.folded(runs) == []
    assert not any(
        map(compare.is_execution, ("callbacks.ema.decay", "trainer.precision", "data.root", "optimizer", "seed"))
    )
    assert all(
        map(compare.is_execution, ("callbacks.samples.every", "trainer", "trainer.max_steps", "validation.every"))
    )


def test_values_of_labels_are_short(tmp_path):
    root, own = (
        compare.Column("data.root", ["/home/me/photographs/cats"]),
        compare.Column("model.levels", ["[1, 2, 3] " * 9]),
    )
    run = RunRecord(tmp_path, "run", {}, [], {}, {})
    text = compare.label([root, own], 0, run)
    assert text.startswith("root=cats · levels=[1, 2, 3]")
    assert text.endswith("…")
    assert len(text) < 60


def test_no_number_is_cut_off_at_phone_width(outputs, page, tmp_path):
    copy = tmp_path / "report.html"
    shutil.copy(outputs / "report.html", copy)
    script = """
      const d = page.document, cells = [...d.querySelectorAll('.rows tbody td, .rows tbody th')];
      d.querySelectorAll('details').forEach(e => { e.open = true; });
      await new Promise(done => setTimeout(done, 100));
      const shown = cells.filter(e => e.getBoundingClientRect().height > 0);
      const cut = shown.filter(e => e.getBoundingClientRect().right > 360 || e.scrollWidth > e.clientWidth);
      return { shown: shown.map(e => e.dataset.label), cut: cut.map(e => e.outerHTML) };"""
    document, console = open_page(frame_page(copy, 360, script), tmp_path)
    assert console == ""
    result = script_result(document)
    assert {"fd_flatten", "min train/loss", "images/s", "nfe"} <= set(result["shown"])
    assert result["cut"] == []

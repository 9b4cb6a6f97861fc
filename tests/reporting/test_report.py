"""src/report.py: the page shows the values of the files, escapes hostile names, and works in a real browser."""

import base64
import csv
import io
import json
import math
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from command import ROOT, TINY, code, composed
from PIL import Image
from reported import (
    Page,
    chromium,
    csv_text,
    frame_page,
    losses,
    make_evaluation,
    make_run,
    open_page,
    png,
    script_result,
    write,
)

from diffusion_lab.errors import ConfigError
from diffusion_lab.reporting import charts, grids, print_report, write_report

OBJECTIVES = {  # job of the sweep → its overrides, best val/loss, fd_classifier_1k
    "0": (["schedule=linear", "objective=pred_noise", "trainer.max_steps=100"], 0.30, 12.5),
    "1": (["schedule=linear", "objective=pred_v", "trainer.max_steps=100"], 0.20, 4.25),
    "2": (["schedule=cosine", "objective=pred_noise", "trainer.max_steps=100"], 0.40, 9.75),
    "10": (["schedule=cosine", "objective=pred_v", "trainer.max_steps=100"], 0.10, 6.5),
}


@pytest.fixture
def sweep(tmp_path):
    """Four runs of two schedules and two objectives; the run with the lowest loss is not the one with the best samples."""
    folder = tmp_path / "sweep"
    write(folder / "multirun.yaml", "hydra: {}\n")
    for job, (overrides, best, quality) in OBJECTIVES.items():
        rows = [
            *losses(best),
            {"step": 50, "fd_classifier_1k": quality + 1},
            {"step": 100, "fd_classifier_1k": quality},
        ]
        make_run(folder / job, overrides, rows, png(40, 40))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of a real training of four steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert code("train", [*TINY, "trainer.max_steps=4", "condition=label", f"hydra.run.dir={folder}"]) == 0
    return folder


def quoted(text):
    """A text as a value on Hydra's command line."""
    return "'" + text.replace("'", "\\'") + "'"


@pytest.fixture
def report(tmp_path, capsys):
    """report(*arguments) writes report.html and returns the page."""

    def call(*arguments, out="report.html"):
        assert code("report", [*(str(a) for a in arguments), f"out={tmp_path / out}"]) == 0
        return Page((tmp_path / out).read_text(encoding="utf-8"))

    return call


def columns(folder):
    """Read metrics.csv independently of the package: column → [(step, value)]."""
    values = {}
    for row in csv.DictReader(io.StringIO((folder / "metrics.csv").read_text())):
        for name, value in row.items():
            if value and name != "step":
                values.setdefault(name, []).append((int(row["step"]), float(value)))
    return values


def names(page, section="runs"):
    return [row[0].removeprefix("run ") for row in page.tables[section][1:]]


# the table ----------------------------------------------------------------------------------------------------------------


def test_table_matches_metrics_csv(sweep, report):
    page = report(sweep)
    for job, (overrides, _, quality) in OBJECTIVES.items():
        logged = columns(sweep / job)
        step, lowest = min(logged["val/loss"], key=lambda point: point[1])
        rates = sorted(v for _, v in logged["speed/images_per_s"])
        rate = (rates[4] + rates[5]) / 2
        expected = {
            "schedule": overrides[0].split("=")[1],
            "objective": overrides[1].split("=")[1],
            "fd_classifier_1k": f"{quality:.4g}",
            "min val/loss": f"{lowest:.4f}",
            "at step": str(step),
            "last val/loss": f"{logged['val/loss'][-1][1]:.4f}",
            "images/s": f"{rate:.0f}",
            "steps": "100",
            "seconds": f"≈ {100 * 128 / rate:.0f}",
            "state": "done",
        }
        shown = {name: page.column(name)[f"run {job}"] for name in expected}
        assert float(shown.pop("fd_classifier_1k")) == float(expected.pop("fd_classifier_1k"))
        assert shown == expected


def test_runs_are_sorted_by_quality_and_the_summary_names_the_best(sweep, report):
    page = report(sweep)
    assert names(page) == ["1", "10", "2", "0"]
    assert "4 runs. Lowest fd_classifier_1k: 4.250, run 1: linear · pred_v." in page.words
    assert "Losses are not comparable across these runs, since the schedule and objective differ." in page.words


def test_without_quality_the_loss_ranks_with_a_caveat(tmp_path, report):
    for job, (overrides, best, _) in OBJECTIVES.items():
        make_run(tmp_path / "sweep" / job, overrides, losses(best))
    page = report(tmp_path / "sweep")
    assert names(page) == ["10", "1", "0", "2"]
    assert "Lowest val/loss: 0.1000, run 10: cosine · pred_v" in page.words
    assert "The losses of these runs are not comparable" in page.words
    assert [a for _, a in page.elements if a.get("class") == "number best"] == []  # no loss is marked as best


def test_losses_of_the_same_choices_are_comparable(tmp_path, report):
    for job, rate in enumerate((0.001, 0.002, 0.004)):
        make_run(
            tmp_path / "sweep" / str(job),
            [f"optimizer.lr={rate}", f"seed={job}", "trainer.max_steps=100"],
            losses(0.3 - rate),
        )
    page = report(tmp_path / "sweep")
    assert page.tables["runs"][0][:4] == ["run", "optimizer.lr", "seed", "min val/loss"]
    assert [row[1] for row in page.tables["runs"][1:]] == ["0.004", "0.002", "0.001"]
    assert "not comparable" not in page.words
    assert len([a for _, a in page.elements if a.get("class") == "number best"]) == 2


def test_results_are_averaged_over_seeds(tmp_path, report):
    """The best single run has another schedule than the best mean."""
    lowest = {"cosine": [0.10, 0.40], "linear": [0.20, 0.21]}
    for i, (schedule, best) in enumerate((s, b) for s, both in lowest.items() for b in both):
        make_run(tmp_path / "sweep" / str(i), [f"schedule={schedule}", f"seed={i % 2}"], losses(best))
    page = report(tmp_path / "sweep")
    assert page.tables["runs / more"][1:] == [
        ["linear", "2", "0.2050", "0.007071"],
        ["cosine", "2", "0.2500", "0.2121"],
    ]
    # With the caveat that losses of two schedules are not comparable
    assert "Lowest val/loss: 0.1000, run 0" in page.words
    assert "Over seeds, the lowest mean val/loss is 0.2050 ± 0.007071 (2 runs): linear." in page.words


def test_one_run(trained, report):
    page = report(trained)
    logged = columns(trained)
    assert page.column("steps") == {"run run": "4"}
    assert page.column("last train/loss")["run run"] == f"{logged['train/loss'][-1][1]:.4g}"
    assert page.column("objective")["run run"] == "pred_v"
    overrides = yaml.safe_load((trained / ".hydra" / "overrides.yaml").read_text())
    assert shlex.split(page.commands[0]) == ["python", "src/train.py", *overrides]
    series = page.data["charts"]["curves"][0]["series"][0]
    assert series["x"] == [step for step, _ in logged["train/loss"]]
    assert series["y"] == [float(f"{v:.5g}") for _, v in logged["train/loss"]]
    assert "There is only one run" in page.words


# curves -------------------------------------------------------------------------------------------------------------------


def test_charts_contain_the_columns_of_metrics_csv(sweep, report):
    page = report(sweep)
    drawn = {chart["name"]: chart for chart in page.data["charts"]["curves"]}
    assert list(drawn) == ["val/loss", "train/loss", "fd_classifier_1k"]
    for name, chart in drawn.items():
        assert len(chart["series"]) == 4
        for series in chart["series"]:
            points = columns(sweep / page.data["runs"][series["run"]]["name"])[name]
            assert series["x"] == [step for step, _ in points]
            assert series["y"] == [float(f"{value:.5g}") for _, value in points]


def test_thinned_curve_keeps_ends_spikes_and_gaps():
    curve = [(step, math.sin(step / 300)) for step in range(5000)]
    curve[1234], curve[4321] = (1234, 9.0), (4321, -9.0)
    curve[2000:2100] = [(step, math.nan) for step in range(2000, 2100)]
    thin = charts.thinned(curve)
    assert len(thin) <= charts.POINTS
    assert (thin[0], thin[-1]) == (curve[0], curve[-1])
    assert {(1234, 9.0), (4321, -9.0)} <= set(thin)
    assert [step for step, _ in thin] == sorted({step for step, _ in thin})
    assert any(math.isnan(value) and 2000 <= step < 2100 for step, value in thin)
    assert charts.thinned(curve[:300]) == curve[:300]


def test_evaluations_are_assigned_to_runs_and_drawn_over_nfe(sweep, tmp_path, report):
    """By the path of the checkpoint, by the folder of the evaluation, and by the folder names of copied runs."""
    make_evaluation(
        tmp_path / "eval" / "a", str(sweep / "0" / "checkpoints" / "best.ckpt"), {("ddim", 20): 3.0, ("ddim", 5): 8.0}
    )
    make_evaluation(sweep / "1" / "evaluate", "latest", {("ddim", 10): 5.0, ("heun", 10): 4.0})
    make_evaluation(tmp_path / "eval" / "b", "/elsewhere/sweep/2/checkpoints/last.ckpt", {("ddim", 10): 6.0})
    make_evaluation(tmp_path / "eval" / "c", "/elsewhere/other/run", {("ddim", 10): 7.0})
    page = report(sweep, tmp_path / "eval")
    chart = page.data["charts"]["nfe"][0]
    assert chart["name"] == "fd_classifier"
    lines = {
        (page.data["runs"][s["run"]]["name"], s["name"]): list(zip(s["x"], s["y"], strict=True))
        for s in chart["series"]
    }
    assert lines == {
        ("0", "ddim"): [(5, 8.0), (20, 3.0)],
        ("1", "ddim"): [(10, 5.0)],
        ("1", "heun"): [(10, 4.0)],
        ("2", "ddim"): [(10, 6.0)],
        ("c", "ddim"): [(10, 7.0)],
    }
    assert page.column("fd_classifier") == {
        "run 0": "3.000ddim, 20 NFE",
        "run 1": "4.000heun, 10 NFE",
        "run 2": "6.000ddim, 10 NFE",
        "run 10": "–",
    }
    assert names(page) == ["0", "1", "2", "10"]  # evaluations rank before values of the training
    assert len(page.tables["evaluations"]) == 1 + 6


def test_evaluations_of_different_protocols_have_separate_columns_and_lines(sweep, tmp_path, report):
    make_evaluation(tmp_path / "eval" / "a", str(sweep / "0"), {("ddim", 20): 3.0})
    make_evaluation(tmp_path / "eval" / "b", str(sweep / "1"), {("ddim", 20): 2.0}, n=100)
    page = report(sweep, tmp_path / "eval")
    assert {"fd_classifier (n=500)", "fd_classifier (n=100)"} <= set(page.tables["runs"][0])
    chart = page.data["charts"]["nfe"][0]
    assert [(s["name"], s["y"]) for s in chart["series"]] == [("ddim, n=100", [2.0]), ("ddim, n=500", [3.0])]
    assert chart["note"] == "lower is better; not comparable: n=100; n=500"


def test_evaluation_without_a_run(tmp_path, report):
    page = report(make_evaluation(tmp_path / "eval", "/elsewhere/run/checkpoints/last.ckpt", {("ddim", 20): 3.0}))
    assert "Evaluations only." in page.words
    assert page.column("fd_classifier", "evaluations") == {"/elsewhere/run/checkpoints/last.ckpt": "3.000"}


# what differs, and the command --------------------------------------------------------------------------------------------


def test_differences_match_the_configurations(tmp_path, report):
    """Compared with the leaves of the files; a differing class replaces its arguments, copies of a value are merged."""
    variants = (
        ["seed=1", "schedule=linear"],
        ["seed=2", "schedule=cosine"],
        ["seed=3", "schedule=cosine", "schedule.shift=2"],
    )
    folders = [make_run(tmp_path / "sweep" / str(i), line, losses(0.3)) for i, line in enumerate(variants)]
    page = report(tmp_path / "sweep")
    rows = {row[0]: row[1] for row in page.tables["what-differs"][1:] if "\n" not in row[0]}
    assert {"seed": "1run 02run 13run 2", "schedule": "Linearrun 0Cosine2 runs: 1, 2"}.items() <= rows.items()
    assert rows["schedule.shift"] == "1.0run 12run 2"
    flat = [_leaves(yaml.safe_load((f / "config.yaml").read_text())) for f in folders]
    shared = {k for k in flat[0] if k.split(".")[0] != "logger" and all(f.get(k, ...) == flat[0][k] for f in flat)}
    listed = set(rows) - {"seed", "schedule", "schedule.shift"}
    assert listed == shared - {"overwrite", "trust"}


def _leaves(node, path=""):
    if not isinstance(node, dict) or not node:
        return {path: node}
    return {k: v for key, value in node.items() for k, v in _leaves(value, f"{path}.{key}" if path else key).items()}


def test_command_composes_the_same_configuration(tmp_path, report):
    lines = [
        ["schedule=linear", "model.multipliers=[1,2]", "callbacks.samples=null", "data.root='my data; $HOME'"],
        ["experiment=edm_digits", "seed=7"],
    ]
    for i, line in enumerate(lines):
        make_run(tmp_path / "sweep" / str(i), line, losses(0.3 + i))
    page = report(tmp_path / "sweep")
    assert len(page.commands) == 2
    for i, typed in enumerate(page.commands):
        program = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))"]
        shell = shlex.join(program) + typed.removeprefix("python src/train.py")
        overrides = json.loads(subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout)
        text = (tmp_path / "sweep" / str(i) / "config.yaml").read_text()
        run_dir = yaml.safe_load(text)["run_dir"]
        assert composed("train", *overrides) == yaml.safe_load(text.replace(run_dir, "RUN"))


def test_command_of_a_resumed_run_names_the_checkpoint_file(tmp_path, report):
    make_run(
        tmp_path / "run",
        ["ckpt=latest", "trainer.max_steps=200"],
        losses(0.3),
        ckpt="/runs/first/checkpoints/last.ckpt",
    )
    page = report(tmp_path / "run")
    assert page.commands == ["python src/train.py ckpt=/runs/first/checkpoints/last.ckpt trainer.max_steps=200"]
    assert "unfinished: 100 of 200 steps" in page.words


def test_metrics_of_older_runs_have_their_current_names(sweep, tmp_path, report):
    folder = make_evaluation(tmp_path / "eval", str(sweep / "0"), {("ddim", 20): 3.0}, spread={"recognised": 0.01})
    rows = json.loads((folder / "metrics.json").read_text())
    rows[0]["metrics"] = {"fd_classifier": 3.0, "recognised": 0.75, "as_asked": 0.5}
    write(folder / "metrics.json", json.dumps(rows))
    for job in OBJECTIVES:
        file = sweep / job / "metrics.csv"
        write(file, file.read_text().replace("fd_classifier_1k", "recognised_1k"))
    page = report(sweep, tmp_path / "eval")
    assert page.column("confident_fraction", "evaluations") == {"run 0": "0.7500 ± 0.01000"}
    assert page.column("label_accuracy", "evaluations") == {"run 0": "0.5000"}
    assert {"confident_fraction", "label_accuracy", "confident_fraction_1k"} <= set(page.tables["runs"][0])
    assert "recognised" not in page.text
    assert "as_asked" not in page.text


# folders that are left out, and status ------------------------------------------------------------------------------------


def test_unreadable_folders_are_listed_with_reasons(sweep, tmp_path, report, capsys):
    whole = csv_text(losses(0.3))
    (sweep / "11").mkdir()
    broken = {name: make_run(sweep / name, [], losses(0.3)) for name in ("12", "13", "14", "15", "16", "17", "18")}
    (broken["12"] / "config.yaml").unlink()
    write(broken["13"] / "config.yaml", "")
    write(broken["14"] / "config.yaml", "seed: [1")
    (broken["15"] / "metrics.csv").unlink()
    write(broken["16"] / "metrics.csv", whole[:20])
    write(broken["17"] / "metrics.csv", "")
    failed = {"status": "failed", "code": 1, "reason": "out of memory", "overrides": []}
    write(broken["18"] / "outcome.json", json.dumps(failed))
    refused = {"status": "refused", "code": 2, "reason": "a < b", "overrides": ["model=x"]}
    write(sweep / "19" / "outcome.json", json.dumps(refused))
    write(sweep / "20" / "metrics.json", "[{")
    page = report(sweep)
    reasons = {
        "11": "the folder is empty",
        "12": "no config.yaml: the run was refused, or stopped before training began",
        "13": "config.yaml is empty",
        "14": "config.yaml cannot be read: while parsing a flow sequence",
        "15": "no metrics.csv: the run stopped before its first row was logged",
        "16": "metrics.csv has no columns step and val/loss or train/loss",
        "17": "metrics.csv is empty",
        "18": "failed: out of memory",
        "19": "refused: a < b",
        "20": "metrics.json is truncated or not JSON",
    }
    printed = capsys.readouterr().err
    for name, reason in reasons.items():
        assert f"{sweep / name}: {reason}" in page.words
        assert f"left out  {sweep / name}: {reason}" in printed
    assert set(names(page)) == set(OBJECTIVES)
    assert "10 folders left out" in page.words
    assert "python src/train.py model=x" in page.commands


def test_empty_folder_produces_a_page(tmp_path, report, capsys):
    (tmp_path / "empty").mkdir()
    page = report(tmp_path / "empty")
    assert "No runs to show." in page.words
    assert f"{tmp_path / 'empty'}: the folder is empty" in page.words
    write(tmp_path / "other" / "notes.txt", "nothing")
    assert "contains neither a run" in report(tmp_path / "other").words
    assert "contains neither a run" in capsys.readouterr().err


def test_truncated_lines_are_skipped(sweep, report):
    file = sweep / "0" / "metrics.csv"
    write(file, csv_text(list(csv.DictReader(io.StringIO(file.read_text()))))[:-3])
    lines = (sweep / "1" / "metrics.csv").read_text().splitlines()
    write(sweep / "1" / "metrics.csv", "\r\n".join([*lines[:4], lines[4] + ",9,9", "1,x", *lines[5:]]) + "\r\n")
    write(sweep / "2" / "outcome.json", '{"status": "do')
    page = report(sweep)
    assert "run 0: the last line of metrics.csv is truncated and was skipped" in page.words
    assert "run 1: 2 lines of metrics.csv cannot be read and were skipped" in page.words
    assert "run 2: outcome.json cannot be read" in page.words
    assert page.column("fd_classifier_1k")["run 0"] == "13.50"  # the skipped last line has the better value


def test_diverged_runs_are_marked(tmp_path, report):
    fine, broken = losses(0.3), losses(0.1)
    for row in broken:
        if row["step"] > 50:
            row |= {name: math.nan for name in ("train/loss", "val/loss") if name in row}
    none = [{**row, "val/loss": math.nan} if "val/loss" in row else row for row in broken]
    for job, rows in enumerate((fine, none, broken)):
        make_run(tmp_path / "sweep" / str(job), [f"seed={job}", "trainer.max_steps=100"], rows)
    page = report(tmp_path / "sweep")
    assert page.column("state") == {"run 0": "done", "run 2": "diverged", "run 1": "diverged"}
    assert page.column("last val/loss") == {"run 0": "0.5000", "run 2": "nan", "run 1": "nan"}
    assert "run 2: diverged: val/loss is NaN or Inf since step 60" in page.words
    assert "Lowest val/loss: 0.3000, run 0" in page.words
    chart = page.data["charts"]["curves"][0]
    by_name = {page.data["runs"][s["run"]]["name"]: s["y"] for s in chart["series"]}
    assert by_name["1"] == [None] * 10
    assert [y is None for y in by_name["2"]] == [False] * 5 + [True] * 5


def test_status_is_read_from_outcome_json(sweep, report):
    for job, status in (("0", "done"), ("1", "pruned"), ("2", "interrupted")):
        outcome = {"status": status, "code": 0, "reason": None, "value": 0.1, "overrides": [], "seconds": 61.5}
        write(sweep / job / "outcome.json", json.dumps(outcome))
    page = report(sweep)
    assert page.column("state") == {"run 0": "done", "run 1": "pruned", "run 2": "interrupted", "run 10": "done"}
    assert page.column("seconds")["run 0"] == "62"


def test_files_of_unexpected_types_do_not_crash(sweep, report):
    """Other types where mappings, lists or numbers are expected."""
    odd = {"data": "digits", "trainer": [1], "schedule": None, "variance": 3, "callbacks": {1: [{"a": "b"}]}}
    config = yaml.safe_load((sweep / "0" / "config.yaml").read_text())
    write(sweep / "0" / "config.yaml", yaml.safe_dump({**config, **odd}))
    write(sweep / "0" / ".hydra" / "overrides.yaml", "- 3\n- {a: b}\n- schedule\n")
    write(sweep / "0" / ".hydra" / "hydra.yaml", "[]")
    write(sweep / "1" / ".hydra" / "overrides.yaml", "text")
    write(sweep / "2" / "outcome.json", "[1]")
    common = {"seeds": 3, "spread": [1], "data": 1, "checkpoint": "x", "n": [1], "sampler": {}, "nfe": "many"}
    rows = [{"metrics": {"fid": None, "kid": "low", "nll": math.inf, "fd": True, "is": 2}, **common}, {"metrics": {}}]
    write(sweep / "1" / "evaluate" / "metrics.json", json.dumps(rows))
    page = report(sweep)
    assert set(names(page)) == set(OBJECTIVES)
    assert "the command line is unknown" in page.words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "write a run, a sweep, an evaluation"),
        (["{place}/none"], "there is no folder {place}/none: name a run"),
        (["{place}/file"], "{place}/file is a file: name the folder"),
        (["{place}", "titel=x"], "there is no folder titel=x"),
        (["{place}", "--sort", "x"], "unrecognized arguments: --sort"),
        (["{place}", "out={place}/file"], "the output {place}/file exists and is not a report: name another file"),
        (["{place}", "out={place}"], "the output {place} is a folder: name a file"),
        (["{place}", "out={place}/file/report.html"], "{place}/file"),
        (["{place}", "--out", "{place}/page.html"], "--out was renamed: write out="),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, capsys):
    write(tmp_path / "file", "text")
    assert code("report", [argument.format(place=tmp_path) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message.format(place=tmp_path) in err
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.integration
def test_command_does_not_import_torch(sweep):
    """Run in a new process; then a second report replaces the first."""
    script = f"""
import runpy, sys
sys.argv = ["src/report.py", {str(sweep)!r}]
try:
    runpy.run_path("src/report.py", run_name="__main__")
except SystemExit as end:
    print("code", end.code, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "code 0 False"
    assert code("report", [str(sweep)]) == 0
    assert Page((sweep / "report.html").read_text(encoding="utf-8")).tables["runs"]


@pytest.mark.parametrize("name", ["a=b", "it's", "1,2", "[x]", "sampler-steps=5", "run#1", "${x}", "数据", "-1"])
def test_any_folder_name_is_a_path(sweep, name, tmp_path, monkeypatch, capsys):
    """Words that set no key of the command are paths, whatever characters they hold."""
    sweep.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert code("report", [f"./{name}" if name.startswith("-") else name, "title=T"]) == 0
    assert (tmp_path / name / "report.html").is_file()
    assert not (tmp_path / "outputs").exists() or not any((tmp_path / "outputs").rglob("*.yaml"))


def test_write_report_returns_what_the_command_prints(sweep, tmp_path, capsys):
    make_evaluation(sweep / "1" / "evaluate", "latest", {("ddim", 10): 5.0, ("heun", 20): 4.0})
    (sweep / "11").mkdir()
    written = write_report([sweep])
    assert written.path == sweep / "report.html"
    assert written.size == written.path.stat().st_size
    assert (written.runs, written.evaluations) == (4, 2)
    assert [(folder.folder, folder.reason) for folder in written.left_out] == [(sweep / "11", "the folder is empty")]
    assert capsys.readouterr() == ("", "")
    print_report(written)
    printed = capsys.readouterr()
    assert printed.out == f"4 runs, 2 evaluations, 1 left out\nopen  {written.path}  ({written.size / 1e6:.1f} MB)\n"
    assert printed.err == f"left out  {sweep / '11'}: the folder is empty\n"
    page = Page(write_report([sweep], tmp_path / "page.html", "A title").path.read_text(encoding="utf-8"))
    assert "A title" in page.words
    with pytest.raises(ConfigError, match="there is no folder"):
        write_report([tmp_path / "none"])


# size ---------------------------------------------------------------------------------------------------------------------


def test_page_of_a_hundred_runs_is_under_ten_megabytes(tmp_path, report):
    """With grids of the maximum size, and curves that are thinned."""
    grid = png(128, 128)
    assert 0.9 * grids.limit(100) < len(grid) <= grids.limit(100)
    rows = losses(0.2, steps=4000)
    first = make_run(
        tmp_path / "sweep" / "0", ["seed=0", "trainer.max_steps=100"], [*rows, {"step": 4000, "fid_10k": 3.0}], grid
    )
    text = (first / "config.yaml").read_text()
    for i in range(1, 100):
        folder = tmp_path / "sweep" / str(i)
        shutil.copytree(first, folder)
        write(folder / "config.yaml", re.sub(r"(?m)^(\s*)seed: 0$", rf"\1seed: {i}", text))
        write(folder / ".hydra" / "overrides.yaml", f"- seed={i}\n")
    page = report(tmp_path / "sweep")
    assert [row[1] for row in page.tables["runs"][1:]] == [str(i) for i in range(100)]
    assert page.tables["runs"][0][1] == "seed"
    assert sum(name == "img" and bool(a["src"]) for name, a in page.elements if "src" in a) == 100
    assert all(len(s["x"]) <= charts.POINTS for c in page.data["charts"]["curves"] for s in c["series"])
    assert 5_000_000 < (tmp_path / "report.html").stat().st_size < 10_000_000


def test_large_grids_are_reduced_and_small_ones_unchanged(tmp_path):
    small, large = png(60, 50), png(900, 700)
    for name, content in (("small", small), ("large", large), ("cut", small[:100])):
        (tmp_path / f"{name}.png").write_bytes(content)
    kept = grids.picture(tmp_path / "small.png", grids.LARGEST)
    assert base64.b64decode(kept.address.split(",")[1]) == small
    reduced = grids.picture(tmp_path / "large.png", 20_000)
    content = base64.b64decode(reduced.address.split(",")[1])
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == (reduced.width, reduced.height)
        assert image.width / image.height == pytest.approx(9 / 7, rel=0.02)
    assert len(content) <= 20_000
    with pytest.raises(ValueError, match=r"cut\.png cannot be read"):
        grids.picture(tmp_path / "cut.png", 20_000)


# safe ---------------------------------------------------------------------------------------------------------------------

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=document.title='owned'>\"'&"


@pytest.fixture
def hostile(tmp_path):
    """Runs whose names, options, error messages and metrics contain HTML."""
    place = tmp_path / "sweep" / HOSTILE.replace("/", "∕")
    overrides = ["seed=0"]
    for i in range(2):
        folder = make_run(
            place / f"<b>{i}", overrides, [*losses(0.3 + i), {"step": 100, f"<i>{HOSTILE}": 1.0}], png(20, 20)
        )
        write(folder / ".hydra" / "overrides.yaml", yaml.safe_dump([f"data.root={HOSTILE}{i}"]))
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["data"]["root"] = f"{HOSTILE}{i}"
        write(folder / "config.yaml", yaml.safe_dump(config))
        make_evaluation(folder / "evaluate", HOSTILE, {(HOSTILE, 5): 1.0 + i}, split=HOSTILE)
    write(place / "bad" / "outcome.json", json.dumps({"status": "failed", "reason": HOSTILE, "overrides": [HOSTILE]}))
    make_evaluation(tmp_path / "sweep" / "alone", HOSTILE, {(HOSTILE, 5): 1.0})
    return tmp_path / "sweep"


def test_hostile_names_are_escaped(hostile, report):
    page = report(hostile, f"title={quoted(HOSTILE)}")
    assert page.words.count("document.title='owned'") > 10
    assert [a.get("type") for tag, a in page.elements if tag == "script"] == ["application/json", None]
    assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
    assert {tag for tag, _ in page.elements} & {"i", "iframe", "object", "embed", "base"} == set()


def test_page_has_no_external_resources(sweep, report):
    page = report(sweep)
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "srcset", "poster", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, value)
    assert not re.search(
        r"https?:|@import|url\(|fetch\(|XMLHttpRequest|WebSocket|sendBeacon|import\(", _without_namespace(page)
    )
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")


def _without_namespace(page):
    """Return the page without the SVG namespace, which is never fetched."""
    return page.text.replace("http://www.w3.org/2000/svg", "")


# a browser ----------------------------------------------------------------------------------------------------------------


def rows_of(document):
    body = document.split('<section id="runs"')[1].split("</tbody>")[0].split("<tbody>")[1]
    return [re.search(r'data-v="([^"]*)"', row).group(1) for row in body.split("</tr>")[:-1]]


@pytest.mark.integration
def test_browser_sorts_by_fragment_and_runs_no_hostile_script(hostile, sweep, tmp_path, report):
    report(hostile, sweep, f"title={quoted(HOSTILE)}")
    document, console = open_page(tmp_path / "report.html", tmp_path, "#sort=-min%20val%2Floss")
    assert console == ""
    assert "<title>&lt;/script&gt;" in document
    assert "owned</title>" not in document
    order = [name.split("/")[-1] for name in rows_of(document)]
    assert order == ["&lt;b&gt;1", "2", "0", "&lt;b&gt;0", "1", "10"]  # the four runs of the sweep are between
    assert re.search(r'data-key="min val/loss"[^>]*aria-sort="descending"', document)
    assert document.count('aria-sort="') == 1


@pytest.mark.integration
def test_browser_at_phone_width(sweep, tmp_path, report):
    """At 360 pixels, only boxes that scroll are wider than the page. Charts show the value under the pointer; a click on a
    heading sorts, on a grid enlarges it, on the legend hides a line."""
    make_evaluation(sweep / "1" / "evaluate", "latest", {("ddim", 10): 5.0, ("heun", 20): 4.0})
    report(sweep, "title=" + "a-title-without-a-place-to-break-" * 4)
    script = """
      const d = page.document, all = s => [...d.querySelectorAll(s)];
      await new Promise(done => setTimeout(done, 100));
      const out = {};
      out.width = [d.documentElement.clientWidth, d.documentElement.scrollWidth];
      out.wide = all('body *').filter(e => !e.closest('.scroll, nav, svg, dialog') && e.getBoundingClientRect().right > 360.5)
        .map(e => e.outerHTML.slice(0, 80));
      out.table = all('#runs .scroll').map(e => e.scrollWidth > e.clientWidth);
      out.drawn = all('.plot').map(e => e.querySelectorAll('path').length);
      const names = () => [...d.querySelector('#runs table').tBodies[0].rows].map(r => r.cells[0].dataset.v);
      out.first = names();
      const heading = all('#runs thead th').find(h => h.dataset.key === 'objective').firstChild;
      heading.click(); out.once = names();
      heading.click(); out.twice = names();
      out.cards = all('.grids figure').map(e => e.dataset.run);
      const plot = d.querySelector('.plot'), svg = plot.querySelector('svg'), area = svg.getBoundingClientRect();
      const end = svg.querySelector('path').getPointAtLength(0);
      svg.dispatchEvent(new page.PointerEvent('pointermove', { clientX: area.left + end.x, clientY: area.top + end.y }));
      out.tip = plot.querySelector('.tip').textContent;
      const button = d.querySelector('.legend[data-of=curves] button');
      button.click();
      out.hidden = [button.getAttribute('aria-pressed'), plot.querySelectorAll('path').length];
      d.querySelector('.enlarge').click();
      out.large = [d.getElementById('large').open, d.querySelector('#large img').src.slice(0, 15)];
      out.style = page.getComputedStyle(d.body).backgroundColor;
      return out;"""
    document, console = open_page(frame_page(tmp_path / "report.html", 360, script), tmp_path)
    assert console == ""
    outcome = script_result(document)
    assert outcome["width"] == [360, 360]
    assert outcome["wide"] == []
    assert outcome["table"] == [False]
    assert outcome["drawn"] == [4, 4, 4, 2, 2]
    assert outcome["first"] == ["1", "10", "2", "0"]
    assert outcome["once"] == ["2", "0", "1", "10"]  # pred_noise before pred_v; the sort is stable
    assert outcome["twice"] == ["1", "10", "2", "0"]
    assert outcome["cards"] == outcome["twice"]
    assert outcome["tip"] == "run 1 · linear · pred_v: 0.9 at step 10"
    assert outcome["hidden"] == ["false", 3]
    assert outcome["large"] == [True, "data:image/png;"]


@pytest.mark.integration
def test_browser_blocks_an_injected_script(sweep, tmp_path, report):
    """The content security policy blocks it; this also shows that the tests above detect console errors."""
    page = report(sweep)
    broken = tmp_path / "broken.html"
    broken.write_text(page.text.replace("<body>", "<body><script>document.title = 'owned'</script>"), encoding="utf-8")
    document, console = open_page(broken, tmp_path)
    assert "<title>sweep</title>" in document
    assert "Content Security Policy" in console


def test_missing_browser_fails_in_ci(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="no browser opens the report"):
        chromium()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="no browser opens the report"):
        chromium()

"""W&B offline, TensorBoard and metrics.csv: what a run leaves for the dashboards, read back."""

import csv
import math
import re

import offline_wandb
import pytest
from command import TINY, code, command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusion_lab.commands import dashboard
from diffusion_lab.training.module import DiffusionModule

SHOWN = tuple(a for a in TINY if a not in ("callbacks.samples=null", "validation.every=0", "logger=csv"))
WANDB = ("logger=[csv,wandb,tensorboard]", "logger.wandb.mode=offline", "logger.wandb.gradients=2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache):
    """A run of six steps, continued to eight, and an evaluation of it, all with every logger."""
    folder = tmp_path_factory.mktemp("loggers")
    patch = pytest.MonkeyPatch()
    patch.setenv("WANDB_SILENT", "true")
    one, two, out = folder / "one", folder / "two", folder / "out"
    quality = [
        "quality=classifier",
        "callbacks.quality.n=70",
        "callbacks.quality.every=6",
        f"callbacks.quality.cache={cache}",
        "callbacks.quality.share=1e9",
    ]
    assert code("train", [*SHOWN, "debug=fast", *quality, *WANDB, f"hydra.run.dir={one}"]) == 0
    assert code("train", [f"ckpt={one}", "trainer.max_steps=8", f"hydra.run.dir={two}"]) == 0
    several = ["n=70", "samplers=[ddim,ddpm]", "steps=[2,3]", "logger=wandb", "logger.wandb.mode=offline"]
    assert code("evaluate", [f"ckpt={one}", *several, f"cache={cache}", f"out={out}"]) == 0
    patch.undo()
    return one, two, out


def _rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.integration
def test_an_offline_run_holds_the_data_of_every_panel(runs):
    one, _, out = runs
    logged = {key for run in (one, out) for row in offline_wandb.read(run).history for key in row}
    logged |= {key.rsplit("/", 1)[0] for key in logged if key.startswith(("samples/", "trajectory/", "quality"))}
    for section, panels in dashboard.LAYOUT.items():
        for panel in panels:
            if panel.kind == "differences":
                assert len(offline_wandb.read(one).config) > 15
            else:
                assert any(re.fullmatch(panel.keys, key) for key in logged), (section, panel)


def test_the_workspace_is_built_from_the_same_layout():
    view = dashboard.workspace("me", "diffusion-lab", "lab")
    assert [section.name for section in view.sections] == list(dashboard.LAYOUT)
    assert [len(section.panels) for section in view.sections] == [len(panels) for panels in dashboard.LAYOUT.values()]


@pytest.mark.integration
def test_names_axes_and_summaries(runs):
    recorded = offline_wandb.read(runs[0])
    assert recorded.run.display_name.startswith("cosine-pred_v")
    assert {"schedule=cosine", "objective=pred_v", "data=digits"} <= set(recorded.run.tags)
    assert recorded.metrics["val/loss"].step_metric == "trainer/global_step"
    assert recorded.metrics["val/loss"].summary.min
    assert recorded.metrics["fd_classifier_70"].summary.min
    lowest = min(row["val/loss"] for row in recorded.history if "val/loss" in row)
    assert recorded.summary["val/loss"]["min"] == lowest
    assert recorded.config["schedule"]["_target_"] == "diffusion_lab.schedules.Cosine"


@pytest.mark.integration
def test_pictures_have_captions(runs):
    recorded = offline_wandb.read(runs[0])
    (samples,) = [row for row in recorded.history if "samples/filenames" in row]
    assert samples["samples/captions"] == ["step 6, DDIM, seed 0: EMA 0.995 | raw weights"]
    (file,) = samples["samples/filenames"]
    assert (recorded.files / file).is_file()
    (strip,) = [row for row in recorded.history if "trajectory/filenames" in row]
    assert "noise to data" in strip["trajectory/captions"][0]


@pytest.mark.integration
def test_csv_wandb_and_tensorboard_carry_the_same_numbers(runs):
    one = runs[0]
    (events,) = (one / "tensorboard").glob("events.out.tfevents*")
    board = EventAccumulator(str(events)).Reload()
    recorded = offline_wandb.read(one).history
    for name in ("train/loss", "val/loss", "fd_classifier_70"):
        there = {e.step: e.value for e in board.Scalars(name)}
        kept = {int(r["trainer/global_step"]): r[name] for r in recorded if name in r and "trainer/global_step" in r}
        written = {int(float(r["step"])): float(r[name]) for r in _rows(one) if r.get(name)}
        assert written
        assert there == pytest.approx(written, rel=1e-6)
        assert kept == pytest.approx(written, rel=1e-6)


@pytest.mark.integration
def test_a_resumed_run_is_the_same_run_there(runs):
    one, two, _ = runs
    first, second = offline_wandb.read(one), offline_wandb.read(two)
    assert first.run.run_id == second.run.run_id
    assert first.run.display_name == second.run.display_name
    steps = [row["trainer/global_step"] for row in second.history if "trainer/global_step" in row]
    assert min(steps) > 6 - 1e-9
    assert max(steps) == 8


@pytest.mark.integration
def test_evaluations_leave_a_table_and_curves(runs):
    recorded = offline_wandb.read(runs[2])
    (table,) = [row for row in recorded.history if "quality/nrows" in row]
    assert table["quality/nrows"] == 4
    assert any(key.startswith("quality_curve/fd_classifier") for row in recorded.history for key in row)


@pytest.mark.integration
def test_a_loss_that_is_no_number_is_said_and_ends_the_run(tmp_path, capfd, monkeypatch):
    step = DiffusionModule.training_step

    def broken(self, batch, batch_idx):
        out = step(self, batch, batch_idx)
        return {**out, "each": out["each"] * (math.nan if batch["step"] >= 2 else 1.0)}

    monkeypatch.setattr(DiffusionModule, "training_step", broken)
    run = tmp_path / "run"
    arguments = [
        *(a for a in TINY if a != "logger=csv"),
        "logger=wandb",
        "logger.wandb.mode=offline",
        "trainer.max_steps=9",
    ]
    ended, _, err = command("train", [*arguments, f"hydra.run.dir={run}"], capfd)
    assert ended == 1
    assert "train/loss is nan at step 3" in err
    assert "training loss is NaN or Inf since step 3" in err
    assert not (run / "checkpoints" / "last.ckpt").exists()  # such weights replace none
    ((title, text),) = offline_wandb.read(run).alerts
    assert title == "training loss is NaN or Inf"
    assert "step 3" in text

"""What a resumed run keeps, and what it refuses; what a run whose loss is NaN leaves."""

import csv

import pytest
import torch
from command import TINY, code, command, train

from diffusion_lab.checkpoint.archive import sealed
from diffusion_lab.commands.train.configuration import Resume, _merged
from diffusion_lab.training.loggers import CSVLogger
from faults.runs import checkpoint, rows

pytestmark = pytest.mark.integration  # commands and trainings of seconds

VALIDATED = ("validation.every=1", "callbacks.ema.decay=0.5")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Return the folder of a run of three steps with three validations."""
    folder = tmp_path_factory.mktemp("first") / "run"
    assert code("train", [*TINY, *VALIDATED, "trainer.max_steps=3", f"hydra.run.dir={folder}"]) == 0
    return folder


@pytest.mark.parametrize(
    ("override", "named"),
    [("model.width=16", "init="), ("condition=label", "init="), ("model.multipliers=[1,2]", "init=")],
)
def test_a_network_of_other_weights_is_refused_in_one_line(override, named, first, tmp_path, capfd):
    folder = tmp_path / "run"
    outcome = command("train", [f"ckpt={first}", override, "trainer.max_steps=5", f"hydra.run.dir={folder}"], capfd)
    assert outcome.code == 2, outcome.err
    (line,) = (line for line in outcome.err.splitlines() if line.startswith("error: "))
    assert "do not fit this network" in line
    assert named in line
    assert "Traceback" not in outcome.err
    assert not folder.exists()


@pytest.mark.parametrize(("override", "same"), [("optimizer.lr=1e-30", True), ("validation.draws=3", False)])
def test_a_best_score_is_kept_where_it_measures_the_same(override, same, first, tmp_path, capfd):
    again = train(tmp_path / "b", f"ckpt={first}", "trainer.max_steps=5", override, capfd=capfd)
    assert again.code == 0
    losses = {int(row["step"]): float(row["val/loss"]) for row in rows(tmp_path / "b") if row["val/loss"]}
    assert losses.keys() == {1, 2, 3, 4, 5}
    counted = losses if same else {step: loss for step, loss in losses.items() if step > 3}
    best = checkpoint(tmp_path / "b", "last")["callbacks"]["Checkpoints"]["best"]
    assert best == pytest.approx(min(counted.values()), rel=1e-6)
    assert counted[checkpoint(tmp_path / "b", "best")["global_step"]] == pytest.approx(best, rel=1e-6)


def test_a_best_checkpoint_that_is_newer_than_the_resumed_one_is_left(first, tmp_path, capfd):
    """The run before has replaced the one that belongs to last.ckpt."""
    older = tmp_path / "older" / "checkpoints"
    older.mkdir(parents=True)
    state = checkpoint(first, "last")
    lower = {**state, "callbacks": {"Checkpoints": {"best": 0.0, "monitor": "val/loss"}}}
    torch.save(sealed(lower), older / "last.ckpt")
    torch.save(sealed({**checkpoint(first, "best"), "global_step": 4}), older / "best.ckpt")
    train(tmp_path / "b", f"ckpt={older / 'last.ckpt'}", "trainer.max_steps=4", capfd=capfd)
    best = checkpoint(tmp_path / "b", "best")
    assert best["global_step"] == 4
    assert best["callbacks"]["Checkpoints"]["best"] > 0


@pytest.mark.filterwarnings("ignore:.*is not written. the weights at step")
@pytest.mark.parametrize("every", [1, 2, 50])
def test_weights_of_a_loss_that_is_not_finite_replace_none(every, tmp_path, capfd):
    """However often rows are logged: the run exits with 1, and last.ckpt is of finite weights or missing."""
    folder = tmp_path / "run"
    arguments = [
        *TINY, "optimizer.lr=1e9", "trainer.gradient_clip_val=0", "trainer.max_steps=6", "callbacks.checkpoints.every=1",
        f"trainer.log_every_n_steps={every}", f"hydra.run.dir={folder}",
    ]  # fmt: skip
    outcome = command("train", arguments, capfd)
    assert outcome.code == 1, outcome.err
    assert "training loss is NaN or Inf since step" in outcome.err
    last = folder / "checkpoints" / "last.ckpt"
    if last.exists():
        state = checkpoint(folder, "last")
        assert all(torch.isfinite(value).all() for value in state["state_dict"].values())


def test_a_grid_that_cannot_be_written_ends_no_training(tmp_path, capfd):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "samples").write_text("a file where the folder would be")
    grids = "callbacks.samples={_target_: diffusion_lab.training.callbacks.Samples, folder: samples, every: 1, n: 1, "
    grids += "strip: null, sampler: {_target_: diffusion_lab.samplers.DDIM, steps: 2}}"
    with pytest.warns(UserWarning, match="no (samples at step|data.png)"):
        outcome = train(folder, "overwrite=true", "trainer.max_steps=2", grids, capfd=capfd)
    assert "2 steps done" in outcome.out


LIVES = (
    ("trainer=ddp", ("trainer.devices=1", "trainer.strategy=auto"), "trainer=ddp", ("ddp", 2)),
    ("trainer=ddp", ("trainer=cpu",), "trainer.devices=1", ("auto", 1)),
)


@pytest.mark.parametrize(("before", "now", "later", "wanted"), LIVES)
def test_a_later_group_or_key_wins_over_what_it_replaces(before, now, later, wanted, first):
    content = {**checkpoint(first, "last"), "overrides": [*TINY, before]}
    for overrides in (now, (later,)):
        current = dict.fromkeys(("ckpt", "init", "overwrite", "trust", "run_dir"))
        composed, lines, *_ = _merged(current, list(overrides), Resume(first, 3, content))
        content = {**content, "composed": composed, "overrides": lines}
    assert (composed["trainer"]["strategy"], composed["trainer"]["devices"]) == wanted
    assert composed["trainer"]["max_steps"] == content["composed"]["trainer"]["max_steps"]


def test_a_kill_while_metrics_csv_gets_a_column_keeps_its_rows(tmp_path, monkeypatch):
    """Lightning's own writer truncates the file first and leaves none of the rows."""
    logger = CSVLogger(tmp_path, name="", version="")
    for step, name in enumerate("ab", 1):
        logger.log_metrics({name: float(step)}, step=step)
        logger.save()
    before = (tmp_path / "metrics.csv").read_text()
    assert before.splitlines() == ["a,b,step", "1.0,,1", ",2.0,2"]

    def killed(writer: csv.DictWriter, rows: list) -> None:
        raise SystemExit

    monkeypatch.setattr(csv.DictWriter, "writerows", killed)
    logger.log_metrics({"c": 3.0}, step=3)
    with pytest.raises(SystemExit):
        logger.save()
    assert (tmp_path / "metrics.csv").read_text() == before

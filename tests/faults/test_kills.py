"""SIGKILL at random points of every command that writes: what a rerun or a resumed run leaves is what an uninterrupted one does.

Half of the kills come at an event of the file system (an open, a rename, …), the others at a time. Seeds are fixed.
"""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from faults.runs import (
    COMMANDS,
    TRAIN,
    Uninterrupted,
    assert_equal,
    assert_same_run,
    checkpoint,
    partials,
    prepare_folder,
    run,
    timed,
)

STEPS = 24  # of TRAIN
LIVES = 4  # killed lives of a training at most
FULL = os.environ.get("FAULTS") == "full"
TRAININGS, RERUNS = (16, 7) if FULL else (3, 2)  # about 100 and 20 kills


class Kill(NamedTuple):
    """Where a command is killed: at an event, or after a time."""

    kill_at: int | None
    kill_after: float | None

    @classmethod
    def draw(cls, random_: random.Random, whole: Uninterrupted) -> "Kill":
        if random_.random() < 0.5:
            return cls(random_.randrange(whole.events), None)
        return cls(None, random_.uniform(0, whole.seconds))


def killed_training(folder: Path, kills: Callable[[int], Kill | None], whole: Uninterrupted) -> tuple[Path, int]:
    """Train in several lives, each killed where kills(life) says, and resumed from the newest checkpoint.

    Returns:
        The run folder of the last life, and the number of kills.
    """
    source: Path | None = None
    killed = 0
    for life in range(LIVES + 1):
        new, kill = folder / f"life{life}", kills(life)
        arguments = TRAIN if source is None else (f"ckpt={source}",)
        outcome = run("train", [*arguments, f"hydra.run.dir={new}"], folder, **(kill._asdict() if kill else {}))
        assert outcome.code in (0, -9), outcome.printed[-3000:]
        killed += outcome.code == -9
        if (new / "checkpoints" / "last.ckpt").is_file():
            source = new
            if checkpoint(new, "last")["global_step"] == STEPS:
                return new, killed
    raise AssertionError("the last life was not killed, and has no checkpoint")


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(TRAININGS))
def test_a_training_that_is_killed_and_resumed_equals_an_uninterrupted_one(seed, trained, tmp_path):
    drawn = random.Random(f"train {seed}")
    last, killed = killed_training(
        tmp_path / "run", lambda life: Kill.draw(drawn, trained) if life < LIVES else None, trained
    )
    assert_same_run(last, trained.folder / "run")
    assert partials(last) == []
    print(f"{killed} kills")


@pytest.mark.integration
def test_a_kill_at_the_rename_of_a_checkpoint_loses_nothing(trained, tmp_path):
    """At two thirds of the events: between the rows, checkpoints and validations of a step."""
    kills = [Kill(trained.events * 2 // 3, None), Kill(trained.events // 3, None)]
    last, killed = killed_training(tmp_path / "run", lambda life: kills[life] if life < len(kills) else None, trained)
    assert killed == 2
    assert_same_run(last, trained.folder / "run")
    assert partials(last) == []


# commands that are run again -------------------------------------------------------------------------------------------------


def _same_file(one: Path, two: Path) -> None:
    if one.suffix == ".pt":
        assert_equal(torch.load(one, weights_only=True), torch.load(two, weights_only=True), one.name)
    elif one.name == "metrics.json":
        assert [row["metrics"] for row in json.loads(one.read_text())] == [
            row["metrics"] for row in json.loads(two.read_text())
        ]
    else:
        assert one.read_bytes() == two.read_bytes(), one


# Files that hold measured times, paths, or overwrite=true of the rerun.
DIFFER = ("config.yaml", "metrics.csv", "quality.png")


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(RERUNS))
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_killed_and_run_again_leaves_what_an_uninterrupted_one_does(command, seed, trained, tmp_path):
    name, arguments, kept = COMMANDS[command]
    ckpt = trained.folder / "run"
    arguments = tuple(argument.replace("{ckpt}", str(ckpt)) for argument in arguments)

    def prepare(folder: Path) -> Path:
        prepare_folder(command, folder, ckpt)
        return folder

    whole = prepare(tmp_path / "whole")
    uninterrupted = timed(whole, lambda: run(name, arguments, whole))
    again, drawn = prepare(tmp_path / "again"), random.Random(f"{command} {seed}")
    kill = Kill.draw(drawn, uninterrupted)
    assert run(name, arguments, again, **kill._asdict()).code in (0, -9)
    run(name, [*arguments, "overwrite=true"], again).succeeded()
    assert partials(again) == []
    files = [path.relative_to(whole / kept) for path in sorted((whole / kept).rglob("*")) if path.is_file()]
    assert files == [path.relative_to(again / kept) for path in sorted((again / kept).rglob("*")) if path.is_file()]
    assert files
    for path in files:
        if path.name not in DIFFER:
            _same_file(whole / kept / path, again / kept / path)


def counts() -> dict[str, Any]:
    """Return the number of kills at most, by kind."""
    return {"train": TRAININGS * LIVES, **dict.fromkeys(COMMANDS, RERUNS)}


def test_the_harness_kills_as_often_as_documented() -> None:
    assert sum(counts().values()) >= (99 if FULL else 20)

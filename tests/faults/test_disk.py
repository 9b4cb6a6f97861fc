"""A disk that is full, by the limit that the system sets on the size of a file: one line, and the files before are kept."""

import os
from pathlib import Path

import pytest

from faults.runs import COMMANDS, TRAIN, Outcome, assert_equal, checkpoint, partials, prepare_folder, run

SMALL = {
    "sample": 2_000,
    "evaluate": 500,
    "fit": 1_500,
    "export": 20_000,
    "cache": 20_000,
}  # bytes, less than a file of each


def assert_refused(outcome: Outcome) -> None:
    assert outcome.code == 2, outcome.printed[-3000:]
    assert "Traceback" not in outcome.printed
    (line,) = (line for line in outcome.printed.splitlines() if line.startswith("error: "))
    assert "File too large" in line


@pytest.mark.integration
def test_a_full_disk_keeps_the_checkpoint_before_and_the_run_resumes(trained, tmp_path):
    folder, first = tmp_path / "run", tmp_path / "run" / "first"
    run("train", [*TRAIN, "trainer.max_steps=5", f"hydra.run.dir={first}"], folder).succeeded()
    kept = checkpoint(first, "last")
    size = (first / "checkpoints" / "last.ckpt").stat().st_size
    full = [f"ckpt={first}", "trainer.max_steps=24", f"hydra.run.dir={folder / 'full'}"]
    refused = run("train", full, folder, limit=size // 2)
    assert_refused(refused)
    assert partials(folder) == []
    assert_equal(checkpoint(first, "last"), kept)
    again = [f"ckpt={first}", "trainer.max_steps=24", f"hydra.run.dir={folder / 'again'}"]
    run("train", again, folder).succeeded()
    assert checkpoint(folder / "again", "last")["global_step"] == 24


@pytest.mark.faults
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_ends_every_command_with_one_line(command, trained, tmp_path):
    name, arguments, _ = COMMANDS[command]
    folder, ckpt = tmp_path / "work", trained.folder / "run"
    prepare_folder(command, folder, ckpt)
    arguments = tuple(argument.replace("{ckpt}", str(ckpt)) for argument in arguments)
    assert_refused(run(name, arguments, folder, limit=SMALL[command]))
    assert partials(folder) == []
    run(name, [*arguments, "overwrite=true"], folder).succeeded()


@pytest.mark.integration
def test_the_system_s_temporary_folder_is_not_used(tmp_path, monkeypatch):
    """A checkpoint passed through it before, whose disk nobody had checked."""
    missing = Path(os.path.devnull) / "none"
    folder = tmp_path / "run"
    monkeypatch.setenv("TMPDIR", str(missing))
    run("train", [*TRAIN, "trainer.max_steps=2", f"hydra.run.dir={folder / 'a'}"], folder).succeeded()
    assert checkpoint(folder / "a", "last")["global_step"] == 2

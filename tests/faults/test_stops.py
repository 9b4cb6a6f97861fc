"""Stop signals and lost outputs: a run always saves, a command that has nothing to save ends with one line."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from together import meeting, torchrun

from diffusion_lab.processes import StopSignals, limit_threads
from faults.runs import TRAIN, assert_same_run, checkpoint, program, rows, run

ENDLESS = (*TRAIN, "trainer.max_steps=1000000", "callbacks.checkpoints.every=1000000")
STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR1: 138}
DEADLINE = 90.0  # seconds until a run has begun


def wait_for_rows(process: "subprocess.Popen[str]", folder: Path) -> None:
    """Wait until a run has logged a row."""
    end = time.monotonic() + DEADLINE
    while not (folder / "metrics.csv").is_file():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def send(process: "subprocess.Popen[str]", *numbers: int, pause: float = 0.0) -> None:
    """Send signals to a process that may have ended."""
    for number in numbers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        time.sleep(pause)


def saved_by(folder: Path, printed: str) -> int:
    """Assert that a stopped run has a whole checkpoint and no traceback; return its step."""
    assert "Traceback" not in printed
    assert [path.name for path in (folder / "checkpoints").iterdir() if "last" in path.name] == ["last.ckpt"]
    return int(checkpoint(folder, "last")["global_step"])


# while it trains ------------------------------------------------------------------------------------------------------------


def dead_pipe() -> int:
    """Return a pipe whose reader is gone, as after `| head`, or Ctrl-C with `| tee`."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def _close_output() -> None:
    os.close(1)
    os.close(2)


OUTPUTS: dict[str, Callable[[], dict]] = {
    "a dead pipe": lambda: {"stdout": (writer := dead_pipe()), "stderr": writer},
    "closed": lambda: {"stdout": None, "stderr": None, "preexec_fn": _close_output},
    "a full disk": lambda: {"stdout": (full := os.open("/dev/full", os.O_WRONLY)), "stderr": full},
    "ascii": lambda: {"env": {"PYTHONIOENCODING": "ascii"}},
}


@pytest.mark.parametrize(
    "output",
    [
        pytest.param(name, marks=pytest.mark.integration if name == "a dead pipe" else pytest.mark.faults)
        for name in OUTPUTS
    ],
)
def test_an_output_that_is_lost_never_costs_a_checkpoint(output, tmp_path):
    folder = tmp_path / "run"
    progress = "callbacks.progress={_target_: diffusion_lab.training.callbacks.Progress}"
    process = program("train", [*ENDLESS, progress, f"hydra.run.dir={folder}"], **OUTPUTS[output]())
    wait_for_rows(process, folder)
    send(process, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert saved_by(folder, (out or "") + (err or "")) >= 3


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(*stop, marks=pytest.mark.faults, id=stop[0].name) for stop in STOPS.items()]
)
@pytest.mark.parametrize("times", [1, 2, 3])
def test_every_stop_signal_saves_however_often_it_comes(number, code, times, tmp_path):
    folder = tmp_path / "run"
    process = program("train", [*ENDLESS, f"hydra.run.dir={folder}"])
    wait_for_rows(process, folder)
    send(process, *[number] * times, pause=0.02)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    saved_by(folder, out + err)
    assert f"ckpt={folder}/checkpoints/last.ckpt" in out
    assert "resume" in out


@pytest.mark.integration
def test_a_signal_in_a_long_validation_saves_at_once_and_the_validation_is_repeated(tmp_path):
    """Of 20,000 draws, minutes long; the resumed run does it with three, as an uninterrupted one."""
    whole, first, again = tmp_path / "run" / "whole", tmp_path / "first", tmp_path / "run" / "again"
    run("train", [*TRAIN, "trainer.max_steps=8", f"hydra.run.dir={whole}"], tmp_path / "run").succeeded()
    long = (*TRAIN, "trainer.max_steps=8", "validation.draws=20000")
    process = program("train", [*long, f"hydra.run.dir={first}"])
    wait_for_rows(process, first)
    time.sleep(2)  # step 5, whose validation has begun
    send(process, signal.SIGTERM)
    begin = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 20
    assert process.returncode == 143, err
    assert saved_by(first, out + err) == 5
    assert [row["step"] for row in rows(first)] == ["3", "5"]  # the last one has the loss since step 3
    resumed = ["validation.draws=1", f"ckpt={first}", f"hydra.run.dir={again}"]
    run("train", resumed, tmp_path / "run").succeeded()
    assert_same_run(again, whole)


@pytest.mark.integration
def test_a_stop_runs_no_validation_that_an_uninterrupted_run_does_not_have(tmp_path):
    whole, first, again = (tmp_path / "run" / name for name in ("whole", "first", "again"))
    run("train", [*TRAIN, f"hydra.run.dir={whole}"], tmp_path / "run").succeeded()
    stop = "+callbacks.stop={_target_: faults.recorders.SendAt, step: 7, number: 15}"
    stopped = run("train", [*TRAIN, stop, f"hydra.run.dir={first}"], tmp_path / "run")
    assert stopped.code == 143, stopped.printed
    assert checkpoint(first, "last")["global_step"] == 7
    assert [row["step"] for row in rows(first)] == ["3", "5", "6", "7"]
    resumed = [f"ckpt={first}", "trust=[faults]", f"hydra.run.dir={again}"]
    run("train", resumed, tmp_path / "run").succeeded()
    assert_same_run(again, whole)


# several processes ----------------------------------------------------------------------------------------------------------


@pytest.mark.ddp
@pytest.mark.faults
def test_a_signal_to_one_process_of_two_ends_both_with_its_code(tmp_path):
    folder, address = tmp_path / "run", meeting()
    arguments = [*ENDLESS, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", f"hydra.run.dir={folder}"]
    first, second = (program("train", arguments, env={**torchrun(rank, 2), **address}) for rank in range(2))
    wait_for_rows(first, folder)
    send(second, signal.SIGTERM)
    printed = [process.communicate(timeout=60) for process in (first, second)]
    assert [first.returncode, second.returncode] == [143, 143], printed
    saved_by(folder, "".join(printed[0]))
    assert "resume" in printed[0][0]


@pytest.mark.ddp
@pytest.mark.faults
def test_spawned_processes_are_stopped_and_the_resume_line_is_printed(tmp_path):
    folder = tmp_path / "run"
    arguments = [*ENDLESS, "trainer=ddp_spawn", "trainer.accelerator=cpu", f"hydra.run.dir={folder}"]
    process = program("train", arguments)
    wait_for_rows(process, folder)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    out, err = process.communicate(timeout=90)
    assert process.returncode == 130, err
    saved_by(folder, out + err)
    assert "resume" in out


# while it starts up ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "delay",
    [
        pytest.param(delay, marks=pytest.mark.integration if delay == 1.0 else pytest.mark.faults)
        for delay in (0.4, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0)
    ],
)
@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_a_signal_during_the_start_ends_a_command_with_one_line(name, delay, tmp_path):
    folder = tmp_path / "run"
    arguments = {
        "train": [*ENDLESS, f"hydra.run.dir={folder}"],
        "evaluate": ["images=none", "data=digits", f"out={folder}"],
    }
    process = program(name, arguments[name])
    time.sleep(delay)
    send(process, signal.SIGINT, pause=0.3)
    send(process, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in out + err
    if process.returncode == 130:  # else the command had ended, or had begun to train
        assert err.splitlines()[-1:] == ["stopped by SIGINT"] or (folder / "checkpoints" / "last.ckpt").is_file()
    else:
        assert process.returncode in ((130, -signal.SIGINT) if name == "train" else (2, 130, -signal.SIGINT)), err
    assert not folder.exists() or (folder / "config.yaml").is_file()


@pytest.mark.faults
def test_sigusr1_during_the_start_queues_the_job_again(tmp_path):
    """With a scontrol that records its arguments."""
    recorded = tmp_path / "scontrol.txt"
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {recorded}\n')
    (tmp_path / "scontrol").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    process = program("train", [*ENDLESS, f"hydra.run.dir={tmp_path / 'run'}"], env=environment)
    time.sleep(1.5)
    send(process, signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 138, err
    assert recorded.read_text() == "requeue 17\n"
    assert "requeued SLURM's job 17" in out


# the parts ------------------------------------------------------------------------------------------------------------------


def test_signals_are_recorded_where_a_run_saves_and_end_a_command_elsewhere() -> None:
    signals, before = StopSignals(), signal.getsignal(signal.SIGTERM)
    signals.install()
    try:
        with pytest.raises(SystemExit) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.value.code == 143
        os.kill(os.getpid(), signal.SIGTERM)  # while the first one cleans up
        signals.deferred = True
        os.kill(os.getpid(), signal.SIGINT)
        assert (signals.received, signals.count) == (signal.SIGTERM, 3)
    finally:
        signals.restore()
    assert signal.getsignal(signal.SIGTERM) is before
    assert signals.received is None


def test_a_process_of_slurm_takes_the_threads_of_its_task() -> None:
    environment = {"SLURM_PROCID": "1", "SLURM_CPUS_PER_TASK": "3"}
    limit_threads(environment)
    assert environment["OMP_NUM_THREADS"] == "3"
    limit_threads(environment | {"SLURM_CPUS_PER_TASK": "8"})
    assert environment["OMP_NUM_THREADS"] == "3"
    outside: dict[str, str] = {}
    limit_threads(outside)
    assert outside == {}

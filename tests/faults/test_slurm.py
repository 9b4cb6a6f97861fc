"""docs/slurm.sbatch and submitit_slurm on a SLURM of two nodes: a resumed run equals an uninterrupted one."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import ROOT, TINY

from faults import slurm

pytestmark = [
    pytest.mark.ddp,
    pytest.mark.skipif(bool(slurm.missing()), reason=f"needs SLURM: {', '.join(slurm.missing())} missing"),
]

# The options of docs/slurm.sbatch for two nodes of two cores.
NODES = ("--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--signal=USR1@10")
RUN = (*TINY, "trainer.accelerator=cpu", "trainer.max_steps=1200", "validation.every=300")


class Job:
    """A job of docs/slurm.sbatch, submitted in a folder that has the project's src/, docs/ and .venv."""

    def __init__(self, folder: Path, environment: dict[str, str], *overrides: str) -> None:
        self.folder, self.environment = folder, environment
        (folder / "outputs/slurm").mkdir(parents=True)
        for name in ("src", "docs"):
            (folder / name).symlink_to(ROOT / name)
        (folder / ".venv").symlink_to(sys.prefix)
        self.id = self._run("sbatch", "--parsable", *NODES, "docs/slurm.sbatch", *overrides).strip()

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout

    @property
    def log(self) -> str:
        """Output of the job, including restarts."""
        path = self.folder / f"outputs/slurm/{self.id}.log"
        return path.read_text() if path.is_file() else ""

    def run_folder(self, number: int) -> Path:
        """Return the run folder after `number` restarts."""
        return self.folder / f"outputs/slurm/{self.id}/{number}"

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until a condition holds; a requeued job, which SLURM holds back for two minutes, is started at once."""

        def holds() -> bool:
            if "BeginTime" in self.state:
                self._run("scontrol", "update", f"JobId={self.id}", "StartTime=now")
            return condition()

        try:
            slurm.wait_for(holds, what, 600)
        except RuntimeError as error:
            raise RuntimeError(f"{error}; {self.state}; log:\n{self.log}") from None

    @property
    def state(self) -> str:
        """State and reason, as in "PENDING BeginTime"; "" after the end."""
        command = ["squeue", "-h", "-j", self.id, "-o", "%T %r"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    def restarts(self) -> int:
        """Return SLURM's count of restarts."""
        shown = self._run("scontrol", "show", "job", self.id)
        return int(re.search(r"Restarts=(\d+)", shown)[1])  # type: ignore[index]

    def exit_code(self) -> str:
        """Return CODE:SIGNAL of the ended job."""
        shown = self._run("scontrol", "show", "job", self.id)
        return re.search(r"ExitCode=(\S+)", shown)[1]  # type: ignore[index]

    def signal(self, name: str) -> None:
        """Send a signal to the processes of the job's steps, as `--signal` does before the time limit."""
        self._run("scancel", f"--signal={name}", self.id)

    def ended(self) -> bool:
        """Whether the job has left the queue."""
        return not self.state or self.state.split()[0] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    try:
        with slurm.cluster(tmp_path_factory.mktemp("slurm") / "daemons") as variables:
            yield variables
    except slurm.UnavailableError as error:
        pytest.skip(f"SLURM does not run here: {error}")


def _rows(folder: Path) -> int:
    path = folder / "metrics.csv"
    return path.read_text().count("\n") if path.is_file() else 0


def _has_steps(job: Job) -> bool:
    shown = subprocess.run(
        ["squeue", "-h", "-s", "-j", job.id, "-o", "%i"],
        env=job.environment,
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    return f"{job.id}.0" in shown


@pytest.mark.integration
@pytest.mark.timeout(600)
def test_a_signal_during_start_up_requeues_the_job_and_each_task_takes_its_cores(tmp_path, environment):
    job = Job(tmp_path, environment, *RUN[:-2], "trainer.max_steps=4")
    job.wait(lambda: _has_steps(job), "step of the job")
    job.signal("USR1")
    job.wait(lambda: job.restarts() == 1, "restart")
    job.wait(job.ended, "end of the job")
    assert "4 steps done" in job.log
    assert "2 processes of 1 thread(s)" in job.log
    assert "Traceback" not in job.log
    assert job.exit_code() == "0:0"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_lives_train_what_an_uninterrupted_run_trains(tmp_path, environment):
    job = Job(tmp_path / "job", environment, *RUN)
    for number in (0, 1):
        folder, before = job.run_folder(number), _rows(job.run_folder(number - 1)) if number else 0
        job.wait(lambda folder=folder, before=before: _rows(folder) > before + 200, f"200 steps after restart {number}")
        job.signal("USR1")
        job.wait(lambda number=number: job.restarts() == number + 1, f"restart {number + 1}")
    job.wait(job.ended, "end of the job")
    assert job.exit_code() == "0:0"
    assert "Traceback" not in job.log
    single = [sys.executable, str(ROOT / "src/train.py"), *RUN, "trainer=ddp", "trainer.devices=2"]
    subprocess.run(
        [*single, f"hydra.run.dir={tmp_path / 'single'}"],
        check=True,
        timeout=900,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    states = [
        torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
        for folder in (job.run_folder(2), tmp_path / "single")
    ]
    assert [state["global_step"] for state in states] == [1200, 1200]
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name]), name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_submitit_slurm_sweep_ends_well(tmp_path, environment):
    sweep = tmp_path / "sweep"
    command = [sys.executable, str(ROOT / "src/train.py"), "--multirun", "seed=0,1", *TINY, "trainer.max_steps=2"]
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=2"]
    done = subprocess.run(
        [*command, *launcher, "hydra.launcher.timeout_min=10", f"hydra.sweep.dir={sweep}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(sweep.glob("*/outcome.json"))) == 2

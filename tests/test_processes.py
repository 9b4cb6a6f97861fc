"""Processes started by torchrun or srun, and the requeueing of a SLURM job at its time limit."""

import csv
import os
import signal
import subprocess
import sys

import pytest
import pytorch_lightning as pl
import torch
from command import ROOT, TINY, command
from together import free_port, meeting, srun

from diffusion_lab import processes
from diffusion_lab.checkpoint.archive import sealed
from diffusion_lab.commands import train
from diffusion_lab.processes import Launched, launched

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_NNODES": "2", "SLURM_LOCALID": "1"}


def test_who_started_this_process():
    assert launched(TORCHRUN) == Launched("torchrun", rank=3, world=4, nodes=2)
    assert launched(SRUN) == Launched("srun", rank=1, world=4, nodes=2)
    assert launched({**SRUN, "SLURM_NTASKS": "1"}) is None  # a job of one task is a single process
    assert launched({**SRUN, "SLURM_JOB_NAME": "interactive"}) is None
    assert launched({}) is None
    assert [processes.rank(env) for env in (TORCHRUN, SRUN, {"LOCAL_RANK": "2"}, {})] == [3, 1, 2, 0]


def test_processes_on_each_machine_are_counted_as_lightning_counts():
    from lightning_fabric.utilities.device_parser import _normalize_parse_gpu_string_input as parsed

    for devices in (1, "2", [0, 3], "0,1,2", "0, 1", "3,"):
        read = parsed(devices) if isinstance(devices, str) else devices
        assert processes.processes_per_node(devices) == (len(read) if isinstance(read, list) else read)
    assert [processes.processes_per_node(devices) for devices in ("auto", -1, "-1")] == [None] * 3
    for devices in (0, -2, "two", "0,b", [], [-1], ["a"], ""):
        with pytest.raises(ValueError, match=r"trainer.devices=.*: write a number of processes"):
            processes.processes_per_node(devices)


@pytest.mark.parametrize(
    ("name", "arguments", "remedy"),
    [
        ("train", [], "write hydra.run.dir=FOLDER"),
        ("train", ["hydra.run.dir=RUN", "overwrite=true"], "overwrite=true is not supported under torchrun"),
        ("train", ["--multirun", "seed=0,1"], "start each run separately"),
        ("train", ["hydra.run.dir=RUN", "trainer=cpu"], "write trainer=ddp trainer.devices=2 trainer.num_nodes=2"),
        ("evaluate", ["ckpt=RUN"], "write devices=4"),
    ],
)
def test_what_several_processes_cannot_run_together(name, arguments, remedy, tmp_path, capfd, monkeypatch):
    for key, value in {**TORCHRUN, "RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    code, _, err = command(name, [a.replace("RUN", str(tmp_path / "run")) for a in arguments], capfd)
    assert code == 2
    assert remedy in err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_weights_in_parts_do_not_allow_and_lonely_tasks_are_refused(tmp_path, capfd, monkeypatch):
    cases = (
        ({}, ["trainer.strategy=deepspeed"], "write trainer=fsdp, or trainer=ddp"),
        ({}, ["trainer=fsdp", "callbacks.ema=null"], "callbacks.ema.decay=0"),
        ({}, ["trainer=fsdp", "compile=true"], "compile=false"),
        ({}, ["trainer=fsdp", "logger=wandb", "logger.wandb.gradients=50"], "logger.wandb.gradients"),
        ({"SLURM_NTASKS": "1"}, ["trainer=ddp", "trainer.accelerator=cpu"], "--ntasks-per-node=N"),
    )
    for i, (env, arguments, remedy) in enumerate(cases):
        for key, value in env.items():
            monkeypatch.setenv(key, value)
        code, _, err = command("train", [*arguments, f"hydra.run.dir={tmp_path / str(i)}"], capfd)
        assert code == 2
        assert remedy in err


def test_a_checkpoint_that_fsdp_would_scramble_is_refused(tmp_path, capfd):
    """Weights stored in channels_last memory format, as earlier versions did."""
    folder = tmp_path / "run"
    assert command("train", [*TINY, "trainer.max_steps=1", f"hydra.run.dir={folder}"], capfd).code == 0
    path = folder / "checkpoints" / "last.ckpt"
    stored = torch.load(path, weights_only=True)
    weights = stored["state_dict"]
    stored["state_dict"] = {
        k: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in weights.items()
    }
    torch.save(sealed(stored), path)
    again = [f"ckpt={folder}", "trainer.max_steps=2", "trainer=fsdp", f"hydra.run.dir={tmp_path / 'again'}"]
    code, _, err = command("train", again, capfd)
    assert code == 2
    assert "resume it with trainer=ddp" in err


def _rows(folder):
    with (folder / "metrics.csv").open() as file:
        return [(row["step"], row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


SAME = (
    *TINY[:5],
    "trainer.log_every_n_steps=1",
    "validation.every=0",
    "data.batch_size=16",
    "lr_scheduler=constant",
    "lr_scheduler.warmup=0",
)


@pytest.mark.integration
@pytest.mark.ddp
@pytest.mark.parametrize("by", ["torchrun", "srun"])
def test_processes_started_outside_train_the_same_run(by, tmp_path, capfd):
    """Two processes of torchrun or srun have the losses of one process to 1e-5."""
    one, two = tmp_path / "one", tmp_path / "two"
    short = [*SAME, "trainer.max_steps=4"]
    assert command("train", [*short, "trainer=cpu", f"hydra.run.dir={one}"], capfd).code == 0
    program = [str(ROOT / "src" / "train.py"), *short, "trainer=ddp", "trainer.accelerator=cpu", f"hydra.run.dir={two}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    if by == "torchrun":
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
        runs = [subprocess.Popen([*start, *program], env=env)]
    else:
        env |= meeting()
        runs = [
            subprocess.Popen([sys.executable, *program], env={**env, **srun(rank, 2)})
            for rank in (1, 0)  # rank 1 first: it waits for rank 0
        ]
    assert [run.wait(timeout=240) for run in runs] == [0] * len(runs)
    alone, together = _rows(one), _rows(two)
    assert [step for step, _ in together] == [step for step, _ in alone]
    assert [float(loss) for _, loss in together] == pytest.approx([float(loss) for _, loss in alone], rel=1e-5)
    assert len(list(tmp_path.iterdir())) == 2  # no folder of process 1


class Signalled(pl.Callback):
    """Send SLURM's signal of the approaching time limit at step 2."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)


@pytest.mark.parametrize("array", [False, True])
def test_a_job_whose_time_is_over_is_saved_and_requeued(array, tmp_path, capfd, monkeypatch):
    calls = tmp_path / "calls"
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    if array:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4700")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setattr(train, "added_callbacks", lambda settings: [Signalled()])
    run = tmp_path / "run"
    code, out, _ = command("train", [*TINY, "trainer.max_steps=9", f"hydra.run.dir={run}"], capfd)
    assert code == 128 + signal.SIGUSR1
    assert calls.read_text().split() == ["requeue", "4700_3" if array else "4711"]
    assert "requeued" in out
    monkeypatch.setattr(train, "added_callbacks", lambda settings: [])
    again = command("train", [f"ckpt={run}", f"hydra.run.dir={tmp_path / 'again'}"], capfd)
    assert again.code == 0
    assert "9 steps done" in again.out

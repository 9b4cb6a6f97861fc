"""Start commands, kill them at chosen points, and compare what they leave.

Commands are forked from a server that has imported the package, because the imports take longer than such a run. `program`
starts a real program, for signals that arrive while it starts up.
"""

import csv
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from diffusion_lab import cli

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = ["diffusion_lab.commands.train", "diffusion_lab.commands.evaluate", "diffusion_lab.commands.sample.context"]
PRELOADED += [
    "diffusion_lab.commands.export",
    "diffusion_lab.commands.fit_variance",
    "torchvision",
    "matplotlib.figure",
]
os.environ["TQDM_MININTERVAL"] = (
    "60"  # few lines of progress: a limit on the size of files holds for the output as well
)
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(PRELOADED)

# Events of the file system, by Python's audit hooks, at which a command may be killed.
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "shutil.rmtree")

# A training of a second or two, whose rows, validations and checkpoints coincide at some steps and not at others.
TRAIN = (
    "schedule.steps=40",
    "sampler.steps=4",
    "model.width=8",
    "model.multipliers=[1]",
    "logger=csv",
    "callbacks.progress=null",
    "callbacks.samples=null",
    "callbacks.checkpoints.every=5",
    "callbacks.ema.decay=0.9",
    "trainer=cpu",
    "trainer.max_steps=24",
    "trainer.log_every_n_steps=3",
    "validation.every=5",
    "validation.draws=1",
    "data.limit=400",
    "data.batch_size=16",
    "lr_scheduler.warmup=0",
)
# Name → command, arguments with {ckpt}, and the folder below the working folder that holds what counts.
COMMANDS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "sample": ("sample", ("ckpt={ckpt}", "n=24", "sampler.steps=2", "device=cpu", "out=out"), "out"),
    "evaluate": (
        "evaluate",
        ("ckpt={ckpt}", "n=64", "steps=[2]", "device=cpu", "out=out", "metrics=[fd]", "cache=cache",
            "extractor={_target_: faults.recorders.Means}"),
        "out",
    ),
    "fit": ("fit_variance", ("ckpt=run", "variance=analytic", "n=64", "device=cpu", "hydra.run.dir=out"), "."),
    "export": ("export", ("ckpt={ckpt}", "out=out/model.safetensors"), "out"),
    "cache": (
        "train",
        (
            *TRAIN, "data=image_folder", "data.root=images", "data.image_size=[16,16]", "data.val=8", "data.test=0",
            "data.limit=null", "model=unet_digits", "trainer.max_steps=1", "hydra.run.dir=out",
        ),
        "images",
    ),
}  # fmt: skip
MEASURED = ("speed/",)  # columns of metrics.csv that no two runs share


class Outcome:
    """A command that has ended: its exit code (−9 after SIGKILL), output and number of events."""

    def __init__(self, code: int, printed: str, events: int) -> None:
        self.code, self.printed, self.events = code, printed, events

    def succeeded(self) -> "Outcome":
        assert self.code == 0, self.printed[-3000:]
        return self


def run(
    name: str,
    arguments: Sequence[str],
    folder: Path,
    *,
    kill_at: int | None = None,
    kill_after: float | None = None,
    limit: int | None = None,
    printed: str = "",
) -> Outcome:
    """Run `python src/NAME.py ARGUMENTS` to its end.

    Args:
        name: of the command.
        arguments: of the command.
        folder: holds everything that the command writes; its events are counted.
        kill_at: send SIGKILL at this event.
        kill_after: send SIGKILL after these seconds.
        limit: RLIMIT_FSIZE, bytes that a file may have.
        printed: distinguishes commands that run at once in one folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    output, counted = (folder.parent / f"{folder.name}{printed}.{kind}" for kind in ("txt", "events"))
    counted.write_text("0")
    output.write_text("")  # a kill may come before the command opens it
    process = _FORKED.Process(target=_one, args=(name, list(arguments), folder, output, counted, kill_at, limit))
    process.start()
    process.join(kill_after if kill_after is not None else 240)
    if process.is_alive():
        assert kill_after is not None, output.read_text()[-3000:]
        process.kill()
    process.join()
    assert process.exitcode is not None
    return Outcome(process.exitcode, output.read_text(errors="replace"), int(counted.read_text() or 0))


def _one(
    name: str, arguments: list[str], folder: Path, printed: Path, counted: Path, kill_at: int | None, limit: int | None
) -> None:
    with printed.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(folder)
    if limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    root, seen = os.fspath(folder), 0

    def hook(event: str, values: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in EVENTS or not isinstance(values[0], str | os.PathLike):
            return
        if not os.path.abspath(values[0]).startswith(root):
            return
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    sys.addaudithook(hook)
    sys.argv = [str(ROOT / "src" / f"{name}.py"), *arguments]
    try:
        cli.start(name)
    finally:
        descriptor = os.open(counted, os.O_WRONLY | os.O_TRUNC)
        os.write(descriptor, str(seen).encode())


class Uninterrupted(NamedTuple):
    """A command that ran to its end: its folder, number of events and duration."""

    folder: Path
    events: int
    seconds: float


def timed(folder: Path, call: Callable[[], Outcome]) -> Uninterrupted:
    begin = time.monotonic()
    outcome = call().succeeded()
    assert outcome.events > 3
    return Uninterrupted(folder, outcome.events, time.monotonic() - begin)


def _images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    drawn = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(drawn.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / f"{i:03d}.png")
        os.utime(folder / f"{i:03d}.png", (0, 0))  # part of the key of a cache


def prepare_folder(command: str, folder: Path, run_folder: Path) -> None:
    """Create a working folder with what a command of COMMANDS needs in it."""
    folder.mkdir()
    if command == "fit":  # which writes into the folder of the checkpoint
        (folder / "run").mkdir()
        (folder / "run" / "last.ckpt").write_bytes((run_folder / "checkpoints" / "last.ckpt").read_bytes())
    if command == "cache":
        _images(folder / "images", 64)


def program(name: str, arguments: Sequence[str], **options: Any) -> "subprocess.Popen[str]":
    """Start `python src/NAME.py ARGUMENTS` as a program in a process group of its own, with captured output."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        **options.pop("env", {}),
    }
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    command = [sys.executable, str(ROOT / "src" / f"{name}.py"), *arguments]
    return subprocess.Popen(command, text=True, env=environment, start_new_session=True, **streams)


def rows(run_folder: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv, without the columns that are measured times."""
    with (run_folder / "metrics.csv").open(newline="") as file:
        return [
            {name: value for name, value in row.items() if not name.startswith(MEASURED)}
            for row in csv.DictReader(file)
        ]


def checkpoint(run_folder: Path, name: str) -> dict[str, Any]:
    """Return checkpoints/NAME.ckpt of a run."""
    return torch.load(run_folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def partials(folder: Path) -> list[str]:
    """Return the temporary files below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "partial" in path.name)


def assert_equal(one: Any, two: Any, where: str = "") -> None:
    """Assert that two nested containers hold equal tensors and values, bit for bit."""
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_equal(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for place, pair in enumerate(zip(one, two, strict=True)):
            assert_equal(*pair, f"{where}/{place}")
    else:
        assert one == two, where


def assert_same_run(run_folder: Path, uninterrupted: Path) -> None:
    """Assert that a run that was killed and resumed leaves what an uninterrupted one does."""
    assert rows(run_folder) == rows(uninterrupted)
    for name in ("best", "last"):
        got, want = checkpoint(run_folder, name), checkpoint(uninterrupted, name)
        for key in ("state_dict", "ema", "optimizer_states", "lr_schedulers", "global_step", "loss_sums"):
            assert_equal(got[key], want[key], f"{name}.ckpt/{key}")
        assert got["callbacks"]["Checkpoints"] == want["callbacks"]["Checkpoints"]

"""The result of a command, one-line errors, stop signals, and launchers (torchrun, SLURM). Imports only the standard library.

Under torchrun or srun, rank 0 runs the command as a single process does. The other processes wait for the configuration that
rank 0 writes and join it, like the processes that Lightning starts.
"""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from diffusion_lab.errors import ConfigError

# Environment variable with the path of rank 0's resolved configuration, for the other processes of a run.
CONFIG_ENV = "DIFFUSION_LAB_CONFIG"
POLL_SECONDS = 0.5


class Result(NamedTuple):
    """The result of a command.

    Attributes:
        code: exit code.
        metric: name of the monitored metric.
        value: best value of the metric. A sweep sorts its jobs by this value, and a sweeper minimizes it.
        pruned: whether the sweeper ended the job early.
        reason: cause of a failure.
    """

    code: int
    metric: str | None = None
    value: float | None = None
    pruned: bool = False
    reason: str | None = None


class Refusal(SystemExit):
    """Exit with code 2, raised after an error was printed on stderr."""

    def __init__(self, reason: str) -> None:
        super().__init__(2)
        self.reason = reason


@contextmanager
def one_line() -> Iterator[None]:
    """Print a ConfigError as one line on stderr and exit with code 2. DIFFUSION_LAB_DEBUG=1 shows the traceback instead."""
    try:
        with signals_first():
            yield
    except ConfigError as error:
        if os.environ.get("DIFFUSION_LAB_DEBUG"):
            raise
        line = " ".join(str(error).split())
        print(f"error: {line}", file=sys.stderr, flush=True)
        raise Refusal(line) from None


# stop signals ---------------------------------------------------------------------------------------------------------------

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # Windows has the first two


class Interrupted(SystemExit):
    """Ends a command after a stop signal, with exit code 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class StopSignals:
    """The stop signals of this process: SIGINT, SIGTERM, SIGHUP (unless nohup ignores it) and SIGUSR1.

    The handler sets `received` and `count`, and prints nothing: the terminal or the pipe of the output may be gone. Where the
    command has nothing to save, the first signal also raises `Interrupted`; the second one meets the cleaning up after the
    first and raises nothing, and further ones raise again.

    Attributes:
        received: the number of the first signal, or None.
        count: number of signals.
        deferred: signals are only recorded, because the command itself saves and ends.
        notify: called with the number of each signal, e.g. to pass it to other processes.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.count = 0
        self.deferred = False
        self.notify: Callable[[int], None] | None = None
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Install the handler, in the main thread alone; Python has none in others. Repeated calls change nothing.

        Signals that the launcher has blocked (`env --block-signal=USR1` in docs/slurm.sbatch, since SIGUSR1 kills an interpreter
        that has no handler yet) are unblocked, which delivers those that have arrived meanwhile.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
        for number in numbers:
            handler = signal.getsignal(number)
            ignored = number != signal.SIGINT and handler is signal.SIG_IGN  # by nohup
            if handler != self._handle and not ignored:
                self._before.setdefault(number, handler)
                signal.signal(number, self._handle)
        if hasattr(signal, "pthread_sigmask"):  # not on Windows
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Only record signals in the body, and raise Interrupted after it if one has come.

        For imports: an exception inside the C++ code of an extension module ends the process by std::terminate.
        """
        before, self.deferred = self.deferred, True
        try:
            yield
        finally:
            self.deferred = before
        if self.received is not None and not before:
            raise Interrupted(self.received)

    def restore(self) -> None:
        """Install the handlers from before `install`, and forget what was received."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)
        self._before = {}
        self.received, self.count, self.deferred, self.notify = None, 0, False, None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.received is None:
            self.received = number
        if self.notify is not None:
            self.notify(number)
        if not self.deferred and self.count != 2:
            raise Interrupted(number)


stop_signals = StopSignals()


@contextmanager
def signals_first() -> Iterator[None]:
    """Raise `Interrupted` again for the exception that it became on its way, e.g. in a `finally` of another package."""
    try:
        yield
    except Exception as error:
        if stop_signals.received is None or stop_signals.deferred:
            raise
        raise Interrupted(stop_signals.received) from error


@contextmanager
def handling_signals() -> Iterator[None]:
    """Handle stop signals by `stop_signals` in the body, and as before after it."""
    stop_signals.install()
    try:
        yield
    finally:
        stop_signals.restore()


# output ---------------------------------------------------------------------------------------------------------------------


class _Lossy(io.FileIO):
    """A stream whose write errors are ignored: a reader that is gone, a full disk, a closed terminal."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError:
            return len(content)


def protect_output() -> None:
    """Make stdout and stderr streams that never raise: losing a line must not lose a run.

    Errors of writing are ignored, characters that the encoding lacks are escaped, and a closed stream becomes the null device,
    so that no file is opened under its number.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is `descriptor`
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        if before is not None and before is not getattr(sys, f"__{name}__"):
            continue  # replaced by a caller, as pytest does
        if before is not None:
            with suppress(OSError):
                before.flush()
        raw = _Lossy(descriptor, "w", closefd=False)
        stream = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=getattr(before, "encoding", None) or "utf-8",
            errors="backslashreplace",
            line_buffering=name == "stderr" or raw.isatty(),
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


# launchers ------------------------------------------------------------------------------------------------------------------


class Launched(NamedTuple):
    """The launcher of this process, and its rank.

    Attributes:
        by: name of the launcher, "torchrun" or "srun".
        rank: rank of this process among all processes, from 0.
        world: number of processes.
        nodes: number of machines.
    """

    by: str
    rank: int
    world: int
    nodes: int


def launched(env: Mapping[str, str] = os.environ) -> Launched | None:
    """Return the launcher of this process; None without a launcher, and in a SLURM job with one task."""
    if "TORCHELASTIC_RUN_ID" in env:
        world = int(env["WORLD_SIZE"])
        return Launched("torchrun", int(env["RANK"]), world, world // int(env["LOCAL_WORLD_SIZE"]))
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env and not interactive(env):
        return Launched("srun", int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_NNODES", "1")))
    return None


def interactive(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this SLURM job is interactive, by the job names that Lightning uses."""
    return env.get("SLURM_JOB_NAME") in ("bash", "interactive")


def rank(env: Mapping[str, str] = os.environ) -> int:
    """Return the rank of this process in its run, from torchrun, SLURM or Lightning. Rank 0 prints and writes."""
    started = launched(env)
    return started.rank if started else int(env.get("LOCAL_RANK", "0"))


def check_launch(started: Launched, command: str, sweep: bool, named_folder: bool, overwrite: bool) -> None:
    """Raise ConfigError for a command line that cannot be run by several processes of a launcher."""
    if command != "train":
        raise ConfigError(
            f"{command}.py starts its processes itself: run it without {started.by}, and write devices={started.world}"
        )
    if sweep:
        raise ConfigError(
            f"--multirun under {started.by} would run the sweep in every process: start each run separately"
        )
    if not named_folder:
        raise ConfigError(
            f"the {started.world} processes started by {started.by} need the same run folder: write hydra.run.dir=FOLDER"
        )
    if overwrite:
        raise ConfigError(f"overwrite=true is not supported under {started.by}: write hydra.run.dir= with a new folder")


def processes_per_node(devices: int | str | list[Any]) -> int | None:
    """Return the number of processes on each node for a value of `trainer.devices`; None for auto.

    Raises:
        ConfigError: if the number is less than one, or Lightning does not accept the value.
    """
    if devices in ("auto", "-1", -1):
        return None
    if isinstance(devices, str) and "," in devices:
        devices = [int(index) if index.isdigit() else index for index in devices.replace(" ", "").split(",") if index]
    if isinstance(devices, list):
        count = len(devices) if all(isinstance(index, int) and index >= 0 for index in devices) else 0
    else:
        count = int(devices) if str(devices).isdigit() else 0
    if count < 1:
        raise ConfigError(f"trainer.devices={devices}: write a number of processes, a list of GPUs as [0,1], or auto")
    return count


def is_multiprocess(trainer: Mapping[str, Any]) -> bool:
    """Whether a run with this `trainer` node has, or may have, several processes."""
    return processes_per_node(trainer["devices"]) != 1 or trainer["num_nodes"] > 1


def check_sweep(trainer: Mapping[str, Any]) -> None:
    """Raise ConfigError if each job of a sweep would have several processes; `trainer` is the node of `conf/trainer`."""
    if is_multiprocess(trainer):
        raise ConfigError(
            "--multirun with several processes would run the sweep again in every process: write trainer.devices=1, "
            "or start each run separately"
        )


def wait_for(path: Path) -> Path:
    """Wait until rank 0 has written `path`, and return it. If rank 0 fails, the launcher ends this process."""
    while not (path.is_file() and path.stat().st_size):
        time.sleep(POLL_SECONDS)
    return path


def limit_threads(env: Any = os.environ) -> None:
    """Set OMP_NUM_THREADS to the CPUs of this process's SLURM task, before torch is imported; a value that is set stays.

    Without a limit on the affinity, each task of a node would compute with as many threads as the machine has.
    """
    if "SLURM_CPUS_PER_TASK" in env and "SLURM_PROCID" in env:
        env.setdefault("OMP_NUM_THREADS", env["SLURM_CPUS_PER_TASK"])


def requeue() -> None:
    """Requeue this SLURM job, which must be submitted with `--requeue`, and print its id. Outside SLURM nothing is done.

    Raises:
        subprocess.CalledProcessError: if scontrol fails.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    subprocess.run(["scontrol", "requeue", job], check=True)
    print(f"requeued SLURM's job {job}", flush=True)


def ended_by(stop: Interrupted, requeues: bool) -> int:
    """Print that a signal ended the command before it had anything to save; return the exit code.

    On SIGUSR1, which SLURM sends before a time limit, a command that `requeues` is queued again.
    """
    print(f"stopped by {signal.Signals(stop.number).name}", file=sys.stderr, flush=True)
    if not requeues or signal.Signals(stop.number).name != "SIGUSR1":
        return 128 + stop.number
    if rank() > 0:
        return 0  # with another code, srun --kill-on-bad-exit may end rank 0 before it has requeued the job
    requeue()
    return 128 + stop.number

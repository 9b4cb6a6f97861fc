"""A real SLURM of two nodes on this machine, from the packages of a distribution, for tests."""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")

CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SchedulerParameters=batch_sched_delay=1,sched_interval=2
JobRequeue=1
KillWait=60
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=8000
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=8000
PartitionName=cpu Nodes={nodes[0]},{nodes[1]} Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


def missing() -> list[str]:
    """Return the programs of SLURM that this machine does not have, or "root"."""
    return [name for name in PROGRAMS if shutil.which(name) is None] + (["root"] if os.geteuid() else [])


class UnavailableError(Exception):
    """The daemons of SLURM do not run on this machine."""


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start the daemons; yield the environment in which sbatch, srun and scontrol reach them.

    The nodes have names that resolve to this machine, since one of them becomes MASTER_ADDR.

    Raises:
        UnavailableError: the daemons do not run, e.g. in a container without the needed rights.
    """
    folder.mkdir(parents=True)
    (folder / "state").mkdir()
    key, conf = folder / "munge.key", folder / "slurm.conf"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    folder.chmod(0o755)
    host = socket.gethostname().split(".")[0]
    nodes = (host, "localhost")
    conf.write_text(CONFIGURATION.format(host=host, folder=folder, nodes=nodes, ports=_free_ports(3), user="root"))
    files = (f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/seed")
    daemons = [
        ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.sock", *files],
        ["slurmctld", "-D", "-f", str(conf)],
        *(["slurmd", "-D", "-N", node, "-f", str(conf)] for node in nodes),
    ]
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    started: list[subprocess.Popen[bytes]] = []
    try:
        for i, command in enumerate(daemons):
            with (folder / f"daemon{i}.out").open("wb") as log:
                started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
            time.sleep(2)
        try:
            wait_for(lambda: _idle(environment) == 2, "two idle nodes", 60)
        except RuntimeError as error:
            logs = "\n".join(path.read_text(errors="replace")[-500:] for path in sorted(folder.glob("daemon*.out")))
            raise UnavailableError(f"{error}\n{logs}") from None
        yield environment
    finally:
        subprocess.run(["scancel", "--full", "--user=root"], env=environment, check=False, timeout=30)
        time.sleep(2)
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:  # slurmd waits for the steps of a job
                process.kill()
                process.wait(20)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _idle(environment: dict[str, str]) -> int:
    done = subprocess.run(
        ["sinfo", "-N", "-h", "-t", "idle"], env=environment, capture_output=True, text=True, check=False
    )
    return len(done.stdout.split("\n")) - 1


def wait_for(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Wait until a condition holds; RuntimeError after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"no {what} within {seconds} s")
        time.sleep(0.5)

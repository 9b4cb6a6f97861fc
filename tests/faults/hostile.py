"""Make hostile files from good ones, and read them: a ConfigError of one printable line, or the right result, and nothing else.

`damaged` damages any file, `replaced` puts something else in its place; the files of tests add what is special to a format.
FAULTS=full makes many more.
"""

import io
import os
import pickle
import resource
import signal
import socket
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion_lab.checkpoint.archive import sealed
from diffusion_lab.errors import ConfigError

FULL = os.environ.get("FAULTS") == "full"
SECONDS = 30  # for one file; a hang is one that never ends
MOST_MEMORY = 700 << 20  # bytes that reading hostile files may add to the process: the bombs declare more
ESCAPES = "\x1b[31mred\x1b]0;title\x07\x9b2J\u202e"

Write = Callable[[Path], object]
Cases = dict[str, Write]


# damage ---------------------------------------------------------------------------------------------------------------------


def damaged(good: bytes, seed: int = 0, flips: int | None = None) -> Cases:
    """Return truncated and altered copies of a file: name → function that writes one to a path."""
    rng, n = np.random.default_rng(seed), len(good)
    flips = (60 if FULL else 12) if flips is None else flips
    cases: dict[str, bytes] = {"empty": b"", "text": b"this is text\n", "zeros": bytes(n), "doubled": good + good}
    for share in (0.01, 0.3, 0.9) if not FULL else np.linspace(0.01, 0.99, 15):
        cases[f"truncated to {share:.2f}"] = good[: int(n * share)]
    cases["without its last byte"] = good[:-1]
    cases["without its first byte"] = good[1:]
    for k, bit in enumerate(rng.integers(0, 8 * n, flips)):
        changed = bytearray(good)
        changed[bit // 8] ^= 1 << (bit % 8)
        cases[f"bit {k}, {bit} flipped"] = bytes(changed)
    for k, start in enumerate(rng.integers(0, n, 8 if FULL else 2)):
        cases[f"block {k}, from {start} zeroed"] = good[:start] + bytes(min(64, n - start)) + good[start + 64 :]
    return {name: _writes(content) for name, content in cases.items()}


def _writes(content: bytes) -> Write:
    return lambda path: path.write_bytes(content)


def replaced() -> Cases:
    """Return what is no regular file, and a file that never ends."""

    def bound(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            before = os.getcwd()
            os.chdir(path.parent)  # an address has 107 bytes at most
            try:
                server.bind(path.name)
            finally:
                os.chdir(before)

    def sparse(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(1 << 40)

    return {
        "a pipe": os.mkfifo,
        "a folder": Path.mkdir,
        "a dangling link": lambda path: path.symlink_to("nowhere"),
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a link to a device": lambda path: path.symlink_to("/dev/zero"),
        "a socket": bound,
        "a sparse file of 1 TiB": sparse,
    }


# values ---------------------------------------------------------------------------------------------------------------------

WRONG: dict[str, Any] = {
    "null": None,
    "a number": 7,
    "NaN": float("nan"),
    "text": ESCAPES,
    "a list": [1],
    "a mapping": {"a": 1},
    "a huge number": 10**18,
}


def altered(
    value: Mapping[str, Any], wrong: Mapping[str, Any] = WRONG, depth: int = 1
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield copies of nested mappings, each with one entry missing or of another type."""
    for key, child in value.items():
        yield f"no {key}", {k: v for k, v in value.items() if k != key}
        for name, other in wrong.items():
            if type(other) is not type(child):
                yield f"{key} is {name}", {**value, key: other}
        if depth > 1 and isinstance(child, dict):
            for name, changed in altered(child, wrong, depth - 1):
                yield f"{key}: {name}", {**value, key: changed}


def nested(depth: int) -> Any:
    """Return lists inside lists."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def laughs(levels: int = 60) -> Any:
    """Return a list of lists that are few in memory and 2^levels to walk through."""
    value: Any = [0]
    for _ in range(levels):
        value = [value, value]
    return value


class Runs:
    """Would run a command when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.marker}",))


class Allocates:
    """Would allocate a terabyte when unpickled, by a call that torch.load permits."""

    def __reduce__(self) -> Any:
        return (bytearray, (1 << 40,))


def saved(content: Any, path: Path, seal: bool = True) -> None:
    """Write a file of torch.save, by default with the right hash: whoever makes a file can compute it."""
    torch.save(sealed(content) if seal else content, path)


def archives(content: dict[str, Any], marker: Path) -> Cases:
    """Return hostile torch archives of any content: name → function that writes one."""
    some = torch.zeros(1)

    def repacked(change: Callable[[zipfile.ZipFile, str, bytes], None]) -> Write:
        def write(path: Path) -> None:
            packed = io.BytesIO()
            torch.save(sealed(content), packed)
            with zipfile.ZipFile(packed) as old, zipfile.ZipFile(path, "w") as new:
                for name in old.namelist():
                    change(new, name, old.read(name))

        return write

    def bomb(new: zipfile.ZipFile, name: str, data: bytes) -> None:
        more = b"0" * (200 << 20) if name.endswith("data.pkl") else b""
        new.writestr(name, data + more, zipfile.ZIP_DEFLATED)

    def other(new: zipfile.ZipFile, name: str, data: bytes) -> None:
        new.writestr(name, pickle.dumps(Runs(marker), 2) if name.endswith("data.pkl") else data)

    def fewer(new: zipfile.ZipFile, name: str, data: bytes) -> None:
        if "/data/" not in name:
            new.writestr(name, data)

    def shorter(new: zipfile.ZipFile, name: str, data: bytes) -> None:
        new.writestr(name, data[: len(data) // 2] if "/data/" in name else data)

    cycle: list[Any] = []
    cycle.append(cycle)
    extra: dict[str, Any] = {
        "a payload": Runs(marker),
        "a terabyte": Allocates(),
        "an expanded tensor": some.expand(1 << 40),
        "a meta tensor": torch.empty(1 << 40, device="meta"),
        "a sparse tensor": torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), some, (1 << 40,)),
        "nested lists": nested(150),
        "lists to laugh at": laughs(),
    }
    cases: Cases = {
        f"{name} in it": (lambda path, v=v: saved({**content, "extra": v}, path, seal=False))
        for name, v in extra.items()
    }
    cases["a cycle in it"] = lambda path: saved({**content, "extra": cycle}, path, seal=False)
    cases |= {f"{name} for it": (lambda path, v=v: saved(v, path, seal=False)) for name, v in WRONG.items()}
    cases["a payload for it"] = lambda path: saved(Runs(marker), path, seal=False)
    cases["a pickle alone"] = lambda path: path.write_bytes(pickle.dumps(Runs(marker)))
    cases |= {"compressed": repacked(bomb), "another pickle": repacked(other)}
    return cases | {"without numbers": repacked(fewer), "with half the numbers": repacked(shorter)}


def arrays(good: Mapping[str, np.ndarray]) -> Cases:
    """Return hostile .npz files with the names of good arrays: name → function that writes one."""

    def write(named: Mapping[str, np.ndarray], **options: Any) -> Write:
        return lambda path: path.write_bytes(_npz(named, **options))

    cases: Cases = {}
    for name, array in good.items():
        rest = {k: v for k, v in good.items() if k != name}
        others = {
            "objects": np.array([print, 1], dtype=object),
            "text": np.array([ESCAPES]),
            "complex numbers": np.zeros(array.shape, complex),
            "dates": np.zeros(array.shape, "M8[s]"),
            "records": np.zeros(3, [("a", "f4"), ("b", "i4")]),
            "booleans": np.zeros(array.shape, bool),
            "one number": np.array(3.5),
            "nothing": np.zeros((0, *array.shape[1:]), array.dtype),
            "another rank": array[None],
            "a negative": np.full(array.shape, -1, np.int64),
            "a huge number": np.full(array.shape, 2**62, np.int64),
            "NaN": np.full(array.shape, np.nan),
            "infinity": np.full(array.shape, np.inf, np.float32),
        }
        cases[f"no {name}"] = write(rest)
        cases |= {f"{name} is {what}": write({**rest, name: other}) for what, other in others.items()}
        cases[f"{name} declares 10^12 rows"] = write(good, declared={name: (10**12, *array.shape[1:])})
        cases[f"{name} declares 10^30 rows"] = write(good, declared={name: (10**30, 1)})
        cases[f"{name} declares −1 rows"] = write(good, declared={name: (-1, *array.shape[1:])})
        zeros = np.zeros((100 << 20,), np.uint8)
        cases[f"{name} inflates"] = lambda path, name=name, rest=rest, zeros=zeros: np.savez_compressed(
            path, **{**rest, name: zeros}
        )
    return cases


def _npz(named: Mapping[str, np.ndarray], declared: Mapping[str, tuple[int, ...]] = {}) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in named.items():
            archive.writestr(f"{name}.npy", npy(array, declared.get(name)))
    return packed.getvalue()


def npy(array: np.ndarray, declared: tuple[int, ...] | None = None) -> bytes:
    """Return the bytes of an .npy file, whose header may declare another shape."""
    file = io.BytesIO()
    if declared is None:
        np.save(file, array, allow_pickle=True)
    else:
        header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": declared}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.tobytes())
    return file.getvalue()


# reading --------------------------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """Reads hostile files one after the other and records what went wrong.

    Attributes:
        folder: where everything happens; nothing in it may change but the hostile files themselves.
        every: read each of so many cases.
        failures: "FORMAT, CASE: what happened".
        count: number of files.
        refused: of these, refused by a ConfigError.
    """

    folder: Path
    every: int = 1
    failures: list[str] = field(default_factory=list)
    count: int = 0
    refused: int = 0

    def read(self, what: str, path: Path, cases: Cases, read: Callable[[], Any], right: Callable[[Any], bool]) -> None:
        """Write each case to `path`, read it, and remove it.

        Args:
            what: name of the format.
            path: the file, which `read` reads.
            cases: name → function that writes one.
            read: reads the file by the product.
            right: whether the result of a file that was accepted is right.
        """
        for name, write in list(cases.items())[self.count % self.every :: self.every]:
            _remove(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
            before = _files(self.folder)
            self.count += 1
            try:
                with _limited():
                    result = read()
                    if not right(result):
                        self.failures.append(f"{what}, {name}: accepted with a wrong result")
            except ConfigError as error:
                self.refused += 1
                if not str(error).isprintable() or not 10 < len(str(error)) < 1500:
                    self.failures.append(f"{what}, {name}: {str(error)!r} is no line")
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                self.failures.append(f"{what}, {name}: {type(error).__name__}: {str(error)[:160]!r}")
            if changed := before ^ _files(self.folder):
                self.failures.append(f"{what}, {name}: changed {sorted(changed)[:3]}")
            _remove(path)

    def verify(self) -> None:
        """Assert that nothing went wrong."""
        assert not self.failures, f"{len(self.failures)} of {self.count} files:\n" + "\n".join(self.failures[:40])
        assert self.count


@contextmanager
def _limited() -> Iterator[None]:
    """Raise TimeoutError after SECONDS, and MemoryError when more than MOST_MEMORY of address space is taken."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"no end after {SECONDS} s")

    before, limits = signal.signal(signal.SIGALRM, ring), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _files(folder: Path) -> set[tuple[str, int, int]]:
    """Return path, size and time of everything below a folder."""
    found, waiting = set(), [folder]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                stat = entry.stat(follow_symlinks=False)
                is_folder = entry.is_dir(follow_symlinks=False)
                found.add((entry.path, 0 if is_folder else stat.st_size, 0 if is_folder else stat.st_mtime_ns))
                if is_folder:
                    waiting.append(Path(entry.path))
    return found


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    elif path.is_symlink() or path.exists():
        path.unlink()

"""Atomic writes, locks, disk space, .npz files and progress bars."""

import glob
import os
import secrets
import shutil
import sys
import zipfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from diffusion_lab.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SPARE = 64 << 20  # bytes that stay free on a disk

T = TypeVar("T")


# writing --------------------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file in the folder of `path`, which is created; sync and rename it to `path` if the body succeeds.

    If the body raises, the temporary file is removed and `path` stays as it was. The first call for a folder also removes the
    temporary files that killed processes left in it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(path.parent)
    partial, lock = _new_partial(path)
    with lock:
        try:
            yield partial
            with partial.open("rb") as file:  # opened again: the body may have replaced the file
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    _sync_folder(path.parent)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file atomically.

    Raises:
        OSError: as the file system reports it.
    """
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_new_file(path: Path, content: bytes, overwrite: bool = False) -> None:
    """Write a file atomically, where no other process has written it in the meantime or `overwrite` is true.

    Raises:
        ConfigError: the file exists.
        OSError: as the file system reports it.
    """
    if overwrite:
        write_file(path, content)
        return
    with claimed(path) as file:
        if file is None:
            raise ConfigError(f"{path} was just written by another process: write overwrite=true to replace it")
        file.write(content)


@contextmanager
def claimed(path: Path) -> Iterator[BinaryIO | None]:
    """Yield an empty file, renamed to `path` if the body succeeds and removed if it raises; None if another process wrote `path`.

    Processes that write the same path wait for each other. The temporary file is the lock, which the kernel releases when a
    process dies; the next process then overwrites the partial file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(path.parent)
    part = path.with_name(f".{path.name}.partial")
    while True:
        with open(part, "a+b") as file:
            _lock(file)
            if path.exists():
                # Another process finished first and renamed `part` to `path`, unless this open created a new `part`.
                if _same(file, part):
                    part.unlink()
                yield None
                return
            if not _same(file, part):  # the process that held the lock failed and removed the file: start again
                continue
            file.truncate(0)
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(part, path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            _sync_folder(path.parent)
            return


_cleaned: set[Path] = set()  # folders whose partial files this process has removed


def remove_partials(folder: Path) -> None:
    """Remove the temporary files that killed processes left in `folder`, once per process.

    A process that writes a file holds its lock, so that an unlocked one belongs to no process. Nothing is removed from a folder
    that is read-only or whose file system has no locks.
    """
    if (real := folder.resolve()) in _cleaned:
        return
    _cleaned.add(real)
    for partial in folder.glob(".*.partial"):
        with suppress(OSError), partial.open("r+b") as file:
            if _lock(file, wait=False):
                for other in folder.glob(f"{glob.escape(partial.name)}.*"):  # torch.hub downloads to a name of its own
                    other.unlink(missing_ok=True)
                partial.unlink(missing_ok=True)


def _new_partial(path: Path) -> tuple[Path, BinaryIO]:
    """Create an empty temporary file for `path`; return its path and the open file, which holds its lock."""
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        file = partial.open("xb")
        with suppress(OSError):  # a file system without locks
            _lock(file)
        if _same(file, partial):  # else another process removed it before the lock was taken
            return partial, file
        file.close()


def _sync_folder(folder: Path) -> None:
    """Write a folder's entries to the disk: without it, a renamed file may be lost when the machine stops."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(file: BinaryIO, wait: bool = True) -> bool:
    """Lock a file until it is closed; return False where another process holds the lock and `wait` is false."""
    if sys.platform == "win32":
        return wait
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _same(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def claimed_folder(folder: Path, key: str, config: str, overwrite: bool = False) -> Iterator[None]:
    """Create `folder` with its config.yaml for the body; if the body raises and nothing else was written, remove both.

    Args:
        folder: the output folder of a command.
        key: the option that names it, for the message.
        config: the content of config.yaml.
        overwrite: use a folder that has a config.yaml.

    Raises:
        ConfigError: another command has claimed the folder, e.g. in the same second.
    """
    file = folder / "config.yaml"
    missing = [parent for parent in (folder.absolute(), *folder.absolute().parents) if not parent.exists()]
    with os_errors():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file.open("x").close()  # created exclusively: two commands of one second must not share a folder
            write_file(file, config)
            replaced = False
        except FileExistsError:
            replaced = True
    if replaced and not overwrite:
        raise ConfigError(f"{folder} was just created by another run: retry, or write another {key}=")
    try:
        yield
        if replaced:  # at the end: until then it describes the files that are in the folder
            write_file(file, config)
    except BaseException:
        if not replaced and {path.name for path in folder.iterdir()} <= {file.name, ".hydra"}:
            file.unlink(missing_ok=True)
            with suppress(OSError):  # the first folder that holds something else stays
                for created in missing:
                    created.rmdir()
        raise


# refusals -------------------------------------------------------------------------------------------------------------------


def refuse_filled(folder: Path, key: str, overwrite: bool) -> None:
    """Raise ConfigError where `folder`, the value of the option `key`, is a file, or holds files and `overwrite` is false."""
    if folder.is_file():
        raise ConfigError(f"{folder} is a file: name a folder for the output")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"the output folder {folder} is not empty: write overwrite=true, or another {key}=")


def require_space(folder: Path, need: int, what: str, remedy: str) -> None:
    """Raise ConfigError where the disk of `folder`, which need not exist, has no room for `need` bytes and 64 MiB more.

    Args:
        folder: the place to write to.
        need: bytes.
        what: a plural noun for the message, e.g. "the decoded images".
        remedy: an imperative for the message, e.g. "write cache=FOLDER on another disk".
    """
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < need + SPARE:
        raise ConfigError(
            f"not enough disk at {folder.absolute()}: {what} take {need / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are "
            f"free: make room, or {remedy}"
        )


@contextmanager
def os_errors() -> Iterator[None]:
    """Turn an OSError of a path that the user named (missing, unreadable, a full disk) into a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(str(error)) from error


# reading --------------------------------------------------------------------------------------------------------------------


def read_npz(path: Path, where: str = "", names: Collection[str] | None = None) -> "dict[str, NDArray[Any]]":
    """Return the arrays of an .npz file by name. Nothing in it is unpickled.

    Args:
        path: the file.
        where: the option that named it, for the message.
        names: the arrays to read, if the file has them; None reads all.

    Raises:
        ConfigError: a missing file, or one that is not an .npz of plain arrays.
    """
    import numpy as np  # late: every command line imports this module before it is checked

    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if names is None or name in names}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        source = f"{where}={path}" if where else str(path.absolute())
        raise ConfigError(f"{source} cannot be read as an .npz of plain arrays ({reason}): name another file") from None


# progress -------------------------------------------------------------------------------------------------------------------


def progress(items: Iterable[T], desc: str, unit: str, show: bool = True) -> Iterable[T]:
    """Return the items, with a progress bar on stderr if `show`."""
    if not show:
        return items
    from tqdm import tqdm

    bar: Iterable[T] = tqdm(items, desc=desc, unit=unit, leave=False)
    return bar


def progress_bar(total: int | None, desc: str, unit: str, show: bool = True, **options: Any) -> Any:
    """Return a progress bar for `update(n)`, a context manager; `options` are tqdm's."""
    from tqdm import tqdm

    return tqdm(**{"total": total, "desc": desc, "unit": unit, "leave": False, "disable": not show, **options})

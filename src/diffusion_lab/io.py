"""Atomic writes, locks, disk space, .npz files and progress bars."""

import glob
import math
import os
import secrets
import shutil
import stat
import sys
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, TypeVar

from diffusion_lab.errors import ConfigError, DamagedFileError, printable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SPARE = 64 << 20  # bytes that are kept free on a disk; bytes that a .zip may unpack to whatever its size
MOST_INFLATION = (
    100  # unpacked bytes of a .zip for a packed one: arrays and images that people look at take less than 50
)
MOST_VALUES, DEEPEST = 500_000, 100  # of nested plain values in one file

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
    with lock, _renamed(partial, path):
        yield partial


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file atomically.

    Raises:
        OSError: if the file cannot be written.
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
    """Yield an empty file that is renamed to `path` if the body succeeds, or None if another process has written `path`.

    The temporary file is locked while the body runs, so that processes that write the same path wait for each other. It is
    removed if the body raises. If a process is killed, the kernel releases its lock and the next process overwrites the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(path.parent)
    part = path.with_name(f".{path.name}.partial")
    while True:
        with open(part, "a+b", opener=_without_links) as file:
            _lock(file)
            if path.exists():
                # Another process has renamed `part` to `path`. If this `open` created a new `part`, remove it.
                if _same(file, part):
                    part.unlink()
                yield None
                return
            if not _same(file, part):  # the previous owner of the lock failed and removed the file: start again
                continue
            file.truncate(0)
            with _renamed(part, path):
                yield file
                file.flush()
            return


_cleaned: set[Path] = set()  # folders whose partial files this process has removed


def _without_links(path: str, flags: int) -> int:
    """Open a file for `open`, but no link: a folder from somebody else may hold one to a file of the user's."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)


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


@contextmanager
def _renamed(partial: Path, path: Path) -> Iterator[None]:
    """Sync `partial`, rename it to `path` and sync the folder if the body succeeds; remove it if the body raises."""
    try:
        yield
        with partial.open("rb") as file:  # opened again: the body may have replaced the file
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


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
    """Raise ConfigError if `folder`, the value of the option `key`, cannot be written, or has files and `overwrite` is false."""
    with os_errors():
        if folder.is_file():
            raise ConfigError(f"the output folder {folder} is a file: write {key}= with a folder")
        if not overwrite and folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"the output folder {folder} is not empty: write overwrite=true, or another {key}=")
    require_writable(folder, key)


def require_writable(folder: Path, key: str) -> None:
    """Raise ConfigError if no file can be written to `folder`, the value of the option `key`, which need not exist."""
    try:
        path = folder.absolute()
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigError(f"{key}={folder!s:.100} cannot be written ({error.strerror}): name another folder") from error


def require_space(folder: Path, need: int, what: str, remedy: str) -> None:
    """Raise ConfigError if less than `need` bytes plus 64 MiB are free on the disk of `folder`.

    Args:
        folder: the folder to write to. It need not exist.
        need: number of bytes.
        what: a plural noun for the error message, e.g. "the decoded images".
        remedy: an imperative for the error message, e.g. "write cache=FOLDER on another disk".
    """
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < need + SPARE:
        raise ConfigError(
            f"not enough disk at {folder.absolute()}: {what} take {need / 2**20:,.0f} MiB, but {free / 2**20:,.0f} MiB are "
            f"free: free disk space, or {remedy}"
        )


@contextmanager
def os_errors() -> Iterator[None]:
    """Convert an OSError for a path that the user named (a missing or unreadable file, a full disk) to a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(str(error)) from error


# reading --------------------------------------------------------------------------------------------------------------------


def require_file(path: Path, where: str = "") -> None:
    """Raise ConfigError unless `path` is a regular file or a link to one. Reading a pipe or a device may never end.

    Args:
        path: the file.
        where: the option that named it, for the message.
    """
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return
        reason = "a folder" if path.is_dir() else "no regular file (a pipe, a socket or a device)"
    except OSError as error:  # missing, a dangling link, a loop of links, a name that is too long
        reason = "missing" if isinstance(error, FileNotFoundError) else f"unreadable: {error.strerror}"
        reason = "a link to a missing file" if path.is_symlink() and reason == "missing" else reason
    raise ConfigError(f"{f'{where}=' if where else ''}{path} cannot be read, it is {reason}: name another file")


def read_bytes(path: Path, most: int) -> bytes:
    """Return the content of a regular file.

    Args:
        path: the file.
        most: the largest size that such a file has, in bytes.

    Raises:
        ConfigError: another kind of file, a larger one.
        OSError: as the file system reports it.
    """
    require_file(path)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ConfigError(
            f"{path} is larger than {most / 2**20:,.0f} MiB, the most that such a file has: name another file"
        )
    return content


def parse_plain(text: str | bytes, loads: Callable[[str | bytes], Any], what: str) -> Any:
    """Parse a document of plain values, such as JSON or YAML.

    Args:
        text: the document.
        loads: the parser, which raises ValueError.
        what: the name of the document, for the message.

    Raises:
        ConfigError: a document that cannot be parsed, or `refuse_bombs`.
    """
    try:
        value = loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{what} cannot be read: {reason}") from None
    refuse_bombs(value, what)
    return value


def refuse_bombs(value: Any, what: str) -> None:
    """Raise ConfigError for nested containers that are too many, too deep, or contain themselves.

    A few lines of YAML, or bytes of a pickle, describe containers that are small in memory and take hours to walk through.
    """
    count, waiting = 0, [(value, 0)]
    while waiting:
        current, depth = waiting.pop()
        inside = [*current.keys(), *current.values()] if isinstance(current, Mapping) else current
        if isinstance(inside, list | tuple | set | frozenset):
            count += len(inside)
            if depth > DEEPEST or count > MOST_VALUES:
                raise ConfigError(
                    f"{what} cannot be read: its values are nested too deeply, or more than {MOST_VALUES:,}"
                )
            waiting += [(child, depth + 1) for child in inside]


def read_npz(path: Path, where: str = "", names: Collection[str] | None = None) -> "dict[str, NDArray[Any]]":
    """Return the arrays of an .npz file by name. Nothing in it is unpickled.

    Args:
        path: the file.
        where: the option that named it, for the message.
        names: the arrays to read, if the file has them; None reads all.

    Raises:
        ConfigError: a missing file, one that is not an .npz of plain arrays, or arrays of other sizes than they declare.
    """
    import numpy as np  # late: every command line imports this module before it is checked

    require_file(path, where)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {m.filename[:-4]: m for m in archive.infolist() if m.filename.endswith(".npy")}
            chosen = {name: m for name, m in members.items() if names is None or name in names}
            refuse_inflation(list(chosen.values()), path)
            arrays = {}
            for name, member in chosen.items():
                with archive.open(member) as file:
                    require_npy(file, member.file_size)
                with archive.open(member) as file:
                    arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
            return arrays
    except ConfigError:
        raise
    except Exception as error:  # zipfile and numpy raise nearly anything on damaged files
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        source = f"{where}={path}" if where else str(path.absolute())
        raise ConfigError(f"{source} cannot be read as an .npz of plain arrays ({reason}): name another file") from None


def require_npy(file: IO[bytes], size: int) -> "tuple[tuple[int, ...], np.dtype[Any]]":
    """Return shape and dtype in the header of an .npy file.

    Args:
        file: at its beginning; its position afterwards is that of the data.
        size: of the file in bytes.

    Raises:
        ValueError: no .npy, an array of Python objects, or another size than the shape needs.
    """
    import numpy as np

    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise DamagedFileError(f"version {version} of the .npy format")
    shape, _, dtype = readers[version](file)
    if dtype.hasobject:
        raise DamagedFileError("an array of Python objects")
    declared, actual = math.prod(shape) * dtype.itemsize, size - file.tell()
    if min(shape, default=0) < 0 or declared != actual:
        raise DamagedFileError(f"it declares {dtype} {shape}, {declared:,} bytes, and has {actual:,}")
    return shape, dtype


def load_npy(path: Path, shape: tuple[int | None, ...], dtype: str, remedy: str) -> "NDArray[Any]":
    """Return the array of an .npy file as a read-only memory map.

    Args:
        path: the file.
        shape: that it must have; None stands for any size.
        dtype: that it must have.
        remedy: an imperative for the message.

    Raises:
        ConfigError: a missing or damaged file, an array of another shape or dtype.
    """
    import numpy as np

    require_file(path)
    try:
        with path.open("rb") as file:
            actual, kind = require_npy(file, path.stat().st_size)
        if len(actual) != len(shape) or any(n not in (None, m) for n, m in zip(shape, actual, strict=True)):
            raise DamagedFileError(f"its shape is {actual}")
        if kind != np.dtype(dtype):
            raise DamagedFileError(f"its values are {kind}")
        array: NDArray[Any] = np.load(path, mmap_mode="r")
    except Exception as error:  # numpy's parser of the header raises nearly anything
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ConfigError(f"{path.absolute()} is damaged ({reason}): {remedy}") from None
    return array


def refuse_inflation(members: Collection[zipfile.ZipInfo], path: Path) -> None:
    """Raise ConfigError for members of a .zip that would take far more memory than the file suggests."""
    packed, unpacked = sum(m.compress_size for m in members), sum(m.file_size for m in members)
    if packed > path.stat().st_size or unpacked > SPARE + MOST_INFLATION * packed:
        raise ConfigError(
            f"{path} declares {unpacked / 2**20:,.0f} MiB in {packed / 2**20:,.1f} MiB, as no images or arrays do: "
            "name another file"
        )


# progress -------------------------------------------------------------------------------------------------------------------


def progress(items: Iterable[T], desc: str, unit: str, show: bool = True) -> Iterable[T]:
    """Return the items, with a progress bar on stderr if `show`."""
    if not show:
        return items
    from tqdm import tqdm

    bar: Iterable[T] = tqdm(items, desc=printable(desc), unit=unit, leave=False)
    return bar


def progress_bar(total: int | None, desc: str, unit: str, show: bool = True, **options: Any) -> Any:
    """Return a tqdm progress bar, a context manager that is advanced by `update(n)`; `options` are passed to tqdm."""
    from tqdm import tqdm

    return tqdm(
        **{"total": total, "desc": printable(desc), "unit": unit, "leave": False, "disable": not show, **options}
    )

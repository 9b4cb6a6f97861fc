"""Decoded images in a memory-mapped file, made once and shared by all processes and runs."""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from diffusion_lab.data.decode import Decoder, Files
from diffusion_lab.errors import ConfigError

VERSION = 1  # of the decoding: raise it when the same files and options would give other bytes
CHUNK = 512  # images in flight
SPARE = 64 << 20  # bytes of the disk that a cache leaves free


def decoded(files: Files, decoder: Decoder, folder: Path) -> NDArray[np.uint8]:
    """All images of `files`, read-only and memory-mapped, uint8 (N, C, H, W).

    The file's name is a hash of what made it: names, sizes and modification times, the decoder's options and `VERSION`. If
    it is not there it is built, under a temporary name, by the first process to come; others wait for it.

    Args:
        files: what to decode.
        decoder: how.
        folder: of the cache; made if it is not there.

    Raises:
        ValueError: a broken image, not enough room on the disk, or a folder that cannot be written.
    """
    key = hashlib.sha256(json.dumps([VERSION, files.stamps, asdict(decoder)]).encode()).hexdigest()[:16]
    path = folder / f"{key}.npy"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with claimed(path) as part:
                if part is not None:
                    _check_room(folder, len(files.names) * math.prod(decoder.shape))
                    _build(part, files, decoder)
        except OSError as error:  # unwritable, full, or without locks
            raise ConfigError(
                f"cannot write {path} ({error}): write data.source.cache=FOLDER on another disk"
            ) from error
    return np.load(path, mmap_mode="r")


def cache_folder(stated: str | None, images: Path) -> Path:
    """The stated folder, or `.cache` in the folder `images`, or the user's cache folder where that cannot be written."""
    if stated is not None:
        return Path(stated).expanduser()
    beside = images / ".cache"
    if os.access(beside if beside.exists() else beside.parent, os.W_OK):
        return beside
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffusion_lab"


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE:
        raise ConfigError(
            f"{folder} has {free / 1e9:.2f} GB free and the decoded images take {needed / 1e9:.2f} GB: "
            "free some space, or write data.source.cache=FOLDER on another disk"
        )


@contextmanager
def claimed(path: Path) -> Iterator[BinaryIO | None]:
    """An empty file that becomes `path` if the body succeeds and vanishes if it fails; None once another process made `path`.

    The temporary file is its own lock, which the kernel drops when a process dies, so that a killed build blocks nobody and the
    next one overwrites its remains.
    """
    part = path.with_suffix(".part")
    while True:
        with open(part, "a+b") as file:
            _lock(file)
            if path.exists():
                # Another process finished first. `part` was renamed to `path` then, unless this open made a new one.
                if _same(file, part):
                    part.unlink()
                yield None
                return
            if not _same(file, part):  # its maker failed and removed it: start afresh
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
            return


def _lock(file: BinaryIO) -> None:
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)


def _same(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _build(out: BinaryIO, files: Files, decoder: Decoder) -> None:
    # Written in order rather than into a memory map: a disk that fills up is then an error, not a crash.
    shape = (len(files.names), *decoder.shape)
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with ThreadPoolExecutor() as pool, tqdm(total=shape[0], desc=f"decoding {files.path.name}", unit="image") as bar:
        for start in range(0, shape[0], CHUNK):
            for image in pool.map(lambda name: decoder(files.read(name), name), files.names[start : start + CHUNK]):
                out.write(image.tobytes())
                bar.update()

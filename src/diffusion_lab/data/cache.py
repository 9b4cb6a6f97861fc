"""Cache decoded images in a memory-mapped file that is shared by all processes and runs."""

import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from diffusion_lab.data.decode import Decoder, Files
from diffusion_lab.errors import ConfigError
from diffusion_lab.io import claimed, load_npy, progress_bar, require_space

VERSION = 2  # version of the decoding: increase it when the decoded bytes change, or an option is renamed
CHUNK = 512  # number of images that are decoded concurrently
CACHE_ELSEWHERE = "write data.source.cache=FOLDER on another disk"


def decoded(files: Files, decoder: Decoder, folder: Path, *read: Path) -> NDArray[np.uint8]:
    """Return all images of `files`, read-only and memory-mapped, uint8 (N, C, H, W).

    The name of the cache file is a hash of the images' names, sizes and modification times, the decoder's options and
    `VERSION`. If it does not exist, one process builds it under a temporary name, and the others wait for it.

    Args:
        files: image files.
        decoder: decodes each of them.
        folder: of the cache; created if it does not exist.
        read: further folders, from which an existing cache is read.

    Raises:
        ConfigError: a broken image, a damaged cache, not enough room on the disk, or a folder that cannot be written.
    """
    key = hashlib.sha256(json.dumps([VERSION, files.stamps, asdict(decoder)]).encode()).hexdigest()[:16]
    path = next((path for f in (folder, *read) if (path := f / f"{key}.npy").exists()), folder / f"{key}.npy")
    if not path.exists():
        try:
            with claimed(path) as part:
                if part is not None:
                    size = len(files.names) * math.prod(decoder.shape)
                    require_space(folder, size, "the decoded images", CACHE_ELSEWHERE)
                    _build(part, files, decoder)
        except OSError as error:  # not writable, full, or without support for locks
            raise ConfigError(f"cannot write {path} ({error}): {CACHE_ELSEWHERE}") from error
    return load_npy(path, (len(files.names), *decoder.shape), "u1", "delete it and run again")


def cache_folders(configured: str | None, images: Path, only_read: bool = False) -> tuple[Path, ...]:
    """Return the folder of the cache: the configured one, or `.cache` in the folder `images`, or the user's if that is read-only.

    With `only_read` it is the user's, and the other is one to read from.
    """
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffusion_lab"
    folder = images / ".cache" if configured is None else Path(configured).expanduser()
    if only_read:
        return user, folder
    writable = configured is not None or os.access(folder if folder.exists() else images, os.W_OK)
    return (folder if writable else user,)


def _build(out: BinaryIO, files: Files, decoder: Decoder) -> None:
    # Written sequentially and not to a memory map, since a full disk would then cause SIGBUS instead of an error.
    shape = (len(files.names), *decoder.shape)
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
    bar = progress_bar(shape[0], f"decoding {files.path.name}", "image", leave=True)
    with ThreadPoolExecutor() as pool, bar:
        for start in range(0, shape[0], CHUNK):
            for image in pool.map(lambda name: decoder(files.read(name), name), files.names[start : start + CHUNK]):
                out.write(image.tobytes())
                bar.update()

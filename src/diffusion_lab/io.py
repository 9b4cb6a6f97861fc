"""Writing files whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusion_lab.errors import ConfigError


def refuse_filled(folder: Path, key: str, overwrite: bool) -> None:
    """Raise ValueError where `folder`, named by the option `key`, is a file or holds something, unless it may be written over."""
    if folder.is_file():
        raise ConfigError(f"{folder} is a file: name a folder for the output")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"the output folder {folder} is not empty: write overwrite=true, or another {key}=")


def write(path: Path, content: str | bytes) -> None:
    """Writes under a temporary name and renames; makes the folder. OSError: as the file system says, nothing is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def os_errors() -> Iterator[None]:
    """Turn an OSError of a path that the user named (missing, unreadable, a full disk) into a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(str(error)) from error

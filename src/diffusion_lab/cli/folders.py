"""The folders that Hydra creates for a command, and their removal where the command wrote nothing into them."""

import shutil
from pathlib import Path

_missing: list[Path] = []  # Hydra's record, its folder, and the parents, as far as they do not exist before the command


def begin(folder: Path, record: str = ".hydra") -> None:
    """Note which of the folders of a command exist before it.

    Args:
        folder: hydra.run.dir or hydra.sweep.dir.
        record: the subfolder that Hydra writes the configuration to.
    """
    path = folder.absolute()
    _missing[:] = [part for part in (path / record, path, *path.parents) if not part.exists()]


def remove_unused(record: str = ".hydra") -> None:
    """Remove the folders that this command has created and that hold nothing but Hydra's record."""
    for part in _missing:
        if not part.is_dir():
            continue
        if part.name == record and list(part.parent.iterdir()) == [part]:
            shutil.rmtree(part)
        elif not any(part.iterdir()):
            part.rmdir()
    _missing.clear()

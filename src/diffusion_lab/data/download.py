"""Files from the network: verified by checksum, written to a temporary name, renamed."""

import hashlib
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from diffusion_lab.errors import ConfigError
from diffusion_lab.io import progress_bar, replacing

TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 20


@dataclass(frozen=True)
class Remote:
    """A file, the addresses that serve it (tried in order) and its checksum, MD5 or SHA-256 (told apart by their lengths)."""

    name: str
    urls: tuple[str, ...]
    checksum: str


def fetch(folder: Path, missing: Sequence[Remote], *, download: bool) -> None:
    """Downloads `missing` into `folder`, each with a progress bar.

    Raises:
        ValueError: `download` is false, no address serves the file with the right checksum, or the folder cannot be
            written; the line names the folder and the files to put there.
    """
    if not download:
        names = ", ".join(file.name for file in missing)
        raise ConfigError(f"{folder.absolute()} lacks {names}: put them there, or write data.download=true")
    for i, file in enumerate(missing):
        reason = "no address"
        for url in file.urls:
            try:
                _retrieve(url, folder / file.name, file.checksum)
                break
            except (OSError, HTTPException) as error:  # OSError includes refused, timed out, unresolved, unwritable
                reason = " ".join(f"{url}: {error}".split())
        else:
            names = ", ".join(file.name for file in missing[i:])
            raise ConfigError(f"cannot download {file.name} ({reason}): put {names} into {folder.absolute()}")


def _retrieve(url: str, path: Path, checksum: str) -> None:
    digest = hashlib.new("sha256" if len(checksum) == 64 else "md5", usedforsecurity=False)
    with replacing(path) as part:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response, open(part, "wb") as file:
            total = int(response.headers.get("Content-Length") or 0) or None
            with progress_bar(total, path.name, "B", unit_scale=True, leave=True) as bar:
                while chunk := response.read(CHUNK):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
        if digest.hexdigest() != checksum:
            raise OSError(f"checksum {digest.hexdigest()}, expected {checksum}")

"""Download files and verify their published checksums."""

import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch

from diffusion_lab.errors import ConfigError
from diffusion_lab.io import replacing

TIMEOUT = 30  # seconds without a byte

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Remote:
    """A file to download.

    Attributes:
        name: file name in the target folder.
        urls: URLs, tried in order.
        checksum: MD5 (32 hexadecimal digits) or SHA-256 (64).
    """

    name: str
    urls: tuple[str, ...]
    checksum: str


def fetch(folder: Path, missing: Sequence[Remote], *, download: bool) -> None:
    """Download files to a folder, which is created if necessary.

    Files are downloaded and verified by torchvision (MD5) or torch.hub (SHA-256), with a progress bar. This function adds
    mirrors, a timeout, and a temporary name until the checksum is verified, since torchvision writes to the final name.

    Args:
        folder: the target folder.
        missing: the files to download.
        download: if false, raise an error instead.

    Raises:
        ConfigError: if `download` is false, no URL provides a file with the right checksum, or the folder is not writable. The
            message contains the folder and the files to put there.
    """
    if not download:
        names = ", ".join(file.name for file in missing)
        raise ConfigError(f"{names} missing in {folder.absolute()}: put the files there, or write data.download=true")
    for i, file in enumerate(missing):
        reason = "no address"
        for url in file.urls:
            log.info("downloading %s", url)
            try:
                with replacing(folder / file.name) as partial, _default_timeout(TIMEOUT):
                    _retrieve(url, partial, file.checksum)
                break
            except (OSError, HTTPException) as error:  # OSError includes refused, timed out, unresolved, unwritable
                reason = " ".join(f"{url}: {error}".split())
            except RuntimeError as error:  # wrong checksum
                reason = " ".join(f"{url}: {error} Expected checksum {file.checksum}".split())
        else:
            names = ", ".join(file.name for file in missing[i:])
            raise ConfigError(f"cannot download {file.name} ({reason}): put {names} into {folder.absolute()}")


def _retrieve(url: str, path: Path, checksum: str) -> None:
    if len(checksum) == 64:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=checksum)
    else:
        from torchvision.datasets.utils import download_url  # late: most data sets need no download

        download_url(url, path.parent, path.name, checksum)


@contextmanager
def _default_timeout(seconds: float) -> Iterator[None]:
    """Set the default timeout of new sockets, which urlopen uses if its caller passes none."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)

"""Files of tensors and plain values: written with a hash of their content; read without running code or unpacking bombs.

Checkpoints, fits and classifiers are `torch.save` archives: a .zip of uncompressed members, of which one is a pickle.
`weights_only=True` runs nothing in it, but it allocates what the pickle declares, and accepts a flipped bit. So the members
are checked before anything is unpickled, the values afterwards, and the content against its hash.
"""

import functools
import hashlib
import io
import pickletools
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.errors import ConfigError, DamagedFileError, printable
from diffusion_lab.io import refuse_bombs, require_file
from diffusion_lab.processes import rank

HASH = "sha256"  # the entry with the hash
MOST_PICKLE = 64 << 20  # bytes; the pickle holds everything but the numbers of tensors
PLAIN = (str, int, float, bool, bytes, complex, type(None))
# What a pickle of tensors and plain values refers to. torch.load permits more, e.g. bytearray(10**12).
CALLED = frozenset(
    (
        *(
            "collections OrderedDict",
            "collections defaultdict",
            "collections Counter",
            "builtins set",
            "__builtin__ set",
        ),
        *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch Size", "torch device"),
        "_codecs encode",
    )
)


# writing --------------------------------------------------------------------------------------------------------------------


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content with the hash of its tensors and plain values."""
    return {**content, HASH: digest(content)}


def packed(content: Mapping[str, Any]) -> bytes:
    """Return the sealed content as the bytes of a file."""
    file = io.BytesIO()
    torch.save(sealed(content), file)
    return file.getvalue()


def digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of all tensors and plain values but that of HASH: 0.25 s for 150 MB on one core."""
    sha = hashlib.sha256()
    for part in _parts({key: value for key, value in content.items() if key != HASH}):
        sha.update(part)
    return sha.hexdigest()


def _parts(value: Any) -> Iterator[Any]:
    """Yield the bytes of nested values, each with its kind and length. Values of other types are left out."""
    if isinstance(value, Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)}\n".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}\n".encode()
        for key, child in value.items():
            yield from _parts(key)
            yield from _parts(child)
    elif isinstance(value, list | tuple):
        yield f"list {len(value)}\n".encode()
        for child in value:
            yield from _parts(child)
    elif type(value) in PLAIN:
        text = repr(value).encode("utf-8", "backslashreplace")
        yield f"{type(value).__name__} {len(text)}\n".encode()
        yield text


# reading --------------------------------------------------------------------------------------------------------------------


def read(path: Path, kind: str, remedy: str) -> dict[str, Any]:
    """Return the mapping in a file, its tensors on the CPU and memory-mapped.

    A file without a hash, of an older version, is compared with the checksums of its .zip, and a line is printed.

    Args:
        path: the file.
        kind: a noun for messages: checkpoint, classifier, fit.
        remedy: an imperative for messages.

    Raises:
        ConfigError: if the file is missing, truncated or damaged, or contains values other than tensors and plain ones.
    """
    require_file(path)
    if not zipfile.is_zipfile(path):
        raise ConfigError(f"{path} is truncated or not a {kind}: {remedy}")
    try:
        _check_members(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(content, dict):
            raise DamagedFileError(f"it holds a {type(content).__name__}")
        refuse_bombs(content, str(path))
        _check_tensors(content, path.stat().st_size)
        if HASH not in content:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise DamagedFileError(f"the checksum of {damaged} differs")
    except ConfigError:
        raise
    except Exception as error:  # zipfile and torch raise many types for damaged files
        reason = (" ".join(str(error).split()) or type(error).__name__)[:160]
        raise ConfigError(
            f"{path} cannot be read as a {kind} of tensors and plain values ({reason}): {remedy}"
        ) from None
    check_hash(content, path, kind, remedy)
    return content


def check_hash(content: Mapping[str, Any], path: Path, kind: str, remedy: str) -> None:
    """Compare the content with its hash; print a line if it has none. Raises ConfigError if they differ."""
    if HASH not in content:
        _print_unverified(path, kind)
    elif content[HASH] != digest(content):
        raise ConfigError(f"{path} is damaged: its content differs from the hash in it; {remedy}")


@functools.cache
def _print_unverified(path: Path, kind: str) -> None:
    if rank() == 0:
        text = (
            f"warning: {path} has no hash, since an older version wrote it: whether this {kind} is undamaged is unknown"
        )
        print(printable(text), file=sys.stderr, flush=True)


def _check_members(path: Path) -> None:
    """Raise DamagedFileError for a .zip that torch.save did not write: compressed members, a pickle that calls functions."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED or m.compress_size != m.file_size for m in members):
            raise DamagedFileError("its members are compressed")
        if sum(m.file_size for m in members) > path.stat().st_size:
            raise DamagedFileError("its members overlap")
        pickles = [m for m in members if m.filename.endswith(".pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MOST_PICKLE:
            raise DamagedFileError("it has no data.pkl of a sensible size")
        for code, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if code.name == "GLOBAL" and not _is_called(str(argument)):
                raise DamagedFileError(f"it refers to {str(argument).replace(' ', '.')}")


def _is_called(name: str) -> bool:
    """Whether a pickle may refer to a name, "module name"."""
    module, _, attribute = name.partition(" ")
    kind = getattr(torch, attribute, None) if module == "torch" else None
    return name in CALLED or isinstance(kind, torch.dtype) or (module == "torch" and attribute.endswith("Storage"))


def _check_tensors(content: Mapping[str, Any], size: int) -> None:
    """Raise DamagedFileError for tensors that stand for more numbers than a file of `size` bytes holds."""
    storages: dict[int, int] = {}
    waiting: list[Any] = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise DamagedFileError(f"it holds a tensor of layout {value.layout} on {value.device}")
            storage = value.untyped_storage()
            if value.numel() * value.element_size() > storage.nbytes():
                raise DamagedFileError(f"a tensor {tuple(value.shape)} is expanded from fewer numbers")
            storages[storage.data_ptr()] = storage.nbytes()
    if sum(storages.values()) > size:
        raise DamagedFileError("its tensors declare more numbers than it holds")

"""What a data set's own images give: made once, filed under everything that made it, never taken for another's."""

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.data.images import Rows
from diffusion_lab.data.sources import Source
from diffusion_lab.errors import ConfigError
from diffusion_lab.io import claimed, read_npz, require_space
from diffusion_lab.metrics.classifier import fingerprint
from diffusion_lab.metrics.collect import Collected, Processes, collect
from diffusion_lab.metrics.extractors import Extractor
from diffusion_lab.metrics.moments import Moments
from diffusion_lab.metrics.scores import MOST

BATCH = 500  # images at a time

Images = np.ndarray | Rows


@dataclass(frozen=True)
class Reference:
    """Statistics of real images in one extractor's features.

    features: float32 (at most 10,000 evenly spaced images, D), where they were asked for.
    key: what made them; None for a file that does not say.
    """

    moments: Moments
    features: Tensor | None
    key: dict[str, Any] | None
    path: Path


def key_of(images: Images, source: Mapping[str, Any], split: str, extractor: Extractor) -> dict[str, Any]:
    """Everything that reference statistics depend on.

    Args:
        images: uint8 (N, C, H, W), the split.
        source: from `described`: the data set's name, crop, resize and their like.
        split: its name.
        extractor: what measures them.
    """
    return {
        **source,
        "split": split,
        "count": len(images),
        "shape": [int(v) for v in images.shape[1:]],
        "images": fingerprint(images),
        "extractor": extractor.name,
        "weights": extractor.key,
    }


def described(source: Source) -> dict[str, Any]:
    """The data set's name and its options (crop, resize, filter, …) as plain values; where its caches lie does not matter."""
    options = {k: v for k, v in vars(source).items() if not k.startswith("_") and k != "cache"}
    return {"data": type(source).__name__.lower(), **json.loads(json.dumps(options, default=str))}


def reference(images: Images, key: Mapping[str, Any], extractor: Extractor, folder: Path, features: bool) -> Reference:
    """The reference of a data set: from its files if they are there, else made and written. Processes wait for one another.

    Args:
        images: uint8 (N, C, H, W).
        key: from `key_of`.
        extractor: on the device where it works.
        folder: where the files are.
        features: also keep the features of at most 10,000 images, for KID and precision, recall, density, coverage.

    Raises:
        ValueError: fewer than 2 images, no room on the disk, a folder that cannot be written.
    """
    stem = file_stem(key)
    path, rows = folder / f"{stem}.npz", folder / f"{stem}-features.npy"
    kept = min(len(images), MOST) if features else 0
    made: Collected | None = None
    try:
        if features and not rows.is_file():
            with claimed(rows) as file:
                if file is not None:
                    require_space_for(extractor.dim, kept, folder)
                    made = _measure(_spaced(images), extractor, keep=True)
                    assert made.features is not None
                    np.lib.format.write_array(file, made.features.numpy(), allow_pickle=False)
        if not path.is_file():
            with claimed(path) as file:
                if file is not None:
                    require_space_for(extractor.dim, kept, folder)
                    whole = made if made is not None and len(images) <= MOST else _measure(images, extractor)
                    file.write(_packed(whole.sums.moments(), key))
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error}): write cache=FOLDER on another disk") from error
    loaded = read(path, extractor, key)
    return Reference(loaded.moments, torch.from_numpy(np.load(rows)) if features else None, dict(key), path)


def file_stem(key: Mapping[str, Any]) -> str:
    """The name of a reference's files: readable, and closed by a hash of the whole key."""
    readable = "-".join(str(key.get(name, "")) for name in ("data", "split", "extractor"))
    end = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return f"reference-{re.sub(r'[^A-Za-z0-9+-]+', '_', readable)}-{end}"


def read(path: Path, extractor: Extractor, key: Mapping[str, Any] | None = None) -> Reference:
    """Moments from an .npz of `mu` and `sigma`: ours, or another tool's (pytorch-fid, torch-fidelity, EDM; ADM's batches too).

    Args:
        path: the file; arrays beside the two are passed over.
        extractor: whose features they must be.
        key: what is wanted; a file of ours that was made of anything else is refused.

    Raises:
        ValueError: no such file, no moments in it, of another size, not finite, or of another data set.
    """
    if not path.is_file():
        raise ConfigError(
            f"there are no reference statistics at {path.absolute()}: name an .npz file with mu and sigma"
        )
    found = read_npz(path)
    if "mu" not in found or "sigma" not in found:
        raise ConfigError(f"{path.absolute()} holds {', '.join(found)}, and no mu and sigma: name reference statistics")
    mean, covariance = np.asarray(found["mu"], np.float64).squeeze(), np.asarray(found["sigma"], np.float64)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ConfigError(
            f"{path.absolute()} holds mu {mean.shape} and sigma {covariance.shape}: write (D,) and (D, D)"
        )
    if len(mean) != extractor.dim:
        raise ConfigError(
            f"{path.absolute()} is of {len(mean)} features, and extractor={extractor.name} has {extractor.dim}: "
            "name statistics of the same extractor"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ConfigError(f"{path.absolute()} holds NaN or infinity: make it anew")
    stated = json.loads(str(found["key"])) if "key" in found else None
    if stated is not None and key is not None:
        _refuse_other(path, stated, key)
    n = int(found["n"]) if "n" in found else None
    return Reference(Moments(torch.from_numpy(mean.copy()), torch.from_numpy(covariance.copy()), n), None, stated, path)


def write(path: Path, moments: Moments, key: Mapping[str, Any] | None = None) -> None:
    """Moments as an .npz of `mu` and `sigma`, which other tools read; `n` and `key` beside them, which they pass over."""
    with claimed(path) as file:
        if file is None:
            raise ConfigError(f"{path.absolute()} is there already: name another file")
        file.write(_packed(moments, key))


def require_space_for(extractor_dim: int, rows: int, folder: Path) -> None:
    """Raise ConfigError where the disk has no room for moments of so many features, and `rows` rows of features."""
    need = 8 * extractor_dim * (extractor_dim + 1) + 4 * extractor_dim * rows
    require_space(folder, need, "reference statistics", "write cache=FOLDER on another disk")


def _refuse_other(path: Path, stated: Mapping[str, Any], key: Mapping[str, Any]) -> None:
    differ = [name for name in {**key, **stated} if stated.get(name) != key.get(name)]
    if differ:
        name = differ[0]
        raise ConfigError(
            f"{path.absolute()} is the reference of {name}={stated.get(name)}, and wanted is {name}={key.get(name)}: "
            "name that one, or leave reference= out and it is made"
        )


def _packed(moments: Moments, key: Mapping[str, Any] | None) -> bytes:
    packed = io.BytesIO()
    more: dict[str, Any] = {} if key is None else {"key": np.array(json.dumps(dict(key)))}
    if moments.n is not None:
        more["n"] = np.array(moments.n)
    np.savez(packed, mu=moments.mean.numpy(), sigma=moments.covariance.numpy(), **more)
    return packed.getvalue()


def _spaced(images: Images) -> Images:
    """At most 10,000 of them, evenly spaced: sets are often ordered by class."""
    if len(images) <= MOST:
        return images
    index = np.linspace(0, len(images) - 1, MOST).round().astype(np.int64)
    return Rows(images.array, images.index[index]) if isinstance(images, Rows) else Rows(images, index)


def _measure(images: Images, extractor: Extractor, keep: bool = False) -> Collected:
    def block(part: range) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(images[part.start : part.stop]))

    said = f"{extractor.name} features of the data set"
    alone = Processes(shared=False)
    kept = [extractor.name] if keep else []
    return collect(block, len(images), BATCH, [extractor], features=kept, processes=alone, progress=said)[
        extractor.name
    ]

"""Reference statistics of a data set, cached by a hash of their inputs."""

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
from jaxtyping import Float
from torch import Tensor

from diffusion_lab.data.images import Rows
from diffusion_lab.data.sources import Source
from diffusion_lab.errors import ConfigError
from diffusion_lab.io import claimed, load_npy, parse_plain, read_npz, require_space
from diffusion_lab.metrics.classifier import fingerprint
from diffusion_lab.metrics.collect import Collected, Processes, collect
from diffusion_lab.metrics.extractors import Extractor
from diffusion_lab.metrics.moments import Moments
from diffusion_lab.metrics.scores import MOST

BATCH = 500  # number of images per batch

Images = np.ndarray | Rows


@dataclass(frozen=True)
class Reference:
    """Statistics of the features of real images.

    Attributes:
        moments: moments of the features of all images.
        features: features of at most 10,000 evenly spaced images, or None.
        key: the result of `key_of`; None if the file does not contain it.
        path: the file of the moments.
    """

    moments: Moments
    features: Float[Tensor, "m d"] | None
    key: dict[str, Any] | None
    path: Path


def key_of(images: Images, source: Mapping[str, Any], split: str, extractor: Extractor) -> dict[str, Any]:
    """Return the key of reference statistics: plain values that identify data, split and extractor.

    Args:
        images: images of the split, uint8 (N, C, H, W).
        source: the result of `described`.
        split: name of the split.
        extractor: the extractor.
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
    """Return the name and the options (crop, resize, filter, …) of a data set in plain values, without its cache folder."""
    options = {k: v for k, v in vars(source).items() if not k.startswith("_") and k != "cache"}
    return {"data": type(source).__name__.lower(), **json.loads(json.dumps(options, default=str))}


def reference(images: Images, key: Mapping[str, Any], extractor: Extractor, folder: Path, features: bool) -> Reference:
    """Load reference statistics from their files, or compute and write them. Processes wait for each other.

    Args:
        images: images, uint8 (N, C, H, W).
        key: the result of `key_of`.
        extractor: the extractor, on its device.
        folder: folder of the files.
        features: whether to include the features of at most 10,000 images, for KID and PRDC.

    Raises:
        ConfigError: if there are fewer than 2 images, disk space is missing, or the folder is not writable.
    """
    stem = file_stem(key)
    path, rows = folder / f"{stem}.npz", folder / f"{stem}-features.npy"
    kept = min(len(images), MOST) if features else 0
    spaced: Collected | None = None
    try:
        if features and not rows.is_file():
            with claimed(rows) as file:
                if file is not None:
                    require_space_for(extractor.dim, kept, folder)
                    spaced = _collect(_spaced(images), extractor, keep=True)
                    assert spaced.features is not None
                    np.lib.format.write_array(file, spaced.features.numpy(), allow_pickle=False)
        if not path.is_file():
            with claimed(path) as file:
                if file is not None:
                    require_space_for(extractor.dim, kept, folder)
                    whole = spaced if spaced is not None and len(images) <= MOST else _collect(images, extractor)
                    file.write(_packed(whole.sums.moments(), key))
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error}): write cache=FOLDER on another disk") from error
    loaded = read(path, extractor, key)
    table = load_npy(rows, (kept, extractor.dim), "f4", "delete it and run again") if features else None
    if table is not None and not np.isfinite(table).all():
        raise ConfigError(f"{rows.absolute()} is damaged (it holds NaN or Inf): delete it and run again")
    return Reference(loaded.moments, None if table is None else torch.from_numpy(np.array(table)), dict(key), path)


def file_stem(key: Mapping[str, Any]) -> str:
    """Return the name of the files without suffix: readable parts of the key, followed by a hash of the key."""
    readable = "-".join(str(key.get(name, "")) for name in ("data", "split", "extractor"))
    code = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return f"reference-{re.sub(r'[^A-Za-z0-9+-]+', '_', readable)}-{code}"


def read(path: Path, extractor: Extractor, key: Mapping[str, Any] | None = None) -> Reference:
    """Read moments from an .npz with `mu` and `sigma`, written by this package, pytorch-fid, torch-fidelity, EDM or ADM.

    Args:
        path: the file. Other arrays are ignored.
        extractor: the extractor of the features.
        key: the result of `key_of`. It must be equal to the key in the file, if there is one.

    Raises:
        ConfigError: if the file or its moments are missing, have another size, contain NaN or Inf, or have another key.
    """
    if not path.is_file():
        raise ConfigError(
            f"there are no reference statistics at {path.absolute()}: name an .npz file with mu and sigma"
        )
    arrays = read_npz(path)
    if "mu" not in arrays or "sigma" not in arrays:
        raise ConfigError(
            f"{path.absolute()} contains {', '.join(arrays)}, but not mu and sigma: name an .npz file with mu and sigma"
        )
    if any(arrays[name].dtype.kind not in "fiu" for name in ("mu", "sigma")):
        raise ConfigError(f"{path.absolute()} holds mu and sigma that are not numbers: write (D,) and (D, D)")
    mean, covariance = np.asarray(arrays["mu"], np.float64).squeeze(), np.asarray(arrays["sigma"], np.float64)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ConfigError(
            f"{path.absolute()} contains mu of shape {mean.shape} and sigma of shape {covariance.shape}: write (D,) and (D, D)"
        )
    if len(mean) != extractor.dim:
        raise ConfigError(
            f"{path.absolute()} has {len(mean)} features, but extractor={extractor.name} has {extractor.dim}: "
            "name statistics of the same extractor"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ConfigError(f"{path.absolute()} holds NaN or Inf: compute it again")
    what = f"the key in {path.absolute()}"
    stored_key = parse_plain(str(arrays["key"]), json.loads, what) if "key" in arrays else None
    if not isinstance(stored_key, dict | None):
        raise ConfigError(f"{what} is not a mapping: leave it out, or name another file")
    if stored_key is not None and key is not None:
        _refuse_other(path, stored_key, key)
    n = arrays.get("n")
    if n is not None and (n.shape != () or n.dtype.kind not in "iu" or n < 2):
        raise ConfigError(f"{path.absolute()} holds n={n}, the number of images: write an integer of 2 or more")
    moments = Moments(torch.from_numpy(mean.copy()), torch.from_numpy(covariance.copy()), None if n is None else int(n))
    return Reference(moments, None, stored_key, path)


def write(path: Path, moments: Moments, key: Mapping[str, Any] | None = None) -> None:
    """Write an .npz with `mu`, `sigma`, `n` and `key`, of which other tools read `mu` and `sigma`.

    Raises:
        ConfigError: if the file exists.
    """
    with claimed(path) as file:
        if file is None:
            raise ConfigError(f"{path.absolute()} exists: name another file")
        file.write(_packed(moments, key))


def require_space_for(extractor_dim: int, rows: int, folder: Path) -> None:
    """Raise ConfigError if the disk has no space for the moments and `rows` rows of `extractor_dim` features."""
    need = 8 * extractor_dim * (extractor_dim + 1) + 4 * extractor_dim * rows
    require_space(folder, need, "reference statistics", "write cache=FOLDER on another disk")


def _refuse_other(path: Path, stored_key: Mapping[str, Any], key: Mapping[str, Any]) -> None:
    for name in {**key, **stored_key}:
        if stored_key.get(name) != key.get(name):
            raise ConfigError(
                f"{path.absolute()} was computed with {name}={stored_key.get(name)}, but this evaluation has "
                f"{name}={key.get(name)}: name another file, or remove reference= to compute it"
            )


def _packed(moments: Moments, key: Mapping[str, Any] | None) -> bytes:
    packed = io.BytesIO()
    more: dict[str, Any] = {} if key is None else {"key": np.array(json.dumps(dict(key)))}
    if moments.n is not None:
        more["n"] = np.array(moments.n)
    np.savez(packed, mu=moments.mean.numpy(), sigma=moments.covariance.numpy(), **more)
    return packed.getvalue()


def _spaced(images: Images) -> Images:
    """Return at most 10,000 evenly spaced images, since data sets are often sorted by class."""
    if len(images) <= MOST:
        return images
    index = np.linspace(0, len(images) - 1, MOST).round().astype(np.int64)
    return Rows(images.array, images.index[index]) if isinstance(images, Rows) else Rows(images, index)


def _collect(images: Images, extractor: Extractor, keep: bool = False) -> Collected:
    def block(part: range) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(images[part.start : part.stop]))

    collected = collect(
        block,
        len(images),
        BATCH,
        [extractor],
        features=[extractor.name] if keep else [],
        processes=Processes(shared=False),
        progress=f"{extractor.name} features of the data set",
    )
    return collected[extractor.name]

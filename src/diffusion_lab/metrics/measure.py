"""From the names of metrics to numbers: which extractor each is taken in, what must be kept for it, what it is called."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from diffusion_lab.errors import ConfigError
from diffusion_lab.metrics.collect import Collected
from diffusion_lab.metrics.extractors import Extractor
from diffusion_lab.metrics.frechet import frechet_distance
from diffusion_lab.metrics.moments import refuse_few
from diffusion_lab.metrics.reference import Reference
from diffusion_lab.metrics.scores import (
    MOST,
    NEAREST,
    NEAREST_DENSITY,
    SPLITS,
    SUBSET,
    SUBSETS,
    inception_score,
    kid,
    prdc,
)

NAMES = ("fid", "kid", "is", "prdc", "fd", "fd_classifier")
LEAST = {"prdc": NEAREST_DENSITY + 1, "is": SPLITS}  # images; others need 2
OF_INCEPTION = ("fid", "kid", "is")  # what these are taken in unless another extractor is named
PINNED = {"fid": "inception", "fd_classifier": "classifier"}  # what these are taken in whatever is named


class Plan(NamedTuple):
    """Which metrics are taken in which extractor: its name, or "own" for a module → names of metrics."""

    asked: dict[str, list[str]]
    main: str  # what kid, is, prdc and fd are taken in

    def features(self, extractor: str) -> bool:
        """Whether its features are kept, not only their sums."""
        return bool({"kid", "prdc"} & set(self.asked[extractor]))


def plan(metrics: Sequence[str], extractor: str | None) -> Plan:
    """Sorts the metrics by extractor.

    Args:
        metrics: of `NAMES`.
        extractor: "inception", "classifier", "own"; None is Inception if fid, kid or is are asked for, else the classifier.

    Raises:
        ValueError: an unknown metric, or none.
    """
    unknown = [m for m in metrics if m not in NAMES]
    if unknown or not metrics:
        raise ConfigError(
            f"metrics={unknown[0] if unknown else '[]'} is unknown: write some of {', '.join(NAMES)}, nll"
        )
    main = extractor or ("inception" if set(metrics) & set(OF_INCEPTION) else "classifier")
    asked: dict[str, list[str]] = {}
    for metric in dict.fromkeys(metrics):
        asked.setdefault(PINNED.get(metric, main), []).append(metric)
    return Plan(asked, main)


def check(metrics: Sequence[str], extractor: Extractor, n: int) -> None:
    """Raise ValueError where n images, or the extractor, do not give a metric."""
    for metric in metrics:
        refuse_few(n, LEAST.get(metric, 2), metric)
        if metric == "is" and not extractor.classes:
            raise ConfigError(f"is needs logits, and extractor {extractor.name} gives none: write extractor=inception")


def measure(metrics: Sequence[str], extractor: Extractor, collected: Collected, reference: Reference) -> dict[str, Any]:
    """The metrics of one extractor, by the names they deserve: `kid` and `is` are Inception's, others are `kid_classifier`, ….

    Args:
        metrics: of `NAMES`.
        extractor: whose features these are.
        collected: of the samples.
        reference: of the data.

    Raises:
        ValueError: too few images for a metric, or an extractor without logits for `is`.
    """
    out: dict[str, Any] = {}
    suffix = "" if extractor.name == "inception" else f"_{extractor.name}"
    for metric in metrics:
        if metric in ("fid", "fd", "fd_classifier"):
            out[extractor.distance] = frechet_distance(collected.sums.moments(), reference.moments)
        elif metric == "is":
            assert collected.logits is not None
            out |= _score(f"is{suffix}", inception_score(collected.logits))
        else:
            assert collected.features is not None
            assert reference.features is not None
            if metric == "kid":
                out |= _score(f"kid{suffix}", kid(collected.features, reference.features))
            else:
                out |= prdc(collected.features, reference.features)
    if collected.recognised is not None:
        out["recognised"] = float(collected.recognised.sum()) / collected.n
        out["classes"] = (collected.recognised / collected.n).tolist()
    if collected.as_asked is not None:
        out["as_asked"] = collected.as_asked / collected.n
    return out


def _score(name: str, score: tuple[float, float]) -> dict[str, float]:
    return {name: score[0], f"{name}_std": score[1]}


def protocol(metrics: Sequence[str]) -> dict[str, str]:
    """What another must do to get comparable numbers, in words."""
    said = {
        "images": "uint8 by x·127.5 + 128 truncated, which rounds; resized inside the extractor only",
        "moments": "float64, covariance with n − 1",
    }
    if "kid" in metrics:
        said["kid"] = f"kernel (x·y/D + 1)³, {SUBSETS} subsets of at most {SUBSET:,}, of at most {MOST:,} images a side"
    if "is" in metrics:
        said["is"] = f"{SPLITS} splits, shuffled"
    if "prdc" in metrics:
        said["prdc"] = (
            f"precision, recall k = {NEAREST}; density, coverage k = {NEAREST_DENSITY}; at most {MOST:,} images a side"
        )
    return said


def label(distance: str, n: int) -> str:
    """A distance labelled with its number of images, on which it depends: fid, 1000 → fid_1k."""
    return f"{distance}_{n // 1000}k" if n % 1000 == 0 else f"{distance}_{n}"

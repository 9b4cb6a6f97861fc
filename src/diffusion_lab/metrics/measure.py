"""Compute metrics of features: select their extractors, and name their values."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusion_lab.errors import ConfigError
from diffusion_lab.metrics.collect import Collected
from diffusion_lab.metrics.extractors import Extractor
from diffusion_lab.metrics.moments import refuse_few
from diffusion_lab.metrics.options import FeatureMetric
from diffusion_lab.metrics.reference import Reference

Metrics = Mapping[str, FeatureMetric]  # by key in `metrics`


class Plan(NamedTuple):
    """Metrics by extractor."""

    by_extractor: dict[str, dict[str, FeatureMetric]]  # name of the extractor ("own" for a module) → key → metric
    main: str  # name of the extractor of metrics that are not pinned to one; empty without metrics

    def features(self, extractor: str) -> bool:
        """Whether a metric of this extractor needs the features of each image."""
        return any(metric.keeps_features for metric in self.by_extractor[extractor].values())

    def logits(self, extractor: str) -> bool:
        """Whether a metric of this extractor needs the logits of each image."""
        return any(metric.keeps_logits for metric in self.by_extractor[extractor].values())


def plan(metrics: Metrics, extractor: str | None) -> Plan:
    """Group the metrics by extractor.

    Args:
        metrics: metrics by key; may be empty.
        extractor: "inception", "classifier" or "own"; None for Inception if fid, kid or is is selected, else the classifier.
    """
    if not metrics:
        return Plan({}, "")
    main = extractor or ("inception" if any(metric.of_inception for metric in metrics.values()) else "classifier")
    by_extractor: dict[str, dict[str, FeatureMetric]] = {}
    for key, metric in metrics.items():
        by_extractor.setdefault(metric.pinned or main, {})[key] = metric
    return Plan(by_extractor, main)


def check(metrics: Metrics, extractor: Extractor, n: int) -> None:
    """Raise ConfigError if n images are too few for a metric, or a metric needs logits that the extractor does not have."""
    for key, metric in metrics.items():
        refuse_few(n, metric.least, key)
        if metric.keeps_logits and not extractor.classes:
            raise ConfigError(f"{key} needs logits, but extractor {extractor.name} has none: write extractor=inception")


def measure(metrics: Metrics, extractor: Extractor, collected: Collected, reference: Reference) -> dict[str, Any]:
    """Compute the metrics of one extractor.

    Args:
        metrics: metrics by key.
        extractor: the extractor.
        collected: features of the samples.
        reference: features of the data.

    Returns:
        The values by name: `kid` and `is` for Inception, `kid_classifier`, … for other extractors.

    Raises:
        ConfigError: if there are too few images for a metric.
    """
    out: dict[str, Any] = {}
    for key, metric in metrics.items():
        out |= metric.figures(key, extractor, collected, reference)
    if collected.confident is not None:
        out["confident_fraction"] = float(collected.confident.sum()) / collected.n
        out["classes"] = (collected.confident / collected.n).tolist()
    if collected.label_hits is not None:
        out["label_accuracy"] = collected.label_hits / collected.n
    return out


def protocol(metrics: Metrics) -> dict[str, str]:
    """Return descriptions of the protocol by key, so that values can be compared with those of other implementations."""
    texts = {
        "images": "uint8 by x·127.5 + 128 truncated, which rounds; resized inside the extractor only",
        "moments": "float64, covariance with n − 1",
    }
    return texts | {key: text for key, metric in metrics.items() if (text := metric.protocol()) is not None}


def label(distance: str, n: int) -> str:
    """Return the name of a distance with the number of images, on which its value depends: fid, 1000 → fid_1k."""
    return f"{distance}_{n // 1000}k" if n % 1000 == 0 else f"{distance}_{n}"

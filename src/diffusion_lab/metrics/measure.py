"""From metrics of features to figures: which extractor each is taken in, what must be kept for it, what it is called."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusion_lab.errors import ConfigError
from diffusion_lab.metrics.collect import Collected
from diffusion_lab.metrics.extractors import Extractor
from diffusion_lab.metrics.moments import refuse_few
from diffusion_lab.metrics.options import FeatureMetric
from diffusion_lab.metrics.reference import Reference

Metrics = Mapping[str, FeatureMetric]  # by their keys in `metrics`


class Plan(NamedTuple):
    """Which metrics are taken in which extractor: its name, or "own" for a module → key → metric."""

    by_extractor: dict[str, dict[str, FeatureMetric]]
    main: str  # the extractor of metrics that are not pinned to one; empty without metrics

    def features(self, extractor: str) -> bool:
        """Whether its features are kept, not only their sums."""
        return any(metric.keeps_features for metric in self.by_extractor[extractor].values())

    def logits(self, extractor: str) -> bool:
        """Whether its logits are kept."""
        return any(metric.keeps_logits for metric in self.by_extractor[extractor].values())


def plan(metrics: Metrics, extractor: str | None) -> Plan:
    """Sort the metrics by extractor.

    Args:
        metrics: by key; may be empty.
        extractor: "inception", "classifier", "own"; None is Inception if fid, kid or is are among them, else the classifier.
    """
    if not metrics:
        return Plan({}, "")
    main = extractor or ("inception" if any(metric.of_inception for metric in metrics.values()) else "classifier")
    by_extractor: dict[str, dict[str, FeatureMetric]] = {}
    for key, metric in metrics.items():
        by_extractor.setdefault(metric.pinned or main, {})[key] = metric
    return Plan(by_extractor, main)


def check(metrics: Metrics, extractor: Extractor, n: int) -> None:
    """Raise ConfigError where n images, or the extractor, do not give a metric."""
    for key, metric in metrics.items():
        refuse_few(n, metric.least, key)
        if metric.keeps_logits and not extractor.classes:
            raise ConfigError(
                f"{key} needs logits, and extractor {extractor.name} gives none: write extractor=inception"
            )


def measure(metrics: Metrics, extractor: Extractor, collected: Collected, reference: Reference) -> dict[str, Any]:
    """The figures of one extractor by name: `kid` and `is` are Inception's, others are `kid_classifier`, ….

    Args:
        metrics: by key.
        extractor: whose features these are.
        collected: of the samples.
        reference: of the data.

    Raises:
        ConfigError: too few images for a metric.
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
    """What another must do to get comparable figures, in words."""
    words = {
        "images": "uint8 by x·127.5 + 128 truncated, which rounds; resized inside the extractor only",
        "moments": "float64, covariance with n − 1",
    }
    return words | {key: text for key, metric in metrics.items() if (text := metric.protocol()) is not None}


def label(distance: str, n: int) -> str:
    """A distance labelled with its number of images, on which it depends: fid, 1000 → fid_1k."""
    return f"{distance}_{n // 1000}k" if n % 1000 == 0 else f"{distance}_{n}"

"""Check and build the nodes of `metrics`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torchmetrics import Metric

from diffusion_lab.errors import ConfigError
from diffusion_lab.instantiation import check_named, instantiate
from diffusion_lab.metrics.options import NLL, OPTIONS, FeatureMetric

# Columns of metrics.json and metrics.csv. A metric must not have one of these names.
TAKEN = (
    *("sampler", "steps", "nfe", "n", "seed", "split", "weights", "extractor", "seconds"),
    *("precision", "recall", "density", "coverage", "confident_fraction", "classes", "label_accuracy"),
)


class Chosen(NamedTuple):
    """The metrics of an evaluation by their keys."""

    features: dict[str, FeatureMetric]  # computed from features of images
    images: dict[str, Metric]  # computed from uint8 images
    nll: str | None  # key of the likelihood, or None


def build(nodes: Mapping[str, Any]) -> Chosen:
    """Build the metrics whose nodes are not null.

    Raises:
        ConfigError: if there is no metric, a node has no `_target_` or an unknown argument, a class is not a metric, or a name is
            in TAKEN.
    """
    nodes = {key: node for key, node in nodes.items() if node is not None}
    if not nodes:
        raise ConfigError(
            f"metrics=[] selects no metric: write one or more of {', '.join(OPTIONS)}, or "
            "+metrics.NAME._target_=torchmetrics.CLASS"
        )
    check_named(nodes, "metrics", "metrics=[fid,kid]")
    for key in nodes:
        if key in TAKEN:
            raise ConfigError(
                f"metrics.{key}: the name is reserved for a column of the results: write +metrics.my_{key}._target_=…"
            )
    features, images, nll = {}, {}, None
    for key, node in nodes.items():
        try:
            metric = instantiate(node, f"metrics.{key}")
        except (ModuleNotFoundError, RuntimeError) as error:  # torchmetrics imports some packages on use
            reason = " ".join(str(error).split())
            raise ConfigError(f"metrics.{key}: {node['_target_']} cannot be built: {reason}") from error
        if isinstance(metric, FeatureMetric):
            features[key] = metric
        elif isinstance(metric, Metric):
            images[key] = metric
        elif isinstance(metric, NLL) and nll is None:
            nll = key
        elif isinstance(metric, NLL):
            raise ConfigError(f"metrics.{key} and metrics.{nll} both compute the likelihood: remove one of them")
        else:
            raise ConfigError(
                f"metrics.{key}: {node['_target_']} is not a metric: name a subclass of torchmetrics.Metric, or of "
                "diffusion_lab.metrics.options.FeatureMetric"
            )
    return Chosen(features, images, nll)

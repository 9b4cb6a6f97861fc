"""KID, Inception score, precision and recall (torch-fidelity's functions), density and coverage (which it lacks)."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_lab.data.images import refuse_nan
from diffusion_lab.errors import ConfigError
from diffusion_lab.metrics.moments import refuse_few

MOST = 10_000  # images of each side that kernels and neighbours are computed from: their cost grows with the square
SPLITS = 10  # of the Inception score, the published number
SUBSETS, SUBSET = 100, 1000  # of KID
NEAREST = 3  # k of precision and recall (Kynkäänniemi et al. 2019)
NEAREST_DENSITY = 5  # k of density and coverage (Naeem et al. 2020)
BLOCK = 1000  # rows of distances at a time


class Score(NamedTuple):
    """A mean and its standard deviation over subsets."""

    mean: float
    std: float


def kid(features: Tensor, real: Tensor, subsets: int = SUBSETS, subset_size: int = SUBSET) -> Score:
    """Squared MMD with the kernel (x·y/D + 1)³, unbiased, over random subsets (Bińkowski et al. 2018).

    Args:
        features: of the samples, float (N, D).
        real: of the data, float (M, D).
        subsets: their number.
        subset_size: images of a subset, at most N and M.

    Raises:
        ValueError: fewer than 2 images in a set, or NaN.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    _check(features, real, 2, "kid")
    size = min(subset_size, len(features), len(real))
    out = kid_features_to_metric(
        features.double(), real.double(), kid_subsets=subsets, kid_subset_size=size, verbose=False
    )
    return Score(out[KEY_METRIC_KID_MEAN], out[KEY_METRIC_KID_STD])


def inception_score(logits: Tensor, splits: int = SPLITS) -> Score:
    """exp E KL(p(y|x) ‖ p(y)) over splits of the shuffled samples (Salimans et al. 2016).

    Args:
        logits: of the samples, float (N, K).
        splits: their number.

    Raises:
        ValueError: fewer images than splits, or NaN.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    refuse_few(len(logits), splits, f"is, a mean over {splits} splits,")
    refuse_nan(logits, of="the logits")
    out = isc_features_to_metric(logits, splits=splits)
    return Score(out[KEY_METRIC_ISC_MEAN], out[KEY_METRIC_ISC_STD])


def prdc(
    features: Tensor, real: Tensor, neighbors: int = NEAREST, density_neighbors: int = NEAREST_DENSITY
) -> dict[str, float]:
    """Precision, recall, density and coverage by nearest neighbors.

    A ball around each image of a set reaches its k-th nearest neighbor of that set. Precision: the share of samples in some
    real ball; recall: of real images in some ball of a sample (Kynkäänniemi et al. 2019). Density: in how many real balls a
    sample lies, divided by k; coverage: the share of real balls that hold a sample (Naeem et al. 2020, eq. 4 and 6).

    Args:
        features: of the samples, float (N, D).
        real: of the data, float (M, D).
        neighbors: k of precision and recall.
        density_neighbors: k of density and coverage.

    Raises:
        ValueError: no more than the larger k images in a set, or NaN.
    """
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    _check(features, real, max(neighbors, density_neighbors) + 1, "prdc")
    precision, recall = calculate_precision_recall_part(features, real, neighbors, BLOCK)
    inside, covered = 0, []
    for balls, radii in _balls(real, density_neighbors):
        held = torch.cat([torch.cdist(balls, part) <= radii for part in features.split(BLOCK)], dim=1)
        inside += int(held.sum())
        covered.append(held.any(1))
    return {
        "precision": precision,
        "recall": recall,
        "density": inside / (density_neighbors * len(features)),
        "coverage": float(torch.cat(covered).double().mean()),
    }


def _balls(real: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of centres (b, D) with the distance (b, 1) to their k-th nearest neighbour among `real`, themselves not counted."""
    for part in real.split(BLOCK):
        distances = torch.cat([torch.cdist(part, other) for other in real.split(BLOCK)], dim=1)
        yield part, distances.kthvalue(k + 1, dim=1, keepdim=True).values


def _check(features: Tensor, real: Tensor, least: int, of: str) -> None:
    for side, name in ((features, "the features"), (real, "the real features")):
        refuse_few(len(side), least, of)
        refuse_nan(side, of=name)
    if features.shape[1] != real.shape[1]:
        raise ConfigError(
            f"features of size {features.shape[1]} and {real.shape[1]} do not compare: take one extractor"
        )

"""KID, Inception score, precision and recall (computed by torch-fidelity), and density and coverage."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_lab.data.images import refuse_nan
from diffusion_lab.errors import ConfigError
from diffusion_lab.metrics.moments import refuse_few

MOST = 10_000  # maximum number of images for kernels and neighbors, whose cost is quadratic
SPLITS = 10  # number of splits of the published Inception score
SUBSETS, SUBSET = 100, 1000  # number and size of the subsets of KID
NEAREST = 3  # k of precision and recall (Kynkäänniemi et al. 2019)
NEAREST_DENSITY = 5  # k of density and coverage (Naeem et al. 2020)
BLOCK = 1000  # number of rows of the distance matrix in memory


class Score(NamedTuple):
    """A mean and its standard deviation over subsets."""

    mean: float
    std: float
    subsets: int  # number of different subsets; with 1 `std` is 0 and no measure of an error


def kid(
    features: Float[Tensor, "n d"], real: Float[Tensor, "m d_real"], subsets: int = SUBSETS, subset_size: int = SUBSET
) -> Score:
    """Return the unbiased squared MMD with the kernel (x·y/D + 1)³ over random subsets (Bińkowski et al. 2018).

    Args:
        features: features of the samples.
        real: features of the data.
        subsets: number of subsets.
        subset_size: number of images per subset; at most n and m are used.

    Raises:
        ConfigError: if a set has fewer than 2 images, the numbers of features differ, or features contain NaN or Inf.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    _check(features, real, 2, "kid")
    size = min(subset_size, len(features), len(real))
    out = kid_features_to_metric(
        features.double(), real.double(), kid_subsets=subsets, kid_subset_size=size, verbose=False
    )
    different = subsets if max(len(features), len(real)) > size else 1
    return Score(out[KEY_METRIC_KID_MEAN], out[KEY_METRIC_KID_STD], different)


def inception_score(logits: Float[Tensor, "n k"], splits: int = SPLITS) -> Score:
    """Return exp E KL(p(y|x) ‖ p(y)) over splits of the shuffled samples (Salimans et al. 2016).

    Args:
        logits: logits of the samples.
        splits: number of splits.

    Raises:
        ConfigError: if there are fewer images than splits, or logits contain NaN or Inf.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    refuse_few(len(logits), splits, f"is, a mean over {splits} splits,")
    refuse_nan(logits, of="the logits")
    out = isc_features_to_metric(logits, splits=splits)
    return Score(out[KEY_METRIC_ISC_MEAN], out[KEY_METRIC_ISC_STD], splits)


def prdc(
    features: Float[Tensor, "n d"],
    real: Float[Tensor, "m d_real"],
    neighbors: int = NEAREST,
    density_neighbors: int = NEAREST_DENSITY,
) -> dict[str, float]:
    """Return precision, recall, density and coverage, by nearest neighbors.

    The radius of the ball around an image is the distance to its k-th nearest neighbor in the same set. Precision: fraction of
    samples in any real ball. Recall: fraction of real images in any ball of a sample (Kynkäänniemi et al. 2019). Density: mean
    number of real balls that contain a sample, divided by k. Coverage: fraction of real balls that contain a sample (Naeem et
    al. 2020, eq. 4 and 6).

    Args:
        features: features of the samples.
        real: features of the data.
        neighbors: k of precision and recall.
        density_neighbors: k of density and coverage.

    Raises:
        ConfigError: if the number of images in a set does not exceed both k, the numbers of features differ, or features
            contain NaN or Inf.
    """
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    _check(features, real, max(neighbors, density_neighbors) + 1, "prdc")
    # cdist expands |x − y|², so its rounding error is that of |x|²: in float32 features far from 0 lose their distances
    features, real = features.double(), real.double()
    precision, recall = calculate_precision_recall_part(features, real, neighbors, BLOCK)
    inside, covered = 0, []
    for balls, radii in _balls(real, density_neighbors):
        contains = torch.cat([torch.cdist(balls, part) <= radii for part in features.split(BLOCK)], dim=1)
        inside += int(contains.sum())
        covered.append(contains.any(1))
    return {
        "precision": precision,
        "recall": recall,
        "density": inside / (density_neighbors * len(features)),
        "coverage": float(torch.cat(covered).double().mean()),
    }


def _balls(real: Float[Tensor, "m d"], k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield blocks of centers (b, D), and the distance (b, 1) to the k-th nearest other row of `real`."""
    for part in real.split(BLOCK):
        distances = torch.cat([torch.cdist(part, other) for other in real.split(BLOCK)], dim=1)
        yield part, distances.kthvalue(k + 1, dim=1, keepdim=True).values


def _check(features: Tensor, real: Tensor, least: int, of: str) -> None:
    for side, name in ((features, "the features"), (real, "the real features")):
        refuse_few(len(side), least, of)
        refuse_nan(side, of=name)
    if features.shape[1] != real.shape[1]:
        raise ConfigError(
            f"the sizes of the features differ ({features.shape[1]} and {real.shape[1]}): compute both with the same extractor"
        )

"""Options of the group `metrics`, a class for each. The defaults are those of the publications."""

from abc import ABC, abstractmethod
from typing import ClassVar

from diffusion_lab.errors import check_number
from diffusion_lab.metrics.collect import Collected
from diffusion_lab.metrics.extractors import Extractor
from diffusion_lab.metrics.frechet import frechet_distance
from diffusion_lab.metrics.reference import Reference
from diffusion_lab.metrics.scores import (
    MOST,
    NEAREST,
    NEAREST_DENSITY,
    SPLITS,
    SUBSET,
    SUBSETS,
    Score,
    inception_score,
    kid,
    prdc,
)


class FeatureMetric(ABC):
    """Base class of metrics of the features of samples and data. Subclasses in other modules can be used by `_target_`.

    Attributes:
        key: name of the option. If the key of the node in `metrics` is equal to it, values have their published names,
            otherwise they are named after the key of the node.
        pinned: "inception" or "classifier" if the metric always uses this extractor; None if it uses that of `extractor=`.
        of_inception: whether Inception is the default of `extractor=` for this metric.
        keeps_features, keeps_logits: whether the metric needs the features or logits of each image, in addition to sums.
        least: smallest number of images.
    """

    key: ClassVar[str] = ""
    pinned: ClassVar[str | None] = None
    of_inception: ClassVar[bool] = False
    keeps_features: ClassVar[bool] = False
    keeps_logits: ClassVar[bool] = False
    least: int = 2

    @abstractmethod
    def figures(self, key: str, extractor: Extractor, collected: Collected, reference: Reference) -> dict[str, float]:
        """Return the values of the metric by name.

        Args:
            key: key of the node in `metrics`.
            extractor: extractor of the features.
            collected: features of the samples.
            reference: features of the data.

        Raises:
            ConfigError: if there are too few images, or features contain NaN or Inf.
        """

    def protocol(self) -> str | None:
        """Return a description of the protocol; None if the descriptions of extractor and moments suffice."""
        return None


class FD(FeatureMetric):
    """Fréchet distance between features of `extractor=` (Heusel et al. 2017)."""

    key = "fd"

    def figures(self, key: str, extractor: Extractor, collected: Collected, reference: Reference) -> dict[str, float]:
        name = extractor.distance if key == self.key else key
        return {name: frechet_distance(collected.sums.moments(), reference.moments)}


class FID(FD):
    """Fréchet distance between features of Inception, independent of `extractor=`."""

    key, pinned, of_inception = "fid", "inception", True


class FDClassifier(FD):
    """Fréchet distance between features of the data set's classifier, independent of `extractor=`."""

    key, pinned = "fd_classifier", "classifier"


class KID(FeatureMetric):
    """Kernel Inception distance: squared MMD with a cubic kernel, mean and standard deviation (Bińkowski et al. 2018).

    Args:
        subsets: random subsets, in [1, 10000].
        subset_size: images of a subset, in [2, 1000000]; fewer where a set is smaller.

    Raises:
        ConfigError: a number out of range.
    """

    key, of_inception, keeps_features = "kid", True, True

    def __init__(self, subsets: int = SUBSETS, subset_size: int = SUBSET) -> None:
        check_number("metrics.kid.subsets", subsets, "[1, 10000]", whole=True)
        check_number("metrics.kid.subset_size", subset_size, "[2, 1000000]", whole=True)
        self.subsets, self.subset_size = subsets, subset_size

    def figures(self, key: str, extractor: Extractor, collected: Collected, reference: Reference) -> dict[str, float]:
        assert collected.features is not None
        assert reference.features is not None
        score = kid(collected.features, reference.features, self.subsets, self.subset_size)
        return _score(self, key, extractor, score)

    def protocol(self) -> str:
        return f"kernel (x·y/D + 1)³, {self.subsets} subsets of at most {self.subset_size:,}, of at most {MOST:,} images a side"


class InceptionScore(FeatureMetric):
    """exp E KL(p(y|x) ‖ p(y)) of an extractor with logits, mean and standard deviation (Salimans et al. 2016).

    Args:
        splits: parts of the shuffled samples, in [1, 10000].

    Raises:
        ConfigError: a number out of range.
    """

    key, of_inception, keeps_logits = "is", True, True

    def __init__(self, splits: int = SPLITS) -> None:
        check_number("metrics.is.splits", splits, "[1, 10000]", whole=True)
        self.splits = splits
        self.least = max(2, splits)

    def figures(self, key: str, extractor: Extractor, collected: Collected, reference: Reference) -> dict[str, float]:
        assert collected.logits is not None
        return _score(self, key, extractor, inception_score(collected.logits, self.splits))

    def protocol(self) -> str:
        return f"{self.splits} splits, shuffled"


class PRDC(FeatureMetric):
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020) by nearest neighbors.

    Args:
        neighbors: k of precision and recall, in [1, 1000].
        density_neighbors: k of density and coverage, in [1, 1000].

    Raises:
        ConfigError: a number out of range.
    """

    key, keeps_features = "prdc", True

    def __init__(self, neighbors: int = NEAREST, density_neighbors: int = NEAREST_DENSITY) -> None:
        check_number("metrics.prdc.neighbors", neighbors, "[1, 1000]", whole=True)
        check_number("metrics.prdc.density_neighbors", density_neighbors, "[1, 1000]", whole=True)
        self.neighbors, self.density_neighbors = neighbors, density_neighbors
        self.least = max(neighbors, density_neighbors) + 1

    def figures(self, key: str, extractor: Extractor, collected: Collected, reference: Reference) -> dict[str, float]:
        assert collected.features is not None
        assert reference.features is not None
        figures = prdc(collected.features, reference.features, self.neighbors, self.density_neighbors)
        return figures if key == self.key else {f"{key}_{name}": value for name, value in figures.items()}

    def protocol(self) -> str:
        return (
            f"precision, recall k = {self.neighbors}; density, coverage k = {self.density_neighbors}; "
            f"at most {MOST:,} images a side"
        )


class NLL:
    """Bits per dimension of held-out images, by the variational bound or the ODE of a sampler. It needs no samples."""

    key: ClassVar[str] = "nll"


OPTIONS = ("fid", "kid", "is", "prdc", "fd", "fd_classifier", "nll")


def _score(metric: FeatureMetric, key: str, extractor: Extractor, score: Score) -> dict[str, float]:
    """Return the mean and, of more than one subset, the standard deviation.

    The name of the extractor is appended to their names, except for Inception.
    """
    published = key if extractor.name == "inception" else f"{key}_{extractor.name}"
    name = published if key == metric.key else key
    return {name: score.mean} | ({f"{name}_std": score.std} if score.subsets > 1 else {})

"""Compute subclasses of `torchmetrics.Metric` on uint8 images."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from diffusion_lab.errors import ConfigError

PART = 128  # maximum number of images per update, which limits the memory of feature networks
REFUSALS = (
    ValueError,
    TypeError,
    RuntimeError,
    IndexError,
)  # raised by torch and torchmetrics for unsupported tensors


class ImageMetric:
    """A metric of uint8 images (b, C, H, W) in 0 … 255, computed on rank 0.

    If `update` has a parameter `real`, it is called with the data (real=True) and the samples (real=False), otherwise only with
    the samples. Images with one channel are repeated to three channels only if the metric does not accept one channel (Inception
    of FID and KID).

    All images are sent to rank 0, in order, and the synchronization of torchmetrics is disabled, since it requires the same
    number of updates in every process. The result is that of a single process.

    Args:
        name: key in `metrics`, and name of the value.
        metric: the metric, before its first update.
        probe: real images, uint8 (2, C, H, W), with which the metric is checked.
        device: device of the metric.

    Attributes:
        takes_real: whether the metric compares samples with data.
        warning: a warning about the value, or None.

    Raises:
        ConfigError: if the signature of `update` is not supported, or `update` raises an error for the probe.
    """

    def __init__(self, name: str, metric: Metric, probe: Tensor, device: torch.device | str = "cpu") -> None:
        self.name, self.device = name, torch.device(device)
        self.takes_real = "real" in inspect.signature(metric.update).parameters
        _refuse_signature(name, metric, self.takes_real)
        for module in metric.modules():
            if isinstance(module, Metric):
                module.distributed_available_fn = _alone
        self.metric = metric.eval().to(self.device)
        self.channels = self._channels(probe)
        self.warning = self._wraps(probe)

    @property
    def protocol(self) -> str:
        """Description of the measurement."""
        kind = type(self.metric)
        call = "update(images, real=…), all images of the split" if self.takes_real else "update(images)"
        return f"{kind.__module__}.{kind.__qualname__}: {call}; uint8, {self.channels} channels"

    def copy(self) -> "ImageMetric":
        """Return a copy with the current state, so that real images are added only once for several sets of samples."""
        other = copy.copy(self)
        other.metric = copy.deepcopy(self.metric)
        return other

    def add(self, images: Tensor, real: bool = False) -> None:
        """Update the metric with uint8 images (b, C, H, W). Real images are allowed only if `takes_real`.

        Raises:
            ConfigError: if the metric raises an error for the images.
        """
        if not len(images):
            return
        try:
            for part in images.tensor_split(-(-len(images) // PART)):
                self._update(self.metric, part, real)
        except REFUSALS as error:
            raise ConfigError(f"metrics.{self.name}: {_refusal(self.metric, error)}") from error

    def figures(self) -> dict[str, Any]:
        """Return the values of the metric by name.

        A pair (mean, standard deviation) is returned as `name` and `name_std`, a mapping as `name_KEY`, and a tensor with several
        elements as a list. Random subsets (KID) are drawn with a fixed seed; the state of the global generator is restored.

        Raises:
            ConfigError: if `compute` raises an error, e.g. for too few images, or returns an unsupported type.
        """
        try:
            return self._flat_of(self.metric)
        except ConfigError:
            raise
        except REFUSALS as error:
            raise ConfigError(f"metrics.{self.name}: {_refusal(self.metric, error)}") from error

    def _update(self, metric: Metric, images: Tensor, real: bool) -> None:
        images = images.to(self.device)
        images = images.expand(-1, self.channels, -1, -1).contiguous()
        if self.takes_real:
            metric.update(images, real=real)
        else:
            metric.update(images)

    def _flat_of(self, metric: Metric) -> dict[str, Any]:
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            return _flat(self.name, metric.compute())

    def _channels(self, probe: Tensor) -> int:
        """Return the number of channels that the metric accepts: that of the images, or 3 for images with one channel."""
        first: Exception | None = None
        for channels in dict.fromkeys((probe.shape[1], 3 if probe.shape[1] == 1 else probe.shape[1])):
            self.channels = channels
            try:
                self._update(copy.deepcopy(self.metric), probe, real=True)
            except REFUSALS as error:
                first = first or error
            else:
                return channels
        assert first is not None
        size = "×".join(map(str, probe.shape[1:]))
        raise ConfigError(
            f"metrics.{self.name}: {_refusal(self.metric, first)} for uint8 images (b, C, H, W) of {size}: choose a metric, or a "
            "feature module, that accepts them"
        ) from first

    def _wraps(self, probe: Tensor) -> str | None:
        """Return a warning if a metric of samples computes uint8 differences modulo 256, so that int16 images differ."""
        if self.takes_real:  # a feature network
            return None
        figures: list[Tensor] = []
        for images in (probe, probe.to(torch.int16)):
            metric = copy.deepcopy(self.metric)
            try:
                self._update(metric, images, real=True)
                figures.append(torch.cat([torch.as_tensor(v).flatten() for v in self._flat_of(metric).values()]))
            except REFUSALS:  # the metric accepts only uint8, or needs more images
                return None
        if torch.allclose(figures[0], figures[1], equal_nan=True):
            return None
        return (
            f"metrics.{self.name}: {type(self.metric).__name__} has different values for uint8 and int16 images, probably "
            "because of an overflow: wrap it in torchmetrics.wrappers.LambdaInputTransformer with "
            "transform_pred={_target_: torch.Tensor.float, _partial_: true}"
        )


def _alone() -> bool:
    """`distributed_available_fn` of a metric that is updated and computed on one process."""
    return False


def _refuse_signature(name: str, metric: Metric, real: bool) -> None:
    signature = inspect.signature(metric.update)
    try:
        signature.bind(None, **({"real": True} if real else {}))
    except TypeError:
        raise ConfigError(
            f"metrics.{name}: {type(metric).__name__}.update has the signature {signature}, but is called with images, and real= "
            "if it is a parameter: choose a metric such as torchmetrics.image.FrechetInceptionDistance"
        ) from None


def _refusal(metric: Metric, error: Exception) -> str:
    return f"{type(metric).__name__} raised an error ({' '.join(str(error).split())})"


def _flat(name: str, result: Any) -> dict[str, Any]:
    if isinstance(result, Mapping):
        parts = [_flat(f"{name}_{key}", value) for key, value in result.items()]
        return {key: value for part in parts for key, value in part.items()}
    if isinstance(result, tuple | list):
        names = [name, f"{name}_std"] if len(result) == 2 else [f"{name}_{i}" for i in range(len(result))]
        return {key: value for one, part in zip(names, result, strict=True) for key, value in _flat(one, part).items()}
    if isinstance(result, Tensor):
        return {name: float(result) if result.numel() == 1 else result.flatten().tolist()}
    if isinstance(result, int | float):
        return {name: float(result)}
    raise ConfigError(
        f"metrics.{name}: compute() returns {type(result).__name__}: choose a metric that returns a tensor, a pair of mean and "
        "standard deviation, or a mapping of them"
    )

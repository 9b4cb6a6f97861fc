"""Metrics of torchmetrics, and other subclasses of its `Metric`, on uint8 images."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from diffusion_lab.errors import ConfigError

PART = 128  # largest number of images of an update: feature networks keep the activations of all of them
REFUSALS = (
    ValueError,
    TypeError,
    RuntimeError,
    IndexError,
)  # what torch and torchmetrics raise for tensors that do not fit


class ImageMetric:
    """A metric of uint8 images (b, C, H, W) in 0 … 255, on rank 0.

    Where its `update` has a parameter `real`, it is called with the data (real=True) and the samples (real=False), else with the
    samples alone. Images of one channel are repeated to three only where the metric refuses one channel and accepts three
    (Inception of FID and KID).

    All images pass through rank 0, in order, and torchmetrics' synchronization is disabled: it needs equally many updates in
    every process, else list states wait forever or do not fit together. The figure is that of a single process.

    Args:
        name: key in `metrics`, name of the figure.
        metric: without updates.
        probe: real images, uint8 (2, C, H, W), for a check before anything is sampled.
        device: of the metric.

    Attributes:
        takes_real: whether the metric compares with the data.
        warning: a reason to distrust the figure, or None.

    Raises:
        ConfigError: another signature of `update`, or an `update` that refuses the probe.
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
        """Return a copy with the current state: real images are added once, for several sets of samples."""
        other = copy.copy(self)
        other.metric = copy.deepcopy(self.metric)
        return other

    def add(self, images: Tensor, real: bool = False) -> None:
        """Update with uint8 images (b, C, H, W); with real ones only where `takes_real`.

        Raises:
            ConfigError: the metric refuses the images.
        """
        if not len(images):
            return
        try:
            for part in images.tensor_split(-(-len(images) // PART)):
                self._update(self.metric, part, real)
        except REFUSALS as error:
            raise ConfigError(f"metrics.{self.name}: {_refusal(self.metric, error)}") from error

    def figures(self) -> dict[str, Any]:
        """Return name → figure.

        The key is `name`; for a pair (mean, standard deviation) `name` and `name_std`; for a mapping `name_KEY`. Several values
        are a list. Random subsets (KID) have a fixed seed; the state of the global generator is restored.

        Raises:
            ConfigError: `compute` fails, e.g. with fewer images than its subsets need, or returns another type.
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
        """Return the number of channels that the metric accepts: that of the images, or 3 for 1."""
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
            f"metrics.{self.name}: {_refusal(self.metric, first)}: evaluate passes uint8 images (b, C, H, W) of {size}; choose "
            "a metric, or a feature module, that accepts them"
        ) from first

    def _wraps(self, probe: Tensor) -> str | None:
        """Return a warning where a metric of samples alone subtracts bytes modulo 256: int16 images give another figure."""
        if self.takes_real:  # a feature network
            return None
        figures: list[Tensor] = []
        for images in (probe, probe.to(torch.int16)):
            metric = copy.deepcopy(self.metric)
            try:
                self._update(metric, images, real=True)
                figures.append(torch.cat([torch.as_tensor(v).flatten() for v in self._flat_of(metric).values()]))
            except REFUSALS:  # it accepts bytes alone, or needs more images
                return None
        if torch.allclose(figures[0], figures[1], equal_nan=True):
            return None
        return (
            f"metrics.{self.name}: {type(self.metric).__name__} gives another figure for the same pixels as int16: bytes "
            "probably wrap around at 256: wrap it in torchmetrics.wrappers.LambdaInputTransformer with "
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
            f"metrics.{name}: {type(metric).__name__}.update takes {signature}, and evaluate passes images, and real= to a "
            "metric with it: choose a metric of one set of images, such as torchmetrics.image.FrechetInceptionDistance"
        ) from None


def _refusal(metric: Metric, error: Exception) -> str:
    return f"{type(metric).__name__} refuses ({' '.join(str(error).split())})"


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

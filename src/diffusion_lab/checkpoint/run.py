"""Load a trained model from a checkpoint and sample from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.checkpoint.build import build, check_kind, network_of
from diffusion_lab.checkpoint.files import find, read, select
from diffusion_lab.conditions import Condition
from diffusion_lab.denoiser import Clip, Denoiser
from diffusion_lab.errors import ConfigError
from diffusion_lab.generation import batches, generate, join
from diffusion_lab.instantiation import instantiate_untrusted, is_node, untrusted
from diffusion_lab.objectives import Objective
from diffusion_lab.samplers import Sampler, Samples
from diffusion_lab.schedules import Schedule

MOST_PIXELS = 1 << 14  # channels, height or width of an image


@dataclass
class Run:
    """A trained model.

    Attributes:
        denoiser: network (in eval mode), schedule, objective and clipping.
        config: the resolved configuration, in plain containers.
        step: number of optimizer steps.
        weights: name of the loaded weights, e.g. "ema 0.9999" or "raw".
        trust: further modules whose classes the configuration may name.
        path: path of the checkpoint.
        class_names: names of the labels of the data set; empty without labels, and for files of format 1.
    """

    denoiser: Denoiser
    config: dict[str, Any]
    step: int
    weights: str
    trust: tuple[str, ...] = ()
    path: Path | None = None
    class_names: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        data = self.config["data"]
        return (int(data["channels"]), int(data["image_size"][0]), int(data["image_size"][1]))

    @property
    def condition(self) -> Condition:
        """The condition of the network, built from the configuration."""
        condition: Condition = build(self.config["condition"], self.trust, "condition", Condition)
        return condition

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the network or of its guidance; None without labels."""
        guidance = (getattr(transform, "num_classes", None) for transform in self.denoiser.on_output)
        counts = (count for count in (self.condition.num_classes, *guidance) if count is not None)
        count = next(counts, None)
        return None if count is None else int(count)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        parameter = next(self.denoiser.network.parameters(), None)  # type: ignore[attr-defined]
        return torch.device("cpu") if parameter is None else parameter.device

    def to(self, device: torch.device | str) -> "Run":
        """Move the network to a device; return the run itself."""
        self.denoiser.network.to(device)  # type: ignore[attr-defined]
        return self

    def sampler(self) -> Sampler:
        """Build the sampler of the configuration."""
        sampler: Sampler = build(self.config["sampler"], self.trust, "sampler", Sampler)
        return sampler

    def sample(
        self,
        n: int,
        sampler: Sampler | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        condition: Mapping[str, Tensor] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Sample n images: float32 (n, C, H, W) in [−1, 1] on the CPU. Image i depends only on (seed, i).

        Arguments and errors are those of `generate`, which also returns the number of network evaluations.
        """
        return self.generate(n, sampler, seed, batch_size, condition, progress).x

    def generate(
        self,
        n: int,
        sampler: Sampler | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        condition: Mapping[str, Tensor] | None = None,
        progress: bool = False,
    ) -> Samples:
        """Sample n images and count the network evaluations. Image i depends only on (seed, i).

        Args:
            n: number of images, at least 1.
            sampler: the sampler; None for that of the configuration.
            seed: seed of all random numbers.
            batch_size: number of images per call of the sampler; None for n.
            condition: keyword arguments of the network, each with n rows, e.g. label int64 (n,).
            progress: whether to show a progress bar.

        Returns:
            The samples, with x float32 (n, C, H, W) in [−1, 1] on the CPU.

        Raises:
            ConfigError: if n < 1, a condition does not have n rows, a label is out of range, or the network returns NaN or Inf.
        """
        self.check_labels(condition or {})
        chosen = sampler or self.sampler()
        parts = batches(n, batch_size, condition, self.device, progress)
        return join(generate(self.denoiser, chosen, self.shape, batch, seed=seed) for batch in parts)

    def check_labels(self, condition: Mapping[str, Tensor]) -> None:
        """Raise ConfigError if a label is out of range, or if neither network nor guidance is class-conditional."""
        label = condition.get("label")
        if label is None:
            return
        if self.num_classes is None:
            raise ConfigError(
                "labels were passed, but this checkpoint was trained without: leave them out, or train with condition=label"
            )
        if label.is_floating_point() or not len(label):
            return
        for value in (int(label.max()), int(label.min())):
            if not 0 <= value <= self.num_classes:
                raise ConfigError(
                    f"label {value} is out of range: write 0 … {self.num_classes - 1}, or {self.num_classes} for no label"
                )


def load_checkpoint(path: str | Path, weights: str = "ema", trust: Sequence[str] = ()) -> Run:
    """Rebuild network, schedule and objective from a checkpoint, in eval mode on the CPU.

    Args:
        path: a file, a run folder, or "latest".
        weights: "ema" (the first average, or the raw weights if there is no average), "raw", or the decay of an average.
        trust: modules, in addition to this package, whose classes the checkpoint may instantiate.

    Raises:
        ConfigError: if the file is missing, truncated or not a checkpoint of this project, or names a class that is not
            trusted.
    """
    file = find(path)
    checkpoint = read(file)
    config = untrusted(checkpoint["config"])
    name, state = select(checkpoint, weights)
    try:
        network = network_of(config["model"], trust, state)
    except RuntimeError as error:
        raise ConfigError(f"the weights in {file} do not fit the network of its configuration: {error}") from None
    check_kind(config["clip"], trust, "clip", object)
    clip = instantiate_untrusted(config["clip"], trust, "clip")
    if not callable(clip):
        raise ConfigError(f"{file} has a clip that is not a function of an image: take another file")
    denoiser = Denoiser(
        network.eval().requires_grad_(False),
        build(config["schedule"], trust, "schedule", Schedule),
        build(config["objective"], trust, "objective", Objective),
        clip=clip,
    )
    _check_data(config["data"], file)
    for group, kind in (("condition", Condition), ("sampler", Sampler)):
        check_kind(config[group], trust, group, kind)
    names = tuple(checkpoint.get("class_names") or ())
    return Run(denoiser, config, int(checkpoint["global_step"]), name, tuple(trust), file, names)


def _check_data(node: Any, file: Path) -> None:
    """Raise ConfigError unless the node of the data has a class, a number of channels and a size of images."""
    source, channels, size = (node[key] if is_node(node) else None for key in ("source", "channels", "image_size"))
    numbers = [channels, *size] if isinstance(size, list) and len(size) == 2 else []
    if not is_node(source) or not numbers or not all(isinstance(n, int) and 0 < n <= MOST_PIXELS for n in numbers):
        raise ConfigError(f"{file} has no data with source, channels and image_size=[H,W]: take another file")


def with_clip(run: Run, clip: Clip) -> Run:
    """Return a copy of the run with another clipping of x̂_0. Guidance and other transforms are kept."""
    return replace(run, denoiser=replace(run.denoiser, clip=clip))

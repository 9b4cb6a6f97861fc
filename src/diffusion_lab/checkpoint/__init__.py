"""Checkpoints: finding one, reading it safely, and what is rebuilt from it."""

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffusion_lab.checkpoint.upgrade import FORMAT, upgraded
from diffusion_lab.conditions import Condition
from diffusion_lab.denoiser import Clip, Denoiser
from diffusion_lab.errors import ConfigError
from diffusion_lab.instantiation import instantiate_untrusted, untrusted
from diffusion_lab.noise import normal
from diffusion_lab.samplers import Sampler, Samples, prior

# (index, condition, progress) → (B, …)
Make = Callable[[Tensor, dict[str, Tensor], bool], Tensor]
MakeSamples = Callable[[Tensor, dict[str, Tensor], bool], Samples]

EXPORTED = "diffusion_lab"  # where a .safetensors file of src/export.py holds its configuration


@dataclass
class Run:
    """What a checkpoint gives back: all that sampling and evaluation need.

    Attributes:
        denoiser: network (in eval mode), schedule, objective, and the configured clipping.
        config: the resolved configuration, plain containers.
        step: optimiser steps done.
        weights: "ema 0.9999" or "raw".
        trust: further modules whose classes its configuration may name.
        path: the checkpoint's file.
        class_names: a name for each label of the data set; empty without labels, and for files of format 1.
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
        """What the network was told beside the image."""
        condition: Condition = instantiate_untrusted(self.config["condition"], self.trust, "condition")
        return condition

    @property
    def num_classes(self) -> int | None:
        """The number of classes of the network, or else of its guidance; None for an unconditional one."""
        count = self.condition.num_classes
        guidance = (getattr(transform, "num_classes", None) for transform in self.denoiser.on_output)
        count = next((k for k in guidance if k is not None), None) if count is None else count
        return None if count is None else int(count)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        parameter = next(self.denoiser.network.parameters(), None)  # type: ignore[attr-defined]
        return torch.device("cpu") if parameter is None else parameter.device

    def to(self, device: torch.device | str) -> "Run":
        """Moves the network; returns itself."""
        self.denoiser.network.to(device)  # type: ignore[attr-defined]
        return self

    def sampler(self) -> Sampler:
        """The sampler of the configuration."""
        sampler: Sampler = instantiate_untrusted(self.config["sampler"], self.trust, "sampler")
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
        """Sample n images, float32 (n, C, H, W) in [−1, 1] on the CPU. Image i depends on (seed, i) alone.

        Arguments and errors as for `generate`, which also returns the network evaluations.
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
        """Sample n images, x float32 (n, C, H, W) in [−1, 1] on the CPU. Image i depends on (seed, i) alone.

        Args:
            n: how many.
            sampler: any; None is the configuration's.
            seed: of all noise.
            batch_size: images at a time; None is all at once.
            condition: keyword arguments for the network, each with n rows, e.g. label int64 (n,).
            progress: show a bar.

        Raises:
            ConfigError: n < 1, a condition of another length, a label out of range, NaN from the network.
        """
        chosen = sampler or self.sampler()

        def make(index: Tensor, condition: dict[str, Tensor], progress: bool) -> Samples:
            x_T = prior(self.denoiser.schedule, normal(self.shape, seed=seed, index=index))
            samples = chosen(self.denoiser, x_T, seed=seed, index=index, condition=condition, progress=progress)
            return samples._replace(x=samples.x.float().clamp(-1, 1))

        return self.batched_samples(n, make, batch_size, condition, progress)

    def batched_samples(
        self,
        n: int,
        make: MakeSamples,
        batch_size: int | None = None,
        condition: Mapping[str, Tensor] | None = None,
        progress: bool = False,
    ) -> Samples:
        """Run a sampler on images 0 … n − 1, a batch at a time. Arguments as for `batched`.

        Returns:
            x (n, …) on the CPU, and nfe, the most of a batch: they differ only under an adaptive sampler.
        """
        nfe = 0

        def images(index: Tensor, condition: dict[str, Tensor], progress: bool) -> Tensor:
            nonlocal nfe
            samples = make(index, condition, progress)
            nfe = max(nfe, samples.nfe)
            return samples.x

        x = self.batched(n, images, batch_size, condition, progress)
        return Samples(x, nfe)

    def batched(
        self,
        n: int,
        make: Make,
        batch_size: int | None = None,
        condition: Mapping[str, Tensor] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """What `make` makes of images 0 … n − 1, a batch at a time, (n, …) on the CPU.

        Args:
            n: how many.
            make: make(index, condition, progress) with int64 (B,), which images, and their condition, both on the network's
                device; shows a bar of its own where there is one batch.
            batch_size, condition, progress: as for `sample`, and what is raised too.
        """
        if not isinstance(n, int) or n < 1:
            raise ConfigError(f"n={n}: ask for at least one image")
        condition = dict(condition or {})
        self._check(condition, n)
        size = n if batch_size is None else min(batch_size, n)
        if size < 1:
            raise ConfigError(f"batch_size={batch_size}: write at least 1")
        parts, starts = [], range(0, n, size)
        for start in _bar(starts, progress and len(starts) > 1):
            index = torch.arange(start, min(start + size, n), device=self.device)
            part = {name: value[start : start + size].to(self.device) for name, value in condition.items()}
            parts.append(make(index, part, progress and len(starts) == 1).cpu())
        return torch.cat(parts)

    def _check(self, condition: Mapping[str, Tensor], n: int) -> None:
        for name, value in condition.items():
            if len(value) != n:
                raise ConfigError(f"condition {name} has {len(value)} rows for n={n} images: give one for each")
        label = condition.get("label")
        if label is None:
            return
        if self.num_classes is None:
            raise ConfigError(
                "this checkpoint was trained without labels: leave them out, or train with condition=label"
            )
        if label.is_floating_point():
            return
        if int(label.min()) < 0 or int(label.max()) > self.num_classes:
            bad = int(label.max()) if int(label.max()) > self.num_classes else int(label.min())
            raise ConfigError(f"label {bad} is out of range: this checkpoint knows 0 … {self.num_classes - 1}")


def load_checkpoint(path: str | Path, weights: str = "ema", trust: Sequence[str] = ()) -> Run:
    """Rebuilds network, schedule and objective from a checkpoint, in eval mode on the CPU.

    Args:
        path: a file, a run folder, or "latest".
        weights: "ema" (the first average; raw weights where there is none), "raw", or the decay of an average.
        trust: further modules whose classes the checkpoint may instantiate; by default only this package's.

    Raises:
        ValueError: no such file, a truncated one, something else than a checkpoint of this project, a class not trusted.
    """
    found = find(path)
    checkpoint = read(found)
    config = untrusted(checkpoint["config"])
    network: nn.Module = instantiate_untrusted(config["model"], trust, "model")
    name, state = select(checkpoint, weights)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"the weights in {found} do not fit the network of its configuration: {error}") from None
    denoiser = Denoiser(
        network.eval().requires_grad_(False),
        instantiate_untrusted(config["schedule"], trust, "schedule"),
        instantiate_untrusted(config["objective"], trust, "objective"),
        clip=instantiate_untrusted(config["clip"], trust, "clip"),
    )
    names = tuple(checkpoint.get("class_names", ()))
    return Run(denoiser, config, int(checkpoint["global_step"]), name, tuple(trust), found, names)


def with_clip(run: Run, clip: Clip) -> Run:
    """Return the run with another clipping; the denoiser's transforms stay."""
    return replace(run, denoiser=replace(run.denoiser, clip=clip))


def find(path: str | Path) -> Path:
    """The checkpoint file that `path` means: itself, a run folder's last.ckpt (else best.ckpt), or the latest run's."""
    given = Path(path)
    if str(path) == "latest":
        files = [
            *Path("outputs/train").glob("*/checkpoints/last.ckpt"),
            *Path("outputs/multirun").glob("*/*/checkpoints/last.ckpt"),
        ]
        if not files:
            raise ConfigError(
                "ckpt=latest finds no run below outputs/train: train one first, or name a checkpoint file"
            )
        return max(files, key=lambda file: file.stat().st_mtime)
    if given.is_dir():
        for name in ("checkpoints/last.ckpt", "checkpoints/best.ckpt", "last.ckpt", "best.ckpt"):
            if (given / name).is_file():
                return given / name
        raise ConfigError(f"the folder {given} holds no checkpoints/last.ckpt: name a run folder or a checkpoint file")
    if not given.is_file():
        raise ConfigError(f"there is no checkpoint at {given}: name a file, a run folder (outputs/train/…), or latest")
    return given


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's tensors and plain values; ValueError unless it is one of this project, whole. A file of src/export.py reads
    as a checkpoint that holds one set of weights."""
    if path.suffix == ".safetensors":
        return _exported(path)
    if not zipfile.is_zipfile(path):
        raise ConfigError(
            f"{path} is not a whole checkpoint: truncated, or something else; take another file (best.ckpt?)"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"{path} cannot be read as a checkpoint of tensors and plain values ({reason})") from None
    written = checkpoint.get("diffusion_lab", {}).get("format") if isinstance(checkpoint, dict) else None
    if written not in (1, 2, FORMAT):
        raise ConfigError(f"{path} is no checkpoint of diffusion-lab: name one that src/train.py wrote")
    return checkpoint if written == FORMAT else upgraded(checkpoint)


def _exported(path: Path) -> dict[str, Any]:
    stored = metadata(path)
    if stored is None:
        raise ConfigError(
            f"{path} holds weights without their configuration: train.py init= can begin from them; "
            "to sample take what src/export.py wrote, or a checkpoint"
        )
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    kind, _, decay = str(stored["weights"]).partition(" ")
    if kind == "ema":
        return {**stored, "ema": {decay: tensors}, "state_dict": {}}
    return {**stored, "ema": {}, "state_dict": {f"network.{name}": tensor for name, tensor in tensors.items()}}


def metadata(path: Path) -> dict[str, Any] | None:
    """The metadata of src/export.py in a .safetensors file; None for weights of other projects. ConfigError: a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(EXPORTED)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a whole .safetensors file: fetch it again ({error})") from error
    if text is None:
        return None
    try:
        stored: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} holds a damaged configuration: export it again ({error})") from None
    written = stored.get("diffusion_lab", {}).get("format")
    if written not in (1, 2, FORMAT) or not {"config", "weights", "global_step"} <= stored.keys():
        raise ConfigError(f"{path} is of another version of diffusion-lab: export it again")
    return stored if written == FORMAT else upgraded(stored)


def select(checkpoint: dict[str, Any], weights: str | float) -> tuple[str, dict[str, Tensor]]:
    """(name, state) of the network's weights: "ema", "raw", or the decay of an average."""
    weights = weights if isinstance(weights, str) else f"{weights:g}"  # weights=0.999 arrives as a number
    averages = checkpoint.get("ema") or {}
    if weights == "ema" and averages:
        weights = next(iter(averages))
    if weights in averages:
        return f"ema {weights}", averages[weights]
    if weights not in ("ema", "raw"):
        raise ConfigError(f"weights={weights} is not in the checkpoint: write {', '.join(['ema', 'raw', *averages])}")
    prefix = "network."
    live = {
        key.removeprefix(prefix): value for key, value in checkpoint["state_dict"].items() if key.startswith(prefix)
    }
    return "raw", live


def _bar(items: range, show: bool) -> Any:
    if not show:
        return items
    from tqdm import tqdm

    return tqdm(items, desc="sampling", unit="batch", leave=False)

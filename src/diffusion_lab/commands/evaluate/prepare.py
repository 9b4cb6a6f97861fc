"""Build and check everything that an evaluation needs, before the first image."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion_lab.checkpoint import Run, load_checkpoint, with_clip
from diffusion_lab.checkpoint.build import data_module, overridden
from diffusion_lab.checkpoint.guidance import is_guided
from diffusion_lab.commands.evaluate import likelihoods, metrics, samplers
from diffusion_lab.commands.evaluate.likelihoods import Likelihood
from diffusion_lab.commands.evaluate.samplers import SamplerSpec
from diffusion_lab.conditions import requested_condition
from diffusion_lab.data.datamodule import DataModule
from diffusion_lab.data.image_set import ImageSet
from diffusion_lab.data.images import Examples
from diffusion_lab.device import device
from diffusion_lab.errors import ConfigError
from diffusion_lab.instantiation import check, check_named, instantiate, locate
from diffusion_lab.io import require_writable
from diffusion_lab.metrics import classifier, extractors, measure, reference
from diffusion_lab.metrics.collect import classes
from diffusion_lab.metrics.extractors import Extractor
from diffusion_lab.metrics.images import ImageMetric
from diffusion_lab.metrics.measure import Plan
from diffusion_lab.metrics.moments import singular
from diffusion_lab.metrics.reference import Reference
from diffusion_lab.metrics.scores import MOST
from diffusion_lab.training.classifier import train_classifier


@dataclass
class Prepared:
    """Images to evaluate (a run with samplers, or an image set), extractors, references and metrics."""

    settings: dict[str, Any]
    out: Path
    device: str
    run: Run | None
    image_set: ImageSet | None
    samplers: list[SamplerSpec]
    data: DataModule
    plan: Plan
    extractors: dict[str, Extractor]  # by the names in the plan
    references: dict[str, Reference]  # by the names in the plan
    real: reference.Images  # images of the split
    image_metrics: dict[str, ImageMetric]  # by key; empty except on rank 0, which receives the images of all processes
    feeds_images: bool  # whether there are image metrics; the same in every process
    nll: str | None  # key of the likelihood in `metrics`
    likelihoods: list[Likelihood | None]  # one per sampler; empty without nll
    held_out: Examples | None  # images for nll
    n: int  # number of images
    condition: dict[str, Tensor]  # keyword arguments of the network, with a row for each image
    labels: Tensor | None  # the requested classes, or the labels of the image set
    warnings: list[str] = field(default_factory=list)

    @property
    def measures_samples(self) -> bool:
        """Whether a metric needs samples. The likelihood does not."""
        return bool(self.extractors) or self.feeds_images


def prepare(settings: dict[str, Any], rank: int = 0) -> Prepared:
    """Build and check all objects of an evaluation. A missing classifier or missing reference statistics are computed and cached.

    Args:
        settings: the resolved configuration.
        rank: rank of this process.

    Raises:
        ConfigError: if the settings are invalid. No file outside the cache is written.
    """
    chosen = metrics.build(settings["metrics"])
    _refuse_likelihood(settings, chosen.nll)
    plan = measure.plan(chosen.features, _extractor_name(settings))
    target = device(settings["device"], settings["devices"], rank)
    run = _run(settings, target) if settings["ckpt"] else None
    specs = samplers.build(settings, run) if run else []
    if "inception" in plan.by_extractor:
        # Check the file before the data is opened or a classifier is trained
        extractors.weights(settings["weights_path"])
    data = _data(settings, run)
    shape = (data.channels, data.image_size[0], data.image_size[1])
    if run and run.shape != shape:
        raise ConfigError(
            f"the images of the checkpoint are {_size(run.shape)}, but those of the data set are {_size(shape)}: write another "
            "data="
        )
    image_set = ImageSet(Path(settings["images"]), shape) if settings["images"] else None
    real = data.images(settings["split"])
    if len(real) < 2:
        raise ConfigError(
            f"split={settings['split']} has {len(real)} image(s), but at least 2 are needed: write split=all"
        )
    by_name = {name: _extractor(name, settings, data, shape).to(target) for name in plan.by_extractor}
    references = {name: _reference(settings, plan, name, e, data, real) for name, e in by_name.items()}
    n = settings["n"] or (image_set.count if image_set else min(len(real), MOST))
    if image_set and n > image_set.count:
        raise ConfigError(
            f"n={n}, but {settings['images']} has {image_set.count} images: write at most n={image_set.count}"
        )
    condition = _condition(settings, specs[0].run, data, n) if run else {}
    labels = classes(condition)
    if image_set and image_set.labels is not None:
        labels = image_set.labels[:n]
    image_metrics = _image_metrics(chosen, real, target) if rank == 0 else {}
    warnings = []
    for name, extractor in by_name.items():
        measure.check(plan.by_extractor[name], extractor, n)
        warning = singular(n, extractor.dim)
        if warning:
            warnings.append(f"extractor {extractor.name}: {warning}")
    return Prepared(
        settings=settings,
        out=Path(settings["out"] or settings["run_dir"]),
        device=target,
        run=run,
        image_set=image_set,
        samplers=specs,
        data=data,
        plan=plan,
        extractors=by_name,
        references=references,
        real=real,
        image_metrics=image_metrics,
        feeds_images=bool(chosen.images),
        nll=chosen.nll,
        likelihoods=likelihoods.kinds(specs) if chosen.nll else [],
        held_out=likelihoods.held_out(data, settings) if chosen.nll else None,
        n=n,
        condition=condition,
        labels=labels,
        warnings=warnings + [m.warning for m in image_metrics.values() if m.warning],
    )


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for settings that are invalid for every checkpoint and data set. Called before processes are started."""
    if bool(settings["ckpt"]) == bool(settings["images"]):
        raise ConfigError(
            "one of ckpt= and images= is needed: write ckpt=PATH with a checkpoint or a run folder, ckpt=latest, or images=PATH "
            "with data=OPTION"
        )
    if settings["data"].get("_target_"):
        check(settings["data"], "data")
    elif settings["images"]:
        raise ConfigError("images= needs a data set for comparison: write data=OPTION, e.g. data=digits")
    check_named(settings["logger"], "logger", "logger=wandb", ("save_dir", "identity", "config", "job_type"))
    for key, smallest in (("repeats", 1), ("devices", 1), ("batch_size", 1), ("n", 2)):
        if settings[key] is not None and settings[key] < smallest:
            raise ConfigError(f"{key}={settings[key]}: write at least {smallest}")
    if settings["save_reference"] and Path(settings["save_reference"]).exists():
        raise ConfigError(f"save_reference={settings['save_reference']} exists: name another file")
    if settings["save_reference"]:
        require_writable(Path(settings["save_reference"]).parent, "save_reference")
    if settings["reference"] and not Path(settings["reference"]).is_file():
        raise ConfigError(f"reference={settings['reference']}: no such file: name an .npz file with mu and sigma")
    _extractor_name(settings)
    if settings["images"] and is_guided(settings["guidance"]):
        raise ConfigError(
            "guidance= cannot be combined with images=: write ckpt=PATH instead of images=, or guidance=none"
        )


def _extractor_name(settings: Mapping[str, Any]) -> str | None:
    """Return "inception", "classifier", "own" for a node, or None for the default."""
    chosen = settings["extractor"]
    if isinstance(chosen, dict):
        locate(chosen, "extractor")
        return "own"
    if chosen not in (None, "inception", "classifier"):
        raise ConfigError(
            f"extractor={chosen} is unknown: write inception, classifier, or {{_target_: package.Module}}"
        )
    return str(chosen) if chosen else None


def _refuse_likelihood(settings: Mapping[str, Any], nll: str | None) -> None:
    """Raise ConfigError if nll is combined with guidance or an image set."""
    if nll and is_guided(settings["guidance"]):
        raise ConfigError(
            "metrics=nll cannot be combined with guidance, since a guided denoiser has no likelihood: write guidance=none"
        )
    if nll and settings["images"]:
        raise ConfigError("metrics=nll needs a checkpoint: write ckpt=PATH instead of images=")


def _run(settings: Mapping[str, Any], target: str) -> Run:
    """Load the checkpoint to a device, with the clipping of `clip`."""
    loaded = load_checkpoint(settings["ckpt"], settings["weights"], settings["trust"])
    return with_clip(loaded, clip=instantiate(settings["clip"], "clip")).to(target)


def _data(settings: Mapping[str, Any], run: Run | None) -> DataModule:
    """Open the data set of `data`, or that of the checkpoint, without the limit on training images."""
    node = settings["data"]
    if node.get("_target_"):
        data: DataModule = instantiate({**node, "limit": None}, "data")
    else:
        assert run is not None
        stored, named = overridden(run.config["data"], node)
        data = data_module({**stored, "limit": None}, settings["trust"], named)
    data.prepare_data()
    data.setup()
    return data


def _condition(settings: Mapping[str, Any], run: Run, data: DataModule, n: int) -> dict[str, Tensor]:
    """Return the condition of n samples: computed from the images of the split if it depends on data, else from labels=."""
    condition = run.condition
    if condition.of_data:
        examples = data.examples(settings["split"])
        return condition(examples.take(np.arange(n) % len(examples)))
    return requested_condition(condition, run.num_classes, n, settings["labels"])


def _image_metrics(chosen: metrics.Chosen, real: reference.Images, target: str) -> dict[str, ImageMetric]:
    """Build the image metrics. Each of them is checked with two real images."""
    probe = torch.from_numpy(np.ascontiguousarray(real[0:2]))
    return {key: ImageMetric(key, metric, probe, target) for key, metric in chosen.images.items()}


def _extractor(name: str, settings: Mapping[str, Any], data: DataModule, shape: tuple[int, int, int]) -> Extractor:
    if name == "classifier":
        return classifier.ClassifierExtractor(
            classifier.for_dataset(data, Path(settings["cache"]), train_classifier, device(settings["device"]))
        )
    if name == "own":
        module = instantiate(settings["extractor"])
        if not isinstance(module, nn.Module):
            raise ConfigError(
                f"extractor={settings['extractor'].get('_target_')} is not a torch.nn.Module: write {{_target_: package.Module}} "
                "with a subclass"
            )
        return extractors.resolve(module, shape)
    return extractors.resolve(name, shape, settings["weights_path"])


def _reference(
    settings: Mapping[str, Any], plan: Plan, name: str, extractor: Extractor, data: DataModule, real: reference.Images
) -> Reference:
    key = reference.key_of(real, reference.described(data.source), settings["split"], extractor)
    if len(plan.by_extractor) > 1 and (settings["reference"] or settings["save_reference"]):
        raise ConfigError(
            f"reference= and save_reference= need one extractor, but these metrics use {' and '.join(plan.by_extractor)}: choose "
            "metrics with the same extractor"
        )
    if settings["reference"]:
        if plan.features(name):
            raise ConfigError(
                "reference= contains only moments, but kid and prdc need the features of each image: remove reference=, or kid "
                "and prdc"
            )
        return reference.read(Path(settings["reference"]), extractor, key)
    statistics = reference.reference(real, key, extractor, Path(settings["cache"]), features=plan.features(name))
    if settings["save_reference"] and not Path(settings["save_reference"]).exists():
        reference.write(Path(settings["save_reference"]), statistics.moments, key)
    return statistics


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}×{shape[2]}×{shape[0]}"

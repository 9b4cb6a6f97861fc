"""Everything an evaluation needs, built and checked before the first image: what is wrong is known within seconds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion_lab.checkpoint import Run, load_checkpoint, with_clip
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
from diffusion_lab.instantiation import check, check_named, instantiate, instantiate_untrusted
from diffusion_lab.io import refuse_filled
from diffusion_lab.metrics import classifier, extractors, measure, reference
from diffusion_lab.metrics.collect import classes
from diffusion_lab.metrics.extractors import Extractor
from diffusion_lab.metrics.images import ImageMetric
from diffusion_lab.metrics.measure import Plan
from diffusion_lab.metrics.moments import singular
from diffusion_lab.metrics.reference import Reference
from diffusion_lab.metrics.scores import MOST


@dataclass
class Prepared:
    """What is measured (a run with samplers, or given images), by what, against what."""

    settings: dict[str, Any]
    out: Path
    device: str
    run: Run | None
    given: ImageSet | None
    samplers: list[SamplerSpec]
    data: DataModule
    plan: Plan
    extractors: dict[str, Extractor]  # by the plan's names
    references: dict[str, Reference]
    real: reference.Images  # of the split
    image_metrics: dict[str, ImageMetric]  # by key; built on rank 0, which receives the images of all processes
    feeds: bool  # whether there are any, in every process
    nll: str | None  # the key of the likelihood
    likelihoods: list[Likelihood | None]  # what it is of, for each sampler; empty without nll
    held_out: Examples | None  # nll's images
    n: int
    condition: dict[str, Tensor]  # what the network is told, a row for each image
    labels: Tensor | None  # the classes among it, or of given images
    warnings: list[str] = field(default_factory=list)

    @property
    def measures_samples(self) -> bool:
        """Whether any metric needs samples, as nll alone does not."""
        return bool(self.extractors) or self.feeds


def prepare(settings: dict[str, Any], rank: int = 0) -> Prepared:
    """Builds and checks. Files that are missing (the classifier, reference statistics) are made by the first process.

    Raises:
        ValueError: anything that cannot be, in one line; nothing is written then but into the cache.
    """
    chosen = metrics.build(settings["metrics"])
    plan = measure.plan(chosen.features, _checked(settings, rank, chosen.nll))
    on = device(settings["device"], settings["devices"], rank)
    run = _run(settings, on) if settings["ckpt"] else None
    asked = samplers.build(settings, run) if run else []
    if "inception" in plan.by_extractor:
        extractors.weights(settings["weights_path"])  # before the data are opened, let alone a classifier trained
    data = _data(settings, run)
    shape = (data.channels, data.image_size[0], data.image_size[1])
    if run and run.shape != shape:
        raise ConfigError(
            f"the checkpoint makes images {_size(run.shape)}, and the data set's are {_size(shape)}: choose another data="
        )
    given = ImageSet(Path(settings["images"]), shape) if settings["images"] else None
    real = data.images(settings["split"])
    if len(real) < 2:
        raise ConfigError(
            f"split={settings['split']} holds {len(real)} image(s), and 2 at least are needed: write split=all"
        )
    judges = {name: _extractor(name, settings, data, shape).to(on) for name in plan.by_extractor}
    references = {name: _reference(settings, plan, name, judge, data, real) for name, judge in judges.items()}
    n = settings["n"] or (given.count if given else min(len(real), MOST))
    if given and n > given.count:
        raise ConfigError(f"n={n}, but {settings['images']} holds {given.count} images: write n={given.count} or less")
    prepared = Prepared(
        settings,
        Path(settings["out"] or settings["run_dir"]),
        on,
        run,
        given,
        asked,
        data,
        plan,
        judges,
        references,
        real,
        _image_metrics(chosen, real, on) if rank == 0 else {},
        bool(chosen.images),
        chosen.nll,
        likelihoods.kinds(asked) if chosen.nll else [],
        likelihoods.held_out(data, settings) if chosen.nll else None,
        n,
        {},
        None,
    )
    if run:
        prepared.condition = _condition(settings, asked[0].run, data, n)
        prepared.labels = classes(prepared.condition)
    elif given and given.labels is not None:
        prepared.labels = given.labels[:n]
    for name, judge in judges.items():
        measure.check(plan.by_extractor[name], judge, n)
        warning = singular(n, judge.dim)
        if warning:
            prepared.warnings.append(f"extractor {judge.name}: {warning}")
    prepared.warnings += [m.warning for m in prepared.image_metrics.values() if m.warning]
    return prepared


def _checked(settings: Mapping[str, Any], rank: int, nll: str | None) -> str | None:
    """The extractor's name, "own" for a module, after the checks that need nothing but the settings."""
    if bool(settings["ckpt"]) == bool(settings["images"]):
        raise ConfigError(
            "name what to evaluate: ckpt=PATH of a checkpoint or a run folder, ckpt=latest, or images=PATH with data=…"
        )
    if settings["data"].get("_target_"):
        check(settings["data"], "data")
    check_named(settings["logger"], "logger", "logger=wandb", ("save_dir", "who", "config", "job_type"))
    if settings["images"] and not settings["data"].get("_target_"):
        raise ConfigError("images= needs the data set that they are compared with: write data=digits, data=mnist, …")
    for key, least in (("repeats", 1), ("devices", 1), ("batch_size", 1), ("n", 2)):
        if settings[key] is not None and settings[key] < least:
            raise ConfigError(f"{key}={settings[key]}: write at least {least}")
    if settings["save_reference"] and Path(settings["save_reference"]).exists() and rank == 0:
        raise ConfigError(f"save_reference={settings['save_reference']} is there already: name another file")
    if rank == 0:
        refuse_filled(Path(settings["out"] or settings["run_dir"]), "out", settings["overwrite"])
    chosen = settings["extractor"]
    if isinstance(chosen, dict):
        chosen = "own"
    elif chosen not in (None, "inception", "classifier"):
        raise ConfigError(
            f"extractor={chosen} is unknown: write inception, classifier, or {{_target_: package.Module}}"
        )
    if is_guided(settings["guidance"]) and nll:
        raise ConfigError(
            "metrics=nll is the likelihood of a model, and guided denoisers are none of one: leave out guidance="
        )
    if settings["images"] and is_guided(settings["guidance"]):
        raise ConfigError("guidance= is for samples of a checkpoint: write ckpt=PATH, not images=")
    if settings["images"] and nll:
        raise ConfigError("metrics=nll is the likelihood of data under a checkpoint: write ckpt=PATH, not images=")
    return str(chosen) if chosen else None


def _run(settings: Mapping[str, Any], on: str) -> Run:
    loaded = load_checkpoint(settings["ckpt"], settings["weights"], settings["trust"])
    return with_clip(loaded, clip=instantiate(settings["clip"], "clip")).to(on)


def _data(settings: Mapping[str, Any], run: Run | None) -> DataModule:
    """The data set: the one that is named, else the checkpoint's. All of it: a run on fewer images is judged by all."""
    stated = settings["data"]
    if stated.get("_target_"):
        data: DataModule = instantiate({**stated, "limit": None}, "data")
    else:
        assert run is not None
        node = {**run.config["data"], "limit": None, **{k: v for k, v in stated.items() if v is not None}}
        data = instantiate_untrusted(node, settings["trust"], "data")
    data.prepare_data()
    data.setup()
    return data


def _condition(settings: Mapping[str, Any], run: Run, data: DataModule, n: int) -> dict[str, Tensor]:
    """The condition of n samples: of real images in turn where it is made of data, else the requested labels."""
    condition = run.condition
    if condition.of_data:
        examples = data.examples(settings["split"])
        return condition(examples.take(np.arange(n) % len(examples)))
    return requested_condition(condition, run.num_classes, n, settings["labels"])


def _image_metrics(chosen: metrics.Chosen, real: reference.Images, on: str) -> dict[str, ImageMetric]:
    probe = torch.from_numpy(np.ascontiguousarray(real[0:2]))
    return {key: ImageMetric(key, metric, probe, on) for key, metric in chosen.images.items()}


def _extractor(name: str, settings: Mapping[str, Any], data: DataModule, shape: tuple[int, int, int]) -> Extractor:
    if name == "classifier":
        return classifier.ClassifierExtractor(
            classifier.for_dataset(data, Path(settings["cache"]), device(settings["device"]))
        )
    if name == "own":
        module = instantiate(settings["extractor"])
        if not isinstance(module, nn.Module):
            raise ConfigError(f"extractor={settings['extractor'].get('_target_')} is no torch.nn.Module")
        return extractors.resolve(module, shape)
    return extractors.resolve(name, shape, settings["weights_path"])


def _reference(
    settings: Mapping[str, Any], plan: Plan, name: str, judge: Extractor, data: DataModule, real: reference.Images
) -> Reference:
    key = reference.key_of(real, reference.described(data.source), settings["split"], judge)
    if len(plan.by_extractor) > 1 and (settings["reference"] or settings["save_reference"]):
        raise ConfigError(
            f"reference= is of one extractor, and these metrics take {' and '.join(plan.by_extractor)}: ask for fewer"
        )
    if settings["reference"]:
        if plan.features(name):
            raise ConfigError(
                "reference= holds moments, and kid and prdc compare images: leave them out, or leave it out"
            )
        return reference.read(Path(settings["reference"]), judge, key)
    made = reference.reference(real, key, judge, Path(settings["cache"]), features=plan.features(name))
    if settings["save_reference"] and not Path(settings["save_reference"]).exists():
        reference.write(Path(settings["save_reference"]), made.moments, key)
    return made


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}×{shape[2]}×{shape[0]}"

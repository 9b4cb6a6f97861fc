"""Log the Fréchet distance between samples and data during training."""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from diffusion_lab.data.datamodule import DataModule
from diffusion_lab.denoiser import Clip, Denoiser
from diffusion_lab.errors import SEEDS, ConfigError, check_number
from diffusion_lab.generation import batch_of, generate, initial_state
from diffusion_lab.metrics import classifier, extractors, reference
from diffusion_lab.metrics.collect import Processes, classes, collect
from diffusion_lab.metrics.extractors import Extractor
from diffusion_lab.metrics.frechet import frechet_distance
from diffusion_lab.metrics.measure import label
from diffusion_lab.metrics.moments import singular
from diffusion_lab.samplers import Sampler
from diffusion_lab.training.callbacks.checkpoints import Checkpoints
from diffusion_lab.training.callbacks.graceful_stop import GracefulStop
from diffusion_lab.training.callbacks.throughput import paused, peak_memory
from diffusion_lab.training.classifier import train_classifier
from diffusion_lab.training.module import DiffusionModule

TRIAL = 8  # number of images for timing the extractor
BACKWARD = 3.0  # cost of a training step, in forward passes


class Cost(NamedTuple):
    """Estimated cost of one evaluation."""

    seconds: float
    bytes: int
    share: float  # of the time from one evaluation to the next


class QualityMonitor(pl.Callback):
    """Log the Fréchet distance of n samples to the data, labeled with n: `fid_10k`, `fd_classifier_1k`, ….

    Samples are drawn with the first average of the weights. Weights, classifier, reference statistics and disk space are
    checked before the first step, and the estimated cost of an evaluation is printed then. Each image is processed by exactly
    one process; the figure does not depend on their number.

    Args:
        sampler: any sampler.
        clip: of x̂_0.
        extractor: "classifier", "inception", or a module.
        every: steps between two evaluations; the last step is evaluated as well.
        n: number of samples.
        split: of the data set, for the reference.
        batch_size: samples at a time in each process.
        seed: of the noise, the same in every evaluation.
        share: largest fraction of the time for evaluations without a warning.
        weights_path: of Inception; None is torch-fidelity's path.
        cache: folder of classifiers and reference statistics.

    Attributes:
        label: name of the logged figure; empty before `prepare`.
        value: the latest figure.

    Raises:
        ConfigError: a number out of range.
    """

    def __init__(
        self,
        sampler: Sampler,
        clip: Clip = 1.0,
        extractor: str | nn.Module = "classifier",
        every: int = 5000,
        n: int = 1000,
        split: str = "train+val",
        batch_size: int = 500,
        seed: int = 0,
        share: float = 0.2,
        weights_path: str | None = None,
        cache: str = "outputs/cache",
    ) -> None:
        check_number("callbacks.quality.every", every, "[1, 1000000000]", "at least 1 step", whole=True)
        check_number("callbacks.quality.n", n, "[2, 10000000]", "images", whole=True)
        check_number("callbacks.quality.batch_size", batch_size, "[1, 1000000]", whole=True)
        check_number("callbacks.quality.seed", seed, SEEDS, whole=True)
        check_number(
            "callbacks.quality.share", share, "(0, 1000000000]", "a fraction of the time, 1 or more for no warning"
        )
        self.sampler, self.clip, self.extractor, self.every, self.n = sampler, clip, extractor, every, n
        self.split, self.batch_size, self.seed, self.share = split, batch_size, seed, share
        self.weights_path, self.cache = weights_path, Path(cache)
        self.label = ""
        self.value: float | None = None
        self._extractor: Extractor | None = None
        self._reference: reference.Reference | None = None

    # before the first step ------------------------------------------------------------------------------------------------

    def check(self, data: DataModule) -> None:
        """Raise ConfigError if the extractor's weights, the labels of the data set or disk space are missing."""
        images = data.images(self.split)
        if len(images) < 2:
            raise ConfigError(
                f"callbacks.quality.split={self.split} has {len(images)} image(s), but at least 2 are needed: write "
                "callbacks.quality.split=train+val"
            )
        if isinstance(self.extractor, str) and self.extractor not in ("inception", "classifier"):
            raise ConfigError(f"callbacks.quality.extractor={self.extractor}: write classifier, inception, or a module")
        if self.extractor == "inception":
            extractors.weights(self.weights_path)
        elif self.extractor == "classifier":
            classifier.file_of(data.examples("train"), self.cache, "", classifier.Recipe())
        reference.require_space_for(2048, 0, self.cache)  # the features of Inception, the largest extractor

    def prepare(self, data: DataModule, device: torch.device) -> None:
        """Load the extractor and the reference statistics. Rank 0 computes those that are not cached."""
        shape = (data.channels, data.image_size[0], data.image_size[1])
        if self.extractor == "classifier":
            trained = classifier.for_dataset(data, self.cache, train_classifier, device)
            self._extractor = classifier.ClassifierExtractor(trained)
        else:
            self._extractor = extractors.resolve(self.extractor, shape, self.weights_path)
        extractor, images = self._extractor.to(device), data.images(self.split)
        key = reference.key_of(images, reference.described(data.source), self.split, extractor)
        self._reference = reference.reference(images, key, extractor, self.cache, features=False)
        self.label = label(extractor.distance, self.n)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: DiffusionModule) -> None:  # type: ignore[override]
        self.prepare(trainer.datamodule, pl_module.device)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: DiffusionModule) -> None:  # type: ignore[override]
        cost = self.cost(trainer, pl_module)
        assert self._extractor is not None
        if not trainer.is_global_zero:
            return
        print(
            f"{self.label} every {self.every:,} steps ({type(self.sampler).__name__}, {self.split}): about {cost.seconds:.0f} s "
            f"and {cost.bytes / 2**20:,.0f} MiB each time, {cost.share:.0%} of the time",
            flush=True,
        )
        if cost.share > self.share:
            warnings.warn(
                f"evaluations would take {cost.share:.0%} of the time: write callbacks.quality.every={self._rarer(cost)}, "
                "or fewer samples, callbacks.quality.n=",
                stacklevel=2,
            )
        warning = singular(self.n, self._extractor.dim)
        if warning:
            warnings.warn(f"callbacks.quality: {warning}", stacklevel=2)

    def cost(self, trainer: pl.Trainer, module: DiffusionModule) -> Cost:
        """Estimate the cost by timing the network on one batch, and the extractor on a few images."""
        assert self._extractor is not None
        extractor, data, world = self._extractor, trainer.datamodule, trainer.world_size  # type: ignore[attr-defined]
        shape = (data.channels, data.image_size[0], data.image_size[1])
        size = min(self.batch_size, self.n)
        before = peak_memory(module.device)
        with self._evaluated(module) as denoiser:
            index = torch.arange(size, device=module.device)
            x = initial_state(denoiser, shape, index, self.seed)
            condition = module.requested_condition(index)
            forward = _seconds(lambda: denoiser(x, 1.0, **condition), module.device) / size
            images = torch.zeros(TRIAL, *shape, dtype=torch.uint8)
            features = _seconds(lambda: extractor(images), module.device) / TRIAL
            evaluations = _evaluations(self.sampler, denoiser, shape)
        memory = peak_memory(module.device) - before + 3 * 8 * extractor.dim**2
        seconds = self.n / world * (evaluations * forward + features)
        step = BACKWARD * forward * module.batch_size / world
        return Cost(seconds, memory, seconds / (seconds + self.every * step))

    def _rarer(self, cost: Cost) -> int:
        """Return the smallest interval, a multiple of 100 steps, at which evaluations take at most `share` of the time."""
        steps = self.every * cost.share / (1 - cost.share) * (1 - self.share) / self.share
        return int(-(-steps // 100) * 100)

    # during training ------------------------------------------------------------------------------------------------------

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: DiffusionModule, *_: object) -> None:  # type: ignore[override]
        step = trainer.global_step
        stopped = any(isinstance(c, GracefulStop) and c.received is not None for c in trainer.callbacks)  # type: ignore[attr-defined]
        if stopped and trainer.world_size == 1:  # an interrupted run is not evaluated
            return
        last = step == trainer.max_steps
        accumulating = trainer.fit_loop.epoch_loop.batch_progress.current.ready % trainer.accumulate_grad_batches
        if not step or accumulating or not (last or step % self.every == 0):
            return
        with paused(trainer):
            try:
                self._evaluate(trainer, pl_module)
            except (ConfigError, torch.OutOfMemoryError) as error:  # the same in every process; the training continues
                if trainer.is_global_zero:
                    warnings.warn(f"no {self.label} at step {step:,}: {error}", stacklevel=2)

    def _evaluate(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        assert self._extractor is not None
        assert self._reference is not None
        data = trainer.datamodule  # type: ignore[attr-defined]
        shape = (data.channels, data.image_size[0], data.image_size[1])
        condition = module.requested_condition(torch.arange(self.n))
        with self._evaluated(module) as denoiser:

            def sample(block: range) -> Tensor:
                batch = batch_of(block, condition, module.device)
                return generate(denoiser, self.sampler, shape, batch, seed=self.seed).x

            collected = collect(
                sample,
                self.n,
                self.batch_size,
                [self._extractor],
                labels=classes(condition),
                processes=Processes(module.device),
            )[self._extractor.name]
        distance = frechet_distance(collected.sums.moments(), self._reference.moments)
        self.value = float(torch.tensor(distance, dtype=torch.float32))  # loggers store float32
        row = {self.label: self.value}
        if collected.confident is not None:
            row[label("confident_fraction", self.n)] = float(collected.confident.sum()) / self.n
        module.log_row_now(row)  # log_row would repeat the value in later rows, and skip steps between two rows
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in row.items()})  # for `monitor=`
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoints):
                callback.consider(trainer, self.value, "quality", self.label)

    @contextmanager
    def _evaluated(self, module: DiffusionModule) -> Iterator[Denoiser]:
        """Yield the denoiser with the first average (or the raw weights if there is none), in eval mode without autocast."""
        denoiser = next(iter(module.denoisers().values()))
        with module.evaluating(), torch.no_grad(), torch.autocast(module.device.type, enabled=False):
            yield replace(denoiser, clip=self.clip)


def _seconds(call: object, device: torch.device) -> float:
    """Return the duration of the second of two calls."""
    assert callable(call)
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _evaluations(sampler: Sampler, denoiser: Denoiser, shape: tuple[int, int, int]) -> int:
    """Return the number of network evaluations per image, counted with a network that returns zeros."""
    channels = int(getattr(denoiser.network, "out_channels", shape[0]))

    def zeros(x: Tensor, c: Tensor, **condition: Tensor) -> Tensor:
        return torch.zeros(len(x), channels, *x.shape[2:], dtype=x.dtype, device=x.device)

    return generate(replace(denoiser, network=zeros), sampler, shape, batch_of(range(1), None, "cpu")).nfe

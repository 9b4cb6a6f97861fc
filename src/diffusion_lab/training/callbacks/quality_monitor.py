"""A distance to the data while training: every so many steps, on averaged weights, on all processes."""

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
from diffusion_lab.errors import ConfigError
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
from diffusion_lab.training.callbacks.throughput import Throughput, peak_memory
from diffusion_lab.training.module import DiffusionModule

TRIAL = 8  # images that the extractor is timed on
BACKWARD = 3.0  # a training step in units of a forward pass


class Cost(NamedTuple):
    """What one evaluation is going to cost."""

    seconds: float
    bytes: int
    share: float  # of the time from one evaluation to the next


class QualityMonitor(pl.Callback):
    """Logs the Fréchet distance of n samples to the data, labelled with n: `fid_10k`, `fd_classifier_1k`, ….

    What it needs (weights, classifier, reference statistics, room on the disk) is there before the first step, and what one
    evaluation will cost is said then. Every image belongs to one process; the figure does not depend on how many there are.

    Args:
        sampler: any sampler.
        clip: what acts on x̂_0.
        extractor: "classifier", "inception", or a module of one's own.
        every: steps between two evaluations; there is one at the last step as well.
        n: samples.
        split: of the data set, what they are compared with.
        batch_size: samples at a time, of each process.
        seed: of the noise, the same every time.
        share: warn where evaluations would take more of the time.
        weights_path: of Inception; None is torch-fidelity's place for them.
        cache: the folder of classifiers and reference statistics.

    Attributes:
        label: the name of the logged figure, known from `prepare` on.
        value: the latest figure.

    Raises:
        ValueError: every < 1, or n < 2.
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
        if every < 1 or n < 2 or batch_size < 1:
            raise ConfigError(
                f"callbacks.quality needs every >= 1, n >= 2, batch_size >= 1, not {every}, {n} and {batch_size}"
            )
        self.sampler, self.clip, self.extractor, self.every, self.n = sampler, clip, extractor, every, n
        self.split, self.batch_size, self.seed, self.share = split, batch_size, seed, share
        self.weights_path, self.cache = weights_path, Path(cache)
        self.label = ""
        self.value: float | None = None
        self._judge: Extractor | None = None
        self._reference: reference.Reference | None = None

    # before the first step ------------------------------------------------------------------------------------------------

    def check(self, data: DataModule) -> None:
        """Refuses, before anything is written, what cannot be: weights that are missing, a set without labels, a full disk."""
        images = data.images(self.split)
        if len(images) < 2:
            raise ConfigError(f"callbacks.quality.split={self.split} holds {len(images)} image(s): write train+val")
        if self.extractor == "inception":
            extractors.weights(self.weights_path)
        elif self.extractor == "classifier":
            classifier.file_of(data.examples("train"), self.cache, "", classifier.Recipe())
        reference.require_space_for(2048, 0, self.cache)  # of Inception, the most

    def prepare(self, data: DataModule, device: torch.device) -> None:
        """Opens the extractor and the reference statistics, which the first process makes where they are missing."""
        shape = (data.channels, data.image_size[0], data.image_size[1])
        if self.extractor == "classifier":
            self._judge = classifier.ClassifierExtractor(classifier.for_dataset(data, self.cache, device))
        else:
            self._judge = extractors.resolve(self.extractor, shape, self.weights_path)
        judge, images = self._judge.to(device), data.images(self.split)
        key = reference.key_of(images, reference.described(data.source), self.split, judge)
        self._reference = reference.reference(images, key, judge, self.cache, features=False)
        self.label = label(judge.distance, self.n)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: DiffusionModule) -> None:  # type: ignore[override]
        self.prepare(trainer.datamodule, pl_module.device)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: DiffusionModule) -> None:  # type: ignore[override]
        cost = self.cost(trainer, pl_module)
        assert self._judge is not None
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
        few = singular(self.n, self._judge.dim)
        if few:
            warnings.warn(f"callbacks.quality: {few}", stacklevel=2)

    def cost(self, trainer: pl.Trainer, module: DiffusionModule) -> Cost:
        """Estimated from one evaluation of the network on a whole batch, and features of a few images."""
        assert self._judge is not None
        judge, data, world = self._judge, trainer.datamodule, trainer.world_size  # type: ignore[attr-defined]
        shape = (data.channels, data.image_size[0], data.image_size[1])
        size = min(self.batch_size, self.n)
        before = peak_memory(module.device)
        with self._evaluated(module) as denoiser:
            index = torch.arange(size, device=module.device)
            x = initial_state(denoiser, shape, index, self.seed)
            condition = module.requested_condition(index)
            forward = _seconds(lambda: denoiser(x, 1.0, **condition), module.device) / size
            images = torch.zeros(TRIAL, *shape, dtype=torch.uint8)
            features = _seconds(lambda: judge(images), module.device) / TRIAL
            evaluations = _evaluations(self.sampler, denoiser, shape)
        memory = peak_memory(module.device) - before + 3 * 8 * judge.dim**2
        seconds = self.n / world * (evaluations * forward + features)
        step = BACKWARD * forward * module.batch_size / world
        return Cost(seconds, memory, seconds / (seconds + self.every * step))

    def _rarer(self, cost: Cost) -> int:
        """Steps between evaluations that take just the share that is allowed, as a round number."""
        wanted = self.every * cost.share / (1 - cost.share) * (1 - self.share) / self.share
        return int(-(-wanted // 100) * 100)

    # while training -------------------------------------------------------------------------------------------------------

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: DiffusionModule, *_: object) -> None:  # type: ignore[override]
        step = trainer.global_step
        stopped = any(isinstance(c, GracefulStop) and c.received is not None for c in trainer.callbacks)  # type: ignore[attr-defined]
        if stopped and trainer.world_size == 1:  # whoever stops a run does not want to wait
            return
        last = step == trainer.max_steps
        parts = trainer.fit_loop.epoch_loop.batch_progress.current.ready % trainer.accumulate_grad_batches
        if not step or parts or not (last or step % self.every == 0):
            return
        begin = time.perf_counter()
        try:
            self._evaluate(trainer, pl_module)
        except (ConfigError, torch.OutOfMemoryError) as error:  # in every process; no reason to end the training
            if trainer.is_global_zero:
                warnings.warn(f"no {self.label} at step {step:,}: {error}", stacklevel=2)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput):
                callback.pause(time.perf_counter() - begin)

    def _evaluate(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        assert self._judge is not None
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
                [self._judge],
                labels=classes(condition),
                processes=Processes(module.device),
            )[self._judge.name]
        distance = frechet_distance(collected.sums.moments(), self._reference.moments)
        self.value = float(torch.tensor(distance, dtype=torch.float32))  # as loggers keep it
        row = {self.label: self.value}
        if collected.confident is not None:
            row[label("confident_fraction", self.n)] = float(collected.confident.sum()) / self.n
        epoch = trainer.global_step * module.batch_size / data.size("train")
        for logger in trainer.loggers:  # Lightning would repeat the figure in every later row, and leave out odd steps
            logger.log_metrics({**row, "epoch": epoch}, step=trainer.global_step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in row.items()})  # for `monitor=`
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoints):
                callback.consider(trainer, self.value, "quality", self.label)

    @contextmanager
    def _evaluated(self, module: DiffusionModule) -> Iterator[Denoiser]:
        """The denoiser of the first average (of the live weights where there is none), in eval mode, without autocast."""
        denoiser = next(iter(module.denoisers().values()))
        with module.evaluating(), torch.no_grad(), torch.autocast(module.device.type, enabled=False):
            yield replace(denoiser, clip=self.clip)


def _seconds(call: object, device: torch.device) -> float:
    """Of the second of two calls."""
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
    """Network evaluations of one run of the sampler, counted on a network that costs nothing."""
    channels = int(getattr(denoiser.network, "out_channels", shape[0]))

    def nothing(x: Tensor, c: Tensor, **condition: Tensor) -> Tensor:
        return torch.zeros(len(x), channels, *x.shape[2:], dtype=x.dtype, device=x.device)

    return generate(replace(denoiser, network=nothing), sampler, shape, batch_of(range(1), None, "cpu")).nfe

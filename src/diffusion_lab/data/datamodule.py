"""LightningDataModule for any `Source`: check the data set against the configuration, split it, and create batches."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray

from diffusion_lab.data.images import Examples, Index, Rows
from diffusion_lab.data.sources import Dataset, Source
from diffusion_lab.data.splits import split
from diffusion_lab.data.stream import BatchStream, EvalBatches
from diffusion_lab.errors import SEEDS, ConfigError, check_number, check_numbers

log = logging.getLogger(__name__)


class DataModule(pl.LightningDataModule):
    """A data set, split and batched. The arguments are the keys of `conf/data/*.yaml`.

    What it does beyond LightningDataModule:

    - Training is one endless stream of global batches without epochs (`BatchStream`), a function of the seed and the step.
      A resumed run calls `start_at`; nothing is stored in the checkpoint, so there is no `state_dict`.
    - Batches are global: one and two processes, and any number of micro-batches, use the same ones. Each rank takes its share
      itself, without a DistributedSampler. World size, rank and micro-batches are those of the attached trainer, or 1, 0 and
      1 without one.
    - Validation and test batches come in order, each example once (`EvalBatches`).
    - `setup` ignores the stage: all splits are opened once and readable without a trainer, by `examples`.

    Args:
        source: the data set.
        channels, image_size, num_classes, num_attributes: C, [H, W], K and A of the model. The images must have C, H and W. If
            K or A is 0, the labels or attributes of the set are not used.
        root: folder of data sets; for the user's images, their folder or file.
        download: download missing files.
        batch_size: of the global batch, over all processes and micro-batches.
        eval_batch_size: of one process.
        flip: mirror training images left to right with probability ½.
        val, test: size of the split as a fraction or a count; null takes the official part of the set.
        split_seed: key of the split, independent of the run's seed.
        stratify: give val and test the class proportions of the set.
        limit: maximum number of training images.
        seed: the run's; key of the order and of flips.

    Raises:
        ConfigError: a number out of range.
    """

    def __init__(
        self,
        source: Source,
        *,
        channels: int,
        image_size: Sequence[int],
        num_classes: int,
        num_attributes: int = 0,
        root: str = "data",
        download: bool = True,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        flip: bool = False,
        val: float | int | None = 0.1,
        test: float | int | None = None,
        split_seed: int = 0,
        stratify: bool = False,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_number("data.channels", channels, "[1, 1024]", whole=True)
        check_numbers("data.image_size", image_size, "[1, 65536]", "[height,width]", whole=True, length=2)
        check_number("data.num_classes", num_classes, "[0, 1000000]", "0 leaves labels unused", whole=True)
        check_number("data.num_attributes", num_attributes, "[0, 100000]", "0 leaves them unused", whole=True)
        check_number("data.batch_size", batch_size, "[1, 1000000]", whole=True)
        check_number("data.eval_batch_size", eval_batch_size, "[1, 1000000]", whole=True)
        for name, amount in (("val", val), ("test", test)):
            interval = "[0, 1)" if isinstance(amount, float) else "[0, 1000000000]"
            check_number(f"data.{name}", amount, interval, "a fraction, or a whole number of images", optional=True)
        check_number("data.limit", limit, "[1, 1000000000]", "training images, null for all", whole=True, optional=True)
        check_number("data.split_seed", split_seed, SEEDS, whole=True)
        check_number("seed", seed, SEEDS, whole=True)
        self.source, self.root, self.download = source, Path(root).expanduser(), download
        self.channels, self.image_size, self.num_classes = channels, list(image_size), num_classes
        self.num_attributes = num_attributes
        self.batch_size, self.eval_batch_size, self.flip = batch_size, eval_batch_size, flip
        self.val, self.test, self.split_seed, self.stratify, self.limit = val, test, split_seed, stratify, limit
        self.seed = seed
        self._start = 0
        self._stream: BatchStream | None = None
        self._dataset: Dataset | None = None
        self._parts: dict[str, Index] = {}

    # --- Opening -------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Download and decode missing files, in one process.

        Raises:
            ConfigError: if this fails, or the data set does not match the configuration.
        """
        self._dataset = self._dataset or self._load()

    def setup(self, stage: str | None = None) -> None:
        """Open and split the data set, in every process. Raises ConfigError as `prepare_data` and `split` do."""
        if self._parts:
            return
        dataset = self._dataset or self._load()
        examples = dataset.examples
        if self.stratify and examples.labels is None:
            raise ConfigError("data.stratify=true needs labels, but the data set has none: write data.stratify=false")
        parts = split(
            len(examples),
            val=self.val,
            test=self.test,
            official=dataset.official,
            seed=self.split_seed,
            labels=examples.labels if self.stratify else None,
            limit=self.limit,
        )
        self._dataset, self._parts = self._drop_unused(dataset), {**parts, "all": np.arange(len(examples))}

    def _load(self) -> Dataset:
        height, width = self.image_size
        expected = (self.channels, height, width)
        dataset = self.source.load(self.root, expected, download=self.download)
        shape, name = dataset.examples.images.shape[1:], type(self.source).__name__
        if shape != expected:
            raise ConfigError(
                f"{name} has {shape[0]} channel(s) of {shape[1]}×{shape[2]}, but data.channels={expected[0]} and "
                f"data.image_size=[{height},{width}]: write data.channels={shape[0]} data.image_size=[{shape[1]},{shape[2]}]"
            )
        _check_count(name, "num_classes", self.num_classes, len(dataset.class_names))
        _check_count(name, "num_attributes", self.num_attributes, len(dataset.attribute_names))
        return dataset

    def _drop_unused(self, dataset: Dataset) -> Dataset:
        """Remove labels and attributes that the configuration does not use."""
        examples = dataset.examples
        if not self.num_classes:
            dataset, examples = replace(dataset, class_names=()), replace(examples, labels=None)
        if not self.num_attributes:
            dataset, examples = replace(dataset, attribute_names=()), replace(examples, attributes=None)
        return replace(dataset, examples=examples)

    # --- Contents ------------------------------------------------------------------------------------------------------

    @property
    def dataset(self) -> Dataset:
        """The complete data set. It is opened if `setup` was not called yet."""
        self.setup()
        assert self._dataset is not None
        return self._dataset

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; empty without labels."""
        return self.dataset.class_names

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Names of the attributes; empty without attributes."""
        return self.dataset.attribute_names

    def examples(self, split: str) -> Examples:
        """Return the examples of "train", "val", "test", "all", or of a union such as "train+val" (the published training set).

        Raises:
            ConfigError: if the split does not exist.
        """
        dataset, names = self.dataset, split.split("+")
        if not self._parts.keys() >= set(names):
            raise ConfigError(
                f"split={split} is unknown: write one of {', '.join(self._parts)}, or a union such as train+val"
            )
        return dataset.examples.select(np.unique(np.concatenate([self._parts[name] for name in names])))

    def size(self, split: str) -> int:
        """Return the number of images of a split."""
        return len(self.examples(split))

    def images(self, split: str) -> NDArray[np.uint8] | Rows:
        """Return the images of a split, uint8 (N, C, H, W). They are read when they are indexed."""
        return self.examples(split).images

    def labels(self, split: str) -> Index | None:
        """Return the labels of a split, int64 (N,), or None."""
        return self.examples(split).labels

    # --- Batches -------------------------------------------------------------------------------------------------------

    def start_at(self, step: int) -> None:
        """Start the training stream at an optimizer step. An existing stream starts there in its next iteration."""
        self._start = step
        if self._stream is not None:
            self._stream.start_step = step

    def train_dataloader(self) -> BatchStream:
        """Return the endless stream of this process. Raises ConfigError if the batch size is not divisible."""
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        self._stream = BatchStream(
            self.examples("train"),
            self.batch_size,
            seed=self.seed,
            accumulate=accumulate,
            repeat=0 if self.trainer is None else int(self.trainer.overfit_batches) // accumulate,  # type: ignore[attr-defined]
            start_step=self._start,
            flip=self.flip,
            **self._process(),
        )
        return self._stream

    def val_dataloader(self) -> EvalBatches:
        """Return this process's share of the validation split, in order."""
        return EvalBatches(self.examples("val"), self.eval_batch_size, **self._process())

    def test_dataloader(self) -> EvalBatches:
        """Return this process's share of the test split, in order."""
        return EvalBatches(self.examples("test"), self.eval_batch_size, **self._process())

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """Move a batch to a device, except the keys of the noise: times are computed on the host, without synchronization."""
        keys = {name: batch[name] for name in ("position", "index") if name in batch}
        return {**super().transfer_batch_to_device(batch, device, dataloader_idx), **keys}

    def _process(self) -> dict[str, Any]:
        if self.trainer is None:
            return {"world_size": 1, "rank": 0, "pin_memory": False}
        on_gpu = self.trainer.strategy.root_device.type == "cuda"
        return {"world_size": self.trainer.world_size, "rank": self.trainer.global_rank, "pin_memory": on_gpu}


def _check_count(name: str, key: str, configured: int, actual: int) -> None:
    if configured == 0 and actual:
        log.info("%s has data.%s=%d, which data.%s=0 does not use", name, key, actual, key)
    if configured not in (0, actual):
        hint = "" if actual else " (for labels, put the images of each class into a separate folder)"
        raise ConfigError(f"data.{key}={configured}, but {name} has {actual}: write data.{key}={actual}{hint}")

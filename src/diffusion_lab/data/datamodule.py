"""The LightningDataModule over any `Source`: compares it with what was configured, splits it, hands out batches."""

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
from diffusion_lab.errors import ConfigError

log = logging.getLogger(__name__)


class DataModule(pl.LightningDataModule):
    """A data set, split and batched. The arguments are the keys of `conf/data/*.yaml`.

    Training is one endless stream of global batches (`BatchStream`), set to where a run continues by `start_at`; it is a
    function of the seed and the step, so no state is saved. Batches for validation and testing come in order (`EvalBatches`).
    Process count, rank and micro-batches are the attached trainer's, else 1, 0 and 1.

    Args:
        source: where the images come from.
        channels, image_size, num_classes, num_attributes: what the model is built for: C, [H, W], K, A. A K or A of 0 leaves
            the labels or attributes of the set unused.
        root: the folder of data sets; for one's own images, these.
        download: fetch missing files.
        batch_size: global: of all processes and micro-batches together.
        eval_batch_size: of one process.
        flip: mirror training images left to right with probability ½.
        val, test: a fraction, a count, or null for the official part of the set.
        split_seed: key of the split; it is not the run's seed.
        stratify: give each class its share of val and test.
        limit: train on only so many images.
        seed: the run's; keys order and flips.
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
        if len(image_size) != 2:
            raise ConfigError(f"data.image_size={list(image_size)}: write [height,width]")
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
        """Downloads and decodes what is missing, in one process. ValueError: it cannot, or the set is not as configured."""
        self._dataset = self._dataset or self._load()

    def setup(self, stage: str | None = None) -> None:
        """Opens and splits the set, in every process. ValueError: as `prepare_data`, or the split leaves nothing to train on."""
        if self._parts:
            return
        dataset = self._dataset or self._load()
        examples = dataset.examples
        if self.stratify and examples.labels is None:
            raise ConfigError("data.stratify=true needs labels, and the set has none: write data.stratify=false")
        parts = split(
            len(examples),
            val=self.val,
            test=self.test,
            official=dataset.official,
            seed=self.split_seed,
            labels=examples.labels if self.stratify else None,
            limit=self.limit,
        )
        self._dataset, self._parts = self._used(dataset), {**parts, "all": np.arange(len(examples))}

    def _load(self) -> Dataset:
        height, width = self.image_size
        stated = (self.channels, height, width)
        dataset = self.source.load(self.root, stated, download=self.download)
        shape, name = dataset.examples.images.shape[1:], type(self.source).__name__
        if shape != stated:
            raise ConfigError(
                f"{name} holds {shape[0]} channel(s) of {shape[1]}×{shape[2]}, configured are {stated[0]} of {height}×{width}: "
                f"write data.channels={shape[0]} data.image_size=[{shape[1]},{shape[2]}]"
            )
        _check_count(name, "num_classes", self.num_classes, len(dataset.class_names))
        _check_count(name, "num_attributes", self.num_attributes, len(dataset.attribute_names))
        return dataset

    def _used(self, dataset: Dataset) -> Dataset:
        """Without the labels or attributes that the configuration leaves unused."""
        examples = dataset.examples
        if not self.num_classes:
            dataset, examples = replace(dataset, class_names=()), replace(examples, labels=None)
        if not self.num_attributes:
            dataset, examples = replace(dataset, attribute_names=()), replace(examples, attributes=None)
        return replace(dataset, examples=examples)

    # --- What it holds -------------------------------------------------------------------------------------------------

    @property
    def dataset(self) -> Dataset:
        """Everything, unsplit; opened if `setup` was not called yet."""
        self.setup()
        assert self._dataset is not None
        return self._dataset

    @property
    def class_names(self) -> tuple[str, ...]:
        """A name a class; empty without labels."""
        return self.dataset.class_names

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """A name an attribute; empty without."""
        return self.dataset.attribute_names

    def examples(self, split: str) -> Examples:
        """The examples of train, val, test, all, or a sum such as "train+val" (the published training set, uncut)."""
        dataset, names = self.dataset, split.split("+")
        if not self._parts.keys() >= set(names):
            raise ConfigError(
                f"split={split}: write one of {', '.join(self._parts)}, or a sum of them such as train+val"
            )
        return dataset.examples.select(np.unique(np.concatenate([self._parts[name] for name in names])))

    def size(self, split: str) -> int:
        """How many images a split has."""
        return len(self.examples(split))

    def images(self, split: str) -> NDArray[np.uint8] | Rows:
        """The images of a split, uint8 (N, C, H, W), read where they are indexed."""
        return self.examples(split).images

    def labels(self, split: str) -> Index | None:
        """The labels of a split, int64 (N,), or None."""
        return self.examples(split).labels

    # --- Batches -------------------------------------------------------------------------------------------------------

    def start_at(self, step: int) -> None:
        """Lets the training stream start at an optimiser step, also one that exists already (from its next iteration on)."""
        self._start = step
        if self._stream is not None:
            self._stream.start_step = step

    def train_dataloader(self) -> BatchStream:
        """The endless stream of this process. ValueError: the batch size does not divide into processes and micro-batches."""
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
        """The validation split in order, this process's share."""
        return EvalBatches(self.examples("val"), self.eval_batch_size, **self._process())

    def test_dataloader(self) -> EvalBatches:
        """The test split in order, this process's share."""
        return EvalBatches(self.examples("test"), self.eval_batch_size, **self._process())

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """Keys stay on the host, where times and coefficients are computed without waiting for the device."""
        keys = {name: batch[name] for name in ("position", "index") if name in batch}
        return {**super().transfer_batch_to_device(batch, device, dataloader_idx), **keys}

    def _process(self) -> dict[str, Any]:
        if self.trainer is None:
            return {"world_size": 1, "rank": 0, "pin_memory": False}
        on_gpu = self.trainer.strategy.root_device.type == "cuda"
        return {"world_size": self.trainer.world_size, "rank": self.trainer.global_rank, "pin_memory": on_gpu}


def _check_count(name: str, key: str, stated: int, found: int) -> None:
    if stated == 0 and found:
        log.info("%s offers data.%s=%d, data.%s=0 leaves them unused", name, key, found, key)
    if stated not in (0, found):
        hint = "" if found else " (for classes of your own, put every image into a folder of its class)"
        raise ConfigError(f"data.{key}={stated}, but {name} has {found}: write data.{key}={found}{hint}")

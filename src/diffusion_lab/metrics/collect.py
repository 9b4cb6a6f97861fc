"""Collect features of images in several processes. Each image is processed by exactly one rank, and sums are reduced once."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor, distributed

from diffusion_lab.data.images import refuse_nan
from diffusion_lab.data.pictures import to_uint8
from diffusion_lab.errors import ConfigError
from diffusion_lab.io import progress_bar
from diffusion_lab.metrics.classifier import CONFIDENT
from diffusion_lab.metrics.extractors import Extractor
from diffusion_lab.metrics.moments import Sums
from diffusion_lab.metrics.scores import MOST

T = TypeVar("T")


class Processes:
    """Collective operations over the processes of torch.distributed, or a single process if it is not initialized.

    Args:
        device: device of the reductions. NCCL needs GPUs.
        shared: if false, this process works without the others, also in a distributed run.

    Attributes:
        rank, world: rank of this process, and number of processes.
    """

    def __init__(self, device: torch.device | str = "cpu", shared: bool = True) -> None:
        shared = shared and distributed.is_available() and distributed.is_initialized()
        self.rank, self.world = (distributed.get_rank(), distributed.get_world_size()) if shared else (0, 1)
        self.device = torch.device(device)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes, on the CPU, in every process."""
        if self.world > 1:
            tensor = tensor.to(self.device)
            distributed.all_reduce(tensor)
        return tensor.cpu()

    def gather(self, tensor: Tensor | None) -> list[Tensor]:
        """Return the tensors of all processes, except None, in the order of ranks on rank 0. Other ranks return an empty list."""
        if self.world == 1:
            return [] if tensor is None else [tensor]
        parts: list[Any] | None = [None] * self.world if self.rank == 0 else None
        distributed.gather_object(None if tensor is None else tensor.cpu(), parts, dst=0)
        return [part for part in parts or [] if part is not None]

    def first(self, make: Callable[[], Any]) -> Any:
        """Call `make` on rank 0, and return its result or raise its exception in every process."""
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = make()
            except Exception as error:
                outcome[1] = error
        if self.world > 1:
            distributed.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def build(self, make: Callable[[], T]) -> T:
        """Call `make` in every process, first on rank 0, so that the other processes can load the files that it writes.

        An exception in one process is raised in all processes.
        """
        results: list[T] = []
        for turn in (True, False):
            error: Exception | None = None
            if (self.rank == 0) == turn:
                try:
                    results.append(make())
                except Exception as raised:
                    error = raised
            self.agree(error)
        return results[0]

    def agree(self, error: Exception | None) -> None:
        """Raise the exception of the lowest rank in every process, so that no process waits for one that has failed."""
        errors: list[Any] = [error]
        if self.world > 1:
            errors = [None] * self.world
            distributed.all_gather_object(errors, error)
        for each in errors:
            if each is not None:
                raise each


def blocks(n: int, size: int, rank: int = 0, world: int = 1) -> Iterator[range]:
    """Yield the blocks of `size` images out of 0 … n − 1 that this rank processes. Block b is processed by rank b mod `world`.

    The blocks do not depend on the number of processes.

    Raises:
        ConfigError: if size < 1.
    """
    return (block for block in rounds(n, size, rank, world) if len(block))


def rounds(n: int, size: int, rank: int = 0, world: int = 1) -> Iterator[range]:
    """Yield `blocks`, and an empty range if this rank has one block fewer than others: all ranks yield the same number."""
    if size < 1:
        raise ConfigError(f"batch_size={size}: write at least 1")
    for first in range(0, n, world * size):
        start = min(first + rank * size, n)
        yield range(start, min(start + size, n))


@dataclass
class Collected:
    """Features of n images by one extractor.

    Attributes:
        n: number of images.
        sums: sums of the features.
        features: features of the first `kept` images, in order, or None.
        logits: logits of all images, in order, or None.
        confident: for each class, the number of images with a probability of at least 0.9; None without class logits.
        label_hits: number of images whose most probable class is the requested one; None without class logits or labels.
    """

    n: int
    sums: Sums
    features: Float[Tensor, "kept d"] | None = None
    logits: Float[Tensor, "n k"] | None = None
    confident: Float64[Tensor, "k"] | None = None
    label_hits: int | None = None


def collect(
    images: Callable[[range], Shaped[Tensor, "b c h w"]],
    n: int,
    size: int,
    extractors: Sequence[Extractor],
    *,
    features: Collection[str] = (),
    logits: Collection[str] = (),
    labels: Int64[Tensor, "n"] | None = None,
    feed: Callable[[Tensor], None] | None = None,
    processes: Processes | None = None,
    progress: str = "",
) -> dict[str, Collected]:
    """Sum the features of n images for every extractor. Each image is generated and processed by exactly one rank.

    Args:
        images: function that returns the images of a block, uint8, or float in [−1, 1].
        n: number of images, at least 2.
        size: number of images per block. Memory does not depend on n unless features or logits are kept.
        extractors: the extractors, on their devices.
        features: names of the extractors for which the features of the first 10,000 images are kept.
        logits: names of the extractors for which the logits of all images are kept.
        labels: the requested classes, or None.
        feed: called on rank 0 with every block as uint8, in the order of the images. Either all processes or none must pass it.
        processes: the processes that share the images; None for all processes of torch.distributed.
        progress: description of the progress bar; empty for no progress bar.

    Returns:
        The results by the name of the extractor, equal in every process.

    Raises:
        ConfigError: in every process, if there are fewer than 2 images, or pixels or features contain NaN or Inf.
    """
    processes = processes or Processes()
    if n < 2:
        raise ConfigError(f"n={n}: a distance needs at least 2 images")
    tallies = {e.name: _Tally(e, n, min(n, MOST) if e.name in features else 0, e.name in logits) for e in extractors}
    error: Exception | None = None
    with progress_bar(n, progress, "image", bool(progress) and processes.rank == 0) as bar:
        for block in rounds(n, size, processes.rank, processes.world):
            batch: Tensor | None = None
            try:
                if len(block) and error is None:
                    batch = images(block)
                    if batch.is_floating_point():
                        refuse_nan(batch, block.start, "the pixels")
                        batch = to_uint8(batch)
                    for tally in tallies.values():
                        tally.add(batch, block, None if labels is None else labels[block.start : block.stop])
                    bar.update(min(len(block) * processes.world, n - bar.n))
            except Exception as raised:  # raised in `agree`, since the other processes would wait for this one
                error = raised
            if feed is not None:  # a collective operation, which every process must call in every round
                processes.agree(error)
                try:
                    for part in processes.gather(batch):
                        feed(part)
                except Exception as raised:
                    error = raised
            elif error is not None:
                break
    processes.agree(error)
    return {name: tally.reduce(processes) for name, tally in tallies.items()}


def classes(condition: Mapping[str, Tensor]) -> Tensor | None:
    """Return the requested classes, int64 (n,), if the condition has integer labels, else None."""
    label = condition.get("label")
    return None if label is None or label.is_floating_point() else label


class _Tally:
    """Running sums of one extractor in one process, in float64. They are reduced once at the end."""

    def __init__(self, extractor: Extractor, n: int, features: int, logits: bool) -> None:
        self.extractor, self.n = extractor, n
        self.sums = Sums(extractor.dim, extractor.device)
        self.features = torch.zeros(features, extractor.dim)
        self.logits = torch.zeros(n if logits else 0, extractor.classes)
        self.class_counts = torch.zeros(extractor.classes + 2, dtype=torch.float64)  # as `_class_counts`

    def add(self, images: Tensor, block: range, labels: Tensor | None) -> None:
        features, logits = self.extractor(images)
        refuse_nan(features, block.start)
        self.sums.add(features)
        stop = min(block.stop, len(self.features))
        if block.start < stop:
            self.features[block.start : stop] = features[: stop - block.start].cpu()
        if logits is not None and len(self.logits):
            self.logits[block.start : block.stop] = logits.cpu()
        if logits is not None and self.extractor.has_class_logits:
            self.class_counts += _class_counts(logits.cpu(), labels)

    def reduce(self, processes: Processes) -> Collected:
        """Return the result of all processes. Each kept row is nonzero in one process, so that its sum is exact."""
        self.sums.vector = processes.sum(self.sums.vector)
        features = processes.sum(self.features) if len(self.features) else None
        logits = processes.sum(self.logits) if len(self.logits) else None
        if not self.extractor.has_class_logits:
            return Collected(self.n, self.sums, features, logits)
        confident, hits, labeled = processes.sum(self.class_counts).split([self.extractor.classes, 1, 1])
        return Collected(self.n, self.sums, features, logits, confident, int(hits) if labeled else None)


def _class_counts(logits: Float[Tensor, "b k"], labels: Int64[Tensor, "b"] | None) -> Float64[Tensor, "k+2"]:
    """Return the number of confidently classified images of each class, of images in the requested class, and of labels."""
    probability, predicted = logits.softmax(1).max(1)
    confident = torch.bincount(predicted[probability >= CONFIDENT], minlength=logits.shape[1])
    hits = torch.tensor([0, 0] if labels is None else [int((predicted == labels).sum()), len(labels)])
    return torch.cat([confident, hits]).double()

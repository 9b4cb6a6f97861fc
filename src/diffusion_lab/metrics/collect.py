"""Features of all images: each is processed by exactly one rank; running sums with one reduction at the end."""

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
    """Reductions over the processes of torch.distributed where it is initialized; else this process is the only one.

    Args:
        device: of the reductions; NCCL reduces on GPUs only.
        shared: false for work of one process alone, in a distributed run too.

    Attributes:
        rank, world: number of this process, number of processes.
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
        """Return the tensors of all processes by rank, on rank 0; an empty list on other ranks. None is left out."""
        if self.world == 1:
            return [] if tensor is None else [tensor]
        parts: list[Any] | None = [None] * self.world if self.rank == 0 else None
        distributed.gather_object(None if tensor is None else tensor.cpu(), parts, dst=0)
        return [part for part in parts or [] if part is not None]

    def first(self, make: Callable[[], Any]) -> Any:
        """Call `make` on rank 0; return its result, or raise its exception, in every process."""
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
        """Return make() of every process, called on rank 0 first, so that the others can load the files that it writes.

        An exception of one process is raised in all.
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
        """Raise the exception of the lowest rank in every process; no process waits for one that has failed."""
        errors: list[Any] = [error]
        if self.world > 1:
            errors = [None] * self.world
            distributed.all_gather_object(errors, error)
        for each in errors:
            if each is not None:
                raise each


def blocks(n: int, size: int, rank: int = 0, world: int = 1) -> Iterator[range]:
    """Yield this rank's blocks of `size` of the images 0 … n − 1: block b belongs to rank b mod `world`.

    The blocks do not depend on the number of processes: an image is in the same batch always.

    Raises:
        ConfigError: size < 1.
    """
    return (block for block in rounds(n, size, rank, world) if len(block))


def rounds(n: int, size: int, rank: int = 0, world: int = 1) -> Iterator[range]:
    """As `blocks`, but with an empty range in the last round where no block is left: all ranks have equally many rounds."""
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
        sums: of the features.
        features: of the first `kept` images, in order; None where not kept.
        logits: of all images, in order; None where not kept.
        confident: number of images of each class with a probability of at least 0.9; None without class logits.
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
    """Sum up the features of n images in every extractor. Each image is made and processed by exactly one rank.

    Args:
        images: block → its images, uint8, or float in [−1, 1].
        n: number of images.
        size: images of a block; memory does not depend on n unless features or logits are kept.
        extractors: on their devices.
        features: names of the extractors whose features are kept, of the first 10,000 images.
        logits: names of the extractors whose logits are kept, of all images.
        labels: the requested classes.
        feed: called on rank 0 with every block as uint8, in the order of the images. All processes pass it, or none does.
        processes: that share the images; None is all of torch.distributed.
        progress: description of the progress bar; none if empty.

    Returns:
        Name of the extractor → result, the same in every process.

    Raises:
        ConfigError: fewer than 2 images; NaN or Inf in pixels or features, raised in every process.
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
            except Exception as raised:  # defects too: the other processes would wait for this one
                error = raised
            if feed is not None:  # collective: every process takes part in every round
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
    """Return the requested classes, int64 (n,), of a condition by label, else None."""
    label = condition.get("label")
    return None if label is None or label.is_floating_point() else label


class _Tally:
    """Running sums of one extractor in one process: float64, reduced once at the end, so that nothing is rounded on the way."""

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
        """Return the result of all processes. Kept rows are zero in all processes but one, so that their sum is exact."""
        self.sums.vector = processes.sum(self.sums.vector)
        features = processes.sum(self.features) if len(self.features) else None
        logits = processes.sum(self.logits) if len(self.logits) else None
        if not self.extractor.has_class_logits:
            return Collected(self.n, self.sums, features, logits)
        confident, hits, labeled = processes.sum(self.class_counts).split([self.extractor.classes, 1, 1])
        return Collected(self.n, self.sums, features, logits, confident, int(hits) if labeled else None)


def _class_counts(logits: Float[Tensor, "b k"], labels: Int64[Tensor, "b"] | None) -> Float64[Tensor, "k+2"]:
    """Return the number of confidently classified images of each class, of images in the requested class, of labels."""
    probability, predicted = logits.softmax(1).max(1)
    confident = torch.bincount(predicted[probability >= CONFIDENT], minlength=logits.shape[1])
    hits = torch.tensor([0, 0] if labels is None else [int((predicted == labels).sum()), len(labels)])
    return torch.cat([confident, hits]).double()

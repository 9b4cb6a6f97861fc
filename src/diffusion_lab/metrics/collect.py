"""Every image once, whoever shares the work: blocks of images to processes, running sums, one reduction at the end."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
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
    """Those that share the work: torch.distributed's where it runs, else this one alone.

    Args:
        device: where tensors are reduced: NCCL reduces on GPUs only.
        shared: false for work that one process does by itself.

    Attributes:
        rank, world: this process's number, and how many there are.
    """

    def __init__(self, device: torch.device | str = "cpu", shared: bool = True) -> None:
        shared = shared and distributed.is_available() and distributed.is_initialized()
        self.rank, self.world = (distributed.get_rank(), distributed.get_world_size()) if shared else (0, 1)
        self.device = torch.device(device)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in each of them."""
        if self.world > 1:
            tensor = tensor.to(self.device)
            distributed.all_reduce(tensor)
        return tensor.cpu()

    def gather(self, tensor: Tensor | None) -> list[Tensor]:
        """The tensors of all processes in the order of their ranks, on rank 0; an empty list elsewhere. None adds nothing."""
        if self.world == 1:
            return [] if tensor is None else [tensor]
        parts: list[Any] | None = [None] * self.world if self.rank == 0 else None
        distributed.gather_object(None if tensor is None else tensor.cpu(), parts, dst=0)
        return [part for part in parts or [] if part is not None]

    def first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on rank 0, in every process; what it raises there is raised in every process."""
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
        """Return make() of every process: on rank 0 first, so that the others find the files that it makes.

        What one process raises is raised in all.
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
        """Raises everywhere what one process met, so that none waits for another that is gone."""
        met: list[Any] = [error]
        if self.world > 1:
            met = [None] * self.world
            distributed.all_gather_object(met, error)
        for found in met:
            if found is not None:
                raise found


def blocks(n: int, size: int, rank: int = 0, world: int = 1) -> Iterator[range]:
    """This process's blocks of the images 0 … n − 1: the b-th block of `size` images is that of process b mod `world`.

    The blocks are the same however many processes there are, so that every image meets the same neighbours in a batch.

    Raises:
        ValueError: size < 1.
    """
    return (block for block in rounds(n, size, rank, world) if len(block))


def rounds(n: int, size: int, rank: int = 0, world: int = 1) -> Iterator[range]:
    """As `blocks`, with an empty range in the last round where none is left for this process: all have equally many rounds."""
    if size < 1:
        raise ConfigError(f"batch_size={size}: write at least 1")
    for first in range(0, n, world * size):
        start = min(first + rank * size, n)
        yield range(start, min(start + size, n))


@dataclass
class Collected:
    """What n images gave in one extractor's features.

    sums: of the features.
    features, logits: float32 (kept, D) and (n, K) of the images in order, where they were asked for.
    confident: float64 (K,), images that the classifier assigns to each class with confidence; None for other extractors.
    label_hits: images that it assigns to the requested class; None without labels.
    """

    n: int
    sums: Sums
    features: Tensor | None = None
    logits: Tensor | None = None
    confident: Tensor | None = None
    label_hits: int | None = None


def collect(
    images: Callable[[range], Tensor],
    n: int,
    size: int,
    extractors: Sequence[Extractor],
    *,
    features: Collection[str] = (),
    logits: Collection[str] = (),
    labels: Tensor | None = None,
    feed: Callable[[Tensor], None] | None = None,
    processes: Processes | None = None,
    progress: str = "",
) -> dict[str, Collected]:
    """The features of n images, each made and measured by one process, in every extractor.

    Args:
        images: gives the images of a block: uint8, or float in [−1, 1] that must be finite, (b, C, H, W).
        n: how many.
        size: images of a block; memory does not depend on n unless features or logits are kept.
        extractors: on the device where they work.
        features: names of the extractors whose features are kept, of the first 10,000 images.
        logits: names of the extractors whose logits are kept, of all.
        labels: int64 (n,), the classes that were asked for.
        feed: on rank 0 it receives every block as uint8, in the order of the images; all processes pass one, or none does.
        processes: those that share the work.
        progress: what a bar says; none if empty.

    Returns:
        Extractor's name → the same in every process.

    Raises:
        ValueError: fewer than 2 images, NaN (in every process, whichever met it), or what `images` raises.
    """
    processes = processes or Processes()
    if n < 2:
        raise ConfigError(f"n={n}: a distance needs at least 2 images")
    tallies = {e.name: _Tally(e, n, min(n, MOST) if e.name in features else 0, e.name in logits) for e in extractors}
    error: Exception | None = None
    with progress_bar(n, progress, "image", bool(progress) and processes.rank == 0) as bar:
        for block in rounds(n, size, processes.rank, processes.world):
            made = None
            try:
                if len(block) and error is None:
                    made = images(block)
                    if made.is_floating_point():
                        refuse_nan(made, block.start, "the pixels")
                        made = to_uint8(made)
                    for tally in tallies.values():
                        tally.add(made, block, None if labels is None else labels[block.start : block.stop])
                    bar.update(min(len(block) * processes.world, n - bar.n))
            except Exception as met:  # a defect too: or the other processes would wait for this one
                error = met
            if feed is not None:  # every process takes part in every round
                processes.agree(error)
                try:
                    for part in processes.gather(made):
                        feed(part)
                except Exception as met:
                    error = met
            elif error is not None:
                break
    processes.agree(error)
    return {name: tally.reduced(processes) for name, tally in tallies.items()}


def classes(condition: Mapping[str, Tensor]) -> Tensor | None:
    """The classes that a condition asks for, int64 (n,), where it does."""
    label = condition.get("label")
    return None if label is None or label.is_floating_point() else label


class _Tally:
    """Running sums of one extractor in one process."""

    def __init__(self, extractor: Extractor, n: int, features: int, logits: bool) -> None:
        self.extractor, self.n = extractor, n
        self.sums = Sums(extractor.dim, extractor.device)
        self.features = torch.zeros(features, extractor.dim)
        self.logits = torch.zeros(n if logits else 0, extractor.classes)
        self.judged = torch.zeros(extractor.classes + 2, dtype=torch.float64)  # recognised by class, as asked, asked

    def add(self, images: Tensor, block: range, labels: Tensor | None) -> None:
        found = self.extractor(images)
        refuse_nan(found.features, block.start)
        self.sums.add(found.features)
        stop = min(block.stop, len(self.features))
        if block.start < stop:
            self.features[block.start : stop] = found.features[: stop - block.start].cpu()
        if found.logits is not None and len(self.logits):
            self.logits[block.start : block.stop] = found.logits.cpu()
        if found.logits is not None and self.extractor.has_class_logits:
            self.judged += _judged(found.logits.cpu(), labels)

    def reduced(self, processes: Processes) -> Collected:
        """Of all processes. Each adds its rows to zeros, so that sums of features are exact."""
        self.sums.vector = processes.sum(self.sums.vector)
        features = processes.sum(self.features) if len(self.features) else None
        logits = processes.sum(self.logits) if len(self.logits) else None
        if not self.extractor.has_class_logits:
            return Collected(self.n, self.sums, features, logits)
        judged = processes.sum(self.judged)
        return Collected(self.n, self.sums, features, logits, judged[:-2], int(judged[-2]) if judged[-1] else None)


def _judged(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Of a batch, float64 (K + 2,): how many are recognised as each class, are what was asked for, were asked for a class."""
    confidence, classes = logits.softmax(1).max(1)
    sure = torch.bincount(classes[confidence >= CONFIDENT], minlength=logits.shape[1])
    right = torch.tensor([0, 0] if labels is None else [int((classes == labels).sum()), len(labels)])
    return torch.cat([sure, right]).double()

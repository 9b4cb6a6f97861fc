"""Batches of examples: an endless stream of global batches for training, and finite ordered loaders for evaluation.

Both replace torch's DataLoader and samplers. The images of a batch are a function of the arguments and the step, without the
state of a sampler or worker. A resumed run, and a run with another number of processes, uses the same global batches.
"""

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_lab import noise
from diffusion_lab.data.images import Examples, Index
from diffusion_lab.errors import SEEDS, ConfigError, check_number


class BatchStream:
    """An endless iterable over training batches, without epochs.

    What it does beyond DataLoader with DistributedSampler:

    - Keyed order. Position j of the global batch of step s holds example π_e[p mod N], p = s·B + j, e = ⌊p/N⌋, where π_e is
      the permutation keyed by (seed, e). Epochs follow each other without a gap: a batch may span two, none is dropped or padded.
    - Exact resume. Iteration starts at any step in constant time; no random state and no position is saved.
    - Several processes. Micro-batch m of A on rank r of W takes the positions m·W + r + k·W·A, k = 0, 1, …, of the same global
      batch, whatever W and A are. The stride distributes stratified times evenly over all micro-batches.

    Args:
        examples: the training split, N examples.
        batch_size: B, of the global batch.
        seed: the run's.
        world_size, rank: W and r.
        accumulate: A, micro-batches per optimizer step.
        start_step: first step of the next iteration; may be assigned between iterations.
        flip: mirror an example left to right with probability ½, keyed by (seed, step, position).
        pin_memory: page-locked tensors, for asynchronous copies to a GPU.
        repeat: repeat the images of the first `repeat` steps, with new noise (to overfit them); 0 uses all images.

    Raises:
        ConfigError: no examples, a number out of range, or B is not a multiple of W·A.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        *,
        seed: int,
        world_size: int = 1,
        rank: int = 0,
        accumulate: int = 1,
        start_step: int = 0,
        flip: bool = False,
        pin_memory: bool = False,
        repeat: int = 0,
    ) -> None:
        if len(examples) == 0:
            raise ConfigError("the training split is empty: write smaller data.val= and data.test=, or add images")
        check_number("data.batch_size", batch_size, "[1, 1000000]", whole=True)
        check_number("seed", seed, SEEDS, whole=True)
        check_number("world_size", world_size, "[1, 1000000]", whole=True)
        check_number("rank", rank, f"[0, {world_size})", whole=True)
        check_number("trainer.accumulate_grad_batches", accumulate, "[1, 1000000]", whole=True)
        check_number("start_step", start_step, "[0, 4294967295]", whole=True)
        check_number("repeat", repeat, "[0, 1000000]", whole=True)
        shares = world_size * accumulate
        if batch_size % shares:
            near = max(round(batch_size / shares), 1) * shares
            raise ConfigError(
                f"the global data.batch_size={batch_size} is not divisible by {world_size} process(es) × {accumulate} "
                f"micro-batch(es): write data.batch_size={near}, or change trainer.devices or trainer.accumulate_grad_batches"
            )
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.world_size, self.rank, self.accumulate = world_size, rank, accumulate
        self.start_step, self.flip, self.pin_memory = start_step, flip, pin_memory
        self.repeat = repeat
        self._orders: dict[int, Index] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for step in count(self.start_step):
            for micro in range(self.accumulate):
                yield self.batch(step, micro)

    def batch(self, step: int, micro: int = 0) -> dict[str, Any]:
        """Return this rank's micro-batch of a step, b = B/(W·A) examples.

        Returns:
            "image" float32 (b, C, H, W) in [−1, 1]; "label" int64 (b,) and "attributes" float32 (b, A) if they exist; "position"
            int64 (b,), positions in the global batch; "step", an int.
        """
        position = np.arange(micro * self.world_size + self.rank, self.batch_size, self.world_size * self.accumulate)
        image_step = step % self.repeat if self.repeat else step
        epoch, offset = np.divmod(image_step * self.batch_size + position, len(self.examples))
        index = np.empty_like(offset)
        for e in np.unique(epoch):
            index[epoch == e] = self._order(int(e))[offset[epoch == e]]
        key, flip = torch.from_numpy(position), None
        if self.flip:
            flip = (noise.uniform((), seed=self.seed, index=key, draw=step, stream=noise.Stream.FLIP) < 0.5).numpy()
        batch: dict[str, Any] = {**self.examples.take(index, flip), "position": key}
        return {**_pinned(batch, self.pin_memory), "step": step}

    def _order(self, epoch: int) -> Index:
        if epoch not in self._orders:
            if len(self._orders) > 1:  # a global batch contains examples of at most two epochs, unless N < B
                del self._orders[min(self._orders)]
            self._orders[epoch] = noise.permutation(len(self.examples), seed=self.seed, draw=epoch).numpy()
        return self._orders[epoch]


class EvalBatches:
    """A finite iterable in order: rank r of W gets the examples r, r + W, r + 2W, …

    Each example is evaluated exactly once; DistributedSampler repeats some so that all ranks get equally many. Yields "image",
    "label" and "attributes" as `BatchStream` does, and "index" int64 (b,), positions in the split, which key the noise of
    the evaluation. Ranks may differ by one in their number of batches: reduce over processes after the last batch.

    Args:
        examples: the split.
        batch_size: of one process.
        world_size, rank: W and r.
        pin_memory: page-locked tensors.

    Raises:
        ConfigError: a number out of range.
    """

    def __init__(
        self, examples: Examples, batch_size: int, *, world_size: int = 1, rank: int = 0, pin_memory: bool = False
    ) -> None:
        check_number("data.eval_batch_size", batch_size, "[1, 1000000]", whole=True)
        check_number("world_size", world_size, "[1, 1000000]", whole=True)
        check_number("rank", rank, f"[0, {world_size})", whole=True)
        self.examples, self.batch_size, self.pin_memory = examples, batch_size, pin_memory
        self.index = np.arange(rank, len(examples), world_size)

    def __len__(self) -> int:
        return -(-len(self.index) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.index), self.batch_size):
            index = self.index[start : start + self.batch_size]
            yield _pinned({**self.examples.take(index), "index": torch.from_numpy(index)}, self.pin_memory)


def _pinned(batch: dict[str, Tensor], pin: bool) -> dict[str, Tensor]:
    return {name: tensor.pin_memory() for name, tensor in batch.items()} if pin else batch

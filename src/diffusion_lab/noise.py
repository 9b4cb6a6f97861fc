"""Keyed noise: every random number of training and sampling is a function of its key, without generator state.

Draw k of image i depends only on (seed, stream, i, k), not on the batch size, the number of processes or earlier draws. The
generator is the counter-based Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), written
as vectorized integer operations that run on any device.

Layout: the 128-bit counter is (block, draw, index, stream | high bits of index), the 64-bit key is the seed. One block is
four words of 32 bits.
"""

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from diffusion_lab.errors import SEEDS, ConfigError, check_number

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # multipliers and Weyl increments of Philox4x32
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


class Stream(IntEnum):
    """Purpose of a random number. Two streams never share a number."""

    SAMPLE = 0  # sampling: x_T is draw 0, the noise of step i is draw i + 1
    NOISE = 1  # training: ε
    TIME = 2  # training: t
    LABEL = 3  # training: label dropout
    FLIP = 4  # data: horizontal flips
    SHUFFLE = 5  # data: the order of an epoch
    SPLIT = 6  # data: train/val/test
    SELF = 7  # training: self-conditioning on or off
    DROPOUT = 8  # training: the seed of dropout's generator
    LIKELIHOOD = 9  # dequantization is draw 0, the probe of the divergence draw 1, ε of the k-th time draw k + 2
    VARIANCE = 10  # fitting a variance: ε of the k-th evaluation, index k
    CODEBOOK = 11  # DDCM: x_T is draw 0, vector k of step i draw i + 1, index k


Word = TypeVar("Word", int, Tensor)  # philox accepts Python integers and tensors alike


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """Map four 32-bit words to four, Python integers or int64 tensors, by Philox4x32-10 (Salmon et al. 2011, section 3.3).

    Between rounds the odd words contain the full product instead of its low half; they enter the next round by xor, where a
    mask truncates both operands. A product beyond int64 wraps, which preserves its 64 bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _M0, c2 * _M1
        c0, c2 = (product1 >> 32 ^ c1 ^ k0) & _MASK, (product0 >> 32 ^ c3 ^ k1) & _MASK
        c1, c3 = product1, product0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def words(
    count: int, *, seed: int, index: Int64[Tensor, " b"], draw: int = 0, stream: Stream = Stream.SAMPLE
) -> Int64[Tensor, "b {count}"]:
    """Return `count` 32-bit words for each key.

    Args:
        count: number of words for each index.
        seed: in [0, 2⁶⁴).
        index: (B,), each in [0, 2⁵⁶): the image, or the position in the global batch.
        draw: in [0, 2³²): number of the draw for that image, or the training step.
        stream: purpose of the numbers.

    Returns:
        (B, count) in [0, 2³²), on the device of `index`.

    Raises:
        ConfigError: `seed` or `draw` is out of range.
    """
    check_number("seed", seed, SEEDS, "non-negative", whole=True)
    if not 0 <= draw < 2**32:
        raise ConfigError(f"draw={draw} is outside [0, 2^32): draws and training steps are 32-bit integers")
    blocks = torch.arange(-(-count // 4), device=index.device)[None, :]
    high = ((index >> 32 << 8 | int(stream)) & _MASK)[:, None]
    counter = (
        blocks,
        torch.full_like(high, draw),
        (index & _MASK)[:, None],
        high,
    )  # broadcast to one shape within two rounds
    return torch.stack(philox(counter, (seed & _MASK, seed >> 32)), dim=-1).flatten(1)[:, :count]


def word(*, seed: int, index: int, draw: int, stream: Stream) -> int:
    """Return one 32-bit word as a Python integer, computed without tensors, e.g. to seed a generator. Arguments as in `words`."""
    counter = (0, draw, index & _MASK, index >> 32 << 8 | int(stream))
    return philox(counter, (seed & _MASK, seed >> 32))[0]


def uniform(
    shape: tuple[int, ...], *, seed: int, index: Int64[Tensor, " b"], draw: int = 0, stream: Stream = Stream.SAMPLE
) -> Float64[Tensor, "b *shape"]:
    """Return uniform numbers in the open interval (0, 1), float64 (B, *shape). Arguments as in `words`."""
    bits = words(math.prod(shape), seed=seed, index=index, draw=draw, stream=stream)
    return ((bits.double() + 0.5) * 2.0**-32).reshape(len(index), *shape)


def normal(
    shape: tuple[int, ...],
    *,
    seed: int,
    index: Int64[Tensor, " b"],
    draw: int = 0,
    stream: Stream = Stream.SAMPLE,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "b *shape"]:
    """Return standard normal numbers (B, *shape), by the Box–Muller transform of pairs of words; |z| < 6.77.

    The transform runs in float64 and is rounded once to `dtype`, so that float32 results do not depend on the vectorization of
    a kernel, which varies with the batch size. Other arguments as in `words`.
    """
    count = math.prod(shape)
    u = uniform((-(-count // 2) * 2,), seed=seed, index=index, draw=draw, stream=stream)
    radius, angle = (-2 * u[:, 0::2].log()).sqrt(), (2 * math.pi) * u[:, 1::2]
    z = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)[:, :count]
    return z.to(dtype).reshape(len(index), *shape)


@dataclass(frozen=True)
class Draws:
    """Noise of a sampler's steps: step i is draw `first + i` of the key. Attributes as the arguments of `normal`."""

    shape: tuple[int, ...]  # of one image
    seed: int
    index: Int64[Tensor, " b"]
    dtype: torch.dtype = torch.float32
    first: int = 1  # draw 0 is x_T

    def __call__(self, i: int) -> Float[Tensor, "b *shape"]:
        """Return z of step i, standard normal (B, *shape)."""
        return normal(self.shape, seed=self.seed, index=self.index, draw=self.first + i, dtype=self.dtype)

    def choices(self, steps: int, n: int) -> Int64[Tensor, "b {steps}"]:
        """Return uniform integers in [0, n) for each of `steps` steps, int64 (B, steps), in place of z."""
        return (uniform((steps,), seed=self.seed, index=self.index, draw=self.first) * n).long()


def permutation(n: int, *, seed: int, draw: int = 0, stream: Stream = Stream.SHUFFLE) -> Int64[Tensor, "{n}"]:
    """Return a random order of 0 … n − 1, int64 (n,): the indices sorted by 62 random bits each, keyed by (seed, draw)."""
    bits = words(2, seed=seed, index=torch.arange(n), draw=draw, stream=stream)
    return torch.argsort((bits[:, 0] << 30) | (bits[:, 1] >> 2), stable=True)

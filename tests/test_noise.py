"""Philox against the published test vectors; distinct keys; statistics at fixed seeds with margins in standard errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from diffusion_lab.noise import Draws, Stream, normal, permutation, philox, uniform, word, words

D = torch.float64


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(counter: str, key: str, want: str) -> None:
    """Random123's kat_vectors, philox 4x32 with 10 rounds."""
    c = tuple(torch.tensor([int(w, 16)]) for w in counter.split())
    k = tuple(int(w, 16) for w in key.split())
    assert [f"{int(w):08x}" for w in philox(c, k)] == want.split()  # type: ignore[arg-type]


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**64 - 1),
    index=st.integers(0, 2**56 - 1),
    draw=st.integers(0, 2**32 - 1),
    stream=st.sampled_from(Stream),
)
def test_words_lie_in_32_bits_and_follow_the_layout(seed: int, index: int, draw: int, stream: Stream) -> None:
    """Counter (block, draw, index low, index high | stream), key the seed: written out with Python's integers."""
    got = words(6, seed=seed, index=torch.tensor([index]), draw=draw, stream=stream)[0]

    def rounds(c: list[int], k: list[int]) -> list[int]:
        for _ in range(10):
            p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [p1 >> 32 ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return c

    key = [seed & 0xFFFFFFFF, seed >> 32]
    want = [
        w for b in (0, 1) for w in rounds([b, draw, index & 0xFFFFFFFF, (index >> 32) << 8 | int(stream)], list(key))
    ]
    assert got.tolist() == want[:6]


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5, 5), (1, 8, 8)])
def test_noise_of_an_image_is_independent_of_its_batch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Bit for bit equal alone, in any batch, in any order and repeated."""
    index = torch.arange(33)
    want = normal(shape, seed=7, index=index, draw=3, dtype=dtype)
    order = torch.randperm(33)
    assert torch.equal(normal(shape, seed=7, index=order, draw=3, dtype=dtype), want[order])
    twice = torch.tensor([5, 5, 0, 5])
    assert torch.equal(normal(shape, seed=7, index=twice, draw=3, dtype=dtype), want[twice])
    for size in (1, 2, 7, 16):
        parts = [normal(shape, seed=7, index=i, draw=3, dtype=dtype) for i in index.split(size)]
        assert torch.equal(torch.cat(parts), want)


def test_no_two_keys_share_noise() -> None:
    """Keys of different seeds, images (also beyond 2³²), draws and streams: all 64-bit prefixes differ."""
    index = torch.tensor([0, 1, 2**32, 2**32 + 1, 2**40, 2**56 - 1])
    prefixes = [
        tuple(row)
        for seed in (0, 1, 2**32, 2**63)
        for draw in (0, 1, 2**31)
        for stream in Stream
        for row in words(2, seed=seed, index=index, draw=draw, stream=stream).tolist()
    ]
    assert len(set(prefixes)) == len(prefixes) == 4 * 3 * len(Stream) * 6


def test_more_words_extend_fewer() -> None:
    index = torch.arange(3)
    assert torch.equal(words(9, seed=1, index=index)[:, :5], words(5, seed=1, index=index))


def test_shapes_and_dtypes() -> None:
    index = torch.arange(2)
    assert normal((3, 5, 7), seed=0, index=index).shape == (2, 3, 5, 7)
    assert normal((), seed=0, index=index).shape == (2,)
    assert normal((3,), seed=0, index=torch.arange(0)).shape == (0, 3)
    assert normal((2,), seed=0, index=index, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert uniform((2,), seed=0, index=index).dtype == D


def test_float32_noise_is_float64_noise_rounded() -> None:
    key = {"seed": 4, "index": torch.arange(50)}
    assert torch.equal(normal((11,), **key), normal((11,), **key, dtype=D).float())  # type: ignore[arg-type]


def test_uniform_is_uniform() -> None:
    """200,000 numbers, fixed seed. Margins 4 standard errors; Kolmogorov–Smirnov p above 1e-3."""
    u = uniform((100,), seed=11, index=torch.arange(2000)).flatten()
    n = len(u)
    assert u.min() > 0
    assert u.max() < 1
    assert abs(float(u.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / n)
    assert abs(float(u.var()) - 1 / 12) < 4 * math.sqrt(1 / 180 / n)
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3


def test_uniform_is_the_middle_of_each_of_2_to_the_32_cells() -> None:
    """(word + ½)/2³², exact in float64, so neither 0, whose logarithm is infinite, nor 1 occurs."""
    key = {"seed": 6, "index": torch.arange(5)}
    got, bits = uniform((7,), **key), words(7, **key)  # type: ignore[arg-type]
    assert [[v * 2**32 - 0.5 for v in row] for row in got.tolist()] == bits.tolist()


@pytest.mark.parametrize("axis", ["index", "draw", "seed", "stream", "element"])
def test_normal_along_every_part_of_the_key(axis: str) -> None:
    """40,000 numbers that differ in one part of the key: moments to 4 standard errors, KS test, no serial correlation."""
    n = 40000
    if axis == "element":
        z = normal((n,), seed=5, index=torch.tensor([3]), dtype=D).flatten()
    elif axis == "index":
        z = normal((), seed=5, index=torch.arange(n), dtype=D)
    else:
        vary = {"draw": 500, "seed": 500, "stream": len(Stream)}[axis]
        each = n // vary
        rows = [
            normal((each,), index=torch.tensor([3]), dtype=D, **{"seed": 5, axis: Stream(k) if axis == "stream" else k})  # type: ignore[arg-type]
            for k in range(vary)
        ]
        z = torch.cat(rows).T.flatten()  # neighbors differ in `axis`
    n = len(z)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(z.pow(power).mean()) - moment) < 4 * math.sqrt(variance / n), f"moment {power}"
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    for lag in (1, 2, 3, 4, 8):
        assert abs(float((z[lag:] * z[:-lag]).mean())) < 4 / math.sqrt(n), f"lag {lag}"


def test_streams_and_draws_are_uncorrelated() -> None:
    z = [normal((100,), seed=5, index=torch.arange(400), draw=d, stream=s, dtype=D) for d in (0, 1) for s in Stream]
    c = np.corrcoef(torch.stack(z).flatten(1).numpy())
    off = np.abs(c - np.eye(len(z)))
    assert off.max() < 4.5 / math.sqrt(40000)  # the largest of 153 correlations


def test_the_bound_of_the_docstring() -> None:
    assert math.sqrt(-2 * math.log(0.5 * 2**-32)) < 6.77


@settings(deadline=None, max_examples=40)
@given(n=st.integers(0, 300), seed=st.integers(0, 2**64 - 1), draw=st.integers(0, 100))
def test_permutation_is_a_permutation(n: int, seed: int, draw: int) -> None:
    order = permutation(n, seed=seed, draw=draw)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(n))
    assert torch.equal(order, permutation(n, seed=seed, draw=draw))


def test_permutations_are_equally_likely() -> None:
    """All 24 orders of four in 2,400 draws: chi-square with 23 degrees of freedom, p above 1e-3 at this seed."""
    counts: dict[tuple[int, ...], int] = {}
    for draw in range(2400):
        order = tuple(permutation(4, seed=1, draw=draw).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_epochs_and_seeds_have_different_orders() -> None:
    assert not torch.equal(permutation(50, seed=0, draw=0), permutation(50, seed=0, draw=1))
    assert not torch.equal(permutation(50, seed=0), permutation(50, seed=1))
    assert not torch.equal(permutation(50, seed=0), permutation(50, seed=0, stream=Stream.SPLIT))


@pytest.mark.parametrize("key", [{"seed": -1}, {"seed": 2**64}, {"seed": 0, "draw": -1}, {"seed": 0, "draw": 2**32}])
def test_seeds_and_draws_out_of_range_are_refused(key: dict[str, int]) -> None:
    with pytest.raises(
        ValueError, match=r"seed=.*: write an integer in \[0, 18446744073709551615\]|draw=.* is outside"
    ):
        words(1, index=torch.arange(1), **key)  # type: ignore[arg-type]


def test_draws_of_a_step_and_uniform_choices() -> None:
    """χ² of 20,000 choices is within 5 standard deviations; choices of an image are independent of its batch."""
    index = torch.tensor([4, 0, 9])
    noise = Draws((1, 3, 5), seed=7, index=index, dtype=D, first=11)
    assert torch.equal(noise(6), normal((1, 3, 5), seed=7, index=index, draw=17, dtype=D))
    assert torch.equal(Draws((2,), 7, index)(0), normal((2,), seed=7, index=index, draw=1))
    chosen = Draws((2,), 7, torch.arange(20_000)).choices(4, 10)
    assert torch.equal(Draws((5,), 7, index).choices(4, 10), chosen[index])
    chi2 = float((torch.bincount(chosen[:, 3], minlength=10).double() - 2000).square().sum() / 2000)
    assert abs(chi2 - 9) < 5 * math.sqrt(18)


def test_streams_keep_their_numbers() -> None:
    """Stream numbers are part of every key: changing one changes published samples and runs."""
    first = ["SAMPLE", "NOISE", "TIME", "LABEL", "FLIP", "SHUFFLE", "SPLIT", "SELF"]
    assert [Stream(i).name for i in range(8)] == first
    assert len({int(s) for s in Stream}) == len(Stream)
    assert all(0 <= s < 256 for s in Stream), "one byte of the counter"


def test_one_word_is_the_first_of_many() -> None:
    """`word` and `words` agree, also for the high bits of the index."""
    for index in (0, 5, 2**33 + 7):
        many = words(4, seed=2**40 + 3, index=torch.tensor([index]), draw=9, stream=Stream.DROPOUT)
        assert word(seed=2**40 + 3, index=index, draw=9, stream=Stream.DROPOUT) == int(many[0, 0])

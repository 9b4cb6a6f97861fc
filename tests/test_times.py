"""How training draws t: coverage, strata, and independence of how ranks share the batch."""

import inspect

import pytest
import torch
from contracts import SCHEDULES, members
from scipy import stats

from diffusion_lab.schedules import Cosine, Linear
from diffusion_lab.times import Stratified, TimeSampler, Uniform

SAMPLERS = {c.__name__: c() for c in members(TimeSampler, "times") if not inspect.signature(c).parameters}
every = pytest.mark.parametrize("name", SAMPLERS)


@every
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_contract(name: str, schedule: str) -> None:
    """t in (0, 1], nodes on a table, float64, the shape of `position`, and the same again."""
    s = SCHEDULES[schedule]
    position = torch.arange(500)
    t = SAMPLERS[name](s, position, 500, seed=3, step=9)
    assert t.shape == (500,)
    assert t.dtype == torch.float64
    assert ((t > 0) & (t <= 1)).all()
    if s.steps is not None:
        assert torch.equal((t * s.steps).round() / s.steps, t)
    assert torch.equal(t, SAMPLERS[name](s, position, 500, seed=3, step=9))
    assert not torch.equal(t, SAMPLERS[name](s, position, 500, seed=3, step=10))
    assert not torch.equal(t, SAMPLERS[name](s, position, 500, seed=4, step=9))


@every
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_any_split_over_ranks_gives_the_same_times(name: str, ranks: int) -> None:
    """Contiguous slices and interleaved ones (DistributedSampler's)."""
    position = torch.arange(24)
    want = SAMPLERS[name](Cosine(), position, 24, seed=0, step=5)
    slices = torch.cat([SAMPLERS[name](Cosine(), p, 24, seed=0, step=5) for p in position.chunk(ranks)])
    assert torch.equal(slices, want)
    for r in range(ranks):
        assert torch.equal(SAMPLERS[name](Cosine(), position[r::ranks], 24, seed=0, step=5), want[r::ranks])


@every
def test_every_node_is_equally_likely(name: str) -> None:
    """40 nodes, 400 steps of a batch of 100: chi-square over 39 degrees of freedom. Stratified times spread more evenly than
    chance, so only the upper tail is a fault; p above 1e-3 at this seed."""
    s = Linear(40)
    t = torch.cat([SAMPLERS[name](s, torch.arange(100), 100, seed=1, step=k) for k in range(400)])
    counts = (t * 40).round().long().bincount(minlength=41)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:].numpy()).pvalue > 1e-3


def test_uniform_on_a_curve_without_steps_is_uniform() -> None:
    class Continuous(Cosine):
        """Only `steps` matters here."""

        def __init__(self) -> None:
            super().__init__()
            self.steps = None  # type: ignore[assignment]

    for sampler in (Uniform(), Stratified()):
        t = torch.cat([sampler(Continuous(), torch.arange(50), 50, seed=1, step=k) for k in range(200)])
        assert stats.kstest(t.numpy(), "uniform").pvalue > 1e-3
        assert len(t.unique()) == len(t)


@pytest.mark.parametrize("batch", [1, 7, 40, 1000])
def test_stratified_has_exactly_one_in_each_part(batch: int) -> None:
    u = Stratified().place(torch.rand(batch, dtype=torch.float64), torch.arange(batch), batch)
    assert torch.equal((u * batch).floor().long(), torch.arange(batch))
    for step in range(20):
        t = Stratified()(Linear(1000), torch.arange(batch), batch, seed=0, step=step)
        # a node i/T stands for u in ((i−1)/T, i/T], so its part is off by less than one node
        low, high = torch.arange(batch) / batch, (torch.arange(batch) + 1) / batch
        assert (t >= low).all()
        assert (t <= high + 1 / 1000).all()


def test_stratified_with_a_batch_of_all_nodes_is_a_permutation_of_them() -> None:
    t = Stratified()(Linear(40), torch.arange(40), 40, seed=0, step=0)
    assert torch.equal((t * 40).round(), torch.arange(1.0, 41.0, dtype=torch.float64))


def test_stratified_lowers_the_variance_of_a_mean() -> None:
    """Of the mean of f(t) = t over batches of 32: 1/(12·32³) against 1/(12·32), a factor 1,024; a tenth is required."""
    means = {
        type(s).__name__: torch.stack([s(Cosine(), torch.arange(32), 32, seed=2, step=k).mean() for k in range(200)])
        for s in (Uniform(), Stratified())
    }
    assert means["Stratified"].var() < 0.1 * means["Uniform"].var()

"""Time samplers: coverage, densities, strata, importance sampling, and independence of the split of a batch over ranks."""

import math
from collections import deque
from collections.abc import Callable

import pytest
import torch
from contracts import SCHEDULES, members, takes
from scipy import stats

from diffusion_lab.objectives import PredFlow, PredV, PredX0
from diffusion_lab.schedules import EDM, VE, VP, Cosine, Flow, Linear, Schedule, Sigmoid, SubVP, Table
from diffusion_lab.time_samplers import Importance, LogitNormal, LogNormal, Stratified, TimeSampler, Uniform
from diffusion_lab.weightings import VLB, Eps

D = torch.float64
SAMPLERS: dict[str, TimeSampler] = {c.__name__: c() for c in members(TimeSampler, "time_samplers")}
SAMPLERS |= {
    f"{c.__name__}-independent": c(stratified=False)  # type: ignore[call-arg]
    for c in members(TimeSampler, "time_samplers")
    if takes(c, "stratified")
}
every = pytest.mark.parametrize("name", SAMPLERS)


@every
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_contract(name: str, schedule: str) -> None:
    """t in (0, 1], nodes on a table, float64, of the shape of `position`, reproducible; without losses the weight is 1."""
    s = SCHEDULES[schedule]
    position = torch.arange(500)
    sampler = SAMPLERS[name]
    sampler.load(type(sampler)().state())  # reset the history of another schedule
    t = sampler(s, position, 500, seed=3, step=9)
    torch.testing.assert_close(sampler.weight(s, t), torch.ones_like(t), rtol=1e-12, atol=0)
    assert bool(sampler.learns) == bool(sampler.state())
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


@pytest.mark.parametrize("name", ["Uniform", "Stratified", "Importance", "Importance-independent"])
def test_every_node_is_equally_likely(name: str) -> None:
    """40 nodes, 400 steps with a batch of 100: chi-square with 39 degrees of freedom, p above 1e-3 at this seed. Only the upper
    tail is tested, because stratified times are more even than independent ones."""
    s = Linear(40)
    SAMPLERS[name].load(type(SAMPLERS[name])().state())
    t = torch.cat([SAMPLERS[name](s, torch.arange(100), 100, seed=1, step=k) for k in range(400)])
    counts = (t * 40).round().long().bincount(minlength=41)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:].numpy()).pvalue > 1e-3


def test_uniform_on_a_curve_without_steps_is_uniform() -> None:
    for sampler in (Uniform(), Stratified(), Importance(), Importance(bins=7, stratified=False)):
        t = torch.cat([sampler(VP(), torch.arange(50), 50, seed=1, step=k) for k in range(200)])
        assert stats.kstest(t.numpy(), "uniform").pvalue > 1e-3
        assert len(t.unique()) == len(t)


@pytest.mark.parametrize("batch", [1, 7, 40, 1000])
def test_stratified_has_exactly_one_in_each_part(batch: int) -> None:
    u = Stratified().stratify(torch.rand(batch, dtype=torch.float64), torch.arange(batch), batch)
    assert torch.equal((u * batch).floor().long(), torch.arange(batch))
    for step in range(20):
        t = Stratified()(Linear(1000), torch.arange(batch), batch, seed=0, step=step)
        # times are rounded up to a node, by less than 1/T
        low, high = torch.arange(batch) / batch, (torch.arange(batch) + 1) / batch
        assert (t >= low).all()
        assert (t <= high + 1 / 1000).all()


def test_stratified_with_a_batch_of_all_nodes_is_a_permutation_of_them() -> None:
    t = Stratified()(Linear(40), torch.arange(40), 40, seed=0, step=0)
    assert torch.equal((t * 40).round(), torch.arange(1.0, 41.0, dtype=torch.float64))


def test_stratified_lowers_the_variance_of_a_mean() -> None:
    """The variance of the mean of f(t) = t over a batch of 32 is 1/(12·32³) instead of 1/(12·32); a factor 10 is required."""
    means = {
        type(s).__name__: torch.stack([s(Cosine(), torch.arange(32), 32, seed=2, step=k).mean() for k in range(200)])
        for s in (Uniform(), Stratified())
    }
    assert means["Stratified"].var() < 0.1 * means["Uniform"].var()


# ------------------------------------------------------------------------------------------------- least time in training

CURVES: dict[str, Callable[..., Schedule]] = {"VP": VP, "SubVP": SubVP, "VE": VE, "EDM": EDM, "Flow": Flow}


class Lowest(TimeSampler):
    """t = u/10⁹: below every least time."""

    def times(self, schedule: Schedule, u: torch.Tensor) -> torch.Tensor:
        return u * 1e-9


@pytest.mark.parametrize("name", [*SAMPLERS, "Lowest"])
@pytest.mark.parametrize("curve", CURVES)
def test_no_time_is_below_the_least_one_of_the_curve(name: str, curve: str) -> None:
    """By default 1e-5 (VE and EDM: 0+) and with t_train_min=0.04 this, with every distribution."""
    for least, schedule in ((None, CURVES[curve]()), (0.04, CURVES[curve](t_train_min=0.04))):
        sampler = Lowest() if name == "Lowest" else SAMPLERS[name]
        sampler.load(type(sampler)().state())
        want = least or (schedule.t_eps if curve in ("VE", "EDM") else 1e-5)
        t = torch.cat([sampler(schedule, torch.arange(500), 500, seed=4, step=k) for k in range(8)])
        assert want <= float(t.min())
        assert float(t.max()) <= 1
        if name == "Lowest":
            assert (t - want).abs().max() <= 1e-9


@pytest.mark.parametrize("name", ["Uniform", "Stratified", "Importance", "Importance-independent"])
@pytest.mark.parametrize("least", [1e-5, 0.004, 0.1])
def test_uniform_times_are_uniform_above_the_least_one(name: str, least: float) -> None:
    """Score SDEs: t ~ U(ε, 1). The first of 100 bins of importance sampling is uniform in [ε, 0.01], and clipped if ε is more."""
    schedule = VP(t_train_min=least)
    SAMPLERS[name].load(type(SAMPLERS[name])().state())
    t = torch.cat([SAMPLERS[name](schedule, torch.arange(100), 100, seed=1, step=k) for k in range(100)])
    assert float(t.min()) >= least
    if name.startswith("Importance"):
        first = t[t <= 0.01]
        if least < 0.01:
            assert stats.kstest(first.numpy(), stats.uniform(least, 0.01 - least).cdf).pvalue > 1e-3
    else:
        assert stats.kstest(t.numpy(), stats.uniform(least, 1 - least).cdf).pvalue > 1e-3


@pytest.mark.parametrize("curve", CURVES)
def test_weights_are_bounded_and_the_vlb_has_a_finite_mean(curve: str) -> None:
    """∫ −dλ/dt dt over the times of training is λ(t_0) − λ(1): 40,000 stratified times, t_0 = 1e-3.
    The largest weight is that of t_0; without a least time it is 5e11 on VP and 1e24 on Flow."""
    schedule = CURVES[curve](t_train_min=1e-3)
    low, high = torch.tensor([1e-3, 0.999], dtype=D)
    t = draws(Stratified(), schedule, 40_000)
    t = t[t <= high]
    got = float((VLB()(schedule, PredX0(), t) / (2 * schedule.lam(t)).exp()).mean())  # the weight on ε, also at α = 0
    want = float(schedule.lam(low) - schedule.lam(high)) / float(high - low)
    assert got == pytest.approx(want, rel=2e-3)
    if curve in (
        "VP",
        "SubVP",
        "Flow",
    ):  # λ ≈ −ln t there, or half of it, so SNR ≤ 1/t² and −dλ/dt ≤ 1/t up to a factor of 1.1
        t = torch.cat([draws(Uniform(), CURVES[curve]()), torch.tensor([1e-5], dtype=D)])
        lowest = torch.tensor(1e-5, dtype=D)
        for objective in (PredV(), PredFlow(), PredX0()):
            assert float(VLB()(CURVES[curve](), objective, t).max()) <= float(VLB()(CURVES[curve](), objective, lowest))
        assert (
            float(Eps()(CURVES[curve](), PredX0(), t).max()) <= float((2 * CURVES[curve]().lam(lowest)).exp()) * 1.001
        )


# ------------------------------------------------------------------------------------------------- log-normal, logit-normal


def draws(sampler: TimeSampler, schedule: Schedule, count: int = 4000) -> torch.Tensor:
    return sampler(schedule, torch.arange(count), count, seed=2, step=0)


@pytest.mark.parametrize("table", [Linear, Cosine, Sigmoid])
@pytest.mark.parametrize("steps", [37, 100])
def test_a_short_table_keeps_the_mean_of_log_normal_and_logit_normal(table: type[Table], steps: int) -> None:
    """The mean of ln(σ/α) is that of N(−1.2, 1.2²) clipped to the nodes, and of t that of the logit-normal distribution, by
    quadrature: rounding to the nearest node has no bias of first order in 1/T. Rounding up adds half a step, 0.1 at T = 37."""
    s = table(steps=steps)
    ends = (-s.lam(torch.tensor([1 / steps, 1.0], dtype=D))).tolist()
    u = (torch.arange(100_000, dtype=D) + 0.5) / 100_000
    want = float((-1.2 + 1.2 * torch.special.ndtri(u)).clamp(*ends).mean())
    t = draws(LogNormal(), s)
    assert float(-s.lam(t).mean()) == pytest.approx(want, abs=0.02)
    assert float(draws(LogitNormal(), s).mean()) == pytest.approx(0.5, abs=0.1 / steps)
    assert float(draws(LogitNormal(mean=-1.0), s).mean()) == pytest.approx(
        float(torch.sigmoid(torch.special.ndtri(u) - 1).mean()), abs=0.1 / steps
    )


@pytest.mark.parametrize("schedule", ["EDM", "VP", "SubVP", "VE", "Flow-shift"])
def test_log_normal_is_normal_in_the_logarithm_of_sigma_over_alpha(schedule: str) -> None:
    """4,000 draws inside the curve's range of λ against N(−1.2, 1.2²), Kolmogorov–Smirnov, p above 1e-3 at this seed; stratified
    draws are within 2/4000 of the distribution function. Draws outside the range are clipped to its ends."""
    s = SCHEDULES[schedule]
    ends = -s.lam(torch.tensor([s.t_eps, 1.0], dtype=D))
    for stratified in (False, True):
        t = draws(LogNormal(stratified=stratified), s)
        value = -s.lam(t)
        inside = value[(value > ends[0] + 1e-6) & (value < ends[1] - 1e-6)]
        low, high = stats.norm.cdf(ends.numpy(), -1.2, 1.2)
        assert len(inside) / 4000 == pytest.approx(high - low, abs=0.01)
        u = (torch.from_numpy(stats.norm.cdf(inside.numpy(), -1.2, 1.2)) - low) / (high - low)
        assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
        if stratified:
            rank = u.sort().values - (torch.arange(len(u)) + 0.5) / len(u)
            assert rank.abs().max() < 2 / 4000


def test_log_normal_has_the_median_of_edm() -> None:
    """u = ½ gives the t at which σ = e^−1.2 on the curve EDM."""
    t = LogNormal().times(EDM(), torch.tensor([0.5, stats.norm.cdf(1.0)], dtype=D))
    torch.testing.assert_close(EDM().alpha_sigma(t)[1], torch.tensor([-1.2, 0.0], dtype=D).exp(), rtol=1e-9, atol=0)


def test_logit_normal_is_that_of_esser() -> None:
    """The density of eq. 19 integrates to u up to t(u), independently of the curve's shift."""
    sampler = LogitNormal(mean=0.4, std=0.7)
    u = torch.tensor([0.02, 0.5, 0.9], dtype=D)
    t = sampler.times(Flow(), u)
    torch.testing.assert_close(t, sampler.times(Flow(shift=3.0), u))
    for at, want in zip(t.tolist(), u.tolist(), strict=True):
        grid = torch.linspace(1e-9, at, 200_001, dtype=D)
        logit = (grid / (1 - grid)).log()
        density = (-((logit - 0.4) ** 2) / (2 * 0.7**2)).exp() / (0.7 * math.sqrt(2 * math.pi) * grid * (1 - grid))
        assert float(torch.trapezoid(density, grid)) == pytest.approx(want, abs=1e-6)


def test_extreme_draws_stay_on_the_curve() -> None:
    """The smallest and largest possible u, with extreme means and deviations."""
    for sampler in (LogNormal(std=20.0), LogitNormal(std=20.0), LogNormal(mean=20.0), LogitNormal(mean=-20.0)):
        for schedule in SCHEDULES.values():
            t = sampler.times(schedule, torch.tensor([2.0**-33, 1 - 2.0**-33], dtype=D))
            assert ((t >= 0) & (t <= 1)).all()
            whole = sampler(schedule, torch.arange(64), 64, seed=0, step=0)
            assert ((whole > 0) & (whole <= 1)).all()


# ----------------------------------------------------------------------------------------------------- importance sampling


class Published:
    """The authors' algorithm, one loss at a time: the last ten losses of every t; p ∝ √mean(L²), with 0.001 uniform."""

    def __init__(self, steps: int) -> None:
        self.losses: list[deque[float]] = [deque(maxlen=10) for _ in range(steps)]

    def update(self, index: list[int], loss: list[float]) -> None:
        for i, value in zip(index, loss, strict=True):
            self.losses[i].append(value)

    def probabilities(self) -> list[float]:
        n = len(self.losses)
        if any(len(q) < 10 for q in self.losses):
            return [1 / n] * n
        root = [math.sqrt(sum(v * v for v in q) / len(q)) for q in self.losses]
        return [0.999 * r / sum(root) + 0.001 / n for r in root]


def test_importance_is_the_published_sampler() -> None:
    """Batches with many (more than ten), few and no losses of a time."""
    s, ours, theirs = Linear(21), Importance(), Published(21)
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        index = torch.randint(0, 21 if step % 3 else 4, (16,), generator=generator)
        loss = torch.rand(16, generator=generator, dtype=D) * (1 + index)
        ours.update(s, (index + 1) / 21, loss)
        theirs.update(index.tolist(), loss.tolist())
        torch.testing.assert_close(ours.probabilities(s), torch.tensor(theirs.probabilities(), dtype=D))
    p = ours.probabilities(s)
    assert p.max() > 2 * p.min(), "the history is full at the end of the loop"
    t = torch.arange(1, 22, dtype=D) / 21
    torch.testing.assert_close(ours.weight(s, t), 1 / (21 * p))


def with_history(schedule: Schedule, loss: Callable[[torch.Tensor], torch.Tensor], **options: float) -> Importance:
    """Return a sampler with a full history of `loss`."""
    sampler = Importance(**options)  # type: ignore[arg-type]
    bins = schedule.steps or sampler.bins
    t = ((torch.arange(bins, dtype=D) + (1 if schedule.steps else 0.5)) / bins).repeat(10)
    sampler.update(schedule, t, loss(t))
    return sampler


@pytest.mark.parametrize("schedule", [Linear(40), VP()])
@pytest.mark.parametrize("stratified", [False, True])
def test_importance_draws_follow_its_probabilities(schedule: Schedule, stratified: bool) -> None:
    """40,000 draws in 40 bins against p, chi-square, p-value above 1e-3 at this seed; uniform inside a bin of a curve."""
    sampler = with_history(schedule, lambda t: t**3 + 0.01, bins=40, stratified=stratified)
    p = sampler.probabilities(schedule)
    assert float(p.sum()) == pytest.approx(1)
    assert p[-1] > 50 * p[0]
    t = draws(sampler, schedule, 40_000)
    bins = (t * 40).round().long() - 1 if schedule.steps else (t * 40).ceil().long() - 1
    counts = bins.bincount(minlength=40)
    assert stats.chisquare(counts.numpy(), (40_000 * p).numpy()).pvalue > 1e-3
    torch.testing.assert_close(sampler.weight(schedule, t), 1 / (40 * p[bins]))
    if not schedule.steps:
        inside = (t * 40)[bins == 39] - 39
        assert stats.kstest(inside.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("schedule", [Linear(40), VP()])
def test_the_weighted_loss_has_the_uniform_mean_and_less_variance(schedule: Schedule) -> None:
    """For L = t⁴ the weighted mean of 40,000 independent draws is within 4 standard errors of the exact mean over uniform t, and
    the variance is below a fifth of that of uniform sampling. (With p ∝ L exactly it would be 0.)"""

    def loss(t: torch.Tensor) -> torch.Tensor:
        return t**4

    sampler = with_history(schedule, loss, bins=40, stratified=False)
    t = draws(sampler, schedule, 40_000)
    weighted = sampler.weight(schedule, t) * loss(t)
    nodes = torch.arange(1, 41, dtype=D) / 40
    want = float(loss(nodes).mean()) if schedule.steps else 0.2
    assert abs(float(weighted.mean()) - want) < 4 * float(weighted.std()) / 200
    assert weighted.var() < 0.2 * loss(draws(Uniform(), schedule, 40_000)).var()


def test_importance_edge_cases() -> None:
    """Losses of 0 give uniform times; NaN and Inf are ignored; a time on the edge of two bins belongs to the lower one."""
    s = VP()
    zeros = with_history(s, torch.zeros_like, bins=5)
    torch.testing.assert_close(zeros.probabilities(s), torch.full((5,), 0.2, dtype=D))
    sampler = with_history(s, torch.ones_like, bins=5)
    before = sampler.state()
    sampler.update(s, torch.tensor([0.1, 0.9], dtype=D), torch.tensor([math.nan, math.inf]))
    assert all(torch.equal(before[k], v) for k, v in sampler.state().items())
    sampler.update(s, torch.tensor([0.2, 0.2 + 1e-9, 1e-12, 1.0], dtype=D), torch.full((4,), 2.0))
    assert (sampler.state()["counts"] - before["counts"]).tolist() == [2, 1, 0, 0, 1]


def test_a_restored_importance_sampler_continues_identically() -> None:
    """The state is a copy, which later updates do not change."""
    s = Linear(40)
    one = with_history(s, lambda t: t)
    state = one.state()
    other = Importance()
    other.load(state)
    for step in range(3):
        t = draws(one, s, 64)
        assert torch.equal(t, draws(other, s, 64))
        assert torch.equal(one.weight(s, t), other.weight(s, t))
        one.update(s, t, t.square() + step)
        other.update(s, t, t.square() + step)
    assert all(torch.equal(v, other.state()[k]) for k, v in one.state().items())
    assert not torch.equal(state["losses"], one.state()["losses"])


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: LogNormal(std=0.0), r"std=0.0: write a number in \(0, 20\]"),
        (lambda: LogitNormal(mean=math.nan), r"mean=nan: write a number in \[-20, 20\]"),
        (lambda: Importance(history=0), r"history=0: write an integer in \[1, 1000\]"),
        (lambda: Importance(bins=0), r"bins=0: write an integer in \[1, 10000\]"),
        (lambda: Importance(uniform_prob=1.5), r"uniform_prob=1.5: write a number in \[0, 1\]"),
    ],
)
def test_errors_name_the_remedy(make: Callable[[], object], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        make()


def test_a_history_of_another_schedule_is_refused() -> None:
    sampler = with_history(Linear(40), torch.ones_like)
    with pytest.raises(ValueError, match="time_sampler=stratified"):
        sampler.weight(Linear(50), torch.ones(1, dtype=D))

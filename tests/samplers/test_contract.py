"""Every sampler through one suite, on data whose best denoiser is known: it must return that distribution."""

import inspect
import itertools
from typing import Any

import pytest
import torch
from contracts import SAMPLERS, SCHEDULES, takes
from oracle import Gaussian, Mixture, oracle

from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.noise import normal
from diffusion_lab.objectives import PredV
from diffusion_lab.samplers.base import Sampler, prior

D = torch.float64
MEAN, STD = 0.3, 0.5
DATA = Gaussian(torch.full((1, 1, 1), MEAN), STD)
MIXTURE = Mixture(torch.tensor([-0.6, 0.6]).reshape(2, 1, 1, 1), torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.7]))
every = pytest.mark.parametrize("name", SAMPLERS)


def make(name: str, steps: int | None, **options: Any) -> Sampler:
    cls = SAMPLERS[name]
    if takes(cls, "rtol"):  # an adaptive solver: a tenth of the time that the published 1e-5 takes
        options = {"rtol": 1e-3, "atol": 1e-3, **options}
    if takes(cls, "codebook"):  # of 64 numbers, the default, mean and deviation are off by an eighth
        options = {"codebook": 4096, **options}
    sampler: Sampler = cls(steps=steps, **options) if takes(cls, "steps") else cls(**options)
    return sampler


def works(sampler: Sampler, denoiser: Denoiser) -> bool:
    try:
        sampler.check(denoiser)
    except ValueError:
        return False
    return True


def side(name: str) -> int:
    """Pixels a side. One is enough, but for step sizes from the norm of an image: 256 numbers keep their bias near 1/128."""
    return 16 if takes(SAMPLERS[name], "snr") else 1


def begin(schedule: str, count: int, name: str) -> torch.Tensor:
    shape = (1, side(name), side(name))
    return prior(SCHEDULES[schedule], normal(shape, seed=9, index=torch.arange(count), dtype=D))


def deterministic(name: str) -> bool:
    """Whether two seeds give the same images."""
    den, x = oracle(DATA, SCHEDULES["Cosine"], PredV()), begin("Cosine", 4, name)
    return torch.equal(make(name, 5)(den, x, seed=0).x, make(name, 5)(den, x, seed=1).x)


def test_all_that_exist_are_found() -> None:
    ours = {"DDPM", "DDIM", "DDCM", "Euler", "Heun", "DPMSolverPP", "UniPC"}
    assert ours | {"EulerMaruyama", "ReverseDiffusion", "PredictorCorrector", "ODE"} <= set(SAMPLERS)


@every
def test_one_signature(name: str) -> None:
    want = ["self", "denoiser", "x_T", "seed", "index", "condition", "start", "stop", "callback", "progress"]
    signature = inspect.signature(SAMPLERS[name].__call__)
    assert list(signature.parameters) == want
    assert {k: p.default for k, p in signature.parameters.items() if p.default is not p.empty} == {
        "seed": 0, "index": None, "condition": None, "start": 1.0, "stop": 0.0, "callback": None, "progress": False,
    }  # fmt: skip


@every
@pytest.mark.parametrize("schedule", ["Linear", "Cosine"])
def test_gaussian_data_comes_back(name: str, schedule: str) -> None:
    """Mean and deviation of N(0.3, 0.5²) from 8,000 numbers. Monte Carlo allows 4 standard errors (0.022 and 0.016). Over
    it the deviation's bias at 10, 40 and 160 steps must fall by 0.6 at least with every fourfold, and end below 0.025."""
    x_T, margin_mean, margin_std = (
        begin(schedule, 8000 // side(name) ** 2, name),
        4 * STD / 8000**0.5,
        4 * STD / 16000**0.5,
    )
    den = oracle(DATA, SCHEDULES[schedule], PredV())
    counts = (10, 40, 160) if takes(SAMPLERS[name], "steps") else (None,)
    bias = []
    for n in counts:
        x = make(name, n)(den, x_T, seed=1).x
        assert x.shape == x_T.shape
        assert x.dtype == x_T.dtype
        bias.append(abs(float(x.std()) - STD))
    assert abs(float(x.mean()) - MEAN) < margin_mean
    assert bias[-1] < 0.025 + margin_std
    for coarse, fine in itertools.pairwise(bias):
        assert fine < max(0.6 * coarse, margin_std)


@every
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_on_every_curve(name: str, schedule: str) -> None:
    """Works or is refused at once. 40 steps and 2,000 numbers: the mean within 0.06, the deviation at most 0.12 above 0.5,
    and 0.15 below that of x̂_0 at the least time, the step into data of a solver that comes there exactly (ancestral steps
    with fixed_small are too narrow by 0.14 on the curves with shift=3)."""
    # β = 0.999 at the end makes 40 steps of Euler and Maruyama unstable on sigmoid
    steps = 160 if (name, schedule) == ("EulerMaruyama", "Sigmoid") else 40
    sampler, den = make(name, steps), oracle(DATA, SCHEDULES[schedule], PredV())
    x_T = begin(schedule, 2000 // side(name) ** 2, name)
    if not works(sampler, den):
        with pytest.raises(ValueError, match=r"write|needs|give|ask"):
            sampler(den, x_T)
        return
    x = sampler(den, x_T).x
    assert x.isfinite().all()
    assert abs(float(x.mean()) - MEAN) < 0.06
    alpha, sigma = SCHEDULES[schedule].alpha_sigma(torch.tensor(SCHEDULES[schedule].t_min, dtype=D))
    estimate = STD * float(alpha * STD / ((alpha * STD) ** 2 + sigma**2).sqrt())
    assert estimate - 0.15 < float(x.std()) < STD + 0.12


@every
def test_mixture_data_comes_back(name: str) -> None:
    """Weights 0.3 and 0.7 at −0.6 ± 0.1 and 0.6 ± 0.2. 100 steps, 6,000 images (of 256 pixels 200): 4 standard errors and
    0.03 of bias."""
    den = oracle(MIXTURE, SCHEDULES["Cosine"], PredV())
    count = 6000 if side(name) == 1 else 200
    x = make(name, 100)(den, begin("Cosine", count, name), seed=2).x.flatten()
    low = x < -0.1
    assert abs(float(low.double().mean()) - 0.3) < 4 * (0.21 / count) ** 0.5 + 0.03
    for part, mean, std in ((x[low], -0.6, 0.1), (x[~low], 0.6, 0.2)):
        assert abs(float(part.mean()) - mean) < 4 * std / len(part) ** 0.5 + 0.03
        assert abs(float(part.std()) - std) < 4 * std / (2 * len(part)) ** 0.5 + 0.03


@every
def test_an_image_knows_nothing_of_its_batch(name: str) -> None:
    """Noise by index: image 5 is the same alone, in another order, twice. 1e-12, because kernels differ by batch size."""
    den, x = oracle(MIXTURE, SCHEDULES["Cosine"], PredV()), begin("Cosine", 6, name)
    want = make(name, 8)(den, x, seed=3).x
    for rows in ([5], [5, 5, 0], [3, 2, 1]):
        index = torch.tensor(rows)
        torch.testing.assert_close(make(name, 8)(den, x[index], seed=3, index=index).x, want[index], rtol=0, atol=1e-12)


@every
def test_seeds_matter_only_where_there_is_noise(name: str) -> None:
    den, x = oracle(DATA, SCHEDULES["Cosine"], PredV()), begin("Cosine", 4, name)
    assert torch.equal(make(name, 6)(den, x, seed=3).x, make(name, 6)(den, x, seed=3).x)
    moved = make(name, 6)(den, x, seed=3, index=torch.arange(4) + 100).x
    assert torch.equal(moved, make(name, 6)(den, x, seed=3).x) == deterministic(name)


@every
def test_callback_and_nfe(name: str) -> None:
    """The callback sees falling times and the states there; nfe counts the evaluations of this call."""
    asked: list[float] = []
    inner = oracle(DATA, SCHEDULES["Cosine"], PredV())

    class Counting(Denoiser):
        def __call__(self, x_t: Any, t: Any, previous: Any = None, **condition: Any) -> Prediction:
            asked.append(float(torch.as_tensor(t).max()))
            return super().__call__(x_t, t, previous, **condition)

    seen: list[tuple[int, float, torch.Tensor, Prediction]] = []
    sampler, x = make(name, 7), begin("Cosine", 3, name)
    den = Counting(inner.network, inner.schedule, inner.objective)
    assert sampler(den, x, callback=lambda *step: seen.append(step)).nfe == len(asked) > 0
    assert [s[1] for s in seen] == sorted((s[1] for s in seen), reverse=True)
    assert [s[0] for s in seen] == sorted(s[0] for s in seen)
    torch.testing.assert_close(seen[0][2], x)
    assert all(isinstance(s[3], Prediction) and s[3].x0.shape == x.shape for s in seen)
    assert sampler(den, x).nfe == len(asked) // 2


@every
def test_conditions_and_previous_reach_the_network(name: str) -> None:
    """Every evaluation gets the label; a network that wants x̂_0 of the step before gets it, None at first."""
    calls: list[dict[str, Any]] = []

    class Net:
        self_conditioning = True

        def __call__(self, x: torch.Tensor, c: torch.Tensor, **condition: Any) -> torch.Tensor:
            calls.append(condition)
            return 0.5 * x

    den, label = Denoiser(Net(), SCHEDULES["Cosine"], PredV()), torch.tensor([1, 0])
    if not works(make(name, 4), den):  # ODE solvers refuse self-conditioning
        with pytest.raises(ValueError, match="self"):
            make(name, 4).check(den)
        return
    make(name, 4)(den, begin("Cosine", 2, name), condition={"label": label})
    assert all(torch.equal(c["label"], label) for c in calls)
    assert calls[0]["previous"] is None
    assert all(c["previous"] is not None for c in calls[1:])


@every
def test_nan_is_refused_and_named(name: str) -> None:
    """Read once, at the end, and then the first bad evaluation and its time are named, in one line with a remedy."""
    asked: list[float] = []

    def network(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        asked.append((float(c.max()) + 1) / 1000)
        return 0.5 * x if len(asked) < 3 else x * torch.nan

    den = Denoiser(network, SCHEDULES["Cosine"], PredV())
    with pytest.raises(ValueError, match=r"NaN .* evaluation 3 of \d+, t=[\d.]+: sample in float32") as refused:
        make(name, 4)(den, begin("Cosine", 2, name))
    assert f"t={asked[2]:.4g}:" in str(refused.value)
    assert "\n" not in str(refused.value)


@every
@pytest.mark.parametrize("budget", [7, 8])
def test_a_budget_is_used_and_kept(name: str, budget: int) -> None:
    """At most so many evaluations, and with one step more it would be more."""
    if not (takes(SAMPLERS[name], "budget") and takes(SAMPLERS[name], "steps")):
        pytest.skip("an adaptive solver has no number of steps to choose")
    den, x = oracle(DATA, SCHEDULES["Cosine"], PredV()), begin("Cosine", 2, name)
    sampler = make(name, None, budget=budget)
    assert 0 < sampler(den, x).nfe <= budget
    assert sampler.steps is not None
    more = make(name, sampler.steps + 1)
    assert more(den, x).nfe > budget
    with pytest.raises(ValueError, match="budget=0"):
        make(name, None, budget=0)


@every
def test_no_steps_and_too_many(name: str) -> None:
    if not takes(SAMPLERS[name], "steps"):
        pytest.skip("an adaptive solver has no number of steps")
    with pytest.raises(ValueError, match="steps >= 1"):
        make(name, 0)
    with pytest.raises(ValueError, match="fewer"):
        make(name, 41).check(oracle(DATA, SCHEDULES["Linear-40"], PredV()))
    if takes(SAMPLERS[name], "grid"):
        with pytest.raises(ValueError, match="write one of"):
            make(name, 4, grid="nonesuch")


@every
def test_the_other_way_is_exact_or_refused(name: str) -> None:
    """start < stop: a deterministic sampler carries data to noise as the exact ODE does; a stochastic one refuses."""
    den, x = oracle(DATA, SCHEDULES["Cosine"], PredV()), torch.tensor([-0.5, 0.3, 1.0], dtype=D).reshape(3, 1, 1, 1)
    sampler = make(name, 200)
    if not deterministic(name):
        with pytest.raises(ValueError, match=r"encode|deterministic|stochastic"):
            sampler(den, x, start=0.0, stop=1.0)
        return
    got = sampler(den, x, start=0.1, stop=0.9).x
    want = DATA.flow(x, SCHEDULES["Cosine"], 0.1, 0.9)
    assert (got - want).abs().max() < 0.02


@every
@pytest.mark.parametrize("schedule", ["Cosine", "EDM", "Flow"])
def test_from_data_to_noise_and_back(name: str, schedule: str) -> None:
    """t = 0 and t = 1 included: a deterministic sampler leaves data, where no network was trained, and returns to within 0.1."""
    if not deterministic(name):
        return
    sampler, den = make(name, 60), oracle(DATA, SCHEDULES[schedule], PredV())
    x = torch.tensor([-0.5, 0.3, 1.0], dtype=D).reshape(3, 1, 1, 1)
    latent = sampler(den, x, start=0.0, stop=1.0).x
    assert latent.isfinite().all()
    assert (sampler(den, latent).x - x).abs().max() < 0.1


@every
def test_float32_and_float64_agree(name: str) -> None:
    """The state keeps x_T's dtype; with the same keyed noise single precision moves an image by its roundings only."""
    den = Denoiser(lambda x, c: x.tanh(), SCHEDULES["Linear"], PredV())
    x = begin("Linear", 4, name)
    double, single = make(name, 10)(den, x).x, make(name, 10)(den, x.float()).x
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)

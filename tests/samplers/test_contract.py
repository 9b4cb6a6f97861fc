"""The contract of all samplers, tested with the exact denoiser of known data: a sampler must return their distribution.

Every sampler class of the package is discovered and tested. What a case asserts depends on properties that the class declares
(`deterministic`, `uses_previous`, its arguments, `check`), never on its name, so a new class needs no entry in a table.
"""

import importlib
import inspect
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from contracts import SAMPLERS, SCHEDULES, takes
from oracle import Gaussian, Mixture, oracle

import diffusion_lab.samplers
from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.noise import normal
from diffusion_lab.objectives import PredV
from diffusion_lab.samplers import EulerMaruyama
from diffusion_lab.samplers.base import Sampler, prior

CONF = Path(__file__).resolve().parents[2] / "conf" / "sampler"
D = torch.float64
MEAN, STD = 0.3, 0.5
DATA = Gaussian(torch.full((1, 1, 1), MEAN), STD)
MIXTURE = Mixture(torch.tensor([-0.6, 0.6]).reshape(2, 1, 1, 1), torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.7]))


def make(name: str, steps: int | None, **options: Any) -> Sampler:
    """Build a sampler of `steps` steps; for an adaptive solver `steps` is ignored."""
    cls = SAMPLERS[name]
    if takes(cls, "rtol"):  # a tenth of the time of the published tolerance, 1e-5
        options = {"rtol": 1e-3, "atol": 1e-3, **options}
    if takes(cls, "codebook"):  # mean and standard deviation of the default's 64 numbers are off by an eighth
        options = {"codebook": 4096, **options}
    sampler: Sampler = cls(steps=steps, **options) if takes(cls, "steps") else cls(**options)
    return sampler


def declares_deterministic(name: str) -> bool:
    try:
        return make(name, 5).deterministic
    except Exception:  # the tests raise it again and fail, instead of the collection of this file
        return True


def is_refused(name: str, schedule: str) -> bool:
    """Whether `check` refuses the pair. Any other exception is left to the test, which raises it again."""
    try:
        make(name, steps_on(name, schedule)).check(oracle(DATA, SCHEDULES[schedule], PredV()))
    except ValueError:
        return True
    except Exception:
        return False
    return False


def steps_on(name: str, schedule: str) -> int:
    # 40 Euler–Maruyama steps are unstable on sigmoid, where β is 0.999 at the end
    return 160 if issubclass(SAMPLERS[name], EulerMaruyama) and schedule == "Sigmoid" else 40


STEPPED = [name for name in SAMPLERS if takes(SAMPLERS[name], "steps")]
ADAPTIVE = [name for name in SAMPLERS if name not in STEPPED]
DETERMINISTIC = [name for name in SAMPLERS if declares_deterministic(name)]
STOCHASTIC = [name for name in SAMPLERS if name not in DETERMINISTIC]
USES_PREVIOUS = [name for name in SAMPLERS if SAMPLERS[name].uses_previous]
IGNORES_PREVIOUS = [name for name in SAMPLERS if name not in USES_PREVIOUS]
PAIRS = list(itertools.product(SAMPLERS, SCHEDULES))
REFUSED = [pair for pair in PAIRS if is_refused(*pair)]
ACCEPTED = [pair for pair in PAIRS if pair not in REFUSED]
OPTIONS = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "custom")
every = pytest.mark.parametrize("name", SAMPLERS)


def side(name: str) -> int:
    """Image side in pixels. Step sizes from the norm of an image have a bias near 2/pixels, so these samplers need 256 pixels."""
    return 16 if takes(SAMPLERS[name], "snr") else 1


def begin(schedule: str, count: int, name: str) -> torch.Tensor:
    shape = (1, side(name), side(name))
    return prior(SCHEDULES[schedule], normal(shape, seed=9, index=torch.arange(count), dtype=D))


def test_all_classes_are_found() -> None:
    expected = {"DDPM", "DDIM", "DDCM", "Euler", "Heun", "DPMSolverPP", "UniPC"}
    assert expected | {"EulerMaruyama", "ReverseDiffusion", "PredictorCorrector", "ODE"} <= set(SAMPLERS)
    exported = [getattr(diffusion_lab.samplers, name) for name in diffusion_lab.samplers.__all__]
    samplers = {c for c in exported if inspect.isclass(c) and issubclass(c, Sampler) and not inspect.isabstract(c)}
    assert samplers <= set(SAMPLERS.values())


def test_every_property_has_cases() -> None:
    """No parametrization is empty, and every sampler accepts a table and a continuous curve."""
    assert all((STEPPED, ADAPTIVE, DETERMINISTIC, STOCHASTIC, USES_PREVIOUS, IGNORES_PREVIOUS, REFUSED, OPTIONS))
    for name in SAMPLERS:
        accepted = [SCHEDULES[schedule].steps is None for sampler, schedule in ACCEPTED if sampler == name]
        assert set(accepted) == {True, False}, name


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_the_configuration(option: str) -> None:
    """An option names a tested class and arguments of it, and its sampler returns finite images on the linear schedule."""
    node = yaml.safe_load((CONF / f"{option}.yaml").read_text())
    module, _, attribute = node.pop("_target_").rpartition(".")
    cls = getattr(importlib.import_module(module), attribute)
    assert cls in SAMPLERS.values()
    assert set(node) <= set(inspect.signature(cls).parameters)
    constants = {key: value for key, value in node.items() if not str(value).startswith("${")}
    sampler = cls(**constants | ({"steps": 20} if "steps" in node else {}))
    x_T = begin("Linear", 2, cls.__name__)
    assert sampler(oracle(DATA, SCHEDULES["Linear"], PredV()), x_T).x.isfinite().all()


@every
def test_one_signature(name: str) -> None:
    expected = ["self", "denoiser", "x_T", "seed", "index", "condition", "start", "stop", "callback", "progress"]
    signature = inspect.signature(SAMPLERS[name].__call__)
    assert list(signature.parameters) == expected
    assert {k: p.default for k, p in signature.parameters.items() if p.default is not p.empty} == {
        "seed": 0, "index": None, "condition": None, "start": 1.0, "stop": 0.0, "callback": None, "progress": False,
    }  # fmt: skip


@every
@pytest.mark.parametrize("schedule", ["Linear", "Cosine"])
def test_gaussian_data_are_returned(name: str, schedule: str) -> None:
    """Mean and standard deviation of N(0.3, 0.5²) from 8,000 numbers, with 4 standard errors (0.022 and 0.016).

    The bias of the standard deviation falls to at most 0.6 of itself from 10 to 40 and from 40 to 160 steps, or below 0.016; its
    last value is below 0.025 plus 4 standard errors.
    """
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


@pytest.mark.parametrize(("name", "schedule"), ACCEPTED)
def test_on_every_curve(name: str, schedule: str) -> None:
    """40 steps and 2,000 numbers: mean within 0.06; standard deviation at most 0.12 above 0.5.

    Its lower limit is 0.15 below the standard deviation of x̂_0 at the smallest time, which a solver without error returns
    (ancestral steps with fixed_small are too narrow by 0.14 on the curves with shift=3).
    """
    sampler, den = make(name, steps_on(name, schedule)), oracle(DATA, SCHEDULES[schedule], PredV())
    sampler.check(den)
    x_T = begin(schedule, 2000 // side(name) ** 2, name)
    x = sampler(den, x_T).x
    assert x.isfinite().all()
    assert abs(float(x.mean()) - MEAN) < 0.06
    alpha, sigma = SCHEDULES[schedule].alpha_sigma(torch.tensor(SCHEDULES[schedule].t_min, dtype=D))
    estimate = STD * float(alpha * STD / ((alpha * STD) ** 2 + sigma**2).sqrt())
    assert estimate - 0.15 < float(x.std()) < STD + 0.12


@pytest.mark.parametrize(("name", "schedule"), REFUSED)
def test_a_refused_curve_is_refused_by_a_call(name: str, schedule: str) -> None:
    """A call raises the same line as `check`, before the first evaluation, and the line says what to write."""
    calls: list[float] = []
    sampler, den = make(name, steps_on(name, schedule)), oracle(DATA, SCHEDULES[schedule], PredV())
    with pytest.raises(ValueError, match="write ") as checked:
        sampler.check(den)
    with pytest.raises(ValueError, match="write ") as called:
        sampler(den, begin(schedule, 2, name), callback=lambda i, t, x, prediction: calls.append(t))
    assert str(called.value) == str(checked.value)
    assert "\n" not in str(called.value)
    assert not calls


@every
def test_mixture_data_are_returned(name: str) -> None:
    """Weights 0.3 and 0.7 at −0.6 ± 0.1 and 0.6 ± 0.2. 100 steps, 6,000 images (200 of 256 pixels), with 4 standard errors and
    a bias of 0.03."""
    den = oracle(MIXTURE, SCHEDULES["Cosine"], PredV())
    count = 6000 if side(name) == 1 else 200
    x = make(name, 100)(den, begin("Cosine", count, name), seed=2).x.flatten()
    low = x < -0.1
    assert abs(float(low.double().mean()) - 0.3) < 4 * (0.21 / count) ** 0.5 + 0.03
    for part, mean, std in ((x[low], -0.6, 0.1), (x[~low], 0.6, 0.2)):
        assert abs(float(part.mean()) - mean) < 4 * std / len(part) ** 0.5 + 0.03
        assert abs(float(part.std()) - std) < 4 * std / (2 * len(part)) ** 0.5 + 0.03


@every
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    """Image 5 is the same alone, repeated, and in another order, to 1e-12, because kernels differ by batch size."""
    den, x = oracle(MIXTURE, SCHEDULES["Cosine"], PredV()), begin("Cosine", 6, name)
    expected = make(name, 8)(den, x, seed=3).x
    for rows in ([5], [5, 5, 0], [3, 2, 1]):
        index = torch.tensor(rows)
        got = make(name, 8)(den, x[index], seed=3, index=index).x
        torch.testing.assert_close(got, expected[index], rtol=0, atol=1e-12)


@every
def test_only_a_stochastic_sampler_depends_on_seed_and_index(name: str) -> None:
    den, x = oracle(DATA, SCHEDULES["Cosine"], PredV()), begin("Cosine", 4, name)
    sampler = make(name, 6)
    expected = sampler(den, x, seed=3).x
    assert torch.equal(make(name, 6)(den, x, seed=3).x, expected)
    assert torch.equal(sampler(den, x, seed=4).x, expected) == sampler.deterministic
    assert torch.equal(sampler(den, x, seed=3, index=torch.arange(4) + 100).x, expected) == sampler.deterministic


@every
def test_callback_and_nfe(name: str) -> None:
    """The callback receives decreasing times and the states there; nfe counts the evaluations of this call."""
    times: list[float] = []
    inner = oracle(DATA, SCHEDULES["Cosine"], PredV())

    class Counting(Denoiser):
        def __call__(self, x_t: Any, t: Any, previous: Any = None, **condition: Any) -> Prediction:
            times.append(float(torch.as_tensor(t).max()))
            return super().__call__(x_t, t, previous, **condition)

    reports: list[tuple[int, float, torch.Tensor, Prediction]] = []
    sampler, x = make(name, 7), begin("Cosine", 3, name)
    den = Counting(inner.network, inner.schedule, inner.objective)
    assert sampler(den, x, callback=lambda *report: reports.append(report)).nfe == len(times) > 0
    assert [r[1] for r in reports] == sorted((r[1] for r in reports), reverse=True)
    assert [r[0] for r in reports] == sorted(r[0] for r in reports)
    torch.testing.assert_close(reports[0][2], x)
    assert all(isinstance(r[3], Prediction) and r[3].x0.shape == x.shape for r in reports)
    assert sampler(den, x).nfe == len(times) // 2


class Recorder:
    """A network that depends on the label and records its keyword arguments."""

    def __init__(self, self_conditioning: bool) -> None:
        self.self_conditioning = self_conditioning
        self.calls: list[dict[str, Any]] = []

    def __call__(self, x: torch.Tensor, c: torch.Tensor, *, label: torch.Tensor, **inputs: Any) -> torch.Tensor:
        assert len(label) == len(x)
        self.calls.append({"label": label, **inputs})
        return (0.2 + 0.3 * label)[:, None, None, None] * x


@every
def test_conditions_reach_the_network(name: str) -> None:
    """Every evaluation receives the label of each of its images: an image is the same as alone, to 1e-12."""
    network, label = Recorder(self_conditioning=False), torch.tensor([1, 0])
    den, x = Denoiser(network, SCHEDULES["Cosine"], PredV()), begin("Cosine", 2, name)
    got = make(name, 4)(den, x, condition={"label": label}).x
    assert network.calls
    assert all(torch.equal(c["label"], label) for c in network.calls if len(c["label"]) == len(x))
    assert all("previous" not in c for c in network.calls)
    for i in range(2):
        alone = make(name, 4)(den, x[[i]], index=torch.tensor([i]), condition={"label": label[[i]]}).x
        torch.testing.assert_close(got[[i]], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", USES_PREVIOUS)
def test_the_previous_estimate_reaches_a_self_conditioning_network(name: str) -> None:
    """The first evaluation receives None, every other one an estimate of x_0, and all of them the whole label."""
    network, label = Recorder(self_conditioning=True), torch.tensor([1, 0])
    den = Denoiser(network, SCHEDULES["Cosine"], PredV())
    make(name, 4)(den, begin("Cosine", 2, name), condition={"label": label})
    assert all(torch.equal(c["label"], label) for c in network.calls)
    assert network.calls[0]["previous"] is None
    assert all(c["previous"] is not None for c in network.calls[1:])


@pytest.mark.parametrize("name", IGNORES_PREVIOUS)
def test_a_self_conditioning_network_is_refused(name: str) -> None:
    """A sampler that does not pass the previous estimate refuses such a network, in `check` and in a call."""
    network = Recorder(self_conditioning=True)
    den, condition = Denoiser(network, SCHEDULES["Cosine"], PredV()), {"label": torch.tensor([1, 0])}
    with pytest.raises(ValueError, match=r"self-conditioning network .*: write sampler="):
        make(name, 4).check(den)
    with pytest.raises(ValueError, match=r"self-conditioning network .*: write sampler="):
        make(name, 4)(den, begin("Cosine", 2, name), condition=condition)
    assert not network.calls


@every
def test_nan_is_refused_and_named(name: str) -> None:
    """The message names the first evaluation that returned NaN and its time, in one line with a remedy."""
    times: list[float] = []

    def network(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        times.append((float(c.max()) + 1) / 1000)
        return 0.5 * x if len(times) < 3 else x * torch.nan

    den = Denoiser(network, SCHEDULES["Cosine"], PredV())
    with pytest.raises(ValueError, match=r"NaN .* evaluation 3 of \d+, t=[\d.]+: sample in float32") as refused:
        make(name, 4)(den, begin("Cosine", 2, name))
    assert f"t={times[2]:.4g}:" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", STEPPED)
@pytest.mark.parametrize("budget", [7, 8])
def test_a_budget_is_used_and_kept(name: str, budget: int) -> None:
    """The evaluations are at most `budget`, and with one more step they would exceed it."""
    den, x = oracle(DATA, SCHEDULES["Cosine"], PredV()), begin("Cosine", 2, name)
    sampler = make(name, None, budget=budget)
    assert 0 < sampler(den, x).nfe <= budget
    assert sampler.steps is not None
    more = make(name, sampler.steps + 1)
    assert more(den, x).nfe > budget
    with pytest.raises(ValueError, match="budget=0"):
        make(name, None, budget=0)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_budget_of_an_adaptive_solver_is_a_limit(name: str) -> None:
    """A call with the evaluations that it needs returns the same images; with one less it is refused, as is a budget of 0."""
    den, x = oracle(DATA, SCHEDULES["Cosine"], PredV()), begin("Cosine", 2, name)
    expected, nfe, _ = make(name, None)(den, x)
    limited = make(name, None, budget=nfe)(den, x)
    assert torch.equal(limited.x, expected)
    assert limited.nfe == nfe
    with pytest.raises(ValueError, match="budget"):
        make(name, None, budget=nfe - 1)(den, x)
    with pytest.raises(ValueError, match="budget=0"):
        make(name, None, budget=0)


@pytest.mark.parametrize("name", STEPPED)
def test_steps_and_grid_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"steps=0: write null, or an integer in \[1, 100000\]"):
        make(name, 0)
    with pytest.raises(ValueError, match="fewer"):
        make(name, 41).check(oracle(DATA, SCHEDULES["Linear-40"], PredV()))
    with pytest.raises(ValueError, match="write one of"):
        make(name, 4, grid="nonesuch")


@pytest.mark.parametrize("name", ADAPTIVE)
def test_an_adaptive_solver_takes_no_steps(name: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        SAMPLERS[name](steps=4)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_encoding_follows_the_exact_ode(name: str) -> None:
    """start < stop: from 0.1 to 0.9 in 200 steps, to 0.02."""
    den, x = oracle(DATA, SCHEDULES["Cosine"], PredV()), torch.tensor([-0.5, 0.3, 1.0], dtype=D).reshape(3, 1, 1, 1)
    got = make(name, 200)(den, x, start=0.1, stop=0.9).x
    expected = DATA.flow(x, SCHEDULES["Cosine"], 0.1, 0.9)
    assert (got - expected).abs().max() < 0.02


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize(("start", "stop"), [(0.0, 1.0), (0.1, 0.9)])
def test_a_stochastic_sampler_refuses_to_encode(name: str, start: float, stop: float) -> None:
    den, x = oracle(DATA, SCHEDULES["Cosine"], PredV()), torch.tensor([-0.5, 0.3, 1.0], dtype=D).reshape(3, 1, 1, 1)
    with pytest.raises(ValueError, match=r"stochastic .*: to encode .* write sampler="):
        make(name, 200)(den, x, start=start, stop=stop)


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("schedule", ["Cosine", "EDM", "Flow"])
def test_from_data_to_noise_and_back(name: str, schedule: str) -> None:
    """From t = 0, where no network is trained, to t = 1 and back, to within 0.1."""
    sampler, den = make(name, 60), oracle(DATA, SCHEDULES[schedule], PredV())
    x = torch.tensor([-0.5, 0.3, 1.0], dtype=D).reshape(3, 1, 1, 1)
    latent = sampler(den, x, start=0.0, stop=1.0).x
    assert latent.isfinite().all()
    assert (sampler(den, latent).x - x).abs().max() < 0.1


@every
def test_float32_and_float64_agree(name: str) -> None:
    """The result has x_T's dtype; with the same keyed noise, float32 changes an image by rounding errors only."""
    den = Denoiser(lambda x, c: x.tanh(), SCHEDULES["Linear"], PredV())
    x = begin("Linear", 4, name)
    double, single = make(name, 10)(den, x).x, make(name, 10)(den, x.float()).x
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)

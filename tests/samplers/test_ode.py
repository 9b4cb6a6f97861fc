"""The adaptive probability-flow ODE against the exact flow and SciPy, and its independence of the rest of the batch."""

from typing import Any

import numpy as np
import pytest
import torch
from contracts import SCHEDULES
from oracle import Gaussian, Mixture, oracle
from scipy.integrate import solve_ivp

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.noise import normal
from diffusion_lab.objectives import PredNoise, PredV
from diffusion_lab.samplers import ODE
from diffusion_lab.samplers.base import prior
from diffusion_lab.samplers.dormand_prince import integrate
from diffusion_lab.samplers.time_parametrization import TimeParametrization
from diffusion_lab.schedules import VE, VP, Cosine, Schedule, SubVP, append_dims_like

D = torch.float64
SHAPE = (2, 2, 2)
DATA = Gaussian(torch.full(SHAPE, 0.3), 0.5)
MIXTURE = Mixture(torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)) / 2, torch.tensor([0.1, 0.2, 0.4]))
CURVES = ["VP", "VP-shift", "SubVP", "VE", "EDM", "Flow", "Cosine", "Linear-zero"]


def begin(schedule: Schedule, count: int = 5) -> torch.Tensor:
    return prior(schedule, normal(SHAPE, seed=1, index=torch.arange(count), dtype=D))


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize(("start", "stop"), [(1.0, 0.0), (0.9, 0.1)])
def test_the_exact_flow(name: str, start: float, stop: float) -> None:
    """Within 10 tolerances of the exact solution for Gaussian data, relative to the initial state; into data x̂_0 follows."""
    schedule = SCHEDULES[name]
    x = begin(schedule)
    got = ODE(1e-6, 1e-6)(oracle(DATA, schedule, PredV()), x, start=start, stop=stop).x
    expected = DATA.flow(x, schedule, start, stop or schedule.t_min)
    if stop == 0:
        expected = DATA.denoise(expected, *schedule.alpha_sigma(torch.tensor(schedule.t_min, dtype=D)))
    assert float((got - expected).abs().max()) < 1e-5 * max(1.0, float(x.abs().max()))


def solve_with_scipy(schedule: Schedule, x: torch.Tensor, start: float, stop: float, tolerance: float) -> Any:
    """Solve for one image, or for a batch with one error norm. The right-hand side is the published f x − ½ g² score."""

    def slope(t: float, flat: np.ndarray) -> np.ndarray:
        time = torch.tensor(t, dtype=D)
        (alpha, sigma), (f, g2) = schedule.alpha_sigma(time), schedule.drift_diffusion(time)
        state = torch.from_numpy(flat).reshape(x.shape)
        score = (alpha * MIXTURE.denoise(state, alpha, sigma) - state) / sigma**2
        return (f * state - g2 / 2 * score).flatten().numpy()

    return solve_ivp(slope, (start, stop), x.flatten().numpy(), rtol=tolerance, atol=tolerance, method="RK45")


@pytest.mark.parametrize("schedule", [VP(), SubVP(), VE()])
def test_single_images_match_scipy(schedule: Schedule) -> None:
    """Published settings, 1e-5 from 1 to the smallest time: equal numbers of evaluations, states equal to 1e-7 of σ_max.

    The right-hand sides are written in different forms, so rounding errors and with them the steps differ slightly.
    """
    x = begin(schedule, 2)
    stop = schedule.t_min
    got, _, evaluations = ODE()(oracle(MIXTURE, schedule, PredNoise()), x, stop=stop)
    assert evaluations is not None
    for i, image in enumerate(x):
        expected = solve_with_scipy(schedule, image[None], 1.0, stop, 1e-5)
        assert int(evaluations[i]) == expected.nfev
        end = torch.from_numpy(expected.y[:, -1]).reshape(SHAPE)
        torch.testing.assert_close(got[i], end, rtol=0, atol=1e-7 * float(x.abs().max()))


def test_an_image_does_not_depend_on_its_batch_but_does_in_scipy() -> None:
    """In batches of 1, 3 and 5 images are equal to 1e-10. With one step size for the whole batch, as in published code, an
    image changes by more than 1e-6 with the rest of the batch."""
    schedule = VP()
    x = begin(schedule)
    den = oracle(MIXTURE, schedule, PredV())
    sampler = ODE()
    expected, _, evaluations = sampler(den, x)
    assert evaluations is not None
    for rows in ([0], [4, 0, 1], [4, 3, 2, 1, 0]):
        got = sampler(den, x[rows])
        torch.testing.assert_close(got.x, expected[rows], rtol=0, atol=1e-10)
        assert got.evaluations is not None
        assert torch.equal(got.evaluations, evaluations[rows])
    alone, among = (solve_with_scipy(schedule, rows, 1.0, 1e-3, 1e-5).y[:8, -1] for rows in (x[:1], x))
    assert np.abs(alone - among).max() > 1e-6


def test_evaluations_of_each_image() -> None:
    """Images that have reached the end are not evaluated; nfe is the largest number, including the step into data."""
    batches: list[int] = []
    inner = oracle(MIXTURE, Cosine(), PredV())

    def network(x: torch.Tensor, c: torch.Tensor, **_: Any) -> torch.Tensor:
        batches.append(len(x))
        return inner.network(x, c)

    got = ODE(1e-3, 1e-3)(Denoiser(network, Cosine(), PredV()), begin(Cosine(), 8))
    assert got.evaluations is not None
    assert got.nfe == len(batches) == int(got.evaluations.max())
    assert int(got.evaluations.sum()) == sum(batches) < 8 * len(batches)
    assert got.evaluations.dtype == torch.int64


def test_budget() -> None:
    """The evaluations that a call needs suffice as its budget; one less is refused. A step needs at least nine."""
    den, x = oracle(DATA, VP(), PredV()), begin(VP())
    expected, nfe, _ = ODE(1e-3, 1e-3)(den, x)
    assert torch.equal(ODE(1e-3, 1e-3, budget=nfe)(den, x).x, expected)
    for budget in (nfe - 1, 8, 1):
        with pytest.raises(ValueError, match=r"raise the budget, or loosen rtol=0.001"):
            ODE(1e-3, 1e-3, budget=budget)(den, x)


def test_the_condition_follows_its_image() -> None:
    """Every image keeps its label when other images have reached the end: the result is that of each image alone."""

    def network(x: torch.Tensor, c: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        assert len(label) == len(x)
        return (x * (1 + label[:, None, None, None])).tanh()

    den, x, label = Denoiser(network, Cosine(), PredV()), begin(Cosine(), 4), torch.tensor([3, 0, 9, 1])
    sampler = ODE(1e-4, 1e-4)
    got, _, evaluations = sampler(den, x, condition={"label": label})
    assert evaluations is not None
    assert len(set(evaluations.tolist())) > 1
    for i in range(4):
        alone = sampler(den, x[i : i + 1], condition={"label": label[i : i + 1]}).x
        torch.testing.assert_close(got[i : i + 1], alone, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------- tables: over the angle


@pytest.mark.parametrize("name", ["Cosine", "Linear-40", "Linear-zero", "VE", "SubVP"])
def test_the_parametrization_is_invertible_and_its_tangent_matches_differences(name: str) -> None:
    """(dα/du, dσ/du) against finite differences of (α, σ)(t(u)), at times between nodes."""
    schedule, parametrization = SCHEDULES[name], TimeParametrization(SCHEDULES[name])
    for t in (1.0, 0.9876, 0.5013, 0.1234, 0.0312):
        u = torch.tensor(parametrization.at(t), dtype=D)
        assert float(parametrization.time(u)) == pytest.approx(t, abs=1e-12)
    for t in (0.9876, 0.5013, 0.1234, 0.0312):  # at t = 1 a central difference leaves the curve
        u = torch.tensor(parametrization.at(t), dtype=D)
        low, high = (schedule.alpha_sigma(parametrization.time(u + h)) for h in (-1e-6, 1e-6))
        for slope, a, b in zip(parametrization.tangent(u), low, high, strict=True):
            assert float(slope) == pytest.approx(float(b - a) / 2e-6, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["Linear-40", "Cosine-40"])
def test_over_the_angle_a_table_is_smooth(name: str) -> None:
    """Over t, with a kink at each node, the solver needs more than twice the evaluations and has ten times the error."""
    schedule, x = SCHEDULES[name], begin(SCHEDULES[name], 3)
    den, t_min = oracle(DATA, schedule, PredV()), schedule.t_min
    expected = DATA.flow(x, schedule, 1.0, t_min)
    got = ODE()(den, x, stop=t_min)
    error = float((got.x - expected).abs().max())

    def slope(t: torch.Tensor, y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        prediction, (d_alpha, d_sigma) = den(y, t), schedule.derivatives(t)
        return append_dims_like(d_alpha, y) * prediction.x0 + append_dims_like(d_sigma, y) * prediction.noise

    over_t = integrate(slope, x, 1.0, t_min)
    assert error < 1e-4
    assert float((over_t.y - expected).abs().max()) > 10 * error
    assert over_t.calls > 2 * got.nfe


# --------------------------------------------------------------------------------------------------- both directions


@pytest.mark.parametrize("name", ["SubVP", "VE", "Cosine"])
def test_encoding_and_decoding_between_noisy_times(name: str) -> None:
    """Encode 0.1 → 0.9 and decode: equal to 1e-3 at tolerance 1e-6."""
    schedule, x = SCHEDULES[name], torch.linspace(-1, 1, 24, dtype=D).reshape(3, *SHAPE)
    den = oracle(MIXTURE, schedule, PredV())
    latent = ODE(1e-6, 1e-6)(den, x, start=0.1, stop=0.9).x
    assert (latent - x).abs().mean() > 0.1
    back = ODE(1e-6, 1e-6)(den, latent, start=0.9, stop=0.1).x
    torch.testing.assert_close(back, x, rtol=0, atol=1e-3)


@pytest.mark.parametrize("schedule", [VP(), VE(), Cosine()])
def test_encoding_and_decoding_data(schedule: Schedule) -> None:
    """The step out of data is DDIM's, with ε̂ predicted from x_0 at the smallest time; decoding returns x_0 up to σ²."""
    x = torch.linspace(-0.5, 1.1, 24, dtype=D).reshape(3, *SHAPE)
    den = oracle(DATA, schedule, PredV())
    sampler = ODE()
    latent = sampler(den, x, start=0.0, stop=1.0).x
    t_min = torch.tensor(schedule.t_min, dtype=D)
    alpha, sigma = schedule.alpha_sigma(t_min)
    first = alpha * x + sigma * den(x, t_min).noise
    torch.testing.assert_close(latent, DATA.flow(first, schedule, schedule.t_min, 1.0), rtol=1e-3, atol=1e-3)
    back = sampler(den, latent).x
    assert float((back - x).abs().max()) < 10 * float(sigma) ** 2 + 1e-4


def test_ends_below_the_smallest_time() -> None:
    """A stop in (0, t_min) is reached; from there into data, and back, no ODE remains to be solved."""
    den, x = oracle(DATA, VP(), PredV()), begin(VP())
    sampler = ODE(1e-6, 1e-6)
    torch.testing.assert_close(sampler(den, x, stop=5e-4).x, DATA.flow(x, VP(), 1.0, 5e-4), rtol=0, atol=1e-4)
    got = sampler(den, x, start=5e-4)
    assert torch.equal(got.x, den(x, torch.tensor(5e-4, dtype=D)).x0)
    assert got.nfe == 1
    assert sampler(den, x, start=0.0, stop=5e-4).nfe == 1


# -------------------------------------------------------------------------------------------------- callback, dtypes


def test_the_callback_receives_states_and_the_networks_predictions() -> None:
    """The prediction solved from x and dx/dt is the network's. t is the time of the image farthest behind; the last report is
    the step into data."""
    seen: list[Any] = []
    den, x = oracle(DATA, VP(), PredV()), begin(VP(), 1)
    out = ODE(1e-4, 1e-4)(den, x, callback=lambda *report: seen.append(report)).x
    assert [i for i, *_ in seen] == list(range(len(seen)))
    for _, t, state, prediction in seen:  # one image, so that t is its time
        expected = den(state, torch.tensor(t, dtype=D))
        for got, true in zip(prediction[:3], expected[:3], strict=True):
            torch.testing.assert_close(got, true, rtol=1e-7, atol=1e-7)
    assert torch.equal(seen[0][2], x)
    assert seen[-1][1] == VP().t_min
    assert torch.equal(seen[-1][3].x0, out)
    many: list[Any] = []
    ODE(1e-4, 1e-4)(den, begin(VP(), 6).float().double(), start=0.1, stop=0.9, callback=lambda *r: many.append(r))
    assert [t for _, t, *_ in many] == sorted(t for _, t, *_ in many)


def test_a_float32_network_and_state() -> None:
    """The state is float64 internally, the network and the result stay float32; images within 1e-5 of those of float64."""
    net = torch.nn.Conv2d(2, 2, 1)
    torch.nn.init.constant_(net.weight, 0.1)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net

        def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            assert x.dtype == c.dtype == torch.float32
            return self.inner(x).tanh()

    seen: list[torch.Tensor] = []
    x = begin(VP()).float()
    got = ODE()(Denoiser(Net(), VP(), PredV()), x, callback=lambda i, t, x, p: seen.extend((x, p.x0, p.output))).x
    assert got.dtype == torch.float32
    assert {v.dtype for v in seen[:-3]} == {torch.float32}
    torch.testing.assert_close(got.double(), ODE()(Denoiser(Net(), VP(), PredV()), x.double()).x, rtol=0, atol=1e-5)


def test_clipping_is_part_of_the_equation() -> None:
    """With x̂_0 clipped to ±0.1 the result is a clipped x̂_0, and the callback receives clipped ones."""
    seen: list[Any] = []
    den = oracle(DATA, VP(), PredV(), clip=0.1)
    assert float(ODE(1e-3, 1e-3)(den, begin(VP()), callback=lambda *r: seen.append(r)).x.abs().max()) <= 0.1
    assert all(float(p.x0.abs().max()) < 0.1 + 1e-9 for *_, p in seen)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_nan_is_named_with_its_evaluation_and_time() -> None:
    """The network returns NaN for one image of three below t = 0.5; the message names this time, not that of the others."""
    inner = oracle(DATA, VP(), PredV())

    def network(x: torch.Tensor, c: torch.Tensor, bad: torch.Tensor) -> torch.Tensor:
        return torch.where((bad & (c < 0.5 * 999))[:, None, None, None], torch.nan, inner.network(x, c))

    den, x = Denoiser(network, VP(), PredV()), begin(VP(), 3)
    with pytest.raises(ValueError, match=r"NaN or infinity at evaluation \d+ of \d+, t=0\.[34]"):
        ODE()(den, x, condition={"bad": torch.tensor([False, True, False])})


@pytest.mark.parametrize("options", [{"rtol": 0.0}, {"atol": -1e-5}, {"budget": 0}])
def test_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"[ra]tol=.*: write a number in \[1e-14, 1\]|budget=0: write null, or an integer"
    ):
        ODE(**options)


def test_self_conditioning_is_refused() -> None:
    def network(x: torch.Tensor, c: torch.Tensor, previous: Any = None) -> torch.Tensor:
        return x

    network.self_conditioning = True  # type: ignore[attr-defined]
    den = Denoiser(network, VP(), PredV())
    for refused in (lambda: ODE().check(den), lambda: ODE()(den, begin(VP()))):
        with pytest.raises(ValueError, match="self-conditioning network needs: write sampler=ddim"):
            refused()

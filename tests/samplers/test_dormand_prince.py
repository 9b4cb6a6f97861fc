"""The adaptive integrator: steps equal to SciPy's for each row, independence of rows, order, memory and refusals."""

import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_lab.samplers.dormand_prince import STAGES, A, B, C, E, integrate

D = torch.float64
Y = torch.tensor([[1.0, 2.0], [0.1, -3.0], [0.0, 0.0], [50.0, 1e-3], [-1.0, 1e-9]], dtype=D)


def rotation(t: torch.Tensor, y: torch.Tensor, rows: Any = None) -> torch.Tensor:
    """A rotation with growth and decay over time."""
    return -5 * y * (3 * t[:, None]).sin() + torch.stack([y[:, 1], -y[:, 0]], 1)


def logistic(t: torch.Tensor, y: torch.Tensor, rows: Any = None) -> torch.Tensor:
    return y * (1 - y) * (1 + t[:, None])


def solve_with_scipy(
    f: Callable[..., torch.Tensor], y: torch.Tensor, start: float, stop: float, **tolerances: float
) -> Any:
    def one(t: float, y: np.ndarray) -> np.ndarray:
        return f(torch.tensor([t], dtype=D), torch.from_numpy(y)[None]).numpy()[0]

    return solve_ivp(one, (start, stop), y.numpy(), method="RK45", **tolerances)


def test_the_tableau_is_of_order_five() -> None:
    """Row sums are the nodes; Σ b c^k = 1/(k+1) for k ≤ 4; the error weights vanish for polynomials that order 4
    integrates exactly."""
    for c, row in zip(C, A, strict=True):
        assert sum(row) == pytest.approx(c, abs=1e-14)
    nodes = (0.0, *C)
    for k in range(5):
        assert sum(b * c**k for b, c in zip(B, nodes, strict=True)) == pytest.approx(1 / (k + 1), abs=1e-14)
    residuals = [sum(e * c**k for e, c in zip(E, (*nodes, 1.0), strict=True)) for k in range(5)]
    assert residuals[:4] == pytest.approx([0] * 4, abs=1e-14)
    assert abs(residuals[4]) > 1e-4


@pytest.mark.parametrize(("start", "stop"), [(0.0, 2.0), (2.0, 0.0), (1.0, 1e-3), (1e-5, 1.0)])
@pytest.mark.parametrize("f", [rotation, logistic])
@pytest.mark.parametrize(("rtol", "atol"), [(1e-3, 1e-6), (1e-5, 1e-5), (1e-8, 1e-10)])
def test_each_row_takes_scipys_steps(
    f: Callable[..., Any], start: float, stop: float, rtol: float, atol: float
) -> None:
    """All rows in one batch, each against SciPy alone: equal evaluations, values and accepted times.

    The times agree to 1e-7, because an error estimate near rtol = 1e-8 has eight significant digits.
    """
    y = torch.tensor([[0.01, 0.5], [0.9, 0.2], [0.0, 1.0]], dtype=D) if f is logistic else Y
    seen: dict[int, list[float]] = {i: [] for i in range(len(y))}

    def on_step(rows: torch.Tensor, t: torch.Tensor, y: torch.Tensor, slope: torch.Tensor) -> None:
        for i, time in zip(rows.tolist(), t.tolist(), strict=True):
            seen[i] += [time] if not seen[i] or seen[i][-1] != time else []

    got = integrate(f, y, start, stop, rtol=rtol, atol=atol, on_step=on_step)
    assert got.calls == int(got.evaluations.max())
    for i, row in enumerate(y):
        expected = solve_with_scipy(f, row, start, stop, rtol=rtol, atol=atol)
        assert int(got.evaluations[i]) == expected.nfev
        np.testing.assert_allclose(seen[i], expected.t, rtol=0, atol=1e-7)
        np.testing.assert_allclose(got.y[i], expected.y[:, -1], rtol=1e-10, atol=1e-12)


def test_a_row_does_not_depend_on_other_rows() -> None:
    """Alone, in another order, with rows that need more steps: equal to 1e-13, with the same evaluations."""
    expected = integrate(rotation, Y, 0.0, 0.5)
    assert len(set(expected.evaluations.tolist())) > 2
    for rows in ([0], [3, 1], [4, 3, 2, 1, 0], [2, 2, 3]):
        got = integrate(rotation, Y[rows], 0.0, 0.5)
        assert torch.equal(got.evaluations, expected.evaluations[rows])
        torch.testing.assert_close(got.y, expected.y[rows], rtol=1e-13, atol=1e-13)


def test_only_active_rows_are_evaluated() -> None:
    """`evaluations` counts the calls of f with each row of `rows`, and the batch shrinks as rows reach the end."""
    counts, sizes = torch.zeros(len(Y), dtype=torch.int64), []

    def f(t: torch.Tensor, y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        assert len(t) == len(y) == len(rows)
        counts[rows] += 1
        sizes.append(len(rows))
        return rotation(t, y)

    got = integrate(f, Y, 0.0, 2.0)
    assert torch.equal(counts, got.evaluations)
    assert len(sizes) == got.calls
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < len(Y)


def test_a_parameter_of_each_row_follows_it() -> None:
    """y' = −k_row y: rows of very different rates end at y e^(−k), to 1e-6 relative at rtol 1e-9."""
    rate = torch.tensor([0.0, 0.1, 30.0, 3.0], dtype=D)[:, None, None]
    y = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=D)[:, None, None].expand(4, 2, 3)
    got = integrate(lambda t, y, rows: -rate[rows] * y, y, 0.0, 1.0, rtol=1e-9, atol=1e-18)
    torch.testing.assert_close(got.y, y * (-rate).exp(), rtol=1e-6, atol=0)


def test_the_error_follows_the_tolerance() -> None:
    """y' = 5 cos(5t) y ends at exp(sin 5t): with a hundredth of the tolerance the error is less than a twentieth."""
    y = torch.ones(1, 1, dtype=D)
    error = []
    for tolerance in (1e-4, 1e-6, 1e-8, 1e-10):
        got = integrate(lambda t, y, rows: 5 * (5 * t[:, None]).cos() * y, y, 0.0, 1.3, rtol=tolerance, atol=tolerance)
        error.append(abs(float(got.y) - math.exp(math.sin(6.5))))
    assert all(coarse > 20 * fine for coarse, fine in itertools.pairwise(error)), error
    assert error[-1] < 1e-9


def test_integration_is_reversible() -> None:
    forward = integrate(rotation, Y, 0.0, 1.0, rtol=1e-10, atol=1e-12)
    back = integrate(rotation, forward.y, 1.0, 0.0, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(back.y, Y, rtol=1e-7, atol=1e-8)


def test_the_state_is_float64_and_the_argument_is_not_modified() -> None:
    single = Y.float()
    before = single.clone()
    got = integrate(rotation, single, 0.0, 1.0)
    assert got.y.dtype == D
    assert torch.equal(single, before)
    for same in (lambda t, y, rows: y, lambda t, y, rows: torch.ones_like(y)):  # f may return its argument
        end = integrate(same, Y, 0.0, 1.0, rtol=1e-9, atol=1e-9).y
        expected = Y * math.e if torch.equal(same(None, Y, None), Y) else Y + 1
        torch.testing.assert_close(end, expected, rtol=1e-7, atol=1e-8)


def test_an_empty_interval_or_batch_needs_no_evaluation() -> None:
    for y, stop in ((Y, 0.5), (Y[:0], 1.0)):
        got = integrate(lambda t, y, rows: y / 0, y, 0.5, stop)
        assert torch.equal(got.y, y)
        assert (got.calls, int(got.evaluations.sum())) == (0, 0)


class Alive(TorchDispatchMode):
    """Count the storages of a state's size or larger that are alive at the same time."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.live, self.most = size, set[int](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= self.size:
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                if key not in self.live:
                    self.live.add(key)
                    weakref.finalize(storage, self.live.discard, key)
        self.most = max(self.most, len(self.live))
        return out


def test_at_most_eight_states_are_alive() -> None:
    y = torch.linspace(-1, 2, 4000, dtype=D).reshape(2, 2000)
    other = torch.empty_like(y)
    with Alive(y.nbytes) as alive:
        integrate(lambda t, y, rows: torch.sin(y), y, 0.0, 0.5)
        assert 0 < alive.most <= 8, alive.most
    del other


# ------------------------------------------------------------------------------------------------------------- refusals


def test_the_limit_names_the_remedy() -> None:
    """A row may take `limit` evaluations, but not one more."""
    need = integrate(rotation, Y, 0.0, 2.0).calls
    assert integrate(rotation, Y, 0.0, 2.0, limit=need).calls == need
    with pytest.raises(
        ValueError, match=r"evaluations reached \d+\.\d% of the interval, .*raise the budget, or loosen rtol"
    ) as refused:
        integrate(rotation, Y, 0.0, 2.0, limit=need - 1)
    assert "\n" not in str(refused.value)
    assert (need - 2) % STAGES == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_derivative_that_is_not_finite_is_named_with_its_time(bad: float) -> None:
    def f(t: torch.Tensor, y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return torch.where((t > 0.5)[:, None] & (rows == 1)[:, None], bad, -y)

    with pytest.raises(ValueError, match="NaN or infinite between t=") as refused:
        integrate(f, Y[:3], 0.0, 1.0)
    low, high = (float(part.split()[0].rstrip(":")) for part in str(refused.value).split("t=")[1:3])
    assert 0 < low <= 0.5 < high <= 1
    assert torch.isfinite(integrate(f, Y[:1], 0.0, 1.0).y).all()
    with pytest.raises(ValueError, match=r"between t=1 and t=1"):
        integrate(f, Y[:3], 1.0, 0.0)


def test_a_diverging_solution_is_refused() -> None:
    """y' = y² from 1 is infinite at t = 1."""
    with pytest.raises(ValueError, match=r"50\.0% of the interval|between t=1 "):
        integrate(lambda t, y, rows: y.square(), torch.ones(1, 1, dtype=D), 0.0, 2.0)


@pytest.mark.parametrize(("rtol", "atol"), [(0.0, 1e-5), (1e-5, 0.0), (-1.0, 1.0), (math.nan, 1e-5)])
def test_tolerances_must_be_positive(rtol: float, atol: float) -> None:
    with pytest.raises(ValueError, match="rtol > 0 and atol > 0"):
        integrate(rotation, Y, 0.0, 1.0, rtol=rtol, atol=atol)


def test_a_derivative_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="shape of y"):
        integrate(lambda t, y, rows: y[:, :1], Y, 0.0, 1.0)

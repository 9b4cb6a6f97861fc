"""Every option of the four choices, from the command line: trained for a step, sampled from, fitted, measured."""

import json

import numpy as np
import pytest
from command import TINY, code, command, train, with_options

from diffusion_lab import composition

pytestmark = pytest.mark.integration


def options(group):
    return [o for o in composition.options(group) if o != "custom"]


CURVES = options("schedule")
ONE_STEP = ("trainer.max_steps=1", "data.batch_size=16")
QUICK = ("device=cpu", "n=3", "save_images=false")


def sampled(folder, capfd, *arguments):
    """samples.npz of a `sample.py` command that must succeed."""
    outcome = command("sample", [*QUICK, f"out={folder}", *arguments], capfd)
    assert outcome.code == 0, outcome.err
    with np.load(folder / "samples.npz") as file:
        return file["arr_0"]


@pytest.mark.parametrize(
    "choice",
    [
        *(f"schedule={o}" for o in CURVES),
        *(f"objective={o}" for o in options("objective")),
        *(f"time_sampler={o}" for o in options("time_sampler")),
        *(f"weighting={o}" for o in options("weighting")),
        "variance=learned",
    ],
)
def test_a_checkpoint_of_every_choice_trains_and_samples(choice, tmp_path, capfd):
    train(tmp_path / "run", *ONE_STEP, choice, capfd=capfd)
    sampler = () if choice == "variance=learned" else ("sampler=ddim",)
    images = sampled(tmp_path / "out", capfd, f"ckpt={tmp_path / 'run'}", *sampler, "sampler.steps=2")
    assert images.shape == (3, 8, 8, 1)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run without labels, with a fit of every optimal variance beside its checkpoint."""
    run = tmp_path_factory.mktemp("fitted") / "run"
    assert code("train", [*TINY, *ONE_STEP, f"hydra.run.dir={run}"]) == 0
    for kind, short in (("analytic", "nodes=5"), ("sn", "steps=2"), ("npr", "steps=2")):
        arguments = [f"ckpt={run}", f"variance={kind}", "n=2", short, "device=cpu"]
        assert code("fit_variance", [*arguments, f"hydra.run.dir={run.parent / kind}"]) == 0
    return run


@pytest.mark.parametrize("sampler", options("sampler"))
def test_every_sampler_samples(sampler, fitted, tmp_path, capfd):
    has_steps = "steps" in with_options("train", sampler=sampler)["sampler"]
    short = "sampler.steps=3" if has_steps else "sampler.rtol=0.5"
    assert sampled(tmp_path / "out", capfd, f"ckpt={fitted}", f"sampler={sampler}", short).shape == (3, 8, 8, 1)


VARIANCES = [o for o in options("variance") if o != "learned"]  # learned needs a run of its own


@pytest.mark.parametrize(
    ("variance", "sampler"),
    [(v, s) for v in VARIANCES for s in ("ddpm", "ddim") if (v, s) != ("fixed_large", "ddim")],
)
def test_every_variance_samples(variance, sampler, fitted, tmp_path, capfd):
    chosen = (f"ckpt={fitted}", f"variance={variance}", f"sampler={sampler}")
    assert sampled(tmp_path / "out", capfd, *chosen, "sampler.steps=3").shape == (3, 8, 8, 1)


def test_the_large_variance_with_ddim_is_refused(fitted, tmp_path, capfd):
    chosen = (f"ckpt={fitted}", "variance=fixed_large", "sampler=ddim", f"out={tmp_path / 'out'}")
    outcome = command("sample", [*QUICK, *chosen], capfd)
    assert outcome.code == 2
    assert "sampler=ddpm" in outcome.err


@pytest.mark.parametrize("variance", VARIANCES)
def test_every_variance_bounds_the_likelihood(variance, fitted, tmp_path, capfd):
    chosen = (f"ckpt={fitted}", f"variance={variance}")
    options = ["metrics=[nll]", "samplers=[ddpm]", "steps=[3]", "n=4", "device=cpu", f"out={tmp_path / 'nll'}"]
    outcome = command("evaluate", [*chosen, *options], capfd)
    assert outcome.code == 0, outcome.err
    (row,) = json.loads((tmp_path / "nll" / "metrics.json").read_text())
    assert np.isfinite(row["metrics"]["nll"])


@pytest.mark.parametrize(
    "grid", ["leading", "trailing", "linspace", "quadratic", "uniform_lambda", "karras", "optimal"]
)
def test_every_grid_samples(grid, fitted, tmp_path, capfd):
    chosen = ("sampler=ddpm", f"sampler.grid={grid}", "sampler.steps=3", "variance=analytic")
    assert sampled(tmp_path / "out", capfd, f"ckpt={fitted}", *chosen).shape == (3, 8, 8, 1)

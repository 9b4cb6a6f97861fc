"""Every option builds, works with every other or is refused before training with the reason; whole experiments build."""

import dataclasses
import functools
import itertools

import pytest
import torch
from command import composed, module, network, with_options
from omegaconf import OmegaConf

from diffusion_lab import composition
from diffusion_lab.commands.train import build
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.instantiation import CONF, instantiate
from diffusion_lab.losses import diffusion_loss
from diffusion_lab.noise import normal
from diffusion_lab.samplers import prior
from diffusion_lab.schedules import Schedule
from diffusion_lab.training.optim import build_optimizer


def node(group, option):
    """The resolved node of an option."""
    return with_options("train", **{group: option})[group]


@functools.cache
def built(group, option):
    """The object of an option."""
    return instantiate(node(group, option))


def options(group):
    return [o for o in composition.options(group) if o != "custom"]


CURVES: dict[str, Schedule] = {  # of the files alone, since they decide which cases exist
    o: instantiate(OmegaConf.to_container(OmegaConf.load(CONF / "schedule" / f"{o}.yaml"))) for o in options("schedule")
}
NOISE = normal((1, 8, 8), seed=0, index=torch.arange(4))


@functools.cache
def denoiser(schedule, objective):
    """A denoiser of the smallest network."""
    config = composed("train", "model.width=8", "model.multipliers=[1]")
    config = {**config, "schedule": node("schedule", schedule), "objective": node("objective", objective)}
    return Denoiser(network(config)[0], CURVES[schedule], built("objective", objective), clip=1.0)


def has_no_denoiser(schedule, objective):
    """PredMean needs steps; ε and EDM's output do not determine x_0 where α(1) = 0."""
    curve = CURVES[schedule]
    if objective == "pred_mean":
        return curve.steps is None
    return objective in ("pred_noise", "edm") and curve.zero_terminal_snr


REFUSED_PAIRS = [pair for pair in itertools.product(CURVES, options("objective")) if has_no_denoiser(*pair)]
PAIRS = [pair for pair in itertools.product(CURVES, options("objective")) if pair not in REFUSED_PAIRS]


@pytest.mark.parametrize(("schedule", "objective"), PAIRS)
def test_every_pair_trains_with_every_weighting(schedule, objective):
    t = torch.tensor([0.001, 0.3, 0.7, 1.0], dtype=torch.float64)
    whole, outputs = denoiser(schedule, objective), []

    def network(x, c):
        """Evaluated once: x_t and t are the same for every weighting and loss."""
        if not outputs:
            outputs.append(whole.network(x, c))
        return outputs[0]

    den = dataclasses.replace(whole, network=network)
    for weighting, loss in itertools.product(options("weighting"), options("loss")):
        weight, error = built("weighting", weighting), built("loss", loss)
        step = diffusion_loss(den, weight, error, NOISE.clamp(-1, 1), NOISE.flip(0), t)
        assert bool(step.weighted.isfinite().all()), (weighting, loss)
        assert bool((step.weighted[:3] > 0).all()), (weighting, loss)
        assert step.weighted[3] >= 0, (weighting, loss)  # where α(1) = 0 a weight on ε is 0 in other coordinates


@pytest.mark.parametrize(("schedule", "objective"), REFUSED_PAIRS)
def test_a_pair_without_a_denoiser_is_refused(schedule, objective):
    with pytest.raises(ValueError, match="write objective=pred_v"):
        denoiser(schedule, objective)


def short(option):
    """The sampler of an option with four steps, or with loose tolerances where it chooses its steps itself."""
    chosen = node("sampler", option)
    few = {"steps": 4} if "steps" in chosen else {"rtol": 0.01, "atol": 0.01} if "rtol" in chosen else {}
    return instantiate({**chosen, **few})


def has_no_start(schedule, sampler):
    """The drift of the reverse SDE is infinite where α(1) = 0."""
    return sampler == "euler_maruyama" and CURVES[schedule].zero_terminal_snr


REFUSED_RUNS = [pair for pair in itertools.product(CURVES, options("sampler")) if has_no_start(*pair)]
RUNS = [pair for pair in itertools.product(CURVES, options("sampler")) if pair not in REFUSED_RUNS]


@pytest.mark.parametrize(("schedule", "sampler"), RUNS)
def test_every_sampler_runs_on_every_curve(schedule, sampler):
    d = denoiser(schedule, "pred_v")
    samples = short(sampler)(d, prior(d.schedule, NOISE))
    assert bool((samples.x.abs() <= 1).all())
    assert samples.nfe > 0


@pytest.mark.parametrize(("schedule", "sampler"), REFUSED_RUNS)
def test_a_sampler_without_a_start_is_refused(schedule, sampler):
    with pytest.raises(ValueError, match="write sampler=reverse_diffusion"):
        short(sampler).check(denoiser(schedule, "pred_v"))


def test_the_refused_combinations_are_few_and_exist():
    assert {("flow", "pred_noise"), ("flow", "edm"), ("vp", "pred_mean")} <= set(REFUSED_PAIRS)
    assert ("flow", "euler_maruyama") in REFUSED_RUNS
    assert len(REFUSED_PAIRS) < len(PAIRS)


def test_the_large_variance_is_for_ancestral_sampling_alone():
    with pytest.raises(ValueError, match="write sampler=ddpm"):
        instantiate(composed("train", "sampler=ddim", "variance=fixed_large")["sampler"])


def test_zero_terminal_snr_refuses_pred_noise_and_says_what_to_write():
    config = composed("train", "schedule.zero_terminal_snr=true")
    with pytest.raises(ValueError, match="objective=pred_v"):
        Denoiser(
            torch.nn.Identity(),
            instantiate(config["schedule"]),
            instantiate({"_target_": "diffusion_lab.objectives.PredNoise"}),
        )


@pytest.mark.parametrize("name", composition.options("experiment"))
def test_every_experiment_builds(name):
    config = composed("train", f"experiment={name}")
    first = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()[:6]
    assert any(f"experiment={name}" in line for line in first)
    build.check_nodes(config)
    with torch.device("meta"):
        net, condition, filled = network(config)
    built = build.module(filled, net, condition, {})
    assert build.callbacks(config, CONF)
    instantiate(config["sampler"]).check(built.denoiser)


@pytest.mark.parametrize(
    ("precision", "clipping", "fused"),
    [
        ("32-true", 1.0, True),
        ("bf16-mixed", 1.0, False),
        ("bf16-mixed", 0.0, True),
        ("16-mixed", 0.0, True),
        ("16-mixed", 1.0, False),
    ],
)
def test_the_optimiser_is_fused_wherever_that_works(precision, clipping, fused):
    config = composed("train", f"trainer.precision={precision}", f"trainer.gradient_clip_val={clipping}")
    built = module(config)
    optimizer = build_optimizer(built.optimizer_config, built.network.parameters())
    assert optimizer.defaults["fused"] is fused

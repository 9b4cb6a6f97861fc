"""Every option builds, works with every other or is refused before training with the reason; whole experiments build."""

import functools
import itertools

import pytest
import torch
from command import composed, module, network

from diffusion_lab import composition
from diffusion_lab.commands.train import build
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.instantiation import CONF, instantiate
from diffusion_lab.losses import diffusion_loss
from diffusion_lab.noise import normal
from diffusion_lab.samplers import prior
from diffusion_lab.training.optim import build_optimizer

BUILT = (
    "schedule",
    "objective",
    "weighting",
    "loss",
    "time_sampler",
    "variance",
    "sampler",
    "condition",
    "lr_scheduler",
    "clip",
    "optimizer",
)


# a class of the user's; a variance that fit_variance.py fills; conditions of data that the digits do not have
UNBUILT = ("custom", "analytic", "tensors", "attributes", "label")


@pytest.mark.parametrize(
    ("group", "option"), [(g, o) for g in BUILT for o in composition.options(g) if o not in UNBUILT]
)
def test_every_option_builds(group, option):
    assert instantiate(composed("train", f"{group}={option}")[group], group) is not None


def options(group):
    return [o for o in composition.options(group) if o != "custom"]


CURVES = options("schedule")


@functools.cache
def denoiser(schedule, objective):
    """Of the smallest network."""
    config = composed(
        "train", f"schedule={schedule}", f"objective={objective}", "model.width=8", "model.multipliers=[1]"
    )
    return Denoiser(network(config)[0], instantiate(config["schedule"]), instantiate(config["objective"]), clip=1.0)


NOISE = normal((1, 8, 8), seed=0, index=torch.arange(4))


@pytest.mark.parametrize("objective", options("objective"))
@pytest.mark.parametrize("schedule", CURVES)
def test_every_pair_trains_with_every_weighting_or_is_refused(schedule, objective):
    continuous = schedule in ("vp", "sub_vp", "ve", "edm", "flow")
    if (continuous and objective == "pred_mean") or (schedule == "flow" and objective in ("pred_noise", "edm")):
        with pytest.raises(ValueError, match="write objective=pred_v"):
            denoiser(schedule, objective)
        return
    t = torch.tensor([0.001, 0.3, 0.7, 1.0], dtype=torch.float64)
    for weighting, loss in itertools.product(options("weighting"), options("loss")):
        chosen = composed("train", f"weighting={weighting}", f"loss={loss}")
        weight, error = instantiate(chosen["weighting"]), instantiate(chosen["loss"])
        step = diffusion_loss(denoiser(schedule, objective), weight, error, NOISE.clamp(-1, 1), NOISE.flip(0), t)
        assert bool(step.weighted.isfinite().all())
        assert bool((step.weighted[:3] > 0).all())
        assert step.weighted[3] >= 0  # where α(1) = 0 a weight on ε is 0 in other coordinates


@pytest.mark.parametrize("sampler", options("sampler"))
@pytest.mark.parametrize("schedule", CURVES)
def test_every_sampler_runs_on_every_curve(schedule, sampler):
    steps = ("sampler.steps=4",) if "steps" in composed("train", f"sampler={sampler}")["sampler"] else ()
    chosen = instantiate(composed("train", f"sampler={sampler}", *steps)["sampler"])
    d = denoiser(schedule, "pred_v")
    if (schedule, sampler) == ("flow", "euler_maruyama"):  # its drift is infinite where α = 0
        with pytest.raises(ValueError, match="write sampler=reverse_diffusion"):
            chosen.check(d)
        return
    samples = chosen(d, prior(d.schedule, NOISE))
    assert bool((samples.x.abs() <= 1).all())
    assert samples.nfe > 0


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

"""Every option builds, works with every other or is refused before training with the reason; whole experiments build."""

import itertools

import pytest
import torch
from command import composed

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.losses import diffusion_loss
from diffusion_lab.noise import normal
from diffusion_lab.runs import build, options
from diffusion_lab.runs.instantiate import instantiate
from diffusion_lab.samplers import prior

BUILT = (
    "schedule",
    "objective",
    "weighting",
    "loss",
    "times",
    "variance",
    "sampler",
    "condition",
    "rate",
    "clip",
    "optimizer",
)


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in BUILT for o in options.group_options(g) if o != "own"])
def test_every_option_builds(group, option):
    node = composed("train", f"{group}={option}").get(group)
    assert (instantiate(node) is None) == (option == "none" and group == "clip")


@pytest.mark.parametrize("objective", options.group_options("objective"))
@pytest.mark.parametrize("schedule", [o for o in options.group_options("schedule") if o != "own"])
def test_every_pair_trains_and_samples_with_every_sampler_and_weighting(schedule, objective):
    config = composed(
        "train", f"schedule={schedule}", f"objective={objective}", "model.width=8", "model.multipliers=[1]"
    )
    network = build.network(config)
    denoiser = Denoiser(network, instantiate(config["schedule"]), instantiate(config["objective"]), clip=1.0)
    index = torch.arange(4)
    noise = normal((1, 8, 8), seed=0, index=index)
    t = torch.tensor([0.001, 0.3, 0.7, 1.0], dtype=torch.float64)
    for weighting, loss in itertools.product(options.group_options("weighting"), options.group_options("loss")):
        chosen = composed("train", f"weighting={weighting}", f"loss={loss}")
        weight, error = instantiate(chosen["weighting"]), instantiate(chosen["loss"])
        step = diffusion_loss(denoiser, weight, error, noise.clamp(-1, 1), noise.flip(0), t)
        assert bool(step.weighted.isfinite().all())
        assert bool((step.weighted > 0).all())
    for sampler, variance in itertools.product(options.group_options("sampler"), options.group_options("variance")):
        asked = ["schedule.steps=1000", f"sampler={sampler}", f"variance={variance}", "sampler.steps=4"]
        if (sampler, variance) == ("ddim", "fixed_large"):
            with pytest.raises(ValueError, match="write sampler=ddpm"):
                instantiate(composed("train", *asked)["sampler"])
            continue
        x = instantiate(composed("train", *asked)["sampler"])(denoiser, prior(denoiser.schedule, noise))
        assert bool((x.abs() <= 1).all())


def test_zero_terminal_snr_refuses_pred_noise_and_says_what_to_write():
    config = composed("train", "schedule.zero_terminal_snr=true")
    with pytest.raises(ValueError, match="objective=pred_v"):
        Denoiser(
            torch.nn.Identity(),
            instantiate(config["schedule"]),
            instantiate({"_target_": "diffusion_lab.objectives.PredNoise"}),
        )


@pytest.mark.parametrize("name", options.group_options("experiment"))
def test_every_experiment_builds(name):
    config = composed("train", f"experiment={name}")
    first = (options.CONF / "experiment" / f"{name}.yaml").read_text().splitlines()[:6]
    assert any(f"experiment={name}" in line for line in first)
    with torch.device("meta"):
        network = instantiate(config["model"])
    module = build.module(config, network, {})
    assert build.callbacks(config, options.CONF)
    instantiate(config["sampler"]).check(module.denoiser)


@pytest.mark.parametrize(
    ("precision", "clipping", "fused"),
    [("32-true", 1.0, True), ("bf16-mixed", 1.0, True), ("16-mixed", 0.0, True), ("16-mixed", 1.0, False)],
)
def test_the_optimiser_is_fused_wherever_that_works(precision, clipping, fused):
    config = composed("train", f"trainer.precision={precision}", f"trainer.gradient_clip_val={clipping}")
    module = build.module(config, build.network(config), {})
    assert module.configure_optimizers()["optimizer"].defaults["fused"] is fused

"""Any optimizer and scheduler of torch by `_target_`: trained, resumed, compared with updates and rates made by hand."""

import warnings

import pytest
import torch
from command import TINY, command, composed, module, train

from diffusion_lab.training.optim import build_optimizer
from training.recorders import Modes, Rates

RECORD = "+callbacks.rates._target_=training.recorders.Rates"
KEEP = ("+callbacks.keep._target_=training.recorders.Keep", "callbacks.checkpoints.every=3", RECORD)
TRUST = "trust=[training.recorders,schedulefree]"
CURVES = "torch.optim.lr_scheduler."


def custom(group, target, *arguments):
    return (f"{group}=custom", f"{group}._target_={target}", *(f"+{group}.{argument}" for argument in arguments))


def state(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def resumed(tmp_path, capfd, *options, again=()):
    """A run of six steps, and one that continues its checkpoint of step 3: their last checkpoints, and the rates of both."""
    whole, second = tmp_path / "whole", tmp_path / "second"
    train(whole, *KEEP, "trainer.max_steps=6", *options, capfd=capfd)
    rates = list(Rates.rates.values())
    train(second, f"ckpt={whole / 'checkpoints' / 'third.ckpt'}", TRUST, *again, capfd=capfd)
    return state(whole), state(second), rates, list(Rates.rates.values())


def assert_equal(one, two):
    assert one["global_step"] == two["global_step"]
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name


# optimizers -----------------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "RMSprop": ("lr=1e-3", "momentum=0.5"),
    "NAdam": ("lr=1e-3",),
    "LBFGS": ("lr=0.1", "max_iter=2"),
    "Muon": ("lr=1e-3",),
}


@pytest.mark.integration
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_torch_trains_and_resumes_bit_for_bit(name, tmp_path, capfd):
    chosen = custom("optimizer", f"torch.optim.{name}", *OPTIMIZERS[name])
    whole, second, rates, _ = resumed(tmp_path, capfd, *chosen, "model.channels_last=true")
    assert_equal(whole, second)
    assert set(rates) == {float(OPTIMIZERS[name][0].split("=")[1])}


@pytest.mark.parametrize("option", ["adamw", "adam", "sgd", "muon"])
def test_every_option_trains(option, tmp_path, capfd):
    train(tmp_path / "run", f"optimizer={option}", "trainer.max_steps=1", capfd=capfd)
    (saved,) = state(tmp_path / "run")["optimizer_states"]
    assert saved["param_groups"][0]["lr"] == composed("train", f"optimizer={option}")["optimizer"]["lr"]
    assert saved["param_groups"][0].get("fused") is (None if option == "muon" else True)


REFUSED = {
    custom("optimizer", "torch.optim.Adagrad", "foo=1"): "Adagrad has no argument foo",
    custom("optimizer", "torch.optim.RMSprop", "fused=true"): "RMSprop has no argument fused",
    custom("optimizer", "torch.nn.Linear"): "torch.nn.Linear is not an optimizer",
    custom("optimizer", "torch.optim.Nothing"): "cannot be imported",
    custom("optimizer", "torch.optim.Adagrad", "lr=-1"): "Invalid learning rate",
    custom("optimizer", "torch.optim.SparseAdam", "weight_decay=0"): "no argument weight_decay",
    ("optimizer=custom",): "optimizer._target_=",
    custom("lr_scheduler", "torch.nn.Linear"): "torch.nn.Linear is not a scheduler",
    custom("lr_scheduler", CURVES + "StepLR"): "+lr_scheduler.step_size=",
    custom("lr_scheduler", CURVES + "StepLR", "step_size=2", "foo=1"): "StepLR has no argument foo",
    custom("lr_scheduler", CURVES + "LambdaLR", "lr_lambda=1.0"): "is not a function",
    custom("lr_scheduler", CURVES + "SequentialLR"): "lr_scheduler.warmup=",
    custom("lr_scheduler", CURVES + "OneCycleLR", "max_lr=1e-2", "total_steps=3"): "lr_scheduler.total_steps=6",
    custom("lr_scheduler", CURVES + "ReduceLROnPlateau"): "validation.every=500",
    (*custom("lr_scheduler", CURVES + "ReduceLROnPlateau"), "validation.every=2", "data.val=0"): "data.val=0.1",
    ("lr_scheduler.warmup=-1",): "lr_scheduler.warmup=-1: write an integer in [0, 10000000]",
}


@pytest.mark.parametrize(("arguments", "remedy"), REFUSED.items(), ids=lambda value: str(value)[-40:])
def test_what_cannot_be_is_one_line_and_leaves_no_folder(arguments, remedy, tmp_path, capfd):
    tiny = [a for a in TINY if not (a.startswith("lr_scheduler=") and any("lr_scheduler=" in b for b in arguments))]
    run = tmp_path / "run"
    code, _, err = command("train", [*tiny, "trainer.max_steps=6", *arguments, f"hydra.run.dir={run}"], capfd)
    assert code == 2, err
    assert err.count("\n") == 1
    assert remedy in err
    assert not run.exists()


def test_another_optimizer_does_not_continue_a_state(tmp_path, capfd):
    train(tmp_path / "run", "trainer.max_steps=2", capfd=capfd)
    again = [f"ckpt={tmp_path / 'run'}", "optimizer=sgd", "trainer.max_steps=4", f"hydra.run.dir={tmp_path / 'again'}"]
    code, _, err = command("train", again, capfd)
    assert code == 2, err
    assert "write init=" in err
    assert not (tmp_path / "again").exists()


def test_muon_updates_matrices_and_adamw_all_else(tmp_path, capfd):
    """One update against torch's two optimizers applied by hand to the same weights and gradients."""
    chosen = ("optimizer=muon", "optimizer.lr=0.02", "optimizer.weight_decay=0.1", "optimizer.momentum=0.9")
    train(tmp_path / "run", *chosen, RECORD, "trainer.max_steps=1", capfd=capfd)
    first = Rates.first
    by_hand = {name: torch.nn.Parameter(value.clone()) for name, value in first["before"].items()}
    matrices = [p for p in by_hand.values() if p.ndim == 2]
    others = [p for p in by_hand.values() if p.ndim != 2]
    assert matrices
    assert others
    for name, p in by_hand.items():
        p.grad = first["gradients"][name].clone()
    torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.9).step()
    torch.optim.AdamW(others, lr=0.02, weight_decay=0.1).step()
    for name, p in by_hand.items():
        torch.testing.assert_close(first["after"][name], p.detach(), rtol=1e-6, atol=1e-7)
    assert all(
        not torch.equal(first["after"][name], first["before"][name]) for name, p in by_hand.items() if p.grad.any()
    )


# schedule-free ----------------------------------------------------------------------------------------------------------------

FREE = custom("optimizer", "schedulefree.AdamWScheduleFree", "lr=1e-2", "warmup_steps=2")
MODES = "+callbacks.modes._target_=training.recorders.Modes"


@pytest.mark.integration
def test_a_schedule_free_run_continues_from_the_weights_that_it_trains(tmp_path, capfd):
    # no average, so that what is validated and drawn is the network itself
    drawn = "callbacks.samples={_target_: diffusion_lab.training.callbacks.Samples, folder: samples, every: 2, n: 2, sampler: "
    drawn += "{_target_: diffusion_lab.samplers.DDIM, steps: 2}, clip: 1.0}"
    options = (*FREE, MODES, drawn, "callbacks.ema=null", "validation.every=2", "callbacks.checkpoints.every=3")
    whole, second, *_ = resumed(tmp_path, capfd, *options)
    assert {hook: {mode for (h, _), mode in Modes.seen.items() if h == hook} for hook, _ in Modes.seen} == {
        "train": {True}, "validation": {False}, "save": {False},
    }  # fmt: skip
    for name, value in whole["state_dict"].items():
        torch.testing.assert_close(second["state_dict"][name], value, rtol=1e-6, atol=1e-6)
    (one,), (two,) = whole["optimizer_states"], second["optimizer_states"]
    for group in (one["param_groups"][0], two["param_groups"][0]):
        assert (group["k"], group["train_mode"]) == (6, False)
    assert one["param_groups"][0]["weight_sum"] == pytest.approx(two["param_groups"][0]["weight_sum"], rel=1e-12)


def test_the_last_checkpoint_of_a_schedule_free_run_holds_the_evaluation_weights(tmp_path, capfd):
    train(tmp_path / "run", *FREE, MODES, "trainer.max_steps=4", capfd=capfd)
    optimizer, stored = Modes.optimizer, list(state(tmp_path / "run")["state_dict"].values())
    trained = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    assert optimizer.param_groups[0]["train_mode"]
    optimizer.eval()
    evaluated = [p.detach() for p in optimizer.param_groups[0]["params"]]
    for value, x, y in zip(stored, evaluated, trained, strict=True):
        torch.testing.assert_close(value, x, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(value, y, rtol=1e-6, atol=1e-6)


def test_an_exception_in_the_validation_leaves_the_training_weights(tmp_path, capfd):
    arguments = (*TINY, *FREE, MODES, "+callbacks.modes.fail=true", "validation.every=2", "trainer.max_steps=4")
    assert command("train", [*arguments, f"hydra.run.dir={tmp_path / 'run'}"], capfd).code == 1
    assert Modes.seen["validation", 2] is False
    assert Modes.optimizer.param_groups[0]["train_mode"] is True


# learning rates -------------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "StepLR": ({"step_size": 2, "gamma": 0.5}, 0),
    "ExponentialLR": ({"gamma": 0.8}, 2),
    "CosineAnnealingLR": ({"T_max": 6}, 0),
    "OneCycleLR": ({"max_lr": 0.02, "total_steps": 8}, 0),
}


def rates_by_hand(name, arguments, warmup, lr, steps=6):
    """The rate of each step: torch's own scheduler on a weight of its own, after a linear warm-up."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=lr)
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **arguments)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return [*((s + 1) / warmup * rates[0] for s in range(warmup)), *rates][:steps]


@pytest.mark.integration
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_rate_of_each_step_is_the_one_by_hand_and_resuming_continues_it(name, tmp_path, capfd):
    arguments, warmup = SCHEDULERS[name]
    chosen = custom("lr_scheduler", CURVES + name, *(f"{k}={v}" for k, v in arguments.items()))
    whole, second, rates, rest = resumed(tmp_path, capfd, *chosen, f"lr_scheduler.warmup={warmup}", "optimizer.lr=0.01")
    assert_equal(whole, second)
    assert rates == pytest.approx(rates_by_hand(name, arguments, warmup, 0.01), rel=1e-9)
    assert rest == rates[3:]


@pytest.mark.integration
def test_what_is_changed_on_resuming_takes_effect(tmp_path, capfd):
    """The rate is that of a run which always had the new values."""
    step = custom("lr_scheduler", CURVES + "StepLR", "step_size=2", "gamma=0.5")
    changes = {
        ("lr_scheduler=linear", "lr_scheduler.warmup=2"): {
            ("optimizer.lr=0.04",): [0.04 * (1 - s / 4) for s in (1, 2, 3)],
            (*step, "lr_scheduler.warmup=0", "+lr_scheduler.gamma=0.1"): [0.001, 0.0001, 0.0001],
        },
        step: {
            ("optimizer.lr=0.04",): [0.02, 0.01, 0.01],
            ("+lr_scheduler.gamma=0.1", "optimizer.weight_decay=0.2"): [0.001, 0.0001, 0.0001],
            ("lr_scheduler=constant", "lr_scheduler.warmup=0"): [0.01, 0.01, 0.01],
        },
    }
    for i, (chosen, cases) in enumerate(changes.items()):
        first = tmp_path / f"first{i}"
        train(first, *KEEP, *chosen, "optimizer.lr=0.01", "trainer.max_steps=3", capfd=capfd)
        for j, (again, expected) in enumerate(cases.items()):
            second = tmp_path / f"second{i}{j}"
            train(second, f"ckpt={first}", TRUST, "trainer.max_steps=6", *again, capfd=capfd)
            assert list(Rates.rates.values()) == pytest.approx(expected, rel=1e-6), again
            (group,) = state(second)["optimizer_states"][0]["param_groups"]
            assert group["weight_decay"] == (0.2 if "optimizer.weight_decay=0.2" in again else 0.01)


PLATEAU = custom("lr_scheduler", CURVES + "ReduceLROnPlateau", "patience=0", "factor=0.5")
STUCK = (
    "+lr_scheduler.threshold=10.0",
    "validation.every=1",
    "optimizer.lr=0.01",
)  # by which nothing is an improvement


@pytest.mark.integration
def test_a_plateau_lowers_the_rate_after_validations_and_resumes(tmp_path, capfd):
    whole, second, rates, rest = resumed(tmp_path, capfd, *PLATEAU, *STUCK, "lr_scheduler.warmup=2")
    assert_equal(whole, second)
    (_, one), (_, two) = whole["lr_schedulers"], second["lr_schedulers"]
    assert one == two
    # every validation halves the rate, and the warm-up doubles it after the first step
    assert rates == pytest.approx([0.005, 0.005, 0.0025, 0.00125, 0.000625, 0.0003125], rel=1e-6)
    assert rest == rates[3:]
    ckpt = f"ckpt={tmp_path / 'whole' / 'checkpoints' / 'third.ckpt'}"
    train(tmp_path / "more", ckpt, TRUST, "optimizer.lr=0.02", capfd=capfd)
    assert list(Rates.rates.values()) == pytest.approx([0.0025, 0.00125, 0.000625], rel=1e-6)


@pytest.mark.integration
def test_a_plateau_goes_by_another_metric(tmp_path, capfd):
    options = (*PLATEAU, *STUCK, "validation.every=2", "trainer.max_steps=6")
    train(tmp_path / "run", *options, "+lr_scheduler.monitor=train/loss", RECORD, capfd=capfd)
    assert list(Rates.rates.values()) == pytest.approx([0.01] * 2 + [0.005] * 2 + [0.0025] * 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tmp_path / "none", *options, "+lr_scheduler.monitor=no/such", RECORD, capfd=capfd)
    lines = [str(w.message) for w in caught if "ReduceLROnPlateau" in str(w.message)]
    assert len(lines) == 3
    assert "no/such is not logged up to step 2" in lines[0]
    assert "train/loss" in lines[0]
    assert set(Rates.rates.values()) == {0.01}


def test_fused_is_passed_to_constructors_that_have_it():
    for name, fused in (("Adagrad", True), ("RMSprop", None), ("LBFGS", None)):
        config = composed("train", *custom("optimizer", f"torch.optim.{name}"))
        built = module(config)
        assert build_optimizer(built.optimizer_config, built.network.parameters()).defaults.get("fused") is fused

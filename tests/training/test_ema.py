"""Averages compared with a reference implementation, and the failures of other implementations."""

import pytest
import pytorch_lightning as pl
import torch
from command import composed, module, train

from diffusion_lab.commands.train import build
from diffusion_lab.commands.train.trainer import build_trainer
from diffusion_lab.losses import diffusion_loss
from diffusion_lab.training.callbacks import EMA
from diffusion_lab.training.draws import validation_draw

SMALL = (
    "model.width=8",
    "model.multipliers=[1]",
    "logger=csv",
    "callbacks.progress=null",
    "callbacks.samples=null",
    "trainer=cpu",
)


class ByHand(pl.Callback):
    """d θ̄ + (1 − d) θ, tensor by tensor in float64, from the live weights after every optimizer step."""

    def __init__(self, decay, warmup):
        self.decay, self.warmup, self.n = decay, warmup, 0

    def on_fit_start(self, trainer, pl_module):
        self.average = {k: v.detach().double().clone() for k, v in pl_module.network.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.n:
            return
        self.n = trainer.global_step
        d = min(self.decay, (1 + self.n) / (10 + self.n)) if self.warmup else self.decay
        for k, v in pl_module.network.named_parameters():
            self.average[k] = d * self.average[k] + (1 - d) * v.detach().double()


def _fit(tmp_path, hooks, *overrides, steps=6):
    config = composed(
        "train", *SMALL, f"trainer.max_steps={steps}", "validation.every=2", "data.batch_size=16", *overrides
    )
    built = module(config)
    trainer = build_trainer(config, tmp_path, [], hooks)
    trainer.fit(built, datamodule=build.data(config))
    return trainer, built


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_is_the_one_written_by_hand(tmp_path, warmup, accumulate):
    """Through validation and accumulation; several decays at once."""
    ema = EMA([0.7, 0.95], warmup=warmup)
    references = [ByHand(0.7, warmup), ByHand(0.95, warmup)]
    _fit(tmp_path, [*references, ema], f"trainer.accumulate_grad_batches={accumulate}")
    for reference in references:
        network = ema.networks[reference.decay]
        for k, v in network.named_parameters():
            assert torch.allclose(v.double(), reference.average[k], rtol=1e-5, atol=1e-7)


def test_averages_are_apart_from_the_live_network(tmp_path):
    """Not in the module's state, not trained, always in eval mode; not even an exception in validation can mix them."""

    class Fails(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            self.live = {k: v.clone() for k, v in pl_module.network.state_dict().items()}
            raise RuntimeError("a callback of the user")

    ema, fails = EMA(0.5), Fails()
    config = composed(
        "train", *SMALL, "trainer.max_steps=6", "validation.every=2", "data.batch_size=16", "model.dropout=0.5"
    )
    built = module(config)
    trainer = build_trainer(config, tmp_path, [], [ema, fails])
    with pytest.raises(RuntimeError, match="a callback of the user"):
        trainer.fit(built, datamodule=build.data(config))
    average = ema.networks[0.5]
    assert not average.training
    assert not any(p.requires_grad for p in average.parameters())
    assert {k.split(".")[0] for k in built.state_dict()} == {"network"}
    trained = {id(p) for p in built.parameters()}
    assert not trained & {id(p) for p in average.parameters()}
    for k, v in built.network.state_dict().items():
        assert torch.equal(v, fails.live[k])
    assert any(not torch.equal(v, fails.live[k]) for k, v in average.state_dict().items())


def _validation_loss(module, denoiser, batch, draw, images):
    t, noise, _, condition = validation_draw(denoiser, module.condition, batch, images=images, draw=draw)
    return diffusion_loss(
        denoiser, module.weighting, module.loss, batch["image"], noise, t, learned=module.learned_variance, **condition
    )


def test_validation_uses_the_average_whatever_the_order_of_callbacks(tmp_path):
    """val/loss equals the loss of the averaged network computed apart, with the average listed first or last."""

    class Nothing(pl.Callback):
        pass

    values = []
    for hooks in ([EMA(0.9), Nothing()], [Nothing(), EMA(0.9)]):
        trainer, module = _fit(tmp_path, hooks, steps=4)
        ema = next(h for h in hooks if isinstance(h, EMA))
        denoiser = module.denoisers()["0.9"]
        assert denoiser.network is ema.networks[0.9]
        total = count = 0.0
        for batch in trainer.datamodule.val_dataloader():
            for draw in range(module.validation_draws):
                loss = _validation_loss(module, denoiser, batch, draw, trainer.datamodule.size("val"))
                total, count = total + float(loss.weighted.double().sum()), count + len(loss.weighted)
        values.append(float(trainer.callback_metrics["val/loss"]))
        assert values[-1] == pytest.approx(total / count, rel=1e-6)
    assert values[0] == values[1]


def test_the_fixed_validation_loss_does_not_depend_on_the_batch_size(tmp_path):
    one, _ = _fit(tmp_path, [EMA(0.9)], steps=2)
    two, _ = _fit(tmp_path, [EMA(0.9)], "data.eval_batch_size=37", steps=2)
    assert float(two.callback_metrics["val/loss"]) == pytest.approx(float(one.callback_metrics["val/loss"]), rel=1e-6)


def test_another_decay_of_a_resumed_run_starts_from_the_nearest_stored_average(tmp_path, capfd):
    """After one more step with d = 0: θ̄ = θ; with d ≈ 1: the stored average."""
    train(tmp_path / "first", "trainer.max_steps=3", "callbacks.ema.decay=[0.5,0.9]", capfd=capfd)
    stored = torch.load(tmp_path / "first" / "checkpoints" / "last.ckpt", weights_only=True)["ema"]
    again = [f"ckpt={tmp_path / 'first'}", "trainer.max_steps=4", "callbacks.ema.warmup=false"]
    out = train(tmp_path / "b", *again, "callbacks.ema.decay=[0.999999,0]", capfd=capfd).out
    assert "callbacks.ema.decay=0.999999 starts from the stored average 0.9" in out
    state = torch.load(tmp_path / "b" / "checkpoints" / "last.ckpt", weights_only=True)
    for name, average in state["ema"]["0.999999"].items():
        torch.testing.assert_close(average, stored["0.9"][name], rtol=1e-4, atol=1e-6)
        assert torch.equal(state["ema"]["0"][name], state["state_dict"][f"network.{name}"])


@pytest.mark.parametrize("decay", [1.0, -0.1, [], [0.9, 0.9]])
def test_decays_out_of_range_are_refused(decay):
    with pytest.raises(ValueError, match=r"callbacks\.ema\.decay"):
        EMA(decay)

"""The LightningModule: what one step of training and of validation computes."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from diffusion_lab.conditions import Condition
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.losses import PointwiseLoss, chain_steps, diffusion_loss
from diffusion_lab.noise import Stream, word
from diffusion_lab.objectives import Objective
from diffusion_lab.schedules import Schedule, to_device
from diffusion_lab.time_samplers import TimeSampler
from diffusion_lab.training.draws import training_draw, validation_draw
from diffusion_lab.training.optim import (
    OptimizerConfig,
    ReduceLROnPlateau,
    Resumption,
    TorchSchedule,
    build_optimizer,
    evaluation_weights,
    hyperparameters,
    lr_schedulers,
    plateau_arguments,
    state_keys,
    switch,
)
from diffusion_lab.training.sharding import ModelParallelStrategy, is_sharded, shard
from diffusion_lab.variances import Learned, Variance
from diffusion_lab.weightings import Weighting


class DiffusionModule(pl.LightningModule):
    """Trains one network on one objective along one schedule.

    All randomness is keyed by (seed, step, position in the global batch): one process or many, one batch or accumulated parts
    of it, uninterrupted or resumed, it is the same run.

    Args:
        network: the denoising network, called as network(x, c, **condition).
        schedule: the curve.
        objective: what the network's output means.
        weighting: the weight on the squared error of the output.
        error: l2, l1 or huber.
        times: how t is drawn.
        condition: which tensors of a batch reach the network.
        optimizer: optimizer and learning-rate schedule.
        batch_size: the global batch, over all processes and accumulated parts.
        variance: that of the run; a learned one is trained as well.
        seed: of all noise.
        compiled: run the training steps through torch.compile.
        validation_draws: how many (t, ε) each validation image gets.
        saved: plain values to store in every checkpoint (the resolved configuration, versions).

    Attributes:
        network: the live weights, which every callback sees as they are trained; nothing is swapped into it.
        averages: decay → network of the averaged weights (EMA), the first one evaluated; empty without callbacks.ema.

    Raises:
        ValueError: a variance that this network cannot give, or that this schedule cannot train.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        objective: Objective,
        weighting: Weighting,
        error: PointwiseLoss,
        times: TimeSampler,
        condition: Condition,
        optimizer: OptimizerConfig,
        *,
        batch_size: int,
        variance: Variance | None = None,
        seed: int = 0,
        compiled: bool = False,
        validation_draws: int = 1,
        saved: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        # A compiled copy of the reference lives in the denoiser only, which is no module: state_dict has no `_orig_mod.` keys.
        self.denoiser = Denoiser(torch.compile(network) if compiled else network, schedule, objective)
        self.schedule, self.objective, self.weighting = schedule, objective, weighting
        self.error, self.times, self.condition, self.optimizer_config = error, times, condition, optimizer
        self.batch_size, self.seed, self.validation_draws = batch_size, seed, validation_draws
        self.saved = dict(saved or {})
        self.learned_variance = variance if isinstance(variance, Learned) else None
        if variance is not None:
            variance.check(network)
        if self.learned_variance:
            chain_steps(self.denoiser)
        self.averages: dict[str, nn.Module] = {}  # a dict hides the averages from nn.Module's registration
        self._validation_loss = MeanMetric(nan_strategy="disable").set_dtype(torch.float64)
        self._resumption: Resumption | None = None
        self._drawn: list[Tensor] = []  # (position, t, loss) of a step's parts, for a time sampler that learns

    # what is evaluated ------------------------------------------------------------------------------------------------

    def register_average(self, name: str, network: nn.Module) -> None:
        """Make the averaged `network` available under `name`; the first one registered is what is evaluated."""
        self.averages[name] = network

    def denoisers(self) -> dict[str, Denoiser]:
        """Name → denoiser for evaluation: the averages first, the live weights ("raw") last unless they are cut over processes.
        Networks are in their own modes."""
        networks = {**self.averages, **({} if is_sharded(self.network) else {"raw": self.network})}
        return {name: Denoiser(network, self.schedule, self.objective) for name, network in networks.items()}

    def requested_condition(self, index: Tensor) -> dict[str, Tensor]:
        """Conditions for the given sample indices, int64 (n,): of validation images where the condition is made of data."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        examples = data.examples("val" if data.size("val") else "train")

        def batch(i: Tensor) -> dict[str, Tensor]:
            return {
                name: value.to(i.device) for name, value in examples.take((i % len(examples)).cpu().numpy()).items()
            }

        return self.condition.sampled(index, batch)

    def log_row(self, values: Mapping[str, float | Tensor], everywhere: bool = False) -> None:
        """Log values of this moment with the number of optimiser steps done and of passes over the training images.

        Args:
            values: reduced over the processes already.
            everywhere: make them known to every process, not only to the first, whose loggers write.
        """
        images = self.trainer.datamodule.size("train")  # type: ignore[attr-defined]
        axes = {"step": float(self.global_step), "epoch": self.global_step * self.batch_size / images}
        self.log_dict(
            {**values, **axes}, rank_zero_only=not everywhere, sync_dist=everywhere and self.trainer.world_size > 1
        )

    # one step ---------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        x0, position, step = batch["image"], batch["position"], batch["step"]
        # Dropout is keyed as well, by the first position of this process's part, so that resuming needs no random state.
        _seed(x0.device, word(seed=self.seed, index=int(position[0]), draw=step, stream=Stream.DROPOUT))
        t, noise, previous, condition = training_draw(
            self.denoiser, self.times, self.condition, batch, batch_size=self.batch_size, seed=self.seed
        )
        loss = diffusion_loss(
            self.denoiser, self.weighting, self.error, x0, noise, t, previous, self.learned_variance, **condition
        )
        each = loss.weighted.detach()
        if not self.times.learns:
            return {"loss": loss.weighted.mean(), "each": each, "t": t}
        self._drawn.append(
            torch.stack([to_device(position, x0.device).double(), to_device(t, x0.device), each.double()])
        )
        weight = to_device(self.times.weight(self.schedule, t), x0.device).to(each.dtype)
        return {"loss": (weight * loss.weighted).mean(), "each": each, "weight": weight, "t": t}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The losses of one global batch go to the time sampler, in the order of their positions, so that every process learns
        the same, and one what many do."""
        if self._drawn:
            own = torch.cat(self._drawn, dim=1)
            parts = [own]
            if (processes := self.trainer.world_size) > 1:
                parts = [torch.empty_like(own) for _ in range(processes)]
                torch.distributed.all_gather(parts, own)
            position, t, each = torch.cat(parts, dim=1).cpu()
            order = position.argsort()
            self.times.update(self.schedule, t[order], each[order])
            self._drawn.clear()

    # validation: fixed t and ε, averaged weights ------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        switch(self.trainer.optimizers, "eval")

    def on_validation_end(self) -> None:
        switch(self.trainer.optimizers, "train")

    def on_validation_epoch_start(self) -> None:
        self._validation_loss.reset()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        denoiser = next(iter(self.denoisers().values()))
        images = self.trainer.datamodule.size("val")  # type: ignore[attr-defined]
        for draw in range(self.validation_draws):
            t, noise, _, condition = validation_draw(denoiser, self.condition, batch, images=images, draw=draw)
            loss = diffusion_loss(
                denoiser,
                self.weighting,
                self.error,
                batch["image"],
                noise,
                t,
                learned=self.learned_variance,
                **condition,
            )
            self._validation_loss.update(loss.weighted)

    def on_validation_epoch_end(self) -> None:
        loss = self._validation_loss.compute().float()  # over all processes
        self.log_row({"val/loss": loss}, everywhere=True)
        if not self.trainer.sanity_checking:
            self._step_plateau(loss)

    def _step_plateau(self, loss: Tensor) -> None:
        """Step `ReduceLROnPlateau` by the value that it monitors: on every process by that of process 0, which has them all."""
        schedule = self.optimizer_config.schedule
        if not isinstance(schedule, TorchSchedule) or not schedule.plateau:
            return
        metrics = {**self.trainer.callback_metrics, "val/loss": loss}
        value = self.trainer.strategy.broadcast(
            float(metrics[schedule.monitor]) if schedule.monitor in metrics else None
        )
        if value is None:
            if self.trainer.is_global_zero:
                warnings.warn(
                    f"lr_scheduler ReduceLROnPlateau: {schedule.monitor} is not logged up to step {self.global_step:,}, so the "
                    f"learning rate stays: write lr_scheduler.monitor= with one of {', '.join(sorted(metrics))}",
                    stacklevel=2,
                )
            return
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau):
                config.scheduler.step(value)

    # processes, optimiser and checkpoint --------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Under trainer=fsdp the live weights are cut over the processes; nothing otherwise."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not is_sharded(self.network):
            shard(self.network, self.device_mesh["data_parallel"])  # type: ignore[index]

    def try_optimizer(self, max_steps: int, validated: bool) -> None:
        """Build optimizer and schedulers once and drop them, so that a refusal comes before the run: neither holds state yet.

        Raises:
            ConfigError: as `build_optimizer` and `lr_schedulers`.
        """
        lr_schedulers(
            self.optimizer_config,
            build_optimizer(self.optimizer_config, self.network.parameters()),
            max_steps,
            validated,
        )

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.optimizer_config, self.network.parameters())
        state = state_keys(optimizer)
        validated = bool(self.trainer.limit_val_batches)
        configs = lr_schedulers(self.optimizer_config, optimizer, self.trainer.max_steps, validated)
        self._hyper = hyperparameters(optimizer, state)
        self._plateau = plateau_arguments(config["scheduler"] for config in configs)
        return [optimizer], configs

    def on_train_start(self) -> None:
        """A resumed optimizer has the hyperparameters and the memory format of its checkpoint; those of this run hold."""
        self._drawn.clear()
        (optimizer,) = self.trainer.optimizers
        if self._resumption:
            schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
            self._resumption.apply(
                optimizer, schedulers, self.optimizer_config, self._hyper, self._plateau, self.global_step
            )
        for weight, state in optimizer.state.items():  # a fused kernel reads a weight and its moments side by side
            moments = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == weight.shape}
            state.update({k: torch.empty_like(weight).copy_(v) for k, v in moments.items()})
        switch([optimizer], "train")

    def on_train_epoch_start(self) -> None:
        """One endless stream: a trainer that cuts it into epochs (limit_train_batches) goes on where it was."""
        self.trainer.datamodule.start_at(self.global_step)  # type: ignore[attr-defined]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The live network in eval mode, with the weights that a schedule-free optimizer states for evaluation; undone after."""
        training = self.network.training
        self.network.eval()
        try:
            with evaluation_weights(self.trainer.optimizers):
                yield
        finally:
            self.network.train(training)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Training resumes between two steps. A checkpoint of a time limit in the middle of an accumulated batch, or one whose
        parts are now others, counts parts that are not repeated otherwise."""
        self._resumption = Resumption(checkpoint.get("config", {}), self.saved.get("config", {}))
        if not self._resumption.keeps_schedulers(self.optimizer_config.schedule):
            checkpoint["lr_schedulers"] = []
        if state := checkpoint.get("times"):
            self.times.load(state)
        parts = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        if progress["current"]["ready"] != parts:
            for counts in (progress["current"], progress["total"]):
                counts.update(dict.fromkeys(("ready", "started", "processed", "completed"), parts))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Tensors are saved in rows, whatever their format in memory: FSDP cuts no others, and scrambles them silently."""
        checkpoint["state_dict"] = _in_rows(checkpoint["state_dict"])
        for optimizer in checkpoint.get("optimizer_states", []):  # empty where FSDP has gathered, on process 0 only
            optimizer["state"] = {i: _in_rows(state) for i, state in optimizer.get("state", {}).items()}
        checkpoint.update(self.saved)
        checkpoint["times"] = self.times.state()


def _in_rows(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: v.contiguous() if isinstance(v, Tensor) else v for name, v in state.items()}


def _seed(device: torch.device, value: int) -> None:
    """Seeds the generators that dropout on `device` uses. torch.manual_seed would also queue a call, with a formatted stack
    trace, for every kind of device that is not there: a millisecond a step, and a list that grows."""
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)

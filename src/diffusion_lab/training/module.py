"""The LightningModule: one step of training, and one of validation."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from diffusion_lab.conditions import Condition
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import SEEDS, check_number
from diffusion_lab.losses import PointwiseLoss, chain_steps, check_bound_times, diffusion_loss
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
    """Train one network on one objective along one schedule.

    All randomness is keyed by (seed, step, position in the global batch), so that a run does not depend on the number of
    processes or accumulated parts, nor on being resumed.

    Args:
        network: the denoising network, called as network(x, c, **condition).
        schedule: the curve (α_t, σ_t).
        objective: the target of the network's output.
        weighting: the weight on the squared error of the output.
        loss: the pointwise loss: l2, l1 or huber.
        time_sampler: draws t.
        condition: selects the tensors of a batch that the network receives.
        optimizer: optimizer and learning-rate schedule.
        batch_size: the global batch, over all processes and accumulated parts.
        variance: of the reverse steps; a learned one is trained.
        seed: of all noise.
        compiled: run the training steps through torch.compile.
        validation_draws: number of (t, ε) per validation image.
        saved: plain values to store in every checkpoint (the resolved configuration, versions).

    Attributes:
        network: the network with its raw weights; no other weights are ever loaded into it.
        between_draws: called before each (t, ε) of the validation, by `Checkpoints` to save at a stop signal.
        averages: decay → network with averaged weights (EMA), the first one evaluated; empty without callbacks.ema.

    Raises:
        ConfigError: a learned variance that this network does not output, or that this schedule or time sampler cannot train.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        objective: Objective,
        weighting: Weighting,
        loss: PointwiseLoss,
        time_sampler: TimeSampler,
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
        check_number("data.batch_size", batch_size, "[1, 1000000]", whole=True)
        check_number("seed", seed, SEEDS, whole=True)
        check_number("validation.draws", validation_draws, "[1, 100000]", whole=True)
        self.network = network
        # Only the denoiser, which is not an nn.Module, refers to the compiled network: state_dict has no `_orig_mod.` keys.
        self.denoiser = Denoiser(torch.compile(network) if compiled else network, schedule, objective)
        self.schedule, self.objective, self.weighting = schedule, objective, weighting
        self.loss, self.time_sampler, self.condition, self.optimizer_config = loss, time_sampler, condition, optimizer
        self.batch_size, self.seed, self.validation_draws = batch_size, seed, validation_draws
        self.saved = dict(saved or {})
        self.learned_variance = variance if isinstance(variance, Learned) else None
        if variance is not None:
            variance.check(network)
        if self.learned_variance:
            chain_steps(self.denoiser)
            check_bound_times(self.learned_variance, time_sampler)
        self.averages: dict[str, nn.Module] = {}  # a dict hides the averages from nn.Module's registration
        self._validation_loss = MeanMetric(nan_strategy="disable")
        self._resumption: Resumption | None = None
        self.between_draws: Callable[[], None] | None = None
        self._stopping = False  # whether the run ends before the next step
        self._validating = False  # whether the validation of this step is not yet complete
        self._drawn: list[Tensor] = []  # (position, t, loss) of a step's parts, for importance sampling

    # evaluation ---------------------------------------------------------------------------------------------------------

    def register_average(self, name: str, network: nn.Module) -> None:
        """Add an averaged network under `name`; the first one registered is evaluated."""
        self.averages[name] = network

    def denoisers(self) -> dict[str, Denoiser]:
        """Return name → denoiser: the averages, then "raw" unless the raw weights are sharded.

        The networks' training or eval modes are left as they are.
        """
        networks = {**self.averages, **({} if is_sharded(self.network) else {"raw": self.network})}
        return {name: Denoiser(network, self.schedule, self.objective) for name, network in networks.items()}

    def requested_condition(self, index: Tensor) -> dict[str, Tensor]:
        """Return conditions for the given sample indices, int64 (n,); a condition of data takes validation images."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        examples = data.examples("val" if data.size("val") else "train")

        def batch(i: Tensor) -> dict[str, Tensor]:
            taken = examples.take((i % len(examples)).cpu().numpy())
            return {name: value.to(i.device) for name, value in taken.items()}

        return self.condition.sampled(index, batch)

    def log_row(self, values: Mapping[str, float | Tensor], everywhere: bool = False) -> None:
        """Log values with the number of optimizer steps and of epochs (passes over the training images).

        Args:
            values: values by name, reduced over the processes.
            everywhere: whether to add them to `callback_metrics` of every process, not only of rank 0, whose loggers write.
        """
        images = self.trainer.datamodule.size("train")  # type: ignore[attr-defined]
        axes = {"step": float(self.global_step), "epoch": self.global_step * self.batch_size / images}
        self.log_dict(
            {**values, **axes}, rank_zero_only=not everywhere, sync_dist=everywhere and self.trainer.world_size > 1
        )

    def log_row_now(self, values: Mapping[str, float]) -> None:
        """Write a row to the loggers at any step, also at the end of the run, where Lightning's `log` is not available.

        Args:
            values: already reduced over the processes. Later rows do not repeat them, as they do with `log_row`.
        """
        images = self.trainer.datamodule.size("train")  # type: ignore[attr-defined]
        row = {**values, "epoch": self.global_step * self.batch_size / images}
        for logger in self.trainer.loggers:
            logger.log_metrics(row, step=self.global_step)

    # one step ---------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        x0, position, step = batch["image"], batch["position"], batch["step"]
        # Dropout is keyed by the first position of this process's part, so that resuming needs no random state.
        # torch.manual_seed also queues a call, with a stack trace, for every kind of device without a driver: 1 ms a step.
        key = word(seed=self.seed, index=int(position[0]), draw=step, stream=Stream.DROPOUT)
        torch.default_generator.manual_seed(key)
        if x0.device.type == "cuda":
            torch.cuda.manual_seed(key)
        t, noise, previous, condition = training_draw(
            self.denoiser, self.time_sampler, self.condition, batch, batch_size=self.batch_size, seed=self.seed
        )
        loss = diffusion_loss(
            self.denoiser, self.weighting, self.loss, x0, noise, t, previous, self.learned_variance, **condition
        )
        each = loss.weighted.detach()
        if not self.time_sampler.learns:
            return {"loss": loss.weighted.mean(), "each": each, "t": t}
        self._drawn.append(
            torch.stack([to_device(position, x0.device).double(), to_device(t, x0.device), each.double()])
        )
        weight = to_device(self.time_sampler.weight(self.schedule, t), x0.device).to(each.dtype)
        return {"loss": (weight * loss.weighted).mean(), "each": each, "weight": weight, "t": t}

    def on_train_batch_end(self, *_: Any) -> None:
        """Turn `trainer.should_stop` into a stop before the next step.

        Lightning would first run a validation that an uninterrupted run does not have, and that might decide best.ckpt.
        """
        if self.trainer.should_stop and self.global_step >= (self.trainer.min_steps or 0):
            self._stopping, self.trainer.should_stop = True, False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """End the run if it is to stop. Gradients of an accumulated batch, which no checkpoint holds, are completed first.

        Raises:
            StopIteration: by which Lightning's loops end an epoch.
        """
        if self._stopping and batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.trainer.should_stop = True
            raise StopIteration

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the time sampler by the losses of the global batch, in the order of their positions.

        Every process updates by the same values, so the number of processes does not matter.
        """
        if self._drawn:
            local = torch.cat(self._drawn, dim=1)
            parts = [local]
            if (processes := self.trainer.world_size) > 1:
                parts = [torch.empty_like(local) for _ in range(processes)]
                torch.distributed.all_gather(parts, local)
            position, t, each = torch.cat(parts, dim=1).cpu()
            order = position.argsort()
            self.time_sampler.update(self.schedule, t[order], each[order])
            self._drawn.clear()

    # validation: fixed t and ε, averaged weights ------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        switch(self.trainer.optimizers, "eval")

    def on_validation_end(self) -> None:
        switch(self.trainer.optimizers, "train")

    def on_validation_epoch_start(self) -> None:
        self._validating = True
        self._validation_loss.set_dtype(torch.float64).reset()  # Lightning sets it to float32 together with the module

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        denoiser = next(iter(self.denoisers().values()))
        images = self.trainer.datamodule.size("val")  # type: ignore[attr-defined]
        for draw in range(self.validation_draws):
            if self.between_draws is not None:
                self.between_draws()
            t, noise, _, condition = validation_draw(denoiser, self.condition, batch, images=images, draw=draw)
            loss = diffusion_loss(
                denoiser,
                self.weighting,
                self.loss,
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
        self._validating = False

    def _step_plateau(self, loss: Tensor) -> None:
        """Step `ReduceLROnPlateau` by the value that it monitors, on every process by rank 0's, which has all values."""
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

    # processes, optimizer and checkpoint --------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Shard the raw weights over the processes under trainer=fsdp."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not is_sharded(self.network):
            shard(self.network, self.device_mesh["data_parallel"])  # type: ignore[index]

    def try_optimizer(self, max_steps: int, validated: bool) -> None:
        """Build optimizer and schedulers and drop them, so that their errors are raised before the run.

        Raises:
            ConfigError: the errors of `build_optimizer` and `lr_schedulers`.
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
        """Set this run's hyperparameters and memory format in a resumed optimizer, which has those of its checkpoint."""
        self._drawn.clear()
        (optimizer,) = self.trainer.optimizers
        if self._resumption:
            schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
            self._resumption.apply(
                optimizer, schedulers, self.optimizer_config, self._hyper, self._plateau, self.global_step
            )
        for weight, state in optimizer.state.items():  # a fused kernel needs a weight and its moments in one format
            moments = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == weight.shape}
            state.update({k: torch.empty_like(weight).copy_(v) for k, v in moments.items()})
        switch([optimizer], "train")

    def on_train_epoch_start(self) -> None:
        """Continue the endless stream of batches where the epoch before ended (limit_train_batches)."""
        self.trainer.datamodule.start_at(self.global_step)  # type: ignore[attr-defined]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the network into eval mode, with a schedule-free optimizer's evaluation weights, inside the context."""
        training = self.network.training
        self.network.eval()
        try:
            with evaluation_weights(self.trainer.optimizers):
                yield
        finally:
            self.network.train(training)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the time sampler, and set the progress of Lightning's loops to the end of the checkpoint's step.

        Checkpoints are written at several points of a step, after a time limit also within an accumulated batch, and
        accumulate_grad_batches may change. The loops continue with the next step, or begin with a validation that a stop signal
        has interrupted.
        """
        self._resumption = Resumption(checkpoint.get("config", {}), self.saved.get("config", {}))
        if not self._resumption.keeps_schedulers(self.optimizer_config.schedule):
            checkpoint["lr_schedulers"] = []
        if state := checkpoint.get("times"):
            self.time_sampler.load(state)
        unvalidated, step = bool(checkpoint.get("unvalidated")), int(checkpoint["global_step"])
        loops = checkpoint["loops"]["fit_loop"]
        progress, limit = loops["epoch_loop.batch_progress"], self.trainer.limit_train_batches
        parts = step * self.trainer.accumulate_grad_batches
        in_epoch = (parts - 1) % limit + 1 if isinstance(limit, int) else parts
        for counts, n in ((progress["current"], in_epoch), (progress["total"], parts)):
            # Lightning's state in the hook on_train_batch_end
            counts.update({"ready": n, "started": n, "processed": n, "completed": n - 1})
        validation = loops["epoch_loop.val_loop.batch_progress"]["total"]
        # Lightning validates first where a batch of the validation was started and not processed.
        started = validation["completed"] + int(unvalidated)
        validation.update(ready=started, started=started, processed=validation["completed"])
        # Counted once when the loops restart, and once more after a validation that they begin with.
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1 - int(unvalidated)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add this project's entries, and make tensors contiguous: FSDP would load channels_last ones in a wrong order."""
        checkpoint["state_dict"] = _contiguous(checkpoint["state_dict"])
        for optimizer in checkpoint.get("optimizer_states", []):  # under FSDP empty but on rank 0
            optimizer["state"] = {i: _contiguous(state) for i, state in optimizer.get("state", {}).items()}
        checkpoint.update(self.saved)
        checkpoint["times"] = self.time_sampler.state()
        checkpoint["unvalidated"] = self._validating


def _contiguous(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: v.contiguous() if isinstance(v, Tensor) else v for name, v in state.items()}

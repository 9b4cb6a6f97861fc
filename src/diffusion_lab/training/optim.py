"""Learning-rate curves, and the optimizer and scheduler of a run, any of torch's by `_target_`."""

import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR, LRScheduler, ReduceLROnPlateau, SequentialLR

from diffusion_lab.errors import ConfigError
from diffusion_lab.instantiation import foreign

Make = Callable[..., torch.optim.Optimizer]


class Rate(ABC):
    """rate(step, max_steps) → the factor on the learning rate in [0, 1] for the update that follows `step` updates.

    Args:
        warmup: updates over which the factor rises linearly from 1/warmup; 0 for none.

    Raises:
        ConfigError: a negative warmup.
    """

    def __init__(self, warmup: int = 0) -> None:
        if warmup < 0:
            raise ConfigError(f"lr_scheduler.warmup={warmup} is negative: write 0 for none")
        self.warmup = warmup

    @abstractmethod
    def after(self, progress: float) -> float:
        """The factor at `progress` ∈ [0, 1] of the updates after the warm-up."""

    def __call__(self, step: int, max_steps: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        return self.after(min((step - self.warmup) / max(max_steps - self.warmup, 1), 1.0))


class Constant(Rate):
    """1 after the warm-up (Ho et al. 2020, appendix B: 5,000 updates of warm-up)."""

    def after(self, progress: float) -> float:
        return 1.0


class Linear(Rate):
    """From 1 to 0 on a straight line."""

    def after(self, progress: float) -> float:
        return 1.0 - progress


class Cosine(Rate):
    """From 1 to 0 on half a cosine (Loshchilov & Hutter 2017, eq. 5)."""

    def after(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class TorchSchedule:
    """A scheduler of torch, with a linear warm-up before it.

    Attributes:
        make: called with the optimizer.
        warmup: updates over which the rate rises linearly from 1/warmup; 0 for none.
        monitor: the logged value that `ReduceLROnPlateau` goes by, after each validation.
        plateau: whether the scheduler is that one.

    Raises:
        ConfigError: a negative warmup.
    """

    make: Callable[..., LRScheduler]
    warmup: int = 0
    monitor: str = "val/loss"
    plateau: bool = False

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise ConfigError(f"lr_scheduler.warmup={self.warmup} is negative: write 0 for none")


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are updated.

    Attributes:
        make: the optimizer, called with the parameters.
        schedule: of the learning rate.
        precision: Lightning's.
        clipping: whether gradients are clipped.
    """

    make: Make
    schedule: Rate | TorchSchedule
    precision: str = "32-true"
    clipping: bool = False


def build_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of the parameters that are trained, with one fused kernel an update where it has one and that works.

    Mixed precision with clipping forbids it: 16-mixed because gradients must be unscaled before they are clipped, and a fused
    optimizer unscales by itself; bf16-mixed, which scales none, because Lightning does not distinguish the two. Muon updates
    matrices alone, so that AdamW takes the other parameters.

    Raises:
        ConfigError: the optimizer refuses its arguments or these parameters.
    """
    trained = [p for p in parameters if p.requires_grad]
    kind = getattr(config.make, "func", config.make)
    if isinstance(kind, type) and issubclass(kind, getattr(torch.optim, "Muon", ())):
        return _with_adamw(config, trained)
    stated = getattr(config.make, "keywords", {})
    fused = {}
    if "fused" in inspect.signature(kind).parameters and "fused" not in stated and not stated.get("foreach"):
        fused = {"fused": not (config.precision.endswith("-mixed") and config.clipping)}
    return foreign(functools.partial(config.make, trained, **fused), "optimizer")


class Joined(torch.optim.Optimizer):
    """Several optimizers as one: their parameter groups in a row, and one step of each.

    Args:
        optimizers: of disjoint parameters.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        super().__init__([group for o in optimizers for group in o.param_groups], {})
        self._share()

    def _share(self) -> None:
        """The groups and the state of each are those of the whole, so that schedulers and checkpoints see one optimizer."""
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]
            optimizer.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss


def _with_adamw(config: OptimizerConfig, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Muon for the matrices, AdamW at the same rate and decay for the rest (Jordan et al. 2024)."""
    matrices, others = ([p for p in trained if (p.ndim == 2) == flat] for flat in (True, False))
    if not matrices:
        raise ConfigError("optimizer Muon updates matrices, and this network has none: write optimizer=adamw")
    muon: torch.optim.Optimizer = foreign(functools.partial(config.make, matrices), "optimizer")
    shared = {k: v for k, v in muon.defaults.items() if k in ("lr", "weight_decay")}
    return Joined([muon, torch.optim.AdamW(others, **shared)]) if others else muon


def lr_schedulers(
    config: OptimizerConfig, optimizer: torch.optim.Optimizer, max_steps: int, validate_every: int
) -> list[dict[str, Any]]:
    """Lightning's descriptions of the schedulers.

    Args:
        config: states the schedule.
        optimizer: theirs.
        max_steps: updates of the run.
        validate_every: batches between two validations, after which a plateau is judged; 0 for none.

    Raises:
        ConfigError: a plateau without validation; the scheduler refuses its arguments or this optimizer.
    """
    schedule = config.schedule
    if isinstance(schedule, Rate):
        curve = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, max_steps))
        return [{"scheduler": curve, "interval": "step"}]
    warm: list[LRScheduler] = []
    if schedule.warmup:
        warm = [LinearLR(optimizer, start_factor=1 / schedule.warmup, total_iters=schedule.warmup - 1 or 1)]
    main: Any = foreign(functools.partial(schedule.make, optimizer), "lr_scheduler")
    if isinstance(main, ReduceLROnPlateau):
        if validate_every < 1:
            raise ConfigError(
                f"lr_scheduler ReduceLROnPlateau goes by {schedule.monitor}, and validation.every=0: write validation.every=500"
            )
        plateau = {"scheduler": main, "interval": "step", "monitor": schedule.monitor, "frequency": validate_every}
        return [*({"scheduler": s, "interval": "step"} for s in warm), plateau]
    if warm:
        main = SequentialLR(optimizer, [*warm, main], milestones=[schedule.warmup])
    return [{"scheduler": main, "interval": "step"}]


@contextmanager
def evaluation_weights(optimizers: Iterable[Any]) -> Iterator[None]:
    """The weights that a schedule-free optimizer (Defazio et al. 2024) states for evaluation, inside; those it trains, after.

    Other optimizers have one set of weights, and nothing happens.
    """
    training = [o for o in optimizers if any(group.get("train_mode", False) for group in o.param_groups)]
    switch(training, "eval")
    try:
        yield
    finally:
        switch(training, "train")


def switch(optimizers: Iterable[Any], mode: str) -> None:
    """Put schedule-free optimizers, which have the methods `train` and `eval`, into a mode."""
    for optimizer in optimizers:
        method = getattr(optimizer, mode, None)
        if callable(method):
            method()

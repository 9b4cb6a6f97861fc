"""Learning-rate schedules, and the construction and resumption of optimizers and schedulers."""

import functools
import inspect
import math
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import (
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from diffusion_lab.errors import ConfigError, check_number
from diffusion_lab.instantiation import foreign

Make = Callable[..., torch.optim.Optimizer]

WARMUP = "[0, 10000000]"


class LRSchedule(ABC):
    """schedule(step, max_steps) → the factor on the learning rate, in [0, 1], for the update after `step` updates.

    Args:
        warmup: updates over which the factor rises linearly from 1/warmup, at most ten million; 0 for none.

    Raises:
        ConfigError: a warmup out of range.
    """

    def __init__(self, warmup: int = 0) -> None:
        check_number("lr_scheduler.warmup", warmup, WARMUP, "updates, 0 for none", whole=True)
        self.warmup = warmup

    @abstractmethod
    def after(self, progress: float) -> float:
        """Return the factor at the fraction `progress` ∈ [0, 1] of the updates after the warm-up."""

    def __call__(self, step: int, max_steps: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        return self.after(min((step - self.warmup) / max(max_steps - self.warmup, 1), 1.0))


class Constant(LRSchedule):
    """Factor 1 after the warm-up (Ho et al. 2020, appendix B: 5,000 updates of warm-up)."""

    def after(self, progress: float) -> float:
        return 1.0


class Linear(LRSchedule):
    """Factor from 1 to 0, linear in the step."""

    def after(self, progress: float) -> float:
        return 1.0 - progress


class Cosine(LRSchedule):
    """Factor from 1 to 0 along half a cosine (Loshchilov & Hutter 2017, eq. 5)."""

    def after(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class TorchSchedule:
    """A scheduler of torch after a linear warm-up.

    Attributes:
        make: the constructor, called with the optimizer.
        warmup: updates over which the rate rises linearly from 1/warmup; 0 for none.
        monitor: the logged value for `ReduceLROnPlateau`, read after each validation.
        plateau: whether the scheduler is `ReduceLROnPlateau`.

    Raises:
        ConfigError: a warmup out of range.
    """

    make: Callable[..., LRScheduler]
    warmup: int = 0
    monitor: str = "val/loss"
    plateau: bool = False

    def __post_init__(self) -> None:
        check_number("lr_scheduler.warmup", self.warmup, WARMUP, "updates, 0 for none", whole=True)


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule.

    Attributes:
        make: the constructor of the optimizer, called with the parameters.
        schedule: the schedule of the learning rate.
        precision: `precision` of Lightning's Trainer.
        clipping: whether gradients are clipped.
    """

    make: Make
    schedule: LRSchedule | TorchSchedule
    precision: str = "32-true"
    clipping: bool = False


def build_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the optimizer of the parameters that require gradients, with a fused kernel if available.

    A fused optimizer is not used for mixed precision with clipping: with 16-mixed it unscales the gradients itself, but they must
    be unscaled before they are clipped, and Lightning does not distinguish bf16-mixed. Muon updates only matrices, and AdamW the
    other parameters.

    Raises:
        ConfigError: if the class is not an optimizer, or its constructor raises an error for the arguments or parameters.
    """
    check_finite("optimizer", config.make)
    trained = [p for p in parameters if p.requires_grad]
    kind = getattr(config.make, "func", config.make)
    if isinstance(kind, type) and issubclass(kind, getattr(torch.optim, "Muon", ())):
        return _with_adamw(config, trained)
    if isinstance(kind, type) and issubclass(kind, torch.optim.LBFGS):
        for p in trained:  # LBFGS views weights and gradients as flat vectors, which channels_last does not allow
            p.data = p.data.contiguous()
    arguments = getattr(config.make, "keywords", {})
    fused = {}
    if "fused" in inspect.signature(kind).parameters and "fused" not in arguments and not arguments.get("foreach"):
        fused = {"fused": not (config.precision.endswith("-mixed") and config.clipping)}
    optimizer: Any = foreign(functools.partial(config.make, trained, **fused), "optimizer")
    if not isinstance(optimizer, torch.optim.Optimizer):
        name = getattr(kind, "__name__", kind)
        raise ConfigError(
            f"optimizer._target_: {name} is not an optimizer: write a class derived from torch.optim.Optimizer"
        )
    return optimizer


def check_finite(where: str, make: Callable[..., Any]) -> None:
    """Raise ConfigError for a number of a bound constructor of another package that no training has: NaN, Inf, 1e30."""
    for name, value in getattr(make, "keywords", {}).items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                check_number(f"{where}.{name}", number, "[-1e9, 1e9]")


class Joined(torch.optim.Optimizer):
    """Several optimizers as one, with the concatenation of their parameter groups.

    Args:
        optimizers: optimizers of disjoint parameters.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        super().__init__([group for o in optimizers for group in o.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Share groups and state with each optimizer, so that schedulers and checkpoints see one optimizer."""
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
    """Build Muon for the matrices, and AdamW with the same lr and weight decay for the rest (Jordan et al. 2024)."""
    matrices, others = ([p for p in trained if (p.ndim == 2) == is_matrix] for is_matrix in (True, False))
    if not matrices:
        raise ConfigError("optimizer Muon updates matrices, and this network has none: write optimizer=adamw")
    muon: torch.optim.Optimizer = foreign(functools.partial(config.make, matrices), "optimizer")
    shared = {k: v for k, v in muon.defaults.items() if k in ("lr", "weight_decay")}
    return Joined([muon, torch.optim.AdamW(others, **shared)]) if others else muon


def lr_schedulers(
    config: OptimizerConfig, optimizer: torch.optim.Optimizer, max_steps: int, validated: bool
) -> list[dict[str, Any]]:
    """Build the schedulers, as dictionaries for Lightning's `configure_optimizers`.

    Args:
        config: has the schedule.
        optimizer: the optimizer to schedule.
        max_steps: updates of the run.
        validated: whether the run has validation. The module steps `ReduceLROnPlateau` after each validation, before
            best.ckpt is written; Lightning never does.

    Raises:
        ConfigError: if `ReduceLROnPlateau` is used without validation, a cycle is shorter than the run, `lr_lambda` is not a
            function, or the scheduler raises an error for its arguments or this optimizer.
    """
    schedule = config.schedule
    if isinstance(schedule, LRSchedule):
        curve = LambdaLR(optimizer, lambda step: schedule(step, max_steps))
        return [{"scheduler": curve, "interval": "step"}]
    warm: list[LRScheduler] = []
    if schedule.warmup:
        warm = [LinearLR(optimizer, start_factor=1 / schedule.warmup, total_iters=schedule.warmup - 1 or 1)]
    check_finite("lr_scheduler", schedule.make)
    _refuse_functions(schedule.make)
    main: Any = foreign(functools.partial(schedule.make, optimizer), "lr_scheduler")
    if isinstance(main, ReduceLROnPlateau):
        if not validated:
            raise ConfigError(
                f"lr_scheduler ReduceLROnPlateau monitors {schedule.monitor} after each validation, and this run has none: "
                "write validation.every=500 and data.val=0.1"
            )
        plateau = {"scheduler": main, "interval": "step", "monitor": schedule.monitor, "frequency": sys.maxsize}
        return [*({"scheduler": s, "interval": "step"} for s in warm), plateau]
    if isinstance(main, OneCycleLR) and main.total_steps < max_steps - schedule.warmup:
        raise ConfigError(
            f"lr_scheduler OneCycleLR ends after {main.total_steps} updates, and the run has {max_steps}: write "
            f"lr_scheduler.total_steps={max_steps - schedule.warmup}"
        )
    if warm:
        main = SequentialLR(optimizer, [*warm, main], milestones=[schedule.warmup])
    return [{"scheduler": main, "interval": "step"}]


def _refuse_functions(make: Callable[..., Any]) -> None:
    """Raise ConfigError if `lr_lambda` of a scheduler is a number or text instead of a function."""
    value = getattr(make, "keywords", {}).get("lr_lambda")
    kind = getattr(make, "func", make)
    if isinstance(kind, type) and issubclass(kind, LambdaLR | MultiplicativeLR):
        functions = value if isinstance(value, list) else [value]
        if not all(callable(function) for function in functions):
            raise ConfigError(
                f"lr_scheduler.lr_lambda={value} is not a function: write +lr_scheduler.lr_lambda._target_=my_package.curve "
                "+lr_scheduler.lr_lambda._partial_=true, or a class derived from diffusion_lab.training.optim.LRSchedule"
            )


# resuming -------------------------------------------------------------------------------------------------------------------

IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")  # never restored from a checkpoint
_PLATEAU_STATE = ("optimizer", "best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr")


def state_keys(optimizer: torch.optim.Optimizer) -> list[set[str]]:
    """Return the keys of each parameter group that are state, not arguments of the constructor (schedule-free's counter)."""
    parts = optimizer.optimizers if isinstance(optimizer, Joined) else [optimizer]
    arguments = [inspect.signature(type(part)).parameters for part in parts for _ in part.param_groups]
    return [set(group) - set(names) for group, names in zip(optimizer.param_groups, arguments, strict=True)]


def hyperparameters(optimizer: torch.optim.Optimizer, state: Sequence[set[str]]) -> list[dict[str, Any]]:
    """Return the values that the constructors of optimizer and schedulers set in each parameter group.

    Args:
        optimizer: the optimizer, after its schedulers were built.
        state: from `state_keys`, called before the schedulers were built.
    """
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    groups = zip(optimizer.param_groups, state, strict=True)
    return [{k: v for k, v in group.items() if k != "params" and k not in names} for group, names in groups]


class Resumption:
    """The part of a checkpoint's optimizer and schedulers that a resumed run restores.

    With equal nodes the state is restored bit for bit. An `LRSchedule` depends only on the step. If `optimizer` or
    `lr_scheduler` was changed, a scheduler of torch is stepped from the start with the new arguments, so that the rate equals
    that of a run which always had them; `ReduceLROnPlateau` keeps its counts, and its rate is scaled.

    Args:
        before: the checkpoint's configuration.
        now: this run's.
    """

    def __init__(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        def differ(key: str) -> bool:
            return bool(before and now) and before.get(key) != now.get(key)

        def part(key: str) -> list[Any]:
            return [(nodes.get("lr_scheduler") or {}).get(key) for nodes in (before, now)]

        self.changed = differ("optimizer") or differ("lr_scheduler")
        kinds, monitors = part("_target_"), part("monitor")
        self.continued = kinds[0] == kinds[1] and monitors[0] == monitors[1]

    def keeps_schedulers(self, schedule: LRSchedule | TorchSchedule) -> bool:
        """Whether the state of the schedulers is restored."""
        return isinstance(schedule, TorchSchedule) and self.continued and (schedule.plateau or not self.changed)

    def apply(
        self, optimizer: torch.optim.Optimizer, schedulers: Sequence[Any], config: OptimizerConfig,
        hyper: Sequence[Mapping[str, Any]], plateau: Mapping[str, Any], step: int,
    ) -> None:  # fmt: skip
        """Set this run's hyperparameters in restored groups, and step schedulers to `step`.

        Args:
            optimizer, schedulers: as restored by Lightning.
            config: has the schedule.
            hyper: from `hyperparameters`, of this run.
            plateau: from `plateau_arguments`, of this run.
            step: updates done.
        """
        ours = isinstance(config.schedule, LRSchedule)
        for group, new in zip(optimizer.param_groups, hyper, strict=True):
            scaled = group["lr"] * new["initial_lr"] / group.get("initial_lr", new["initial_lr"])
            group.update(new if ours or self.changed else {k: new[k] for k in IMPLEMENTATION if k in new})
            if isinstance(config.schedule, TorchSchedule) and config.schedule.plateau and self.changed:
                group["lr"] = scaled
        if not (ours or self.changed):
            return
        with warnings.catch_warnings():
            # The optimizer was stepped in the run before, which torch cannot see.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for scheduler in schedulers:
                if isinstance(scheduler, ReduceLROnPlateau):
                    vars(scheduler).update(plateau)
                elif ours:
                    scheduler.last_epoch, scheduler._step_count = step - 1, step
                    scheduler.step()
                elif isinstance(config.schedule, TorchSchedule) and config.schedule.plateau:
                    scheduler.base_lrs = [new["initial_lr"] for new in hyper]
                else:
                    for _ in range(step):
                        scheduler.step()


def plateau_arguments(schedulers: Iterable[Any]) -> dict[str, Any]:
    """Return the attributes that the constructor of `ReduceLROnPlateau` set; empty without one."""
    plateaus = [s for s in schedulers if isinstance(s, ReduceLROnPlateau)]
    return {k: v for s in plateaus for k, v in vars(s).items() if k not in _PLATEAU_STATE}


# schedule-free optimizers ---------------------------------------------------------------------------------------------------


@contextmanager
def evaluation_weights(optimizers: Iterable[Any]) -> Iterator[None]:
    """Use the evaluation weights of schedule-free optimizers (Defazio et al. 2024) inside the context.

    Other optimizers, and schedule-free optimizers that are already in evaluation mode, are not changed.
    """
    training = [o for o in optimizers if any(group.get("train_mode", True) for group in o.param_groups)]
    switch(training, "eval")
    try:
        yield
    finally:
        switch(training, "train")


def switch(optimizers: Iterable[Any], mode: str) -> None:
    """Call the method `mode`, "train" or "eval", of optimizers that have it: schedule-free ones."""
    for optimizer in optimizers:
        method = getattr(optimizer, mode, None)
        if callable(method):
            method()

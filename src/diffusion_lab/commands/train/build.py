"""Build the objects of a training run from its configuration: data, condition, network, module, callbacks, loggers."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    Checkpoint,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger, Logger
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from diffusion_lab.checkpoint.build import outlined
from diffusion_lab.conditions import Condition
from diffusion_lab.data.datamodule import DataModule
from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.errors import ConfigError
from diffusion_lab.instantiation import (
    PACKAGE,
    accepted,
    check,
    check_named,
    instantiate,
    locate,
    require_kind,
    targets,
)
from diffusion_lab.losses import PointwiseLoss
from diffusion_lab.objectives import Objective
from diffusion_lab.samplers import Sampler
from diffusion_lab.schedules import Schedule
from diffusion_lab.time_samplers import TimeSampler
from diffusion_lab.training.callbacks import GracefulStop, QualityMonitor
from diffusion_lab.training.loggers import Identity
from diffusion_lab.training.module import DiffusionModule
from diffusion_lab.training.optim import LRSchedule, OptimizerConfig, TorchSchedule
from diffusion_lab.variances import Variance
from diffusion_lab.weightings import Weighting

Config = Mapping[str, Any]
MOST_WEIGHTS = 20_000  # tensors of a network
Make = Callable[..., Any]  # `instantiate`, or `instantiate_untrusted` for the configuration of a checkpoint

# Groups with a single node: the class of what it describes, and the arguments that the command passes to its constructor.
KINDS: dict[str, Any] = {
    "data": DataModule,
    "condition": Condition,
    "model": nn.Module,
    "schedule": Schedule,
    "objective": Objective,
    "weighting": Weighting,
    "loss": PointwiseLoss,
    "time_sampler": TimeSampler,
    "sampler": Sampler,
    "variance": Variance,
    "clip": Callable,
    "trainer": pl.Trainer,
}
PASSED: dict[str, tuple[str, ...]] = {
    "data": ("seed",),
    "condition": ("num_classes", "num_attributes", "names"),
    "model": ("channels", "image_size", "num_classes", "learned_variance", "given_channels"),
    "schedule": (),
    "objective": (),
    "weighting": (),
    "loss": (),
    "time_sampler": (),
    "sampler": (),
    "variance": (),
    "clip": (),
    "optimizer": ("params",),
    "trainer": ("callbacks", "logger"),
}


def check_nodes(config: Config) -> None:
    """Compare every node with its constructor's signature and annotations, before any file is read or object built.

    Raises:
        ConfigError: if a key is unknown, an argument is missing or has the wrong type, a class cannot be imported, or the class
            of an optimizer or scheduler is not supported.
    """
    _check_kinds(config)
    for group, passed in PASSED.items():
        check(config[group], group, passed, KINDS.get(group))
    check(_torch_arguments(config["lr_scheduler"]) or config["lr_scheduler"], "lr_scheduler", ("optimizer",))
    check_named(config["callbacks"], "callbacks", "callbacks=default", ("folder", "sampler", "clip"))
    check_named(config["logger"], "logger", "logger=[csv,wandb]", ("save_dir", "identity", "config"))
    for key in ("callbacks", "logger"):
        if config["trainer"].get(key) is not None:
            raise ConfigError(
                f"trainer.{key} is set from the group {key}: write +{key}.mine._target_=my_package.MyClass instead"
            )


NO_SCHEDULER = (
    "lr_scheduler._target_={} is not a scheduler: write a class derived from "
    "torch.optim.lr_scheduler.LRScheduler or diffusion_lab.training.optim.LRSchedule"
)


def _check_kinds(config: Config) -> None:
    """Raise ConfigError if the class of the optimizer or scheduler is not supported, before its arguments are checked."""
    joining = (torch.optim.lr_scheduler.SequentialLR, torch.optim.lr_scheduler.ChainedScheduler)
    kind = locate(config["optimizer"], "optimizer")
    if isinstance(kind, type) and not issubclass(kind, torch.optim.Optimizer):
        name = config["optimizer"]["_target_"]
        raise ConfigError(
            f"optimizer._target_={name} is not an optimizer: write a class derived from torch.optim.Optimizer"
        )
    kind, name = locate(config["lr_scheduler"], "lr_scheduler"), config["lr_scheduler"]["_target_"]
    if isinstance(kind, type) and issubclass(kind, joining):
        raise ConfigError(
            f"lr_scheduler._target_={name} takes other schedulers as arguments, which is not supported: write "
            "lr_scheduler.warmup= for a warm-up, or a class derived from diffusion_lab.training.optim.LRSchedule"
        )
    if isinstance(kind, type) and not issubclass(
        kind, LRScheduler | torch.optim.lr_scheduler.ReduceLROnPlateau | LRSchedule
    ):
        raise ConfigError(NO_SCHEDULER.format(name))


def data(config: Config, make: Make = instantiate) -> DataModule:
    """Build the data module. No file is read."""
    node = config["data"]
    module: DataModule = make(node, "data", **accepted(node, seed=config["seed"]))
    require_kind(module, DataModule, "data")
    return module


def condition(config: Config, data: DataModule, make: Make = instantiate) -> tuple[Condition, dict[str, Any]]:
    """Build the condition.

    Returns:
        The condition, and its node including the number of classes, the number of attributes and the names of the attributes
        of the data set.
    """
    node = dict(config["condition"])
    counts = {"num_classes": data.num_classes, "num_attributes": data.num_attributes}
    names = list(data.attribute_names) if "names" in accepted(node, names=()) else None
    node |= accepted(node, **counts, **({} if names is None else {"names": names}))
    built: Condition = make(node, "condition")
    require_kind(built, Condition, "condition")
    return built, node


def model(
    config: Config,
    condition: Condition,
    learned: bool,
    make: Make = instantiate,
    check: Callable[[nn.Module], None] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network with newly initialized weights, which depend only on the seed.

    Args:
        config: the configuration.
        condition: the condition of the network.
        learned: whether the network predicts a variance.
        make: the function that instantiates a node.
        check: of the weights' shapes, which a checkpoint's configuration determines; called before they are allocated.

    Returns:
        The network, and its node including the arguments that other groups determine.
    """
    node, data = dict(config["model"]), config["data"]
    arguments = {
        "channels": data["channels"],
        "image_size": data["image_size"],
        "num_classes": condition.num_classes,
        "learned_variance": learned,
        "given_channels": condition.given_channels,
    }
    node |= accepted(node, **{k: v for k, v in arguments.items() if v})
    if check is not None and all(target.startswith(f"{PACKAGE}.") for target in targets(node)):
        try:
            check(outlined(lambda: make(node, "model"), MOST_WEIGHTS))
        except RuntimeError as error:
            raise ConfigError(f"model cannot be built: {error}") from None
    torch.manual_seed(config["seed"])
    built: nn.Module = make(node, "model")
    require_kind(built, nn.Module, "model")
    for name, value in (("channels", data["channels"]), ("given_channels", condition.given_channels)):
        actual = getattr(built, name, value)
        if actual != value:
            raise ConfigError(f"model.{name}={actual}, and data and condition have {value}: leave model.{name} out")
    return built, node


def module(
    config: Config, network: nn.Module, condition: Condition, saved: Config, make: Make = instantiate
) -> DiffusionModule:
    """Build the LightningModule.

    Raises:
        ConfigError: if the optimizer or scheduler cannot be built, or variance=learned and the network does not output variance
            channels.
    """
    groups = ("schedule", "objective", "weighting", "loss", "time_sampler", "variance")
    parts = {group: make(config[group], group) for group in groups}
    for group, part in parts.items():
        require_kind(part, KINDS[group], group)
    built = DiffusionModule(
        network,
        **parts,
        condition=condition,
        optimizer=optimizer(config, make),
        batch_size=config["data"]["batch_size"],
        seed=config["seed"],
        compiled=config["compile"],
        validation_draws=config["validation"]["draws"],
        saved=saved,
    )
    built.try_optimizer(config["trainer"]["max_steps"], validates(config))
    if built.learned_variance and not hasattr(network, "extra"):
        _try_channels(built, config)
    return built


def validates(config: Config) -> bool:
    """Whether a run has validation."""
    return config["validation"]["every"] > 0 and config["data"]["val"] != 0


def optimizer(config: Config, make: Make = instantiate) -> OptimizerConfig:
    """Build the configuration of the optimizer and its learning-rate schedule."""
    node = config["lr_scheduler"]
    schedule: LRSchedule | TorchSchedule
    if arguments := _torch_arguments(node):
        bound = make({**arguments, "_partial_": True}, "lr_scheduler")
        plateau = issubclass(locate(node), torch.optim.lr_scheduler.ReduceLROnPlateau)
        schedule = TorchSchedule(bound, node.get("warmup", 0), node.get("monitor", "val/loss"), plateau)
    else:
        schedule = make(node, "lr_scheduler")
        if not isinstance(schedule, LRSchedule):
            raise ConfigError(NO_SCHEDULER.format(node["_target_"]))
    trainer = config["trainer"]
    constructor = make({**config["optimizer"], "_partial_": True}, "optimizer")
    return OptimizerConfig(constructor, schedule, str(trainer["precision"]), bool(trainer["gradient_clip_val"]))


def _torch_arguments(node: Config) -> dict[str, Any] | None:
    """Return the node of a torch scheduler without the keys of `TorchSchedule`, or None for another class."""
    kind = locate(node, "lr_scheduler")
    if isinstance(kind, type) and issubclass(kind, LRScheduler | torch.optim.lr_scheduler.ReduceLROnPlateau):
        return {key: value for key, value in node.items() if key not in ("warmup", "monitor")}
    return None


@torch.no_grad()
def _try_channels(built: DiffusionModule, config: Config) -> None:
    """Evaluate a network of another package once. Raises ConfigError if its output has no variance channels."""
    data = config["data"]
    x = torch.zeros(1, data["channels"], *data["image_size"])
    condition = {"label": torch.zeros(1, dtype=torch.long)} if built.condition.num_classes else {}
    training = built.network.training
    built.network.eval()
    output, extra, *_ = Denoiser(built.network, built.schedule, built.objective).output(x, 1.0, **condition)
    built.network.train(training)
    assert built.learned_variance is not None
    built.learned_variance.read(Prediction(x, x, output, extra))


def callbacks(config: Config, folder: Path, make: Make = instantiate) -> list[pl.Callback]:
    """Build the callbacks that are not null, in the order of the configuration, and `GracefulStop`.

    Raises:
        ConfigError: if a callback is in REFUSED, writes last.ckpt or best.ckpt, or has a folder outside the run folder.
    """
    built: list[pl.Callback] = []
    for name, node in (config.get("callbacks") or {}).items():
        if node is not None:
            if "folder" in node:  # possibly from the configuration of an untrusted checkpoint
                below = Path(str(node["folder"]))
                if below.is_absolute() or ".." in below.parts:
                    raise ConfigError(
                        f"callbacks.{name}.folder={below} is outside the run folder: write a relative path"
                    )
                node = {**node, "folder": str(folder / below)}
            built.append(make(node, f"callbacks.{name}"))
            _check_callback(built[-1], name, validates(config))
    check_monitors(built, config)
    return [*built, GracefulStop()]


REFUSED = {
    GradientAccumulationScheduler: "the number of accumulated batches must be constant during a run: write "
    "trainer.accumulate_grad_batches=",
    StochasticWeightAveraging: "it replaces the trained weights by their average: write callbacks.ema.decay=",
    LearningRateFinder: "it sets an attribute of the module, but the learning rate is an argument of the optimizer: write "
    "--multirun optimizer.lr=1e-4,3e-4,1e-3",
    BatchSizeFinder: "the random numbers of a run depend on data.batch_size: write data.batch_size=",
}


def _check_callback(callback: pl.Callback, name: str, validated: bool) -> None:
    if not isinstance(callback, pl.Callback):
        raise ConfigError(
            f"callbacks.{name}: {type(callback).__name__} is not a callback: write a class derived from "
            "pytorch_lightning.Callback"
        )
    for kind, reason in REFUSED.items():
        if isinstance(callback, kind):
            raise ConfigError(f"callbacks.{name}: {kind.__name__} is not supported, since {reason}")
    monitor = getattr(callback, "monitor", None)
    if isinstance(callback, EarlyStopping | ModelCheckpoint) and str(monitor).startswith("val/") and not validated:
        raise ConfigError(
            f"callbacks.{name}: {type(callback).__name__} monitors {monitor}, but this run has no validation: write "
            "validation.every=500 and data.val=0.1"
        )
    names = ("last", "best", "last.ckpt", "best.ckpt")
    last = getattr(callback, "save_last", False) or getattr(callback, "filename", None) in names
    if isinstance(callback, Checkpoint) and last:
        raise ConfigError(
            f"callbacks.{name}: this {type(callback).__name__} would overwrite last.ckpt or best.ckpt of "
            f"callbacks.checkpoints: write callbacks.{name}.save_last=false and another filename"
        )


def check_monitors(callbacks: Sequence[pl.Callback], config: Config) -> None:
    """Raise ConfigError for a monitor that nothing logs, unless a callback of the user may log it."""
    if any(not type(c).__module__.startswith((f"{PACKAGE}.", "pytorch_lightning.")) for c in callbacks):
        return
    quality = any(isinstance(c, QualityMonitor) for c in callbacks)
    logged = ["val/loss", "train/loss"] + ["quality"] * quality
    for name, node in (config.get("callbacks") or {}).items():
        monitor = str((node or {}).get("monitor") or "val/loss")
        prefixes = ("train/", "speed/", *(("fid", "fd", "confident_fraction") if quality else ()))
        if monitor not in (*logged, "step", "epoch") and not monitor.startswith(prefixes):
            raise ConfigError(
                f"callbacks.{name}.monitor={monitor} is not logged by this run: write one of {', '.join(logged)}"
            )


def loggers(config: Config, folder: Path, identity: Identity, make: Make = instantiate) -> list[Logger]:
    """Build the loggers that are not null, and a CSVLogger if none of them writes metrics.csv to the run folder."""
    built: list[Logger] = []
    for name, node in (config.get("logger") or {}).items():
        if node is not None:
            arguments = accepted(node, save_dir=str(folder), identity=identity, config=copy.deepcopy(dict(config)))
            built.append(make(node, f"logger.{name}", **arguments))
            if not isinstance(built[-1], Logger):
                raise ConfigError(
                    f"logger.{name}: {node['_target_']} is not a logger: write a class derived from "
                    "pytorch_lightning.loggers.Logger"
                )
    if not any(isinstance(logger, CSVLogger) and Path(logger.log_dir) == folder for logger in built):
        built.insert(0, CSVLogger(str(folder), name="", version="", flush_logs_every_n_steps=100))
    return built

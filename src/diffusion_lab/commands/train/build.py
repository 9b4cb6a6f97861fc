"""From configuration to objects, in the order in which data flows: data → condition → network → schedule, objective, loss →
training. Every group of conf/ appears here once.
"""

import copy
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    Checkpoint,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
    StochasticWeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger, Logger
from pytorch_lightning.plugins.environments import SLURMEnvironment
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

import diffusion_lab
from diffusion_lab import processes
from diffusion_lab.checkpoint import FORMAT
from diffusion_lab.conditions import Condition
from diffusion_lab.data.datamodule import DataModule
from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.errors import ConfigError
from diffusion_lab.instantiation import accepted, check, check_named, instantiate, locate
from diffusion_lab.training import sharding
from diffusion_lab.training.callbacks import GracefulStop
from diffusion_lab.training.loggers import Identity
from diffusion_lab.training.module import DiffusionModule
from diffusion_lab.training.optim import LRSchedule, OptimizerConfig, TorchSchedule

if TYPE_CHECKING:
    from diffusion_lab.commands.train.configuration import Configuration

Config = Mapping[str, Any]
Make = Callable[..., Any]  # instantiate, or for a configuration that a file supplied its untrusting form

# Groups of one node, and what the command passes to its constructor.
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
    """Compare every node with its constructor's signature and annotations, before anything is read or built.

    Raises:
        ConfigError: a key that nothing reads, an argument that is missing or of another type, a class that cannot be imported.
    """
    _refuse_kinds(config)
    for group, passed in PASSED.items():
        check(config[group], group, passed)
    check(_schedule_node(config["lr_scheduler"]), "lr_scheduler", ("optimizer",))
    check_named(config["callbacks"], "callbacks", "callbacks=default", ("folder", "sampler", "clip"))
    check_named(config["logger"], "logger", "logger=[csv,wandb]", ("save_dir", "who", "config"))
    for key in ("callbacks", "logger"):
        if config["trainer"].get(key) is not None:
            raise ConfigError(
                f"trainer.{key} is filled from the group {key}: write +{key}.mine._target_=my_package.MyClass"
            )


def _refuse_kinds(config: Config) -> None:
    """Raise ConfigError for a class of another kind than the group's, before its arguments are compared with the group's."""
    joining = (torch.optim.lr_scheduler.SequentialLR, torch.optim.lr_scheduler.ChainedScheduler)
    kind = locate(config["optimizer"], "optimizer")
    if isinstance(kind, type) and not issubclass(kind, torch.optim.Optimizer):
        name = config["optimizer"]["_target_"]
        raise ConfigError(
            f"optimizer._target_={name} is no optimizer: write a class derived from torch.optim.Optimizer"
        )
    kind, name = locate(config["lr_scheduler"], "lr_scheduler"), config["lr_scheduler"]["_target_"]
    if isinstance(kind, type) and issubclass(kind, joining):
        raise ConfigError(
            f"lr_scheduler._target_={name} joins schedulers of one optimizer, which a file does not hold: write "
            "lr_scheduler.warmup= for a warm-up, or a class derived from diffusion_lab.training.optim.LRSchedule"
        )
    if isinstance(kind, type) and not issubclass(
        kind, LRScheduler | torch.optim.lr_scheduler.ReduceLROnPlateau | LRSchedule
    ):
        raise ConfigError(_no_scheduler(name))


def _no_scheduler(name: str) -> str:
    return (
        f"lr_scheduler._target_={name} is no scheduler: write a class derived from "
        "torch.optim.lr_scheduler.LRScheduler or diffusion_lab.training.optim.LRSchedule"
    )


def data(config: Config, make: Make = instantiate) -> DataModule:
    """The data module; nothing is read yet."""
    node = config["data"]
    module: DataModule = make(node, "data", **accepted(node, seed=config["seed"]))
    return module


def condition(config: Config, found: DataModule, make: Make = instantiate) -> tuple[Condition, dict[str, Any]]:
    """The condition, and its node with what the data set states: the number of classes, of attributes, and their names."""
    node = dict(config["condition"])
    stated = {"num_classes": found.num_classes, "num_attributes": found.num_attributes}
    names = list(found.attribute_names) if "names" in accepted(node, names=()) else None
    node |= accepted(node, **stated, **({} if names is None else {"names": names}))
    built: Condition = make(node, "condition")
    return built, node


def model(config: Config, told: Condition, learned: bool, make: Make = instantiate) -> tuple[nn.Module, dict[str, Any]]:
    """The network with fresh weights, which depend on the seed alone, and its node with all that depends on other groups."""
    node, shape = dict(config["model"]), config["data"]
    depends = {
        "channels": shape["channels"],
        "image_size": shape["image_size"],
        "num_classes": told.num_classes,
        "learned_variance": learned,
        "given_channels": told.given_channels,
    }
    node |= accepted(node, **{k: v for k, v in depends.items() if v})
    torch.manual_seed(config["seed"])
    built: nn.Module = make(node, "model")
    return built, node


def module(config: Config, net: nn.Module, told: Condition, saved: Config, make: Make = instantiate) -> DiffusionModule:
    """What is trained: network, schedule, objective, weighting, error, times, variance, condition, optimizer."""
    built = DiffusionModule(
        net,
        schedule=make(config["schedule"], "schedule"),
        objective=make(config["objective"], "objective"),
        weighting=make(config["weighting"], "weighting"),
        error=make(config["loss"], "loss"),
        times=make(config["time_sampler"], "time_sampler"),
        condition=told,
        optimizer=optimizer(config, make),
        batch_size=config["data"]["batch_size"],
        variance=make(config["variance"], "variance"),
        seed=config["seed"],
        compiled=config["compile"],
        validation_draws=config["validation"]["draws"],
        saved=saved,
    )
    built.try_optimizer(config["trainer"]["max_steps"], validates(config))
    if built.learned_variance and not hasattr(net, "extra"):
        _try_channels(built, config)
    return built


def validates(config: Config) -> bool:
    """Whether a run validates."""
    return config["validation"]["every"] > 0 and config["data"]["val"] != 0


def optimizer(config: Config, make: Make = instantiate) -> OptimizerConfig:
    """How the weights are updated."""
    node = config["lr_scheduler"]
    schedule: LRSchedule | TorchSchedule
    if _is_torch_schedule(node):
        bound = make({**_schedule_node(node), "_partial_": True}, "lr_scheduler")
        plateau = issubclass(locate(node), torch.optim.lr_scheduler.ReduceLROnPlateau)
        schedule = TorchSchedule(bound, node.get("warmup", 0), node.get("monitor", "val/loss"), plateau)
    else:
        schedule = make(node, "lr_scheduler")
        if not isinstance(schedule, LRSchedule):
            raise ConfigError(_no_scheduler(node["_target_"]))
    trainer = config["trainer"]
    made = make({**config["optimizer"], "_partial_": True}, "optimizer")
    return OptimizerConfig(made, schedule, str(trainer["precision"]), bool(trainer["gradient_clip_val"]))


def _is_torch_schedule(node: Config) -> bool:
    kind = locate(node, "lr_scheduler")
    return isinstance(kind, type) and issubclass(kind, LRScheduler | torch.optim.lr_scheduler.ReduceLROnPlateau)


def _schedule_node(node: Config) -> dict[str, Any]:
    """The scheduler's own arguments: the warm-up before one of torch's, and the value a plateau goes by, are the module's."""
    ours = ("warmup", "monitor") if _is_torch_schedule(node) else ()
    return {key: value for key, value in node.items() if key not in ours}


@torch.no_grad()
def _try_channels(built: DiffusionModule, config: Config) -> None:
    """One output of a network that is not this package's; ConfigError unless it has channels for the variance."""
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
    """The named callbacks that are not null, in the order of the file, and the handler of Ctrl-C.

    Raises:
        ConfigError: one whose effect this project gives in another way, or two that write one file.
    """
    built: list[pl.Callback] = []
    for name, node in (config.get("callbacks") or {}).items():
        if node is not None:
            place = {"folder": str(_inside(folder, node["folder"]))} if "folder" in node else {}
            built.append(make({**node, **place}, f"callbacks.{name}"))
            _refuse(built[-1], name, validates(config))
    return [*built, GracefulStop()]


REFUSED = {
    GradientAccumulationScheduler: "the noise of a step is keyed by its place in the global batch, which is cut once for a run: "
    "write trainer.accumulate_grad_batches=",
    StochasticWeightAveraging: "it puts averaged weights into the network that is trained: write callbacks.ema.decay=",
    LearningRateFinder: "it looks for a learning rate in the module, and that of a run is in the optimizer: write "
    "--multirun optimizer.lr=1e-4,3e-4,1e-3",
    BatchSizeFinder: "data.batch_size is the global batch, which keys all noise: write data.batch_size=",
}


def _refuse(callback: pl.Callback, name: str, validated: bool) -> None:
    if not isinstance(callback, pl.Callback):
        raise ConfigError(
            f"callbacks.{name}: {type(callback).__name__} is no callback: write a class derived from "
            "pytorch_lightning.Callback"
        )
    for kind, reason in REFUSED.items():
        if isinstance(callback, kind):
            raise ConfigError(f"callbacks.{name}: {kind.__name__} is refused, since {reason}")
    monitor = getattr(callback, "monitor", None)
    if isinstance(callback, EarlyStopping | ModelCheckpoint) and str(monitor).startswith("val/") and not validated:
        raise ConfigError(
            f"callbacks.{name}: {type(callback).__name__} goes by {monitor}, and this run has no validation: write "
            "validation.every=500 and data.val=0.1"
        )
    names = ("last", "best", "last.ckpt", "best.ckpt")
    last = getattr(callback, "save_last", False) or getattr(callback, "filename", None) in names
    if isinstance(callback, Checkpoint) and last:
        raise ConfigError(
            f"callbacks.{name}: a {type(callback).__name__} that writes last.ckpt or best.ckpt would replace those of "
            f"callbacks.checkpoints: write callbacks.{name}.save_last=false and another filename"
        )


def _inside(folder: Path, name: str) -> Path:
    """A folder below the run folder, also where a checkpoint's configuration names it."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(f"callbacks write below the run folder, and {name} is not: write a relative name")
    return folder / name


def loggers(config: Config, folder: Path, who: Identity, make: Make = instantiate) -> list[Logger]:
    """The loggers that are not null; metrics.csv is always written."""
    built: list[Logger] = []
    for name, node in (config.get("logger") or {}).items():
        if node is not None:
            given = accepted(node, save_dir=str(folder), who=who, config=copy.deepcopy(dict(config)))
            built.append(make(node, f"logger.{name}", **given))
            if not isinstance(built[-1], Logger):
                raise ConfigError(f"logger.{name}: {node['_target_']} is no logger of Lightning's")
    if not any(isinstance(logger, CSVLogger) and Path(logger.log_dir) == folder for logger in built):
        built.insert(0, CSVLogger(str(folder), name="", version="", flush_logs_every_n_steps=100))
    return built


def trainer(
    config: Config, folder: Path, loggers: list[Logger], hooks: list[pl.Callback], make: Make = instantiate
) -> pl.Trainer:
    """Lightning's trainer: the arguments of its node, and where the node is silent those that this project needs.

    Raises:
        ConfigError: combinations that Lightning refuses, or would run differently from what was written.
    """
    node, validation = dict(config["trainer"]), config["validation"]
    if node["accelerator"] == "auto":  # never Apple's MPS: it has no float64, in which all coefficients are computed
        node["accelerator"] = "gpu" if torch.cuda.is_available() else "cpu"
    if node["accelerator"] in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator=gpu, but torch sees no CUDA device: write trainer=cpu")
    if node["accelerator"] == "cpu" and str(node["precision"]) == "16-mixed":
        raise ConfigError(
            "trainer.precision=16-mixed needs a GPU (a CPU would silently run bf16): write 32-true or bf16-mixed"
        )
    for key in ("max_steps", "accumulate_grad_batches", "log_every_n_steps", "num_nodes"):
        if node[key] < 1:
            raise ConfigError(f"trainer.{key}={node[key]} must be at least 1")
    _refuse_limits(node)
    if validation["draws"] < 1:
        raise ConfigError(f"validation.draws={validation['draws']} must be at least 1")
    if (node["gradient_clip_val"] or 0) < 0:
        raise ConfigError("trainer.gradient_clip_val is a norm: write 0 for no clipping")
    if node["strategy"] == "fsdp":
        there = 1 if node["accelerator"] == "cpu" else torch.cuda.device_count()
        node["strategy"] = sharding.strategy(
            (processes.processes_per_node(node["devices"]) or there) * node["num_nodes"]
        )
    validate = validates(config)
    needed = {
        "val_check_interval": validation["every"] * node["accumulate_grad_batches"] if validate else None,
        "limit_val_batches": 1.0 if validate else 0,
        "benchmark": not node["deterministic"],
        "default_root_dir": str(folder),
        "enable_checkpointing": any(isinstance(hook, Checkpoint) for hook in hooks),
        "enable_progress_bar": any(isinstance(hook, ProgressBar) for hook in hooks),
        "enable_model_summary": any(isinstance(hook, ModelSummary) for hook in hooks),
        "plugins": _slurm(),
    }
    given = accepted(node, **needed)
    if validate and "check_val_every_n_epoch" not in node:
        given["check_val_every_n_epoch"] = None  # the interval counts over the endless stream
    # Objects stay out of the node: a node holds plain values, and these are none.
    objects = {key: node.pop(key) for key in ("strategy",) if not isinstance(node[key], str | dict)}
    built: pl.Trainer = make(node, "trainer", **given, **objects, callbacks=hooks, logger=loggers)
    if isinstance(node.get("profiler"), str):
        profiler: Any = built.profiler  # type: ignore[attr-defined]
        profiler.dirpath, profiler.filename = folder, "profile"  # or its table would go to a logger that nobody shows
    return built


def _refuse_limits(node: Config) -> None:
    """Raise ConfigError for flags that an endless stream of global batches has no meaning for."""
    if node.get("barebones"):
        raise ConfigError(
            "trainer.barebones=true goes without the loggers, checkpoints and callbacks that a run leaves: write "
            "logger=none callbacks.samples=null callbacks.progress=null for a run without overhead"
        )
    parts = node["accumulate_grad_batches"]
    for key in ("limit_train_batches", "overfit_batches"):
        value = node.get(key)
        if isinstance(value, float) and value not in (0.0, 1.0):
            raise ConfigError(f"trainer.{key}={value}: training is one endless stream, so write a number of batches")
        if value is not None and not isinstance(value, float) and value % parts:
            raise ConfigError(
                f"trainer.{key}={value} cuts a global batch of trainer.accumulate_grad_batches={parts} parts: write "
                f"trainer.{key}={max(value // parts, 1) * parts}"
            )
    if node.get("limit_train_batches") == 0:
        raise ConfigError("trainer.limit_train_batches=0 trains nothing: write 1 or more, or leave it out")


def _slurm() -> list[Any] | None:
    """SLURM without Lightning's requeueing (see `summary.requeue`). Not under torchrun, which may run inside a SLURM job."""
    started = processes.launched()
    if not SLURMEnvironment.detect() or (started and started.by == "torchrun"):
        return None
    return [SLURMEnvironment(auto_requeue=False)]


def saved(configuration: "Configuration", wandb_id: str, class_names: Sequence[str]) -> dict[str, Any]:
    """Return what this project adds to a checkpoint: plain values only, so that it loads with weights_only=True."""
    packages = ("torchvision", "numpy", "hydra-core", "omegaconf", "torchmetrics")
    return {
        "choices": dict(configuration.choices),
        "wandb_id": wandb_id,
        "class_names": list(class_names),
        "config": copy.deepcopy(configuration.settings),
        "overrides": list(configuration.overrides),
        "composed": copy.deepcopy(configuration.composed),
        "diffusion_lab": {
            "format": FORMAT,
            "version": diffusion_lab.__version__,
            "torch": str(torch.__version__),
            "lightning": str(pl.__version__),
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
            "commit": _commit(),
        },
    }


def _commit() -> str:
    """The commit of the code that trains, "unknown" where this is no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return "unknown"
    return result.stdout.strip() or "unknown"

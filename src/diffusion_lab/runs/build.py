"""From configuration to objects, in the order in which data flows: data → network → schedule, objective, loss → training.

The second page to read: every group of conf/ appears here once.
"""

import copy
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.profilers import PyTorchProfiler, SimpleProfiler
from torch import nn

import diffusion_lab
from diffusion_lab.data.datamodule import DataModule
from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.errors import ConfigError
from diffusion_lab.runs import launchers
from diffusion_lab.runs.checkpoints import FORMAT
from diffusion_lab.runs.instantiate import instantiate
from diffusion_lab.training import sharding
from diffusion_lab.training.callbacks import Interrupt
from diffusion_lab.training.module import DiffusionModule, Optimisation

Config = Mapping[str, Any]


def data(config: Config) -> DataModule:
    """The data module; nothing is read yet."""
    module: DataModule = instantiate(config["data"])
    return module


def network(config: Config) -> nn.Module:
    """The denoising network with fresh weights, which depend on the seed alone."""
    instantiate(
        config["condition"]
    )  # refuses labels that the data set does not have, before the network is built for them
    torch.manual_seed(config["seed"])
    built: nn.Module = instantiate(config["model"])
    return built


def module(config: Config, net: nn.Module, saved: Config) -> DiffusionModule:
    """What is trained: network, schedule, objective, weighting, error, times, variance, condition, optimiser."""
    trainer = config["trainer"]
    make = instantiate(config["optimizer"])
    try:
        make([nn.Parameter(torch.zeros(1))])
    except (ValueError, TypeError) as error:
        raise ConfigError(f"optimizer: {error}") from error
    built = DiffusionModule(
        net,
        schedule=instantiate(config["schedule"]),
        objective=instantiate(config["objective"]),
        weighting=instantiate(config["weighting"]),
        error=instantiate(config["loss"]),
        times=instantiate(config["times"]),
        condition=instantiate(config["condition"]),
        optimisation=Optimisation(
            make=make,
            rate=instantiate(config["rate"]),
            max_steps=trainer["max_steps"],
            precision=str(trainer["precision"]),
            clipping=bool(trainer["gradient_clip_val"]),
        ),
        batch_size=config["data"]["batch_size"],
        variance=instantiate(config["variance"]),
        seed=config["seed"],
        compiled=trainer["compile"],
        validation_draws=trainer["val_draws"],
        saved=saved,
    )
    if built.learned_variance and not hasattr(net, "extra"):
        _try_channels(built, config)
    return built


@torch.no_grad()
def _try_channels(built: DiffusionModule, config: Config) -> None:
    """Asks a network that is not this package's for one output; ValueError unless it has channels for the variance."""
    data = config["data"]
    x = torch.zeros(1, data["channels"], *data["image_size"])
    condition = {"label": torch.zeros(1, dtype=torch.long)} if built.condition.num_classes else {}
    training = built.network.training
    built.network.eval()
    output, extra, *_ = Denoiser(built.network, built.schedule, built.objective).output(x, 1.0, **condition)
    built.network.train(training)
    assert built.learned_variance is not None
    built.learned_variance.read(Prediction(x, x, output, extra))


def callbacks(config: Config, folder: Path) -> list[pl.Callback]:
    """The named callbacks that are not null, in the order of the file, and the handler of Ctrl-C."""
    built: list[pl.Callback] = []
    for node in (config.get("callbacks") or {}).values():
        if node is not None:
            place = {"folder": str(_inside(folder, node["folder"]))} if "folder" in node else {}
            built.append(instantiate(node, **place))
    return [*built, Interrupt()]


def _inside(folder: Path, name: str) -> Path:
    """A folder below the run folder, also where a checkpoint's configuration names it."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(f"callbacks write below the run folder, and {name} is not: write a relative name")
    return folder / name


def trainer(config: Config, folder: Path, loggers: list[Any], hooks: list[pl.Callback]) -> pl.Trainer:
    """Lightning's trainer. Raises ValueError for combinations that it would run differently from what was asked."""
    options = config["trainer"]
    accelerator = options["accelerator"]
    if accelerator == "auto":  # never Apple's MPS: it has no float64, in which all coefficients are computed
        accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator=gpu, but torch sees no CUDA device: write trainer=cpu")
    precision = str(options["precision"])
    if precision not in ("32-true", "16-mixed", "bf16-mixed"):
        raise ConfigError(f"trainer.precision={precision} is unknown: write 32-true, 16-mixed or bf16-mixed")
    if accelerator == "cpu" and precision == "16-mixed":
        raise ConfigError(
            "trainer.precision=16-mixed needs a GPU (a CPU would silently run bf16): write 32-true or bf16-mixed"
        )
    accumulate = options["accumulate_grad_batches"]
    for key in ("max_steps", "accumulate_grad_batches", "log_every_n_steps", "val_draws", "num_nodes"):
        if options[key] < 1:
            raise ConfigError(f"trainer.{key}={options[key]} must be at least 1")
    if options["gradient_clip_val"] < 0:
        raise ConfigError("trainer.gradient_clip_val is a norm: write 0 for no clipping")
    validate = options["val_every"] > 0 and config["data"]["val"] != 0
    try:
        return pl.Trainer(
            accelerator=accelerator,
            devices=options["devices"],
            strategy=_strategy(options, accelerator),
            num_nodes=options["num_nodes"],
            precision=precision,  # type: ignore[arg-type]
            max_steps=options["max_steps"],
            max_epochs=-1,
            max_time=options["max_time"],
            accumulate_grad_batches=accumulate,
            gradient_clip_val=options["gradient_clip_val"] or None,
            log_every_n_steps=options["log_every_n_steps"],
            val_check_interval=options["val_every"] * accumulate if validate else None,
            check_val_every_n_epoch=None if validate else 1,
            limit_val_batches=1.0 if validate else 0,
            num_sanity_val_steps=0,
            deterministic=options["deterministic"],
            detect_anomaly=options["detect_anomaly"],
            profiler=_profiler(options["profiler"], folder),
            benchmark=not options["deterministic"],
            logger=loggers,
            callbacks=hooks,
            default_root_dir=str(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            plugins=_slurm(),
        )
    except (pl.utilities.exceptions.MisconfigurationException, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"trainer: Lightning refuses these options: {error}") from error


def _strategy(options: Config, accelerator: str) -> Any:
    """The strategy's name, or for fsdp an object."""
    if options["strategy"] != "fsdp":
        return options["strategy"]
    there = 1 if accelerator == "cpu" else torch.cuda.device_count()
    return sharding.strategy((launchers.each(options["devices"]) or there) * options["num_nodes"])


def _slurm() -> list[Any] | None:
    """SLURM without Lightning's requeueing, which is runs/train.py's; not under torchrun, which may run inside a SLURM job."""
    started = launchers.launched()
    if not SLURMEnvironment.detect() or (started and started.by == "torchrun"):
        return None
    return [SLURMEnvironment(auto_requeue=False)]


def _profiler(name: str | None, folder: Path) -> SimpleProfiler | PyTorchProfiler | None:
    kinds = {"simple": SimpleProfiler, "pytorch": PyTorchProfiler}
    if name is not None and name not in kinds:
        raise ConfigError(f"trainer.profiler={name} is unknown: write simple or pytorch")
    return kinds[name](dirpath=folder, filename="profile") if name else None


def saved(
    resolved: Config, composed: Config, overrides: Sequence[str], choices: Mapping[str, str], wandb_id: str
) -> dict[str, Any]:
    """What this project adds to a checkpoint: plain values only, so that it loads with weights_only=True."""
    return {
        "choices": dict(choices),
        "wandb_id": wandb_id,
        "config": copy.deepcopy(dict(resolved)),
        "overrides": list(overrides),
        "composed": copy.deepcopy(dict(composed)),  # the same with its interpolations, to resume with overrides on top
        "diffusion_lab": {
            "format": FORMAT,
            "version": diffusion_lab.__version__,
            "torch": str(torch.__version__),
            "lightning": str(pl.__version__),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torchvision", "numpy", "hydra-core", "omegaconf", "torchmetrics")},
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

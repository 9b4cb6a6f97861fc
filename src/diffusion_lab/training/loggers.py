"""The W&B logger, the name of a run, and tables of figures for any logger."""

import csv
import netrc
import os
import secrets
import socket
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse
from urllib.request import getproxies

import pytorch_lightning.loggers as lightning_loggers
from pytorch_lightning.loggers import Logger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.loggers.logger import rank_zero_experiment

from diffusion_lab.errors import ConfigError, check_number
from diffusion_lab.io import replacing

CONNECT_SECONDS = 3.0
FINISH_SECONDS = 120.0  # for W&B to send its last data when a run ends; `wandb sync` sends the rest


class Identity(NamedTuple):
    """Name, group, tags and id of a run, for loggers.

    Attributes:
        name: the options chosen, followed by the overrides.
        group: of a job of a sweep, the name of the sweep's folder.
        tags: GROUP=OPTION of the options chosen.
        id: W&B's, stored in checkpoints, so that a resumed run continues the W&B run.
    """

    name: str
    group: str | None
    tags: list[str]
    id: str


# Groups whose options become tags.
_TAGGED = ("data", "model", "condition", "schedule", "objective", "weighting", "variance", "sampler", "experiment")
# Keys that are left out of a name, since they do not affect the result; in a sweep, which may vary _ALONE, only _NEVER.
_NEVER = (
    "logger",
    "hydra",
    "print_config",
    "data.root",
    "data.download",
    "overwrite",
    "trust",
    "ckpt",
    "init",
    "sweep",
)
_ALONE = ("trainer.", "callbacks.", "debug", "validation.")


def identity(
    choices: Mapping[str, Any], overrides: Sequence[str], sweep: Path | None, wandb_id: str | None
) -> Identity:
    """Return the identity of a run.

    Args:
        choices: group → option, as Hydra composed them.
        overrides: KEY=VALUE of the command line.
        sweep: the folder of the sweep that the run is a job of, else None.
        wandb_id: W&B's id of a resumed run, else None.
    """
    omitted = _NEVER if sweep else _NEVER + _ALONE
    named = ("schedule", "objective", "experiment") if sweep else tuple(choices)
    values = [o.lstrip("+") for o in overrides]
    values = [o for o in values if o.split("=", 1)[0] not in named and not o.startswith(omitted)]
    recipe = choices.get("experiment")
    name = "-".join([*([recipe] if recipe else []), str(choices.get("schedule")), str(choices.get("objective"))])
    tags = [f"{group}={choices[group]}" for group in _TAGGED if choices.get(group)]
    return Identity(" ".join([name, *values]), sweep.name if sweep else None, tags, wandb_id or secrets.token_hex(4))


class _CSVWriter(ExperimentWriter):
    """Replace metrics.csv atomically when a new column appears; Lightning truncates it first, so that a kill loses all rows."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        with replacing(path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames)
            writer.writeheader()
            writer.writerows(rows)


class CSVLogger(lightning_loggers.CSVLogger):
    """Lightning's CSVLogger, whose metrics.csv survives a kill at any time.

    Args:
        save_dir: folder of metrics.csv, with `name` and `version` as sub-folders unless they are empty.
        name: name of the experiment.
        version: version of the experiment.
        prefix: text before the name of each metric.
        flush_logs_every_n_steps: steps after which rows are written to the file, in [1, 10⁹].

    Raises:
        ConfigError: a number out of range.
    """

    def __init__(
        self, save_dir: str, name: str = "", version: str = "", prefix: str = "", flush_logs_every_n_steps: int = 100
    ) -> None:
        check_number("logger.csv.flush_logs_every_n_steps", flush_logs_every_n_steps, "[1, 1000000000]", whole=True)
        super().__init__(save_dir, name, version, prefix, flush_logs_every_n_steps)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """Writer of metrics.csv."""
        if not isinstance(self._experiment, _CSVWriter):
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _CSVWriter(self.log_dir)
        return self._experiment


class WandbLogger(lightning_loggers.WandbLogger):
    """Lightning's W&B logger, offline without a login or a connection, and named by the options chosen.

    Args:
        save_dir: the folder that gets `wandb/`.
        project: W&B's project.
        name: of the run; None takes that of `identity`.
        group: of the run; None takes that of `identity`.
        tags: further ones.
        mode: auto, online (refused without a connection or a login), offline.
        gradients: optimizer steps between two histograms of the gradients (`callbacks.WandbSummary`); 0 for none.
        identity: of the run, passed by the command.
        config: of the run, passed by the command.
        job_type: W&B's; passed by the command.
        kwargs: arguments of `wandb.init`, e.g. entity.

    Raises:
        ConfigError: an unknown mode, a negative number of steps, or mode=online without a connection or a login.
    """

    def __init__(
        self,
        save_dir: str,
        project: str = "diffusion-lab",
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        mode: str = "auto",
        gradients: int = 0,
        identity: Identity | None = None,
        config: dict[str, Any] | None = None,
        job_type: str = "train",
        **kwargs: Any,
    ) -> None:
        check_number("logger.wandb.gradients", gradients, "[0, 1000000000]", "steps, 0 for none", whole=True)
        offline = runs_offline(mode)
        if offline:
            os.environ.setdefault("WANDB_SILENT", "true")  # an offline run has no page to announce
        identity = identity or Identity(name or "run", group, [], secrets.token_hex(4))
        self.gradients = gradients
        super().__init__(
            project=project,
            name=name or identity.name,
            version=kwargs.pop("version", None) or kwargs.pop("id", None) or identity.id,
            save_dir=save_dir,
            offline=offline,
            mode="offline" if offline else "online",  # Lightning sets an environment variable that W&B reads only once
            resume=None if offline else "allow",  # offline, `wandb sync` resumes by the id
            group=group or identity.group,
            tags=[*identity.tags, *tags],
            job_type=job_type,
            config=config,
            **{"settings": {"finish_timeout": FINISH_SECONDS}, "log_model": False, **kwargs},
        )
        self._wandb_init.pop("anonymous", None)  # Lightning always passes it, and W&B warns that it is deprecated


def runs_offline(mode: str) -> bool:
    """Whether W&B runs offline: mode=offline, or mode=auto without a login or a connection.

    Raises:
        ConfigError: an unknown mode, or mode=online without a login or a connection.
    """
    if mode not in ("auto", "online", "offline"):
        raise ConfigError(f"logger.wandb.mode={mode} is unknown: write auto, online or offline")
    if mode == "offline":
        return True
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not _logged_in(address):
        if mode == "online":
            raise ConfigError(
                "logger.wandb.mode=online without a login: run `wandb login`, or write logger.wandb.mode=offline"
            )
        return True
    if _reachable(address):
        return False
    if mode == "online":
        raise ConfigError(
            f"logger.wandb.mode=online, but {address} does not answer: write logger.wandb.mode=offline, then `wandb sync`"
        )
    warnings.warn(
        f"W&B: {address} does not answer, so this run is logged offline; `wandb sync` sends it later", stacklevel=2
    )
    return True


def log_table(
    logger: Logger,
    folder: Path,
    name: str,
    columns: Sequence[str],
    rows: list[list[Any]],
    curves: Sequence[str],
) -> None:
    """Log one table of an evaluation.

    W&B also gets curves against network evaluations and the image `name`.png of `folder`; other loggers get the numbers of
    each row as one step.

    Args:
        logger: any of Lightning's.
        folder: of the evaluation.
        name: of the table.
        columns: of the table.
        rows: of the table.
        curves: columns to plot against network evaluations.
    """
    if not isinstance(logger, lightning_loggers.WandbLogger):
        for step, row in enumerate(rows):
            numbers = {k: float(v) for k, v in zip(columns, row, strict=True) if isinstance(v, int | float)}
            logger.log_metrics(numbers, step=step)
        logger.save()
        return
    import wandb

    run = logger.experiment
    table = wandb.Table(columns=list(columns), data=rows)
    run.log({name: table})
    for metric in curves:
        title = f"{metric} against network evaluations"
        run.log({f"{name}_curve/{metric}": wandb.plot.line(table, "nfe", metric, stroke="sampler", title=title)})
    if (folder / f"{name}.png").is_file():
        run.log({f"{name}_plot": wandb.Image(str(folder / f"{name}.png"))})
    run.finish()


def _logged_in(address: str) -> bool:
    """Whether W&B has a key for an address: in WANDB_API_KEY, or in the .netrc that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return file.is_file() and netrc.netrc(file).authenticators(urlparse(address).hostname or "") is not None
    except netrc.NetrcParseError:
        return False


def _reachable(address: str) -> bool:
    parts = urlparse(address)
    if parts.scheme in getproxies():
        return True  # W&B connects through the proxy, which a plain socket does not
    try:
        with socket.create_connection(
            (parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)), CONNECT_SECONDS
        ):
            return True
    except OSError:
        return False

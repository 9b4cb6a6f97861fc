"""Loggers: metrics.csv always, any of Lightning's by `_target_`, and W&B with what makes a run findable there."""

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

from diffusion_lab.errors import ConfigError

CONNECT_SECONDS = 3.0
FINISH_SECONDS = 120.0  # for what W&B has still to send when a run ends; the rest is for `wandb sync`


class Identity(NamedTuple):
    """The name of a run among others.

    Attributes:
        name: from the choices made, and of a sweep from the values too.
        group: of the jobs of a sweep, its folder's name.
        tags: GROUP=OPTION of the choices made.
        id: W&B's, kept in the checkpoint, so that a resumed run is the same run there.
    """

    name: str
    group: str | None
    tags: list[str]
    id: str


# The choices that distinguish runs.
_TAGGED = ("data", "model", "condition", "schedule", "objective", "weighting", "variance", "sampler", "experiment")
# What does not affect the result; in a sweep only the first ones are left out of a name, since the others may be its subject.
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


def identity(choices: Mapping[str, Any], overrides: Sequence[str], sweep: Path | None, held: str | None) -> Identity:
    """The identity of a run.

    Args:
        choices: group → option, as Hydra composed them.
        overrides: KEY=VALUE of the command line.
        sweep: the folder of the sweep that the run is a job of.
        held: W&B's id where the run is continued.
    """
    mute = _NEVER if sweep else _NEVER + _ALONE
    named = ("schedule", "objective", "experiment") if sweep else tuple(choices)
    values = [o.lstrip("+") for o in overrides]
    values = [o for o in values if o.split("=", 1)[0] not in named and not o.startswith(mute)]
    recipe = choices.get("experiment")
    name = "-".join([*([recipe] if recipe else []), str(choices.get("schedule")), str(choices.get("objective"))])
    tags = [f"{group}={choices[group]}" for group in _TAGGED if choices.get(group)]
    return Identity(" ".join([name, *values]), sweep.name if sweep else None, tags, held or secrets.token_hex(4))


class WandbLogger(lightning_loggers.WandbLogger):
    """Lightning's W&B logger: offline where nobody is logged in or nothing answers, named by the choices made.

    Args:
        save_dir: the folder that gets `wandb/`.
        project: W&B's project.
        name: of the run; None takes `who`'s.
        group: None takes `who`'s, the folder of a sweep.
        tags: further ones.
        mode: auto, online (refused without a connection or a login), offline.
        gradients: optimizer steps between two histograms of the gradients (`callbacks.WandbSummary`); 0 for none.
        who: the run's identity, passed by the command.
        config: the run's configuration, passed by the command.
        kwargs: of `wandb.init`, e.g. entity.

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
        who: Identity | None = None,
        config: dict[str, Any] | None = None,
        job_type: str = "train",
        **kwargs: Any,
    ) -> None:
        if gradients < 0:
            raise ConfigError(f"logger.wandb.gradients={gradients} must be a number of steps, or 0 for none")
        offline = runs_offline(mode)
        if offline:
            os.environ.setdefault("WANDB_SILENT", "true")  # there is no page to announce
        who = who or Identity(name or "run", group, [], secrets.token_hex(4))
        self.gradients = gradients
        super().__init__(
            project=project,
            name=name or who.name,
            version=kwargs.pop("version", None) or kwargs.pop("id", None) or who.id,
            save_dir=save_dir,
            offline=offline,
            mode="offline" if offline else "online",  # Lightning sets the environment, which W&B reads once a process
            resume=None if offline else "allow",  # offline the id alone decides, in `wandb sync`
            group=group or who.group,
            tags=[*who.tags, *tags],
            job_type=job_type,
            config=config,
            **{"settings": {"finish_timeout": FINISH_SECONDS}, "log_model": False, **kwargs},
        )
        self._wandb_init.pop("anonymous", None)  # Lightning passes it always, and W&B warns of it always


def runs_offline(mode: str) -> bool:
    """Whether W&B runs offline: as written, not logged in, or not reachable."""
    if mode not in ("auto", "online", "offline"):
        raise ConfigError(f"logger.wandb.mode={mode} is unknown: write auto, online or offline")
    if mode == "offline":
        return True
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not _logged_in(address):
        if mode == "online":
            raise ConfigError(
                "logger.wandb.mode=online, but you are not logged in: run `wandb login`, or write mode offline"
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
    """One table, and for W&B its figures against network evaluations and the picture `name`.png of `folder`; other
    loggers get the numbers of each row as a step."""
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
    """Whether W&B has a key for that address: in the environment, or where `wandb login` leaves it."""
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
        return True  # W&B goes through the proxy, which a connection of ours would not
    try:
        with socket.create_connection(
            (parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)), CONNECT_SECONDS
        ):
            return True
    except OSError:
        return False

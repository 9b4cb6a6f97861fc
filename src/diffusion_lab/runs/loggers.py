"""Loggers: metrics.csv always, W&B and TensorBoard by choice."""

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

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from diffusion_lab.errors import ConfigError

CONNECT_SECONDS = 3.0
FINISH_SECONDS = 120.0  # for what W&B has still to send when a run ends; the rest is for `wandb sync`


class Identity(NamedTuple):
    """What a run is called beside others.

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


# The choices that tell runs apart.
_TAGGED = ("data", "model", "condition", "schedule", "objective", "weighting", "variance", "sampler", "experiment")
# What says nothing of the result; in a sweep only the first ones are left out of a name, for the others may be what it is about.
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
_ALONE = ("trainer.", "callbacks.", "debug")


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


def build(config: Mapping[str, Any], folder: Path, who: Identity) -> list[Logger]:
    """The loggers of a run that writes to `folder`.

    Raises:
        ValueError: an unknown mode, or mode=online without a connection or a login.
    """
    chosen = config.get("logger") or {}
    loggers: list[Logger] = [CSVLogger(str(folder), name="", version="", flush_logs_every_n_steps=100)]
    if chosen.get("tensorboard") is not None:
        loggers.append(TensorBoardLogger(str(folder), name="tensorboard", version=""))
    if chosen.get("wandb") is not None:
        options = chosen["wandb"]
        offline = _offline(str(options["mode"]))
        if offline:
            os.environ.setdefault("WANDB_SILENT", "true")  # nothing to say without a page to look at
        logger = WandbLogger(
            project=options["project"],
            name=options["name"] or who.name,
            version=who.id,
            save_dir=str(folder),
            offline=offline,
            mode="offline" if offline else "online",  # Lightning sets the environment, which W&B reads once a process
            resume=None if offline else "allow",  # offline the id alone says it, to `wandb sync`
            group=options.get("group") or who.group,
            tags=[*who.tags, *options.get("tags", [])],
            job_type="train",
            settings={"finish_timeout": FINISH_SECONDS},
            config=dict(config),
            log_model=False,
        )
        logger._wandb_init.pop("anonymous", None)  # Lightning passes it always, and W&B warns of it always
        loggers.append(logger)
    return loggers


def log_table(
    options: Mapping[str, Any],
    folder: Path,
    config: dict[str, Any],
    name: str,
    columns: Sequence[str],
    rows: list[list[Any]],
    curves: Sequence[str],
) -> None:
    """One W&B run that holds one table, its figures against network evaluations, and the picture `name`.png of `folder`.

    Raises:
        ValueError: as `build`.
    """
    offline = _offline(str(options["mode"]))
    if offline:
        os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    mode: Any = "offline" if offline else "online"
    with wandb.init(
        project=options["project"], name=options["name"] or folder.name, dir=str(folder), mode=mode, config=config
    ) as run:
        table = wandb.Table(columns=list(columns), data=rows)
        run.log({name: table})
        for metric in curves:
            title = f"{metric} against network evaluations"
            run.log({f"{name}_curve/{metric}": wandb.plot.line(table, "nfe", metric, stroke="sampler", title=title)})
        if (folder / f"{name}.png").is_file():
            run.log({f"{name}_plot": wandb.Image(str(folder / f"{name}.png"))})


def _offline(mode: str) -> bool:
    """Whether W&B runs offline: asked for, not logged in, or not reachable."""
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
        return True  # W&B asks the proxy, which a connection of ours would not
    try:
        with socket.create_connection(
            (parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)), CONNECT_SECONDS
        ):
            return True
    except OSError:
        return False

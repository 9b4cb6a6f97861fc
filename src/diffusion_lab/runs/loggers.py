"""Loggers: metrics.csv always, W&B and TensorBoard by choice."""

import netrc
import os
import socket
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

CONNECT_SECONDS = 3.0


def build(config: Mapping[str, Any], resolved: Mapping[str, Any], folder: Path) -> list[Logger]:
    """The loggers of a run that writes to `folder`.

    Raises:
        ValueError: an unknown mode, or mode=online without a connection or a login.
    """
    chosen = config.get("logger") or {}
    loggers: list[Logger] = [CSVLogger(str(folder), name="", version="", flush_logs_every_n_steps=100)]
    if "tensorboard" in chosen:
        loggers.append(TensorBoardLogger(str(folder), name="tensorboard", version=""))
    if "wandb" in chosen:
        options = chosen["wandb"]
        offline = _offline(str(options["mode"]))
        if offline:
            os.environ.setdefault("WANDB_SILENT", "true")  # nothing to say without a page to look at
        logger = WandbLogger(
            project=options["project"],
            name=options["name"] or f"{_leaf(resolved, 'schedule')}-{_leaf(resolved, 'objective')}",
            save_dir=str(folder),
            offline=offline,
            mode="offline" if offline else "online",  # Lightning sets the environment, which W&B reads once a process
            config=dict(resolved),
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
) -> None:
    """One W&B run that holds one table, and the picture `name`.png where `folder` has it.

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
        run.log({name: wandb.Table(columns=list(columns), data=rows)})
        if (folder / f"{name}.png").is_file():
            run.log({f"{name}_plot": wandb.Image(str(folder / f"{name}.png"))})


def _leaf(resolved: Mapping[str, Any], group: str) -> str:
    return str(resolved[group]["_target_"]).rsplit(".", 1)[-1]


def _offline(mode: str) -> bool:
    """Whether W&B runs offline: asked for, not logged in, or not reachable."""
    if mode not in ("auto", "online", "offline"):
        raise ValueError(f"logger.wandb.mode={mode} is unknown: write auto, online or offline")
    if mode == "offline":
        return True
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not _logged_in(address):
        if mode == "online":
            raise ValueError(
                "logger.wandb.mode=online, but you are not logged in: run `wandb login`, or write mode offline"
            )
        return True
    if _reachable(address):
        return False
    if mode == "online":
        raise ValueError(
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
    try:
        with socket.create_connection(
            (parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)), CONNECT_SECONDS
        ):
            return True
    except OSError:
        return False

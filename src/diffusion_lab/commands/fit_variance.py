"""Fit the optimal variance of a checkpoint, and write it to the checkpoint's folder (`src/fit_variance.py`)."""

import csv
import io
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.checkpoint import Run, fits, load_checkpoint
from diffusion_lab.checkpoint.build import build, data_module, overridden
from diffusion_lab.data.datamodule import DataModule
from diffusion_lab.device import device
from diffusion_lab.errors import ConfigError
from diffusion_lab.io import os_errors, require_writable, write_file
from diffusion_lab.metrics.collect import Processes
from diffusion_lab.metrics.worker_group import run_in_group
from diffusion_lab.models import VarianceHead
from diffusion_lab.time_samplers import Stratified, TimeSampler
from diffusion_lab.training.variance_fit import fit_times, moments, second_moments, train_head
from diffusion_lab.variances import Analytic


@dataclass
class Prepared:
    """A run, the kind of variance to fit, and the data set on which the run was trained."""

    settings: dict[str, Any]
    run: Run
    kind: str
    data: DataModule


class Fit(NamedTuple):
    """The entries of the file of a fit, and a table for the run folder."""

    stored: dict[str, Any]
    header: list[str]
    rows: list[list[float]]


def run(config: DictConfig) -> int:
    """Fit a variance, write it to the checkpoint's folder and a table to the run folder, and return the exit code."""
    settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    with os_errors():
        _check(settings)
        kind = device(settings["device"], settings["devices"]).partition(":")[0]
        run_in_group(fit, settings, settings["devices"], kind)
    return 0


def fit(settings: dict[str, Any], processes: Processes) -> None:
    """Fit in this process, as one of a group. Rank 0 writes the files and prints the summary."""
    prepared = processes.build(lambda: prepare(settings, processes.rank))
    result = (_analytic if prepared.kind == "analytic" else _head)(prepared, processes)
    if processes.rank == 0:
        path = fits.write(prepared.run, prepared.kind, result.stored, settings["overwrite"])
        table = Path(settings["run_dir"]) / f"{prepared.kind}.csv"
        write_file(table, _csv(result))
        print(
            f"variance={prepared.kind} for weights {prepared.run.weights}, step {prepared.run.step:,}: {path}\n"
            f"look at  {table}\n"
            f"sample   python src/sample.py ckpt={shlex.quote(str(settings['ckpt']))} variance={prepared.kind} sampler=ddpm "
            "sampler.steps=50 n=64"
        )


def _check(settings: dict[str, Any]) -> str:
    """Return the kind of variance. Raises ConfigError for settings that are invalid for every checkpoint."""
    if not settings["ckpt"]:
        raise ConfigError("ckpt= is not set: write ckpt=PATH with a checkpoint or a run folder, or ckpt=latest")
    kind = fits.FITTED.get((settings["variance"] or {}).get("_target_", ""))
    if kind is None:
        raise ConfigError("this variance needs no fit: write variance=analytic, variance=sn or variance=npr")
    for key in ("n", "steps", "batch_size", "devices"):
        if not settings[key] or settings[key] < 1:
            raise ConfigError(f"{key}={settings[key]}: write at least 1")
    if kind != "analytic" and settings["devices"] > 1:
        raise ConfigError(f"devices={settings['devices']}: variance={kind} is trained in one process: write devices=1")
    return kind


def prepare(settings: dict[str, Any], rank: int = 0) -> Prepared:
    """Build and check all objects of a fit, without writing a file.

    Raises:
        ConfigError: if the checkpoint is missing, the fit exists, or the settings do not fit the checkpoint.
    """
    kind = _check(settings)
    target = device(settings["device"], settings["devices"], rank)
    loaded = load_checkpoint(settings["ckpt"], settings["weights"], settings["trust"])
    path = fits.place(loaded, kind)
    require_writable(path.parent, "ckpt")
    if path.exists() and not settings["overwrite"] and rank == 0:
        raise ConfigError(
            f"{path} exists and was fitted to these weights: use it, or write overwrite=true to fit again"
        )
    if kind == "analytic":
        fit_times(loaded.denoiser.schedule, settings["nodes"])
    else:
        VarianceHead(loaded.denoiser.network, kind)  # type: ignore[arg-type]
    node, named = overridden(loaded.config["data"], {"batch_size": settings["batch_size"], **settings["data"]})
    data = data_module(node, settings["trust"], named, seed=settings["seed"])
    data.prepare_data()
    data.setup()
    return Prepared(settings, loaded.to(target), kind, data)


def _analytic(p: Prepared, processes: Processes) -> Fit:
    """Estimate E mean(ε̂²) at every time over the training images, which are distributed over the processes."""
    schedule, settings = p.run.denoiser.schedule, p.settings
    times = fit_times(schedule, settings["nodes"])
    error: Exception | None = None
    sums = torch.zeros(2, len(times), dtype=torch.float64)
    try:
        sums = second_moments(
            p.run.denoiser,
            p.data.examples("train"),
            times,
            settings["n"],
            p.run.condition,
            seed=settings["seed"],
            batch_size=settings["batch_size"],
            rank=processes.rank,
            world=processes.world,
            progress=processes.rank == 0,
        )
    except Exception as raised:  # raised in `agree`, since the other processes would wait for this one
        error = raised
    processes.agree(error)
    values = moments(processes.sum(sums))
    c = Analytic(times, values).covariance(schedule, times)
    stored = {"times": times, "moments": values, "n": settings["n"], "seed": settings["seed"]}
    return Fit(stored, ["t", "moment", "covariance"], torch.stack([times, values, c], dim=1).tolist())


def _head(p: Prepared, processes: Processes) -> Fit:
    """Train a variance head on the training images."""
    d, settings = p.run.denoiser, p.settings
    torch.manual_seed(settings["seed"])
    network = VarianceHead(d.network, p.kind).to(p.run.device)  # type: ignore[arg-type]
    times = build(p.run.config["time_sampler"], settings["trust"], "time_sampler", TimeSampler)
    rows = train_head(
        replace(d, network=network, clip=None),
        p.kind,
        p.data.train_dataloader(),
        Stratified()
        if times.learns
        else times,  # importance sampling depends on losses of the network, not of the head
        p.run.condition,
        steps=settings["steps"],
        lr=settings["lr"],
        decay=settings["ema"],
        seed=settings["seed"],
        progress=True,
    )
    head = {name: value.cpu() for name, value in network.head.state_dict().items()}
    stored = {"head": head, **{key: settings[key] for key in ("steps", "lr", "ema", "seed")}}
    return Fit(stored, ["step", "loss"], [list(row) for row in rows])


def _csv(result: Fit) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(result.header)
    writer.writerows(result.rows)
    return text.getvalue()

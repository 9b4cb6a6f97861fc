"""`src/fit_variance.py`: the optimal variance of a checkpoint, stored beside it for sample.py and evaluate.py."""

import csv
import io
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.checkpoint import Run, load_checkpoint
from diffusion_lab.checkpoint import fits as variances
from diffusion_lab.commands.evaluate.processes import shared
from diffusion_lab.data.datamodule import DataModule
from diffusion_lab.device import device
from diffusion_lab.errors import ConfigError
from diffusion_lab.instantiation import instantiate_untrusted
from diffusion_lab.io import os_errors, write_file
from diffusion_lab.metrics.collect import Processes
from diffusion_lab.models import VarianceHead
from diffusion_lab.time_samplers import Stratified
from diffusion_lab.training.variance_fit import fit_times, moments, second_moments, train_head
from diffusion_lab.variances import Analytic


@dataclass
class Prepared:
    """A run, what is fitted to it, and the data set that it was trained on."""

    settings: dict[str, Any]
    run: Run
    kind: str
    data: DataModule


class Fit(NamedTuple):
    """What is stored, and the table for the run folder."""

    stored: dict[str, Any]
    header: list[str]
    rows: list[list[float]]


def run(config: DictConfig) -> int:
    """Fits as configured; leaves the fit beside the checkpoint and a table in the run folder; returns the exit code."""
    with os_errors():
        settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        prepared = prepare(settings)
        with shared(settings, prepare, fit) as processes:
            found = fit(prepared, processes)
        path = variances.write(prepared.run, prepared.kind, found.stored)
        table = Path(settings["run_dir"]) / f"{prepared.kind}.csv"
        write_file(table, _csv(found))
    print(
        f"variance={prepared.kind} for weights {prepared.run.weights}, step {prepared.run.step:,}: {path}\n"
        f"look at  {table}\n"
        f"sample   python src/sample.py ckpt={shlex.quote(str(settings['ckpt']))} variance={prepared.kind} sampler=ddpm "
        "sampler.steps=50 n=64"
    )
    return 0


def prepare(settings: dict[str, Any], rank: int = 0) -> Prepared:
    """Builds and checks all that a fit needs. ValueError: anything that cannot be, in one line; nothing is written then."""
    if not settings["ckpt"]:
        raise ConfigError("name what to fit to: ckpt=PATH of a checkpoint or a run folder, or ckpt=latest")
    kind = variances.FITTED.get((settings["variance"] or {}).get("_target_", ""))
    if kind is None:
        raise ConfigError("this variance is not fitted: write variance=analytic, variance=sn or variance=npr")
    for key in ("n", "steps", "batch_size", "devices"):
        if not settings[key] or settings[key] < 1:
            raise ConfigError(f"{key}={settings[key]}: write at least 1")
    if kind != "analytic" and settings["devices"] > 1:
        raise ConfigError(f"variance={kind} trains a small head in one process: write devices=1")
    on = device(settings["device"], settings["devices"], rank)
    loaded = load_checkpoint(settings["ckpt"], settings["weights"], settings["trust"])
    path = variances.place(loaded, kind)
    if path.exists() and not settings["overwrite"] and rank == 0:
        raise ConfigError(
            f"{path} is there already, fitted to these weights: use it, or write overwrite=true to fit anew"
        )
    if kind == "analytic":
        fit_times(loaded.denoiser.schedule, settings["nodes"])
    else:
        VarianceHead(loaded.denoiser.network, kind)  # type: ignore[arg-type]
    stated = {key: value for key, value in settings["data"].items() if value is not None}
    node = {**loaded.config["data"], "batch_size": settings["batch_size"], **stated}
    data: DataModule = instantiate_untrusted(node, settings["trust"], "data", seed=settings["seed"])
    data.prepare_data()
    data.setup()
    return Prepared(settings, loaded.to(on), kind, data)


def fit(prepared: Prepared, processes: Processes) -> Fit:
    """The fit, in every process the same."""
    return (_analytic if prepared.kind == "analytic" else _head)(prepared, processes)


def _analytic(p: Prepared, processes: Processes) -> Fit:
    """E mean(ε̂²) at every time, on the training images, each process its share."""
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
    except Exception as met:  # a defect too: or the other processes would wait for this one
        error = met
    processes.agree(error)
    found = moments(processes.sum(sums))
    c = Analytic(times, found).covariance(schedule, times)
    stored = {"times": times, "moments": found, "n": settings["n"], "seed": settings["seed"]}
    return Fit(stored, ["t", "moment", "covariance"], torch.stack([times, found, c], dim=1).tolist())


def _head(p: Prepared, processes: Processes) -> Fit:
    """A second head, trained on the training images."""
    d, settings = p.run.denoiser, p.settings
    torch.manual_seed(settings["seed"])
    network = VarianceHead(d.network, p.kind).to(p.run.device)  # type: ignore[arg-type]
    times = instantiate_untrusted(p.run.config["time_sampler"], settings["trust"], "time_sampler")
    rows = train_head(
        replace(d, network=network, clip=None),
        p.kind,
        p.data.train_dataloader(),
        Stratified() if times.learns else times,  # importance sampling knows the losses of the network, not of the head
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


def _csv(found: Fit) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(found.header)
    writer.writerows(found.rows)
    return text.getvalue()

"""`src/evaluate.py`: a checkpoint's samples against its data set."""

import csv
import io
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.data.pictures import to_uint8
from diffusion_lab.metrics.classifier import Trained, features, logits, trained
from diffusion_lab.metrics.frechet import frechet_distance, moments
from diffusion_lab.runs import files
from diffusion_lab.runs.checkpoints import Run, load_checkpoint, rewrapped
from diffusion_lab.runs.cli import refusals
from diffusion_lab.runs.instantiate import instantiate
from diffusion_lab.runs.sample import device, labels
from diffusion_lab.samplers import DDIM, DDPM, Sampler

SAMPLERS = {"ddim": DDIM, "ddpm": DDPM}
METRICS = ("fd_classifier",)
CONFIDENT = 0.9  # the classifier's probability from which a sample counts as recognised
MOST = 10_000


def run(config: DictConfig) -> int:
    """Evaluates as configured; writes metrics.json and metrics.csv, prints the table; returns the exit code."""
    with refusals(OSError):
        settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        if not settings["ckpt"]:
            raise ValueError("name what to evaluate: ckpt=PATH of a checkpoint or a run folder, or ckpt=latest")
        unknown = [m for m in settings["metrics"] if m not in METRICS]
        if unknown:
            raise ValueError(f"metrics={unknown[0]} is unknown: write {', '.join(METRICS)}")
        out = Path(settings["out"] or settings["run_dir"])
        files.refuse_filled(out, "out", settings["overwrite"])
        loaded = load_checkpoint(settings["ckpt"], settings["weights"], settings["trust"])
        loaded = rewrapped(loaded, clip=instantiate(settings.get("clip"))).to(device(settings["device"]))
        samplers = _samplers(settings)
        for _, sampler in samplers:
            sampler.check(loaded.denoiser)
        judge, reference = _judge(loaded, settings)
        rows = [_measure(loaded, name, sampler, judge, reference, settings) for name, sampler in samplers]
        _write(out, rows)
    _show(rows, judge, out)
    return 0


def _samplers(settings: dict[str, Any]) -> list[tuple[str, Sampler]]:
    variance = instantiate(settings["variance"])
    for name in settings["samplers"]:
        if name not in SAMPLERS:
            raise ValueError(f"samplers={name} is unknown: write {', '.join(SAMPLERS)}")
    asked = product(settings["samplers"], settings["steps"])
    return [(name, SAMPLERS[name](steps=steps, variance=variance)) for name, steps in asked]


def _judge(loaded: Run, settings: dict[str, Any]) -> tuple[Trained, torch.Tensor]:
    """The data set's classifier, and the uint8 images that samples are compared with."""
    node = dict(loaded.config["data"])
    if settings["data_root"]:
        node["root"] = settings["data_root"]
    data = instantiate(node, settings["trust"])
    data.prepare_data()
    data.setup()
    if not data.num_classes:
        raise ValueError("metrics=fd_classifier needs a labelled data set, and this one has no labels")
    train, held = data.examples("train"), data.examples("test")
    judge = trained(
        np.asarray(train.images), train.labels, np.asarray(held.images), held.labels, Path(settings["cache"])
    )
    return judge, torch.from_numpy(np.asarray(data.images(settings["split"])))


def _measure(
    loaded: Run, name: str, sampler: Sampler, judge: Trained, reference: torch.Tensor, settings: dict[str, Any]
) -> dict[str, Any]:
    n = settings["n"] or min(len(reference), MOST)
    asked = labels(settings["labels"], loaded, n)
    condition = {} if asked is None else {"label": asked}
    samples = loaded.sample(n, sampler, settings["seed"], settings["batch_size"], condition, progress=True)
    images = to_uint8(samples)
    confidence, classes = logits(judge.network, images).softmax(1).max(1)
    counts = torch.bincount(classes[confidence >= CONFIDENT], minlength=loaded.config["data"]["num_classes"])
    distance = frechet_distance(moments(features(judge.network, images)), moments(features(judge.network, reference)))
    metrics: dict[str, Any] = {
        "fd_classifier": distance,
        "recognised": float((confidence >= CONFIDENT).double().mean()),
        "classes": (counts / n).tolist(),
    }
    if asked is not None:
        metrics["as_asked"] = float((classes == asked).double().mean())
    return {
        "sampler": name,
        "steps": sampler.steps,
        "nfe": sampler.nfe,
        "n": n,
        "seed": settings["seed"],
        "split": settings["split"],
        "weights": loaded.weights,
        "extractor": f"classifier ({judge.path.stem}, {judge.accuracy:.2%} right on held-out images)",
        "metrics": metrics,
    }


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    files.write(out / "metrics.json", json.dumps(rows, indent=2))
    text = io.StringIO()
    flat = [{**{k: v for k, v in row.items() if k != "metrics"}, **row["metrics"]} for row in rows]
    writer = csv.DictWriter(text, list(flat[0]))
    writer.writeheader()
    writer.writerows(flat)
    files.write(out / "metrics.csv", text.getvalue())


def _show(rows: list[dict[str, Any]], judge: Trained, out: Path) -> None:
    first = rows[0]
    print(
        f"{first['n']:,} images, seed {first['seed']}, weights {first['weights']}, against split {first['split']}\n"
        f"classifier: {judge.accuracy:.2%} right on held-out images; recognised: its confidence is at least {CONFIDENT:.0%}\n"
        f"{'sampler':10}{'steps':>7}{'nfe':>7}{'fd_classifier':>15}{'recognised':>12}"
    )
    for row in rows:
        m = row["metrics"]
        print(
            f"{row['sampler']:10}{row['steps'] or 'all':>7}{row['nfe']:>7}{m['fd_classifier']:>15.2f}{m['recognised']:>12.1%}"
        )
    print(f"written to {out}")

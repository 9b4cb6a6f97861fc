"""Draw samples with every sampler and seed and compute the metrics, distributed over all processes."""

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.checkpoint.guidance import is_guided
from diffusion_lab.commands.evaluate import likelihoods, nll_files
from diffusion_lab.commands.evaluate.prepare import Prepared
from diffusion_lab.commands.evaluate.samplers import SamplerSpec
from diffusion_lab.generation import batch_of, generate
from diffusion_lab.io import progress
from diffusion_lab.metrics.collect import Processes, blocks, collect
from diffusion_lab.metrics.measure import measure, protocol
from diffusion_lab.metrics.nll import Measured

Row = dict[str, Any]


class Measurement(NamedTuple):
    """Metrics of n images, duration of sampling and measuring in seconds, and network evaluations per image."""

    metrics: Row
    seconds: float
    nfe: float


def rows(prepared: Prepared, processes: Processes) -> list[Row]:
    """Return a row for each sampler and number of steps, or one row for an image set. Every process returns the same rows.

    Raises:
        ConfigError: if an image contains NaN or Inf. The message contains its index.
    """
    _add_real(prepared)
    common = _common(prepared, processes)
    if prepared.image_set:
        only = _measure(prepared, processes, None, 0)
        return [{**_head(prepared, None, only.nfe), "metrics": only.metrics, "seconds": only.seconds, **common}]
    results = [_row(prepared, processes, spec) for spec in prepared.samplers]
    if prepared.held_out is not None and processes.rank == 0:
        _add_likelihoods(prepared, results)
    return [{**row, **common} for row in results]


def _add_real(prepared: Prepared) -> None:
    """Update the image metrics that compare samples with data with all images of the split, once for all samplers."""
    metrics = [metric for metric in prepared.image_metrics.values() if metric.takes_real]
    parts = list(blocks(len(prepared.real), prepared.settings["batch_size"])) if metrics else []
    for part in progress(parts, "real images", "block", bool(parts)):
        images = torch.from_numpy(np.ascontiguousarray(prepared.real[part.start : part.stop]))
        for metric in metrics:
            metric.add(images, real=True)


def _row(prepared: Prepared, processes: Processes, spec: SamplerSpec) -> Row:
    """Return the mean of the metrics over `repeats` seeds, and their standard deviation."""
    if not prepared.measures_samples:
        return {**_head(prepared, spec, 0), "metrics": {}, "seconds": 0.0}
    seed, repeats = prepared.settings["seed"], prepared.settings["repeats"]
    seeds = list(range(seed, seed + repeats))
    measurements = [_measure(prepared, processes, spec, s) for s in seeds]
    each = [m.metrics for m in measurements]
    means = {name: np.mean([figures[name] for figures in each], axis=0).tolist() for name in each[0]}
    row = {**_head(prepared, spec, float(np.mean([m.nfe for m in measurements]))), "metrics": means, "seeds": seeds}
    if repeats > 1:
        row["spread"] = {name: np.std([figures[name] for figures in each], axis=0, ddof=1).tolist() for name in each[0]}
        row["each"] = each
    return {**row, "seconds": float(np.mean([m.seconds for m in measurements]))}


def _add_likelihoods(prepared: Prepared, results: list[Row]) -> None:
    """Add nll to the rows of the samplers that have a likelihood, and write its terms to separate files."""
    assert prepared.held_out is not None
    by_name: dict[str, Measured] = {}
    for row, spec, likelihood in zip(results, prepared.samplers, prepared.likelihoods, strict=True):
        if likelihood is None:
            continue
        begin = time.perf_counter()
        m = likelihoods.measured(spec, likelihood, prepared.held_out, prepared.settings)
        key, error = prepared.nll, m["standard_error"]
        row["metrics"] |= {key: m["bpd"]} | ({} if error is None else {f"{key}_std": error})
        row["nll"] = {k: m[k] for k in ("kind", "n", "seed", "nfe", "settings")} | {
            "split": prepared.settings["nll_split"]
        }
        row["seconds"] += time.perf_counter() - begin
        if not prepared.measures_samples:
            row |= {"n": m["n"], "nfe": round(m["nfe"]), "split": prepared.settings["nll_split"]}
        by_name[f"{spec.name}, {spec.sampler.steps or 'all'} steps"] = m
    nll_files.write(prepared.out, by_name)


def _head(prepared: Prepared, spec: SamplerSpec | None, nfe: float) -> Row:
    """Return the columns that identify a row."""
    main = prepared.extractors.get(prepared.plan.main) or next(iter(prepared.extractors.values()), None)
    return {
        "sampler": spec.name if spec else None,
        "steps": spec.sampler.steps if spec else None,
        "nfe": round(nfe) if spec else None,
        "n": prepared.n,
        "seed": prepared.settings["seed"] if spec else None,
        "split": prepared.settings["split"],
        "weights": prepared.run.weights if prepared.run else None,
        "extractor": main.name if main else None,
    }


def _measure(prepared: Prepared, processes: Processes, spec: SamplerSpec | None, seed: int) -> Measurement:
    """Sample n images with one sampler and seed, or read the image set if `spec` is None, and compute the metrics."""
    p, begin = prepared, time.perf_counter()
    work = torch.zeros(2, dtype=torch.float64)  # Σ network evaluations, number of images
    desc = "reading"
    if spec is not None:
        spec.run.to(p.device)
        desc = f"{spec.name}, {spec.sampler.steps or 'all'} steps"

    def images(block: range) -> Tensor:
        if spec is None:
            assert p.image_set is not None
            work.add_(torch.tensor([0, len(block)]))
            return p.image_set.block(block)
        batch = batch_of(block, p.condition, p.device)
        samples = generate(spec.run.denoiser, spec.sampler, spec.run.shape, batch, seed=seed)
        work.add_(torch.tensor([samples.nfe * len(block), len(block)]))
        return samples.x

    image_metrics = {key: metric.copy() for key, metric in p.image_metrics.items()}

    def feed(images: Tensor) -> None:
        for metric in image_metrics.values():
            metric.add(images)

    collected = collect(
        images,
        p.n,
        p.settings["batch_size"],
        list(p.extractors.values()),
        features=[extractor.name for name, extractor in p.extractors.items() if p.plan.features(name)],
        logits=[extractor.name for name, extractor in p.extractors.items() if p.plan.logits(name)],
        labels=p.labels,
        feed=feed if p.feeds_images else None,
        processes=processes,
        progress=desc,
    )
    figures: Row = {}
    for name, extractor in p.extractors.items():
        figures |= measure(p.plan.by_extractor[name], extractor, collected[extractor.name], p.references[name])
    if p.feeds_images:
        figures |= processes.first(
            lambda: {k: v for metric in image_metrics.values() for k, v in metric.figures().items()}
        )
    evaluations, count = processes.sum(work).tolist()
    return Measurement(figures, time.perf_counter() - begin, evaluations / count)


def _common(prepared: Prepared, processes: Processes) -> Row:
    """Return the entries that are common to all rows and are needed to reproduce the results."""
    p = prepared
    texts = protocol({key: metric for metrics in p.plan.by_extractor.values() for key, metric in metrics.items()})
    texts |= {key: metric.protocol for key, metric in p.image_metrics.items()}
    out: Row = {"protocol": texts, "batch_size": p.settings["batch_size"], "processes": processes.world}
    out["data"] = {"name": type(p.data.source).__name__, "shape": [p.data.channels, *p.data.image_size]}
    out["references"] = {
        extractor.name: {
            "file": str(p.references[name].path),
            "n": p.references[name].moments.n,
            "weights": extractor.key,
            **_accuracy(extractor),
        }
        for name, extractor in p.extractors.items()
    }
    if p.run:
        average = p.run.weights.removeprefix("ema ")
        out["checkpoint"] = {
            "path": str(p.run.path.absolute() if p.run.path else p.settings["ckpt"]),  # not `latest`
            "step": p.run.step,
            "ema_decay": None if p.run.weights == "raw" else float(average),
            "clip": (p.settings.get("clip") or {}).get("_target_", "none").rsplit(".", 1)[-1],
            "guidance": _guidance(p.settings["guidance"]),
            "variance": (p.settings["variance"] or {}).get("_target_", "its own").rsplit(".", 1)[-1],
        }
    else:
        out["images"] = str(p.settings["images"])
    if p.warnings:
        out["warnings"] = p.warnings
    return out


def _guidance(node: Row | None) -> Row | None:
    """Return the guidance of the samples as plain values; None without guidance."""
    if node is None or not is_guided(node):
        return None
    return {"kind": node["_target_"].rsplit(".", 1)[-1], **{k: v for k, v in node.items() if k != "_target_"}}


def _accuracy(extractor: Any) -> Row:
    """Return the accuracy and the file of an extractor that is a trained classifier; empty for other extractors."""
    classifier = getattr(extractor, "trained", None)
    return {} if classifier is None else {"accuracy": classifier.accuracy, "classifier": str(classifier.path)}

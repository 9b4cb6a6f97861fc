"""The evaluation itself: every sampler, every seed → images → metrics. All processes do this together."""

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.checkpoint.guidance import is_guided
from diffusion_lab.commands.evaluate import likelihoods
from diffusion_lab.commands.evaluate.prepare import Prepared
from diffusion_lab.commands.evaluate.samplers import SamplerSpec
from diffusion_lab.generation import batch_of, generate
from diffusion_lab.io import progress
from diffusion_lab.metrics import nll
from diffusion_lab.metrics.collect import Processes, blocks, collect
from diffusion_lab.metrics.measure import measure, protocol
from diffusion_lab.metrics.nll import Measured

Row = dict[str, Any]


class Once(NamedTuple):
    """The metrics of n images, the seconds that making and measuring them took, and the network evaluations of an image."""

    found: Row
    seconds: float
    nfe: float


def rows(prepared: Prepared, processes: Processes) -> list[Row]:
    """One row for each sampler and number of steps, or one for given images; the same in every process.

    Raises:
        ValueError: NaN, with the image's index.
    """
    _show_real(prepared)
    common = _common(prepared, processes)
    if prepared.given:
        once = _once(prepared, processes, None, 0)
        return [{**_head(prepared, None, once.nfe), "metrics": once.found, "seconds": once.seconds, **common}]
    found = [_row(prepared, processes, asked) for asked in prepared.samplers]
    if prepared.held_out is not None and processes.rank == 0:
        _add_likelihoods(prepared, found)
    return [{**row, **common} for row in found]


def _show_real(prepared: Prepared) -> None:
    """Update the metrics of images that compare with the data, once for all samplers, with every image of the split."""
    metrics = [metric for metric in prepared.image_metrics.values() if metric.takes_real]
    parts = list(blocks(len(prepared.real), prepared.settings["batch_size"])) if metrics else []
    for part in progress(parts, "real images", "block", bool(parts)):
        images = torch.from_numpy(np.ascontiguousarray(prepared.real[part.start : part.stop]))
        for metric in metrics:
            metric.add(images, real=True)


def _row(prepared: Prepared, processes: Processes, asked: SamplerSpec) -> Row:
    if not prepared.measures_samples:
        return {**_head(prepared, asked, 0), "metrics": {}, "seconds": 0.0}
    seed, repeats = prepared.settings["seed"], prepared.settings["repeats"]
    seeds = list(range(seed, seed + repeats))
    runs = [_once(prepared, processes, asked, s) for s in seeds]
    each = [once.found for once in runs]
    means = {name: np.mean([found[name] for found in each], axis=0).tolist() for name in each[0]}
    row = {**_head(prepared, asked, float(np.mean([once.nfe for once in runs]))), "metrics": means, "seeds": seeds}
    if repeats > 1:
        row["spread"] = {name: np.std([found[name] for found in each], axis=0, ddof=1).tolist() for name in each[0]}
        row["each"] = each
    return {**row, "seconds": float(np.mean([once.seconds for once in runs]))}


def _add_likelihoods(prepared: Prepared, found: list[Row]) -> None:
    """nll of the samplers that have one, into their rows; its terms into files of their own."""
    assert prepared.held_out is not None
    by_name: dict[str, Measured] = {}
    for row, asked, likelihood in zip(found, prepared.samplers, prepared.likelihoods, strict=True):
        if likelihood is None:
            continue
        begin = time.perf_counter()
        m = likelihoods.measured(asked, likelihood, prepared.held_out, prepared.settings)
        key, error = prepared.nll, m["standard_error"]
        row["metrics"] |= {key: m["bpd"]} | ({} if error is None else {f"{key}_std": error})
        row["nll"] = {k: m[k] for k in ("kind", "n", "seed", "nfe", "settings")} | {
            "split": prepared.settings["nll_split"]
        }
        row["seconds"] += time.perf_counter() - begin
        if not prepared.measures_samples:
            row |= {"n": m["n"], "nfe": round(m["nfe"]), "split": prepared.settings["nll_split"]}
        by_name[f"{asked.name}, {asked.sampler.steps or 'all'} steps"] = m
    nll.write(prepared.out, by_name)


def _head(prepared: Prepared, asked: SamplerSpec | None, nfe: float) -> Row:
    main = prepared.extractors.get(prepared.plan.main) or next(iter(prepared.extractors.values()), None)
    return {
        "sampler": asked.name if asked else None,
        "steps": asked.sampler.steps if asked else None,
        "nfe": round(nfe) if asked else None,
        "n": prepared.n,
        "seed": prepared.settings["seed"] if asked else None,
        "split": prepared.settings["split"],
        "weights": prepared.run.weights if prepared.run else None,
        "extractor": main.name if main else None,
    }


def _once(prepared: Prepared, processes: Processes, asked: SamplerSpec | None, seed: int) -> Once:
    p, begin = prepared, time.perf_counter()
    work = torch.zeros(2, dtype=torch.float64)  # network evaluations, of how many images
    if asked is not None:
        run = asked.run.to(p.device)
        sample = lambda block: generate(  # noqa: E731
            run.denoiser, asked.sampler, run.shape, batch_of(block, p.condition, p.device), seed=seed
        )
        said = f"{asked.name}, {asked.sampler.steps or 'all'} steps"
    else:
        sample, said = None, "reading"

    def images(block: range) -> Tensor:
        if sample is None:
            assert p.given is not None
            work.add_(torch.tensor([0, len(block)]))
            return p.given.block(block)
        samples = sample(block)
        work.add_(torch.tensor([samples.nfe * len(block), len(block)]))
        return samples.x

    fed = {key: metric.copy() for key, metric in p.image_metrics.items()}

    def feed(images: Tensor) -> None:
        for metric in fed.values():
            metric.add(images)

    collected = collect(
        images,
        p.n,
        p.settings["batch_size"],
        list(p.extractors.values()),
        features=[judge.name for name, judge in p.extractors.items() if p.plan.features(name)],
        logits=[judge.name for name, judge in p.extractors.items() if p.plan.logits(name)],
        labels=p.labels,
        feed=feed if p.feeds else None,
        processes=processes,
        progress=said,
    )
    found: Row = {}
    for name, extractor in p.extractors.items():
        found |= measure(p.plan.by_extractor[name], extractor, collected[extractor.name], p.references[name])
    if p.feeds:
        found |= processes.first(lambda: {k: v for metric in fed.values() for k, v in metric.figures().items()})
    evaluations, count = processes.sum(work).tolist()
    return Once(found, time.perf_counter() - begin, evaluations / count)


def _common(prepared: Prepared, processes: Processes) -> Row:
    """What holds for every row: everything else that another needs to get the same numbers."""
    p = prepared
    words = protocol({key: metric for metrics in p.plan.by_extractor.values() for key, metric in metrics.items()})
    words |= {key: metric.protocol for key, metric in p.image_metrics.items()}
    out: Row = {"protocol": words, "batch_size": p.settings["batch_size"], "processes": processes.world}
    out["data"] = {"name": type(p.data.source).__name__, "shape": [p.data.channels, *p.data.image_size]}
    out["references"] = {
        judge.name: {
            "file": str(p.references[name].path),
            "n": p.references[name].moments.n,
            "weights": judge.key,
            **_accuracy(judge),
        }
        for name, judge in p.extractors.items()
    }
    if p.run:
        average = p.run.weights.removeprefix("ema ")
        out["checkpoint"] = {
            "path": str(p.run.path.absolute() if p.run.path else p.settings["ckpt"]),  # what `latest` means now
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
    """The guidance of the samples in plain values; None where there was none."""
    if node is None or not is_guided(node):
        return None
    return {"kind": node["_target_"].rsplit(".", 1)[-1], **{k: v for k, v in node.items() if k != "_target_"}}


def _accuracy(judge: Any) -> Row:
    trained = getattr(judge, "trained", None)
    return {} if trained is None else {"accuracy": trained.accuracy, "classifier": str(trained.path)}

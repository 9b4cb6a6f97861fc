"""Build the variance of a sampler for a checkpoint, and read and write the fits of src/fit_variance.py."""

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion_lab.checkpoint import Run, archive
from diffusion_lab.checkpoint.build import build
from diffusion_lab.checkpoint.upgrade import condition_of_format_1
from diffusion_lab.errors import ConfigError
from diffusion_lab.instantiation import check, instantiate, locate
from diffusion_lab.io import write_new_file
from diffusion_lab.models import VarianceHead
from diffusion_lab.samplers import Sampler
from diffusion_lab.samplers.ancestral import is_ancestral
from diffusion_lab.variances import Analytic, FixedSmall, Variance

FORMAT = 1  # version of the file format
FITTED = {f"diffusion_lab.variances.{name}": name.lower() for name in ("Analytic", "SN", "NPR")}

Node = Mapping[str, Any]


def variance_for(node: Node | None, run: Run) -> tuple[Variance, Run]:
    """Build a variance for the run's network.

    Call it before guidance wraps the run's denoiser, and use the returned run from then on.

    Args:
        node: a resolved node of `conf/variance`; None for the variance of the checkpoint.
        run: a run from `load_checkpoint`; fits are read from the folder of its file.

    Returns:
        The variance and the run. For sn and npr the network of the run has the fitted head.

    Raises:
        ConfigError: if the fit is missing or belongs to other weights (the message contains the command to run), or if the
            variance does not fit the network.
    """
    if not node:
        stored = run.config.get("variance")
        variance: Variance = build(stored, run.trust, "variance", Variance) if stored else FixedSmall()
        variance.check(run.denoiser.network)
        return variance, run
    check(node, "variance", (), Variance)
    kind = FITTED.get(node["_target_"])
    if kind is None or (kind == "analytic" and node.get("times") is not None):
        variance = instantiate(node)
        variance.check(run.denoiser.network)
        return variance, run
    fit = read(run, kind)
    if kind == "analytic":
        return Analytic(fit["times"], fit["moments"]), run
    network = VarianceHead(bare(run), kind).to(run.device)
    try:
        network.head.load_state_dict(fit["head"])
    except RuntimeError as error:
        path = place(run, kind)
        raise ConfigError(
            f"the head in {path} does not fit the network: fit it again with overwrite=true ({error})"
        ) from None
    network.requires_grad_(False).eval()
    return instantiate(node), replace(run, denoiser=replace(run.denoiser, network=network))


def sampler_for(node: Node, run: Run) -> tuple[Sampler, Run]:
    """Build a sampler with its variance.

    `variance: null` selects the variance of the checkpoint. If the sampler cannot use it, fixed_small is used instead, and a
    line is printed.

    Args:
        node: a resolved node of `conf/sampler`.
        run: a run from `load_checkpoint`.

    Returns:
        The sampler, and the run that `variance_for` returns.

    Raises:
        ConfigError: as for `variance_for`.
    """
    check(node, "sampler", ("variance",), Sampler)
    if "variance" not in node:
        return instantiate(node, "sampler"), run
    variance, run = variance_for(node["variance"], run)
    sampler_class = locate(node, "sampler")
    if not node["variance"] and variance.ancestral_only and not is_ancestral(sampler_class, node.get("eta")):
        print(
            f"{sampler_class.__name__} uses variance=fixed_small, since {type(variance).__name__} requires ancestral steps "
            "(sampler=ddpm)"
        )
        variance = FixedSmall()
    return instantiate({**node, "variance": None}, "sampler", variance=variance), run


# files --------------------------------------------------------------------------------------------------------------------


def bare(run: Run) -> nn.Module:
    """Return the run's network without a fitted head."""
    network: nn.Module = run.denoiser.network  # type: ignore[assignment]
    return network.network if isinstance(network, VarianceHead) else network


def fingerprint(run: Run) -> str:
    """Return the SHA-256 of weights, schedule, objective and condition, on which a fit depends."""
    nodes = {group: run.config.get(group) for group in ("schedule", "objective")}
    nodes["condition"] = condition_of_format_1(run.config.get("condition"))
    digest = hashlib.sha256(json.dumps(nodes, sort_keys=True, default=str).encode())
    for name, tensor in bare(run).state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def place(run: Run, kind: str) -> Path:
    """Return the path of a fit: a file in the checkpoint's folder, named after the run's fingerprint."""
    if run.path is None:
        raise ConfigError(
            f"variance={kind} is read from the folder of a checkpoint, and this run has no path: use load_checkpoint"
        )
    return run.path.with_name(f"variance_{kind}_{fingerprint(run)[:16]}.pt")


def write(run: Run, kind: str, fit: Mapping[str, Any], overwrite: bool = True) -> Path:
    """Write a fit atomically, readable with weights_only=True; return its path.

    Raises:
        ConfigError: another process has written the fit in the meantime, and `overwrite` is false.
    """
    path = place(run, kind)
    content = {"format": FORMAT, "kind": kind, "weights": fingerprint(run), "of": run.weights, **fit}
    write_new_file(path, archive.packed(content), overwrite)
    return path


def read(run: Run, kind: str) -> dict[str, Any]:
    """Read the fit for the run's weights.

    Raises:
        ConfigError: if the file is missing or damaged, or belongs to other weights.
    """
    path = place(run, kind)
    command = f"python src/fit_variance.py ckpt={shlex.quote(str(run.path))} variance={kind}"
    command += "" if run.weights.startswith("ema") else f" weights={run.weights}"
    if not path.is_file():
        others = list(path.parent.glob(f"variance_{kind}_*.pt"))
        also = f" ({len(others)} fit(s) for other weights)" if others else ""
        raise ConfigError(f"no fit of variance={kind} for the weights {run.weights}{also}: first run {command}")
    remedy = f"run {command} overwrite=true"
    fit = archive.read(path, "fit", remedy)
    if fit.get("format") != FORMAT or fit.get("kind") != kind or not _is_complete(fit, kind):
        raise ConfigError(f"{path} is not a fit of variance={kind}: {remedy}")
    if fit.get("weights") != fingerprint(run):
        raise ConfigError(f"{path} was fitted to other weights than these ({run.weights}): {remedy}")
    return fit


def _is_complete(fit: Mapping[str, Any], kind: str) -> bool:
    """Whether a fit holds what its kind needs: two vectors of one length, or the weights of a head."""
    if kind != "analytic":
        head = fit.get("head")
        return isinstance(head, dict) and all(isinstance(weight, torch.Tensor) for weight in head.values())
    times, moments = fit.get("times"), fit.get("moments")
    if not isinstance(times, torch.Tensor) or not isinstance(moments, torch.Tensor):
        return False
    numbers = times.is_floating_point() and moments.is_floating_point()
    return (
        numbers
        and times.ndim == 1
        and times.shape == moments.shape
        and bool((times.isfinite() & moments.isfinite()).all())
    )

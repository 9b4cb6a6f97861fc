"""From `variance=` to an object for a checkpoint: its own, another, or one that src/fit_variance.py fitted and left beside it."""

import hashlib
import io
import json
import pickle
import shlex
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion_lab.checkpoint import Run
from diffusion_lab.checkpoint.upgrade import condition_of_format_1
from diffusion_lab.errors import ConfigError
from diffusion_lab.instantiation import instantiate, instantiate_untrusted, locate
from diffusion_lab.io import write_file
from diffusion_lab.models import VarianceHead
from diffusion_lab.samplers import Sampler
from diffusion_lab.variances import Analytic, FixedSmall, Variance

FORMAT = 1  # of a fit's file
FITTED = {f"diffusion_lab.variances.{name}": name.lower() for name in ("Analytic", "SN", "NPR")}

Node = Mapping[str, Any]


def variance_for(node: Node | None, run: Run) -> tuple[Variance, Run]:
    """The variance that a node of the configuration describes, ready for the run's network.

    Call it before anything wraps the run's denoiser (guidance), and go on with the run that it returns: for a second head
    its network is the given one with that head.

    Args:
        node: of `conf/variance`, resolved; None is the checkpoint's own.
        run: from `load_checkpoint`, which says where the checkpoint lies.

    Returns:
        The variance and the run: the same, or for sn and npr one with the fitted head.

    Raises:
        ValueError: a fit that is missing or of other weights, with the command that makes it; a variance that this network
            cannot give.
    """
    if not node:
        own = run.config.get("variance")
        variance: Variance = instantiate_untrusted(own, run.trust, "variance") if own else FixedSmall()
        variance.check(run.denoiser.network)
        return variance, run
    kind = FITTED.get(node["_target_"])
    if kind is None or (kind == "analytic" and node.get("times") is not None):
        variance = instantiate(node)
        variance.check(run.denoiser.network)
        return variance, run
    fit = read(run, kind)
    if kind == "analytic":
        return Analytic(fit["times"], fit["moments"]), run
    network = VarianceHead(bare(run), kind).to(run.device)
    network.head.load_state_dict(fit["head"])
    network.requires_grad_(False).eval()
    return instantiate(node), replace(run, denoiser=replace(run.denoiser, network=network))


def usable(variance: Variance, sampler: Node, asked: bool) -> Variance:
    """The variance for a sampler: fixed_small where a checkpoint's own, not `asked` for, is not for this sampler."""
    unfit = variance.ancestral_only and not getattr(locate(sampler, "sampler"), "ancestral", True)
    if not unfit or asked:
        return variance
    kind = locate(sampler).__name__
    print(
        f"{kind} samples with variance=fixed_small, since {type(variance).__name__} is for ancestral steps (sampler=ddpm)"
    )
    return FixedSmall()


def sampler_for(node: Node, run: Run) -> tuple[Sampler, Run]:
    """The sampler that a node of the configuration describes, with its variance; and the run to use it on, see `variance_for`.

    A sampler whose node has `variance: null` takes the checkpoint's own.
    """
    if "variance" not in node:
        return instantiate(node), run
    variance, run = variance_for(node["variance"], run)
    variance = usable(variance, node, asked=bool(node["variance"]))
    return instantiate({**node, "variance": None}, variance=variance), run


# files of fits ------------------------------------------------------------------------------------------------------------


def bare(run: Run) -> nn.Module:
    """The run's network without a second head."""
    network: nn.Module = run.denoiser.network  # type: ignore[assignment]
    return network.network if isinstance(network, VarianceHead) else network


def fingerprint(run: Run) -> str:
    """SHA-256 of what a fit depends on: the weights that are used, and what their output means."""
    told = {group: run.config.get(group) for group in ("schedule", "objective")}
    told["condition"] = condition_of_format_1(run.config.get("condition"))
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for name, tensor in bare(run).state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def place(run: Run, kind: str) -> Path:
    """The file of a fit: beside the checkpoint, named by its weights."""
    if run.path is None:
        raise ConfigError(f"variance={kind} is looked for beside a checkpoint: get the run from load_checkpoint")
    return run.path.with_name(f"variance_{kind}_{fingerprint(run)[:16]}.pt")


def write(run: Run, kind: str, fit: Mapping[str, Any]) -> Path:
    """Stores a fit whole or not at all, readable with weights_only=True; returns where."""
    path, packed = place(run, kind), io.BytesIO()
    torch.save({"format": FORMAT, "kind": kind, "weights": fingerprint(run), "of": run.weights, **fit}, packed)
    write_file(path, packed.getvalue())
    return path


def read(run: Run, kind: str) -> dict[str, Any]:
    """The stored fit of the run's weights; ValueError: there is none, or it is not one, or of other weights."""
    path = place(run, kind)
    again = f"python src/fit_variance.py ckpt={shlex.quote(str(run.path))} variance={kind}"
    again += "" if run.weights.startswith("ema") else f" weights={run.weights}"
    if not path.is_file():
        others = list(path.parent.glob(f"variance_{kind}_*.pt"))
        also = f" ({len(others)} of other weights)" if others else ""
        raise ConfigError(f"variance={kind} is not fitted to these weights ({run.weights}){also}: first run {again}")
    try:
        if not zipfile.is_zipfile(path):
            raise RuntimeError("truncated")
        fit = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError):
        raise ConfigError(f"{path} is not a whole fit of fit_variance.py: run {again} overwrite=true") from None
    if not isinstance(fit, dict) or fit.get("format") != FORMAT or fit.get("kind") != kind:
        raise ConfigError(f"{path} is no fit of variance={kind}: run {again} overwrite=true")
    if fit["weights"] != fingerprint(run):
        raise ConfigError(f"{path} was fitted to other weights than these ({run.weights}): run {again} overwrite=true")
    return fit

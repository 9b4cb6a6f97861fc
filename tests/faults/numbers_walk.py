"""Build every public class of the package with every wrong number, and use what is not refused.

A program of its own: `python numbers_walk.py [NAME …]` prints one line for each fault. In the tests' process the runtime type
checks would refuse a wrong type before the class does.

A class is found by walking the package, so that a new one is walked without further changes; one whose constructor has required
arguments needs a row in `ARGUMENTS`, or the walk fails.
"""

import contextlib
import importlib
import inspect
import io
import math
import pkgutil
import re
import sys
import tempfile
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from oracle import Gaussian, oracle
from PIL import Image
from torch import Tensor, nn

import diffusion_lab
from diffusion_lab import conditions, editing, generation, guidance, likelihood, losses, noise
from diffusion_lab.data import decode, stream
from diffusion_lab.data.datamodule import DataModule
from diffusion_lab.data.images import Examples
from diffusion_lab.data.sources import Digits
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import ConfigError, shown
from diffusion_lab.instantiation.annotations import annotation
from diffusion_lab.metrics import scores
from diffusion_lab.models.base import UNetBase
from diffusion_lab.models.blocks import BlockConfig
from diffusion_lab.objectives import Objective, PredV
from diffusion_lab.samplers import DDIM, Sampler
from diffusion_lab.schedules import VE, Cosine, Flow, Schedule
from diffusion_lab.time_samplers import TimeSampler, Uniform
from diffusion_lab.training import optim, variance_fit
from diffusion_lab.variances import Variance
from diffusion_lab.weightings import Native, Weighting

D = torch.float64
WRONG: tuple[Any, ...] = (
    -1, 0, 0.5, math.nan, math.inf, -math.inf, 1e30, 2**70, "a", "3", None, True, [], [1], {},
)  # fmt: skip

# Rooms whose classes hold what the package itself has computed or read: results, records, configurations.
RECORDS = ("checkpoint", "cli", "commands", "composition", "interop", "processes", "reporting", "instantiation")
# Values made by the package alone; a number of theirs is no argument of a user.
VALUES = (
    "Examples", "Rows", "Dataset", "Panel", "EvaluationContext", "Collected", "Moments", "Sums", "Score", "ImageSet",
    "ModuleExtractor", "ClassifierExtractor", "Pruning", "Residual", "Attention", "ResAttnBlock", "StridedConv", "NearestConv",
    "DoubleConv", "Solution", "Processes", "Recipe",
)  # fmt: skip
IMAGES = np.zeros((20, 1, 8, 8), np.uint8)
IMAGES[:] = np.arange(20, dtype=np.uint8)[:, None, None, None] * 10
EXAMPLES = Examples(IMAGES, np.arange(20) % 10)
DATA = Gaussian(torch.zeros(1, 4, 4, dtype=D), 0.3)
UNET = {
    "channels": 1,
    "image_size": [8, 8],
    "width": 8,
    "multipliers": [1, 2],
    "blocks": 1,
    "attention": [],
    "groups": 4,
}


class Labeled(nn.Module):
    """A network of labels: y = x / 2 + label."""

    num_classes = 3

    def forward(self, x: Tensor, c: Tensor, label: Tensor | None = None) -> Tensor:
        return x / 2 + (0 if label is None else label.to(x.dtype).reshape(-1, 1, 1, 1))


def labeled() -> Denoiser:
    return Denoiser(Labeled(), Cosine(20), PredV())


def _module_arguments() -> dict[str, Any]:
    adam = optim.OptimizerConfig(torch.optim.Adam, optim.Constant())
    parts = (Cosine(20), PredV(), Native(), losses.L2(), Uniform(), conditions.Unconditional(), adam)
    names = ("schedule", "objective", "weighting", "loss", "time_sampler", "condition", "optimizer")
    return {"network": nn.Linear(1, 1), "batch_size": 4, **dict(zip(names, parts, strict=True))}


# Arguments that a constructor needs, beyond its defaults; a callable builds them anew for each case.
ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "Table": lambda: {"log_alpha_bar": torch.linspace(-0.1, -5, 20, dtype=D)},
    "Label": lambda: {"num_classes": 3},
    "Attributes": lambda: {"num_attributes": 3},
    "LowResolution": lambda: {"channels": 1},
    "DataModule": lambda: {"source": Digits(), "channels": 1, "image_size": [8, 8], "num_classes": 10, "test": 0.1},
    "Decoder": lambda: {"shape": (1, 4, 4)},
    "BatchStream": lambda: {"examples": EXAMPLES, "batch_size": 4, "seed": 0},
    "EvalBatches": lambda: {"examples": EXAMPLES, "batch_size": 4},
    "Denoiser": lambda: {"network": Labeled(), "schedule": Cosine(20), "objective": PredV()},
    "ClassifierFreeTransform": lambda: {"scale": 2.0, "rescale": 0.0, "interval": (0.0, 1.0), "num_classes": 3},
    "ClassifierTransform": lambda: {
        "schedule": Cosine(20),
        "objective": PredV(),
        "classifier": lambda x, t: x.flatten(1)[:, :3],
        "num_classes": 3,
        "scale": 1.0,
        "interval": (0.0, 1.0),
        "form": "exact",
        "passes_label": True,
    },
    "ClassifierFree": lambda: {"denoiser": labeled()},
    "ClassifierGuidance": lambda: {"denoiser": labeled(), "classifier": lambda x, t: x.flatten(1)[:, :3]},
    "UNet": lambda: dict(UNET),
    "UNetForImageSize": lambda: {"channels": 1, "image_size": [8, 8]},
    "ClassicUNet": lambda: {"channels": 1, "image_size": [8, 8], "width": 4, "levels": 2},
    "Classifier": lambda: {"channels": 1, "num_classes": 3, "width": 8, "features": 4},
    "Sinusoidal": lambda: {"features": 4},
    "Fourier": lambda: {"features": 4},
    "Embedding": lambda: {"width": 4, "features": "sinusoidal", "activation": nn.SiLU, "num_classes": 3},
    "BlockConfig": lambda: {
        "embedding": 4,
        "groups": 1,
        "dropout": 0.0,
        "scale_shift": False,
        "activation": nn.SiLU,
        "heads": 1,
        "head_channels": None,
    },
    "Draws": lambda: {"shape": (1, 2, 2), "seed": 0, "index": torch.arange(2), "dtype": D},
    "TorchSchedule": lambda: {"make": torch.optim.lr_scheduler.ExponentialLR},
    "WeightAverage": lambda: {"network": nn.Linear(1, 1), "live": nn.Linear(1, 1), "decay": 0.5},
    "DiffusionModule": _module_arguments,
    "Samples": lambda: {"folder": "samples", "sampler": DDIM(4)},
    "QualityMonitor": lambda: {"sampler": DDIM(4)},
    "Checkpoints": lambda: {"folder": "checkpoints"},
    "CSVLogger": lambda: {"save_dir": tempfile.gettempdir()},
    "WandbLogger": lambda: {"save_dir": tempfile.gettempdir(), "mode": "offline"},
    "Analytic": lambda: {"times": [0.25, 0.5, 1.0], "moments": [0.2, 0.5, 0.9]},
    "UNetBase": lambda: {
        "channels": 1,
        "image_size": [8, 8],
        "levels": 1,
        "feature_channels": 4,
        "self_conditioning": False,
        "embedding": importlib.import_module("diffusion_lab.models.embeddings").Embedding(4, "fourier", nn.SiLU, None),
        "learned_variance": False,
    },
    "vlb": lambda: {"denoiser": oracle(DATA, Cosine(20), PredV()), "x0": torch.zeros(2, 1, 4, 4, dtype=D), "steps": 4},
    "ode": lambda: {
        "denoiser": oracle(DATA, Cosine(20), PredV()),
        "x0": torch.zeros(2, 1, 4, 4, dtype=D),
        "rtol": 1e-2,
        "atol": 1e-2,
    },
    "passes": lambda: {"steps": 10, "jump_length": 2, "resample": 2},
    "batches": lambda: {"n": 3, "size": 2},
    "fit_times": lambda: {"schedule": Cosine(20)},
}
# Functions that are called as constructors are, or that take numbers of the user.
FUNCTIONS = (
    guidance.ClassifierFree, guidance.ClassifierGuidance, likelihood.vlb, likelihood.ode, editing.passes, generation.batches,
    variance_fit.fit_times,
)  # fmt: skip
# Numbers that are no argument of a user: the package computes them.
COMPUTED = {("UNetBase", "levels"), ("UNetBase", "feature_channels"), ("passes", "steps"), ("BlockConfig", "embedding")}


# use ------------------------------------------------------------------------------------------------------------------------


class Useless(AssertionError):
    """What was accepted does not work."""


def demand(condition: Any, what: str) -> None:
    if not bool(condition):
        raise Useless(what)


def finite(*values: Tensor) -> bool:
    return all(bool(value.isfinite().all()) for value in values)


def use_schedule(curve: Schedule) -> None:
    for dtype in (D, torch.float32):
        t = torch.linspace(0, 1, 41, dtype=dtype)
        alpha, sigma = curve.alpha_sigma(t)
        demand(finite(alpha, sigma), "α and σ are finite")
        demand((sigma[1:] > 0).all() and (alpha[:-1] > 0).all(), "α and σ are positive inside (0, 1)")
        demand(finite(curve.conditioning(t)), "the time-conditioning input is finite")
    t = torch.linspace(0.05, 0.95, 41, dtype=D)
    lam = curve.lam(t)
    demand(finite(lam, *curve.derivatives(t)) and (lam.diff() < 0).all(), "λ decreases strictly")
    demand(torch.allclose(curve.time(lam), t, atol=1e-5), "time() inverts λ")


def use_objective(objective: Objective) -> None:
    for curve in (Cosine(20), VE(), Flow()):
        with contextlib.suppress(ConfigError):
            objective.check(curve)
            t = torch.linspace(0.1, 0.9, 9, dtype=D)
            x0, eps = torch.linspace(-1, 1, 9, dtype=D)[:, None], torch.linspace(2, -1, 9, dtype=D)[:, None]
            solved = objective.solve(curve, t, curve.corrupt(x0, eps, t), objective.target(curve, t, x0, eps))
            demand(
                all(torch.allclose(a, b, atol=1e-4) for a, b in zip(solved, (x0, eps), strict=True)), "it is solvable"
            )


def use_weighting(weighting: Weighting) -> None:
    for curve in (Cosine(20), VE(), Flow()):
        w = weighting(curve, PredV(), torch.linspace(0.05, 1, 20, dtype=torch.float32))
        demand(finite(w) and (w >= 0).all() and (w > 0).any(), "weights are finite, non-negative and not all 0")


def use_time_sampler(sampler: TimeSampler) -> None:
    for curve in (Cosine(1000), VE()):
        t = sampler(curve, torch.arange(64), 64, seed=0, step=0)
        demand(finite(t) and ((t > 0) & (t <= 1)).all(), "times lie in (0, 1]")
        demand(finite(sampler.weight(curve, t)), "weights are finite")
        sampler = type(sampler)(**{k: v for k, v in vars(sampler).items() if k in ("mean", "std", "bins", "history")})


def use_sampler(sampler: Sampler) -> None:
    denoiser = oracle(DATA, Cosine(1000 if sampler.steps is None else 100), PredV())
    sampler.check(denoiser)
    if isinstance(sampler.steps, int) and sampler.steps > 50:
        return
    x = noise.normal((1, 4, 4), seed=0, index=torch.arange(2), dtype=D)
    result = sampler(denoiser, x, seed=0).x
    demand(finite(result) and result.abs().max() < 3, "images are finite and near the data")


def use_model(network: UNetBase) -> None:
    label = {} if network.num_classes is None else {"label": torch.zeros(1, dtype=torch.long)}
    given = {"given": torch.zeros(1, network.given_channels, 8, 8)} if network.given_channels else {}
    out = network(torch.zeros(1, network.channels, 8, 8), torch.zeros(1), **label, **given)
    demand(finite(out), "the output is finite")


def use_condition(condition: conditions.Condition) -> None:
    batch = {
        "image": torch.zeros(4, 1, 8, 8), "label": torch.zeros(4, dtype=torch.long), "position": torch.arange(4), "step": 0,
        "attributes": torch.ones(4, condition.num_classes or 1),
    }  # fmt: skip
    demand(all(finite(value) for value in condition(batch, seed=0).values()), "arguments are finite")


def use_decoder(decoder: decode.Decoder) -> None:
    file = io.BytesIO()
    Image.fromarray(IMAGES[5, 0]).save(file, "png")
    decoder(file.getvalue(), "x.png")


def use_data(data: DataModule) -> None:
    data.setup()
    demand(len(data.train_dataloader().batch(0)["image"]) == data.batch_size, "a batch")
    demand(all(finite(batch["image"]) for batch in data.val_dataloader()), "validation")


def use_lr(schedule: optim.LRSchedule) -> None:
    factors = [schedule(step, 100) for step in (0, 1, 50, 99)]
    demand(all(0 <= factor <= 1 for factor in factors), "factors lie in [0, 1]")


def use_denoiser(denoiser: Denoiser) -> None:
    x_t = noise.normal((1, 4, 4), seed=0, index=torch.arange(2))
    prediction = denoiser(x_t, 0.5, label=torch.tensor([0, 1]))
    demand(finite(prediction.x0, prediction.noise), "predictions are finite")


def use_transform(transform: Any) -> None:
    use_denoiser(Denoiser(Labeled(), Cosine(20), PredV(), on_output=(transform,)))


def use_threshold(clip: Any) -> None:
    x0 = clip(torch.linspace(-3, 3, 32).reshape(2, 1, 4, 4))
    demand(finite(x0) and x0.abs().max() > 0, "x_0 is finite and not 0")


def use_loss(loss: losses.PointwiseLoss) -> None:
    value = loss(torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2))
    demand(finite(value) and (value > 0).all(), "the loss is finite and above 0")


def use_metric(metric: Any) -> None:
    features = torch.linspace(-1, 1, 60, dtype=D).reshape(20, 3).sin()
    if hasattr(metric, "subsets"):
        demand(math.isfinite(scores.kid(features, features, min(metric.subsets, 3), metric.subset_size).mean), "kid")
    if metric.least <= 20 and hasattr(metric, "splits"):
        demand(math.isfinite(scores.inception_score(features, metric.splits).mean), "is")
    if metric.least <= 20 and hasattr(metric, "neighbors"):
        scores.prdc(features, features, metric.neighbors, metric.density_neighbors)


def use_variance(variance: Variance) -> None:
    value = variance.covariance(Cosine(20), torch.linspace(0.1, 1, 9, dtype=D))  # type: ignore[attr-defined]
    demand(finite(value) and ((value >= 0) & (value <= 1)).all(), "c lies in [0, 1]")


def use_likelihood(result: Any) -> None:
    demand(finite(result.bpd), "bits per dimension are finite")


def use_list(result: Any) -> None:
    demand(len(list(result)), "it is not empty")


USES: tuple[tuple[Any, Callable[[Any], None]], ...] = (
    (Schedule, use_schedule),
    (Objective, use_objective),
    (Weighting, use_weighting),
    (TimeSampler, use_time_sampler),
    (Sampler, use_sampler),
    (Variance, use_variance),
    (conditions.Condition, use_condition),
    (losses.PointwiseLoss, use_loss),
    (optim.LRSchedule, use_lr),
    (Denoiser, use_denoiser),
    (DataModule, use_data),
    (decode.Decoder, use_decoder),
    (stream.BatchStream, lambda s: demand(len(s.batch(s.start_step)["image"]), "a batch")),
    (stream.EvalBatches, lambda s: demand(finite(*(batch["image"] for batch in s)), "batches")),
    (noise.Draws, lambda d: demand(finite(d(0)), "noise")),
    (types.GeneratorType, use_list),
    (list, use_list),
)
BY_NAME: dict[str, Callable[[Any], None]] = {
    "ClassifierFreeTransform": use_transform,
    "ClassifierTransform": use_transform,
    "StaticThreshold": use_threshold,
    "DynamicThreshold": use_threshold,
    "UNet": use_model,
    "UNetForImageSize": use_model,
    "ClassicUNet": use_model,
    "Classifier": lambda c: demand(finite(c(torch.zeros(1, c.convolutions[0].in_channels, 8, 8))), "logits"),
    "Sinusoidal": lambda f: demand(finite(f(torch.ones(2))), "features"),
    "Fourier": lambda f: demand(finite(f(torch.ones(2))), "features"),
    "Embedding": lambda e: demand(finite(e(torch.ones(2))), "an embedding"),
    "KID": use_metric,
    "InceptionScore": use_metric,
    "PRDC": use_metric,
    "vlb": use_likelihood,
    "ode": use_likelihood,
    "fit_times": lambda times: demand(finite(times) and len(times), "times"),
}


def use(name: str, built: Any) -> None:
    by_type = next((function for kind, function in USES if isinstance(built, kind)), None)
    if function := BY_NAME.get(name, by_type):
        function(built)


# walk -----------------------------------------------------------------------------------------------------------------------


def constructors() -> Iterator[Any]:
    """Yield the public, concrete classes with a numeric parameter, and FUNCTIONS."""
    for found in pkgutil.walk_packages(diffusion_lab.__path__, "diffusion_lab."):
        if found.name.split(".")[1] in RECORDS:
            continue
        for name, cls in sorted(vars(importlib.import_module(found.name)).items()):
            public = inspect.isclass(cls) and cls.__module__ == found.name and not name.startswith("_")
            if not public or inspect.isabstract(cls) or name in VALUES or issubclass(cls, tuple | Exception | dict):
                continue
            if issubclass(cls, typing.Protocol) or issubclass(cls, BlockConfig):  # type: ignore[arg-type]
                continue
            if numeric(cls):
                yield cls
    yield BlockConfig
    yield from FUNCTIONS


def kinds(hint: Any) -> set[str]:
    """Return "number" and "list" where an annotation allows a number, or a list of them."""
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return set().union(*(kinds(member) for member in arguments))
    if origin in (int, float):
        return {"number"}
    if origin in (list, tuple, Sequence):
        return {"list"} if any(kinds(argument) for argument in arguments) else set()
    return set()


def numeric(target: Any) -> dict[str, set[str]]:
    """Return the numeric parameters of a constructor."""
    with contextlib.suppress(ValueError, TypeError):
        parameters = inspect.signature(target).parameters.values()
        by_name = {p.name: kinds(annotation(target, p)) for p in parameters}
        return {k: v for k, v in by_name.items() if v and (target.__name__, k) not in COMPUTED}
    return {}


def arguments_of(target: Any) -> dict[str, Any]:
    given = ARGUMENTS.get(target.__name__, dict)()
    if isinstance(target, type) and issubclass(target, Sampler):
        given |= {"steps": 4} if "steps" in inspect.signature(target).parameters else {}
        given |= {"rtol": 1e-2, "atol": 1e-2} if "rtol" in inspect.signature(target).parameters else {}
    if isinstance(target, type) and issubclass(target, Schedule) and "steps" in inspect.signature(target).parameters:
        given |= {"steps": 40}
    return given


def cases(target: Any, name: str, forms: set[str]) -> list[Any]:
    """Return the values of a parameter: each wrong number, also within a list, and the ends of the range that it states."""
    values = list(WRONG)
    if "list" in forms:
        default = arguments_of(target).get(name, inspect.signature(target).parameters[name].default)
        length = len(default) if isinstance(default, list | tuple) else 2
        values += [[wrong] * length for wrong in WRONG] + [[1, wrong] for wrong in WRONG] + [[1] * (length + 1)]
    with contextlib.suppress(Exception):
        target(**{**arguments_of(target), name: math.nan})
    try:
        target(**{**arguments_of(target), name: math.nan})
    except ConfigError as error:
        if stated := re.search(r"(integers?)?(?: numbers?)? in ([\[(])([-\w.+]+), ([-\w.+]+)([\])])", str(error)):
            whole, opening, low, high, closing = stated.groups()
            if not whole:
                values += [float(low)] * (opening == "[") + [float(high)] * (closing == "]")
            elif opening == "[":
                values += [int(low)]
    except Exception:  # reported as the case of NaN
        pass
    return values


def fault(target: Any, name: str, value: Any) -> str | None:
    """Return what is wrong with the outcome of one value; None if it is refused in one line, or works."""
    parameter = inspect.signature(target).parameters[name]
    may_be_none = parameter.default is None or "None" in str(annotation(target, parameter))
    no_number = value is True or isinstance(value, str | dict) or (value is None and not may_be_none)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        built = target(**{**arguments_of(target), name: value})
        built = list(built) if inspect.isgenerator(built) else built
        if no_number:
            return "is accepted"
        use(target.__name__, built)
    except ConfigError as error:
        line = str(error)
        combination = number and math.isfinite(value)  # the message may be about two numbers, by their formula
        if "\n" in line or (name not in line and not combination):
            return f"is refused without its name: {line}"
    except Exception as error:
        return f"raises {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def walk(names: Sequence[str] = ()) -> tuple[int, list[str]]:
    """Return the number of cases, and a line for each fault."""
    count, faults = 0, []
    for target in constructors():
        if names and target.__name__ not in names:
            continue
        try:
            use(target.__name__, target(**arguments_of(target)))
        except Exception as error:
            faults.append(
                f"{target.__module__}.{target.__name__}: the defaults of the walk fail ({error!r}): add ARGUMENTS"
            )
            continue
        for name, forms in numeric(target).items():
            for value in cases(target, name, forms):
                count += 1
                if problem := fault(target, name, value):
                    faults.append(f"{target.__module__}.{target.__name__}({name}={shown(value)}) {problem}")
    return count, faults


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    total, lines = walk(sys.argv[1:])
    print(f"{total} cases, {len(lines)} faults", *lines, sep="\n")
    sys.exit(bool(lines))

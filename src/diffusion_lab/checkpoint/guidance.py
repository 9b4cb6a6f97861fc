"""Apply the group `guidance` of the configuration to the denoiser of a run."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion_lab.checkpoint import Run
from diffusion_lab.checkpoint.build import build
from diffusion_lab.checkpoint.classifiers import TrainedClassifier, load_classifier
from diffusion_lab.conditions import Label
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import ConfigError
from diffusion_lab.guidance import ClassifierFree, NoisyClassifier, Unguided
from diffusion_lab.instantiation import accepted, instantiate, locate
from diffusion_lab.schedules import Schedule

Node = Mapping[str, Any]

TRAIN = "python src/train_classifier.py data={} noisy=true schedule={}"


def is_guided(node: Node | None) -> bool:
    """Whether a node of `conf/guidance` is neither null nor guidance=none."""
    return node is not None and locate(node, "guidance") is not Unguided


def guided(node: Node | None, run: Run) -> Run:
    """Return the run with a guided denoiser.

    Call this function after clipping and a fitted variance have been applied, because both replace the denoiser.

    Args:
        node: a resolved node of `conf/guidance`. Its key `ckpt`, the file of a classifier, is replaced by the arguments
            `classifier`, `num_classes` and `labeled`.
        run: a run from `load_checkpoint`.

    Raises:
        ConfigError: if the network has no null label, the classifier is missing or was trained on other data, or an
            argument is out of range.
    """
    if node is None or not is_guided(node):
        return run
    condition = run.condition
    arguments: dict[str, Any] = {"num_classes": condition.num_classes}
    if "ckpt" in node:
        arguments = _classifier_arguments(node["ckpt"], run)
    elif locate(node) is ClassifierFree and condition.num_classes and getattr(condition, "drop", 1) == 0:
        raise ConfigError(
            "guidance=cfg needs a null label, but this checkpoint was trained with condition.drop=0: train with "
            "condition.drop=0.1, or write guidance=classifier"
        )
    options = {key: value for key, value in node.items() if key != "ckpt"}
    if "denoiser" not in accepted(options, denoiser=run.denoiser):
        raise ConfigError(
            f"guidance._target_={node['_target_']} has no argument `denoiser`: write a class that takes one"
        )
    denoiser = instantiate(options, "guidance", denoiser=run.denoiser, **accepted(options, **arguments))
    if not isinstance(denoiser, Denoiser):
        raise ConfigError(
            f"guidance._target_={node['_target_']} does not return a Denoiser: return a guided copy of its argument `denoiser`"
        )
    return replace(run, denoiser=denoiser)


def _classifier_arguments(path: str | None, run: Run) -> dict[str, Any]:
    """Return the arguments of `ClassifierGuidance` from a classifier's file."""
    classifier = _classifier(path, run)
    node, schedule = classifier.config["schedule"], run.denoiser.schedule
    trained_along = schedule if node == run.config["schedule"] else build(node, run.trust, "schedule", Schedule)
    return {
        "classifier": NoisyClassifier(classifier.network.to(run.device), trained_along, schedule),
        "num_classes": int(classifier.config["data"]["classes"]),
        "labeled": isinstance(run.condition, Label),
    }


def _classifier(path: str | None, run: Run) -> TrainedClassifier:
    """Read a classifier of noisy images for the data of the run. `path` is a file, a run folder, or "latest"."""
    data = run.config["data"]
    name = str(data["source"]["_target_"]).rsplit(".", 1)[-1].lower()
    schedule = str(run.config["schedule"]["_target_"]).rsplit(".", 1)[-1].lower()
    train = TRAIN.format(name, {"subvp": "sub_vp", "scaledlinear": "scaled_linear"}.get(schedule, schedule))
    if not path:
        raise ConfigError(
            f"guidance=classifier needs a classifier of noisy images: train one with {train}, and write guidance.ckpt=FOLDER"
        )
    if path == "latest":
        files = sorted(Path("outputs/classifier").glob("*/classifier.pt"), key=lambda file: file.stat().st_mtime)
        if not files:
            raise ConfigError(f"guidance.ckpt=latest: no classifier in outputs/classifier: train one with {train}")
        file = files[-1]
    else:
        file = Path(path) / "classifier.pt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ConfigError(f"guidance.ckpt={path}: no such file: train a classifier with {train}")
    classifier = load_classifier(file)
    trained_on = classifier.config["data"]
    if classifier.network.time is None:
        raise ConfigError(
            f"guidance.ckpt={path} was trained on clean images, but guidance needs noisy ones: train one with {train}"
        )
    if trained_on["name"] != name or tuple(trained_on["shape"]) != run.shape:
        shape = "×".join(map(str, trained_on["shape"]))
        raise ConfigError(
            f"guidance.ckpt={path} classifies {trained_on['name']} ({shape}), but this checkpoint samples {name}: train one "
            f"with {train}"
        )
    return classifier

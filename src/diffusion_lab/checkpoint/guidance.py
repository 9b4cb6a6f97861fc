"""From `guidance=` to a run whose denoiser is guided."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion_lab.checkpoint import Run
from diffusion_lab.checkpoint.classifiers import TrainedClassifier, load_classifier
from diffusion_lab.conditions import Label
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import ConfigError
from diffusion_lab.guidance import ClassifierFree, NoisyClassifier, Unguided
from diffusion_lab.instantiation import accepted, instantiate, instantiate_untrusted, locate

Node = Mapping[str, Any]

TRAIN = "python src/train_classifier.py data={} noisy=true schedule={}"


def is_guided(node: Node | None) -> bool:
    """Whether a node of `conf/guidance` guides: that of guidance=none does not, and neither does null."""
    return node is not None and locate(node, "guidance") is not Unguided


def guided(node: Node | None, run: Run) -> Run:
    """Return the run with its denoiser guided as a node of `conf/guidance` describes.

    Call it last: after clipping and a fitted variance have given the run its denoiser. The file key `ckpt` of a node becomes
    the arguments `classifier`, `num_classes` and `labeled`.

    Raises:
        ConfigError: a network without a null label, a classifier that is missing or of other data, numbers out of range.
    """
    if node is None or not is_guided(node):
        return run
    condition = run.condition
    given: dict[str, Any] = {"num_classes": condition.num_classes}
    if "ckpt" in node:
        given = _by_classifier(node["ckpt"], run)
    elif locate(node) is ClassifierFree and condition.num_classes and getattr(condition, "drop", 1) == 0:
        raise ConfigError(
            "guidance=cfg needs a null label, and this checkpoint was trained with condition.drop=0, which never showed it: "
            "train with condition.drop=0.1, or write guidance=classifier"
        )
    options = {key: value for key, value in node.items() if key != "ckpt"}
    denoiser = instantiate(options, "guidance", denoiser=run.denoiser, **accepted(options, **given))
    if not isinstance(denoiser, Denoiser):
        raise ConfigError(
            f"guidance._target_={node['_target_']} returns no Denoiser: return the one it was given, guided"
        )
    return replace(run, denoiser=denoiser)


def _by_classifier(path: str | None, run: Run) -> dict[str, Any]:
    """The arguments that a classifier's file stands for."""
    judge = _classifier(path, run)
    own, schedule = judge.config["schedule"], run.denoiser.schedule
    trained_along = schedule if own == run.config["schedule"] else instantiate_untrusted(own, run.trust, "schedule")
    return {
        "classifier": NoisyClassifier(judge.network.to(run.device), trained_along, schedule),
        "num_classes": int(judge.config["data"]["classes"]),
        "labeled": isinstance(run.condition, Label),
    }


def _classifier(path: str | None, run: Run) -> TrainedClassifier:
    """The classifier of noisy images in a file or a folder of src/train_classifier.py, for the run's data."""
    data = run.config["data"]
    name = str(data["source"]["_target_"]).rsplit(".", 1)[-1].lower()
    schedule = str(run.config["schedule"]["_target_"]).rsplit(".", 1)[-1].lower()
    train = TRAIN.format(name, {"subvp": "sub_vp", "scaledlinear": "scaled_linear"}.get(schedule, schedule))
    if not path:
        raise ConfigError(f"guidance=classifier needs guidance.ckpt=FOLDER of a classifier of noisy images: {train}")
    if path == "latest":
        found = sorted(Path("outputs/classifier").glob("*/classifier.pt"), key=lambda file: file.stat().st_mtime)
        if not found:
            raise ConfigError(f"guidance.ckpt=latest finds no classifier below outputs/classifier: {train}")
        file = found[-1]
    else:
        file = Path(path) / "classifier.pt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ConfigError(f"guidance.ckpt={path}: there is no classifier: {train}")
    judge = load_classifier(file)
    own = judge.config["data"]
    if judge.network.time is None:
        raise ConfigError(f"guidance.ckpt={path} was trained on clean images and says nothing of noisy ones: {train}")
    if own["name"] != name or tuple(own["shape"]) != run.shape:
        shape = "×".join(map(str, own["shape"]))
        raise ConfigError(
            f"guidance.ckpt={path} classifies {own['name']} ({shape}), and this checkpoint makes {name}: {train}"
        )
    return judge

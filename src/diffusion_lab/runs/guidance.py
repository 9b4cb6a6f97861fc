"""From `guidance=` to a run whose denoiser is guided."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion_lab.errors import ConfigError
from diffusion_lab.guidance import ClassifierFree, ClassifierGuidance, NoisyClassifier
from diffusion_lab.metrics import classifier
from diffusion_lab.metrics.classifier import Trained
from diffusion_lab.runs.checkpoints import Run
from diffusion_lab.runs.instantiate import instantiate
from diffusion_lab.training.condition import Label

Node = Mapping[str, Any]

TRAIN = "python src/train_classifier.py data={} noisy=true schedule={}"


def is_guided(node: Node | None) -> bool:
    """Whether a node of `conf/guidance` guides: that of guidance=none does not, and neither does null."""
    return bool(node) and _kind(node) != "Unguided"


def guided(node: Node | None, run: Run) -> Run:
    """Return the run with its denoiser guided as a node of `conf/guidance` describes.

    Call it last: after clipping and a fitted variance have given the run its denoiser.

    Raises:
        ConfigError: a network without a null label, a classifier that is missing or of other data, numbers out of range.
    """
    if not node or not is_guided(node):
        return run
    options = {key: value for key, value in node.items() if key not in ("_target_", "ckpt")}
    kind, denoiser = _kind(node), run.denoiser
    if kind == "ClassifierFree":
        condition = run.condition
        if getattr(condition, "num_classes", None) and getattr(condition, "drop", 1) == 0:
            raise ConfigError(
                "guidance=cfg needs a null label, and this checkpoint was trained with condition.drop=0, which never showed it: "
                "train with condition.drop=0.1, or write guidance=classifier"
            )
        denoiser = ClassifierFree(denoiser, **options, num_classes=condition.num_classes)
    elif kind == "ClassifierGuidance":
        judge = _classifier(node["ckpt"], run)
        schedule = instantiate(judge.config["schedule"])
        same = judge.config["schedule"] == run.config["schedule"]
        judge.network.to(run.device)
        logits = NoisyClassifier(judge.network, denoiser.schedule if same else schedule, denoiser.schedule)
        denoiser = ClassifierGuidance(
            denoiser,
            logits,
            int(judge.config["data"]["classes"]),
            **options,
            labelled=isinstance(run.condition, Label),
        )
    else:
        raise ConfigError(
            f"guidance._target_={node['_target_']} is unknown: write guidance=none, guidance=cfg or guidance=classifier"
        )
    return replace(run, denoiser=denoiser)


def _kind(node: Node | None) -> str:
    return str((node or {}).get("_target_", "")).rsplit(".", 1)[-1]


def _classifier(path: str | None, run: Run) -> Trained:
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
    judge = classifier.load(file)
    own = judge.config["data"]
    if judge.network.time is None:
        raise ConfigError(f"guidance.ckpt={path} was trained on clean images and says nothing of noisy ones: {train}")
    if own["name"] != name or tuple(own["shape"]) != run.shape:
        shape = "×".join(map(str, own["shape"]))
        raise ConfigError(
            f"guidance.ckpt={path} classifies {own['name']} ({shape}), and this checkpoint makes {name}: {train}"
        )
    return judge

"""Quality, diversity and label accuracy on digits against the guidance scale.

Networks and results are kept in outputs/bench/guidance and reused. The plot is written to docs/guidance.png.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import command, measured, table

HOME = Path("outputs/bench/guidance")
PICTURE = Path("docs/guidance.png")
SCALES = {"cfg": [0, 1, 1.5, 2, 4], "classifier": [0, 1, 3, 10]}
METRICS = ["fd_classifier", "precision", "recall", "density", "coverage", "label_accuracy"]
ABLATED = {  # name → overrides of the training
    "no labels": [],
    "no labels, self-conditioning": ["model.self_conditioning=true"],
    "labels, never dropped": ["condition=label", "condition.drop=0"],
    "labels, dropped at 0.1": ["condition=label"],
    "labels, dropped at 0.3": ["condition=label", "condition.drop=0.3"],
    "labels, dropped at 0.1, self-conditioning": ["condition=label", "model.self_conditioning=true"],
}
PLAIN, LABELLED = "no labels", "labels, dropped at 0.1"


def train_missing(quick: bool) -> None:
    """Train the networks of the ablation and the classifier of noisy digits unless they exist."""
    short = ["trainer.max_steps=40", "validation.every=40"] if quick else []
    for name, overrides in ABLATED.items():
        if not (folder(name) / "checkpoints" / "last.ckpt").is_file():
            command(
                "train", f"hydra.run.dir={folder(name)}", "logger=csv", "callbacks.progress=null", *overrides, *short
            )
    if not (HOME / "noisy" / "classifier.pt").is_file():
        command("train_classifier", "data=digits", "noisy=true", f"out={HOME / 'noisy'}")


def folder(name: str) -> Path:
    """Return the run folder of a network of the ablation."""
    return HOME / name.replace(", ", "_").replace(" ", "_").replace(".", "")


def evaluated(name: str, kind: str, scale: float, n: int) -> dict[str, Any]:
    """Return the metrics of n samples of a network with guidance of a kind, or "none"."""
    guidance = [] if kind == "none" else [f"guidance={kind}", f"guidance.scale={scale}"]
    guidance += [f"guidance.ckpt={HOME / 'noisy'}"] if kind == "classifier" else []
    out = HOME / "measured" / f"{folder(name).name}_{kind}_{scale}_{n}"
    (row,) = measured(out, f"ckpt={folder(name)}", f"n={n}", "metrics=[fd_classifier,prdc]", *guidance)
    metrics: dict[str, Any] = row["metrics"]
    return metrics


def validation_loss(name: str) -> float:
    """Return the last logged validation loss."""
    lines = (folder(name) / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("val/loss")
    return float([line.split(",")[column] for line in lines[1:] if line.split(",")[column]][-1])


def trade_off(n: int) -> dict[str, list[dict[str, Any]]]:
    """Return metrics by kind of guidance, one row per scale."""
    names = {"cfg": LABELLED, "classifier": PLAIN}
    return {kind: [evaluated(names[kind], kind, scale, n) for scale in scales] for kind, scales in SCALES.items()}


def plot(metrics: dict[str, list[dict[str, Any]]]) -> None:
    """Plot metrics against the scale, one panel per metric."""
    import matplotlib.pyplot as plt

    panels = {
        "label_accuracy": "label_accuracy",
        "coverage": "coverage",
        "fd_classifier": "fd_classifier",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 3), layout="constrained")
    for ax, (metric, title) in zip(axes, panels.items(), strict=True):
        for (kind, rows), color in zip(metrics.items(), ("#2563a8", "#c0562b"), strict=True):
            ax.plot(
                SCALES[kind], [row[metric] for row in rows], "o-", color=color, label=kind, markersize=4, linewidth=1.5
            )
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_xlabel("guidance.scale", fontsize=9)
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xticks([0, 1, 2, 4, 10], ["0", "1", "2", "4", "10"])
        ax.grid(color="#e6e6e6", linewidth=0.8)
        ax.tick_params(labelsize=8)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(PICTURE, dpi=120)
    plt.close(figure)


def _row(head: Sequence[str], m: dict[str, Any]) -> list[str]:
    return [*head, *("" if k not in m else f"{m[k]:.1%}" if k == "label_accuracy" else f"{m[k]:.3f}" for k in METRICS)]


def main(quick: bool) -> str:
    """Return two tables: the trade-off of guidance, and the effect of labels, label dropping and self-conditioning."""
    global HOME
    if quick:
        HOME = HOME / "quick"
    n = 100 if quick else 1000
    train_missing(quick)
    metrics = trade_off(n)
    if not quick:
        plot(metrics)
    rows = [
        _row([kind, f"{scale:g}"], m)
        for kind, each in metrics.items()
        for scale, m in zip(SCALES[kind], each, strict=True)
    ]
    ablation = [_row([name, f"{validation_loss(name):.4f}"], evaluated(name, "none", 0, n)) for name in ABLATED]
    first, second = (
        table([*head, *METRICS], r) for head, r in ((("guidance", "scale"), rows), (("network", "val/loss"), ablation))
    )
    accuracy = json.loads((HOME / "noisy" / "accuracy.json").read_text())["accuracy"]
    return f"{first}\n\nThe classifier of noisy digits has an accuracy of {accuracy:.1%} on held-out x_t, t uniform.\n\n{second}"

"""What guidance buys and what it costs on the digits: is the class the one that was asked for, and how much variety is left?

Networks are trained once and kept in outputs/bench/guidance, as is what was measured. The plot goes to docs/guidance.png.
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
ABLATED = {  # name → what is trained
    "no labels": [],
    "no labels, self-conditioning": ["model.self_conditioning=true"],
    "labels, never dropped": ["condition=label", "condition.drop=0"],
    "labels, dropped at 0.1": ["condition=label"],
    "labels, dropped at 0.3": ["condition=label", "condition.drop=0.3"],
    "labels, dropped at 0.1, self-conditioning": ["condition=label", "model.self_conditioning=true"],
}
PLAIN, LABELLED = "no labels", "labels, dropped at 0.1"


def trained(quick: bool) -> None:
    """The networks of the ablation and the classifier of noisy digits, where they are not there yet."""
    short = ["trainer.max_steps=40", "validation.every=40"] if quick else []
    for name, overrides in ABLATED.items():
        if not (folder(name) / "checkpoints" / "last.ckpt").is_file():
            command(
                "train", f"hydra.run.dir={folder(name)}", "logger=csv", "callbacks.progress=null", *overrides, *short
            )
    if not (HOME / "noisy" / "classifier.pt").is_file():
        command("train_classifier", "data=digits", "noisy=true", f"out={HOME / 'noisy'}")


def folder(name: str) -> Path:
    """Where a network of the ablation is."""
    return HOME / name.replace(", ", "_").replace(" ", "_").replace(".", "")


def evaluated(name: str, kind: str, scale: float, n: int) -> dict[str, Any]:
    """The metrics of n samples of a network under a guidance; kind "none" for none."""
    guidance = [] if kind == "none" else [f"guidance={kind}", f"guidance.scale={scale}"]
    guidance += [f"guidance.ckpt={HOME / 'noisy'}"] if kind == "classifier" else []
    out = HOME / "measured" / f"{folder(name).name}_{kind}_{scale}_{n}"
    found: dict[str, Any] = measured(out, f"ckpt={folder(name)}", f"n={n}", "metrics=[fd_classifier,prdc]", *guidance)[
        0
    ]["metrics"]
    return found


def validation_loss(name: str) -> float:
    """The last one that training logged."""
    lines = (folder(name) / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("val/loss")
    return float([line.split(",")[column] for line in lines[1:] if line.split(",")[column]][-1])


def trade_off(n: int) -> dict[str, list[dict[str, Any]]]:
    """Metrics by kind of guidance, one row a scale."""
    names = {"cfg": LABELLED, "classifier": PLAIN}
    return {kind: [evaluated(names[kind], kind, scale, n) for scale in scales] for kind, scales in SCALES.items()}


def plot(found: dict[str, list[dict[str, Any]]]) -> None:
    """Quality against scale, a panel a metric."""
    import matplotlib.pyplot as plt

    panels = {
        "label_accuracy": "recognised as the class that was asked for",
        "coverage": "coverage",
        "fd_classifier": "fd_classifier",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 3), layout="constrained")
    for ax, (metric, title) in zip(axes, panels.items(), strict=True):
        for (kind, rows), colour in zip(found.items(), ("#2563a8", "#c0562b"), strict=True):
            ax.plot(
                SCALES[kind], [row[metric] for row in rows], "o-", color=colour, label=kind, markersize=4, linewidth=1.5
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
    """Both tables: the trade-off, and what labels, their dropping and self-conditioning do."""
    global HOME
    if quick:
        HOME = HOME / "quick"
    n = 100 if quick else 1000
    trained(quick)
    found = trade_off(n)
    if not quick:
        plot(found)
    rows = [
        _row([kind, f"{scale:g}"], m)
        for kind, each in found.items()
        for scale, m in zip(SCALES[kind], each, strict=True)
    ]
    ablation = [_row([name, f"{validation_loss(name):.4f}"], evaluated(name, "none", 0, n)) for name in ABLATED]
    first, second = (
        table([*head, *METRICS], r) for head, r in ((("guidance", "scale"), rows), (("network", "val/loss"), ablation))
    )
    accuracy = json.loads((HOME / "noisy" / "accuracy.json").read_text())["accuracy"]
    return (
        f"{first}\n\nThe classifier of noisy digits is right on {accuracy:.1%} of held-out x_t, t uniform.\n\n{second}"
    )

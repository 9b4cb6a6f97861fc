"""Report of a hundred runs: seconds of the whole command and size of the page."""

import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from common import ROOT, configuration, table
from PIL import Image

STEPS, EVERY = 100_000, 50
CONFIG = configuration(f"trainer.max_steps={STEPS}")


def main(quick: bool) -> str:
    """Return a Markdown table."""
    head = ["runs", "seconds", "CPU seconds", "page, MB"]
    return table(head, [_measured(count) for count in ((10,) if quick else (10, 100))])


def _measured(count: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for i in range(count):
            _run(place / str(i), i)
        before, begin = os.times(), time.perf_counter()
        subprocess.run([sys.executable, str(ROOT / "src" / "report.py"), folder], check=True, stdout=subprocess.DEVNULL)
        seconds, after = time.perf_counter() - begin, os.times()
        busy = after.children_user + after.children_system - before.children_user - before.children_system
        size = (place / "report.html").stat().st_size / 1e6
        return [str(count), f"{seconds:.1f}", f"{busy:.1f}", f"{size:.1f}"]


def _run(folder: Path, seed: int) -> None:
    """Write the files of a long run: rows of losses and speed, and an image of smooth noise as its last grid."""
    overrides = [f"seed={seed}", f"trainer.max_steps={STEPS}"]
    (folder / ".hydra").mkdir(parents=True)
    (folder / "samples").mkdir()
    config = {**CONFIG, "seed": seed}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    rng = np.random.default_rng(seed)
    bins = [f"train/loss_snr/{i}" for i in range(8)]
    names = [
        "epoch",
        "speed/hours_to_go",
        "speed/images_per_s",
        "speed/peak_memory_gib",
        "step",
        "train/loss",
        *bins,
        "val/loss",
    ]
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for step in range(EVERY, STEPS + 1, EVERY):
            head = {"epoch": step / 12, "step": step}
            values = {name: 0.1 + rng.random() for name in names if name not in (*head, "val/loss")}
            writer.writerows([{**head, **values}, {**head, "val/loss": 0.1 + rng.random()}])
    coarse = Image.fromarray(rng.integers(0, 256, (64, 128, 3), dtype=np.uint8)).resize(
        (1100, 760), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(coarse).astype(int) + rng.integers(-8, 8, (760, 1100, 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "samples" / f"step_{STEPS:07d}.png")

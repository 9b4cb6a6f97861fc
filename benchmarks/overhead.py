"""Overhead of Lightning, callbacks, logging and EMA per step, compared with a bare loop of the same network."""

import logging
import warnings

from common import Bare, bare_seconds, configuration, fitted, network, paired, table

from diffusion_lab.commands.train import build


def measure(name: str, overrides: list[str], steps: int, rounds: int) -> list[str]:
    """Return one row: median milliseconds of both, and the ratio of the pairs."""
    config = configuration(*overrides)
    data = build.data(config)
    data.prepare_data()
    data.setup()
    images = data.images("train")[:]
    loop = Bare(
        network(config)[0],
        images,
        batch=config["data"]["batch_size"],
        lr=config["optimizer"]["lr"],
        steps=10_000,
        decay=0.999,
        average=False,
    )
    warm = 5 if steps >= 20 else 1
    ours, bare, ratios = paired(fitted(config, steps, warm), lambda: bare_seconds(loop, steps, warm), rounds)
    spread = f"{ratios[len(ratios) // 2] - 1:+.1%} ({ratios[0] - 1:+.1%} … {ratios[-1] - 1:+.1%})"
    return [name, str(config["data"]["batch_size"]), f"{bare * 1e3:.1f}", f"{ours * 1e3:.1f}", spread]


def main(quick: bool) -> str:
    """Return the table of both networks."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    quiet = ["callbacks.progress=null", "callbacks.samples=null", "validation.every=0", "trainer=cpu"]
    shapes = ["data.channels=3", "data.image_size=[32,32]", "data.num_classes=0"]
    rows = [measure("digits, unet_digits", quiet, 40 if quick else 150, 2 if quick else 5)]
    noise = [
        "data=image_folder",
        "data.root=NOISE",
        *shapes,
        "model=unet_cifar10",
        "data.batch_size=32",
        "optimizer.lr=2e-4",
    ]
    rows.append(measure("32×32 noise, unet_cifar10", [*quiet, *_noise(noise)], 1 if quick else 3, 1 if quick else 3))
    return table(
        ["", "batch", "bare loop, ms per step", "src/train.py, ms per step", "added (median, range of pairs)"], rows
    )


def _noise(overrides: list[str]) -> list[str]:
    """Write random images to a temporary .npz, so that the second row needs no download; return the overrides."""
    import tempfile
    from pathlib import Path

    import numpy as np

    path = Path(tempfile.mkdtemp()) / "noise.npz"
    np.savez(path, arr_0=np.random.default_rng(0).integers(0, 256, (256, 32, 32, 3), dtype=np.uint8))
    return [o.replace("NOISE", str(path)) for o in overrides]


if __name__ == "__main__":
    print(main(quick=False))

"""Digits in two minutes: this project, a bare loop and denoising-diffusion-pytorch, measured in the features of one classifier.

The Fréchet distance uses the classifier's 64 features of 1,797 samples (DDIM, 50 steps, EMA weights) and of all 1,797 images.
It is not FID. The distance between random halves of the real images shows the scale of the smallest differences.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import Bare, configuration, network, table
from torch import Tensor

from diffusion_lab.checkpoint import load_checkpoint
from diffusion_lab.commands.train import build
from diffusion_lab.data.images import to_float
from diffusion_lab.data.pictures import to_uint8
from diffusion_lab.metrics import classifier
from diffusion_lab.metrics.classifier import CONFIDENT, ClassifierExtractor
from diffusion_lab.metrics.frechet import frechet_distance, moments
from diffusion_lab.noise import permutation
from diffusion_lab.samplers import DDIM
from diffusion_lab.training.classifier import train_classifier

ROOT = Path(__file__).resolve().parents[1]
HEAD = ["", "parameters", "seconds", "images/s", "Fréchet distance", "confident_fraction"]


def row(
    name: str, parameters: str, seconds: float, images: int, samples: Tensor, extract: ClassifierExtractor, real: Tensor
) -> list[str]:
    """Return one row of the table for float samples in [−1, 1]."""
    features, logits = extract(to_uint8(samples))
    assert logits is not None
    distance = frechet_distance(moments(features), moments(extract(real).features))
    confident = float((logits.softmax(1).max(1).values >= CONFIDENT).double().mean())
    return [name, parameters, f"{seconds:.0f}", f"{images / seconds:,.0f}", f"{distance:.2f}", f"{confident:.1%}"]


def halves(extract: ClassifierExtractor, real: Tensor) -> str:
    """Return the mean and standard deviation of the distance between two random halves of the real images."""
    f = extract(real).features
    values = []
    for draw in range(20):
        order = permutation(len(f), seed=1, draw=draw)
        half = len(f) // 2
        values.append(frechet_distance(moments(f[order[:half]]), moments(f[order[half:]])))
    return f"{np.mean(values):.2f} ± {np.std(values):.2f}"


def ours(extract: ClassifierExtractor, real: Tensor, steps: int) -> list[str]:
    """Return the row of `python src/train.py` with a number of steps."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, str(ROOT / "src" / "train.py"), f"hydra.run.dir={run}", f"trainer.max_steps={steps}"]
        begin = time.perf_counter()
        subprocess.run(
            [*command, "callbacks.progress=null"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        seconds = time.perf_counter() - begin
        loaded = load_checkpoint(run)
        count = sum(p.numel() for p in loaded.denoiser.network.parameters())
        samples = loaded.sample(len(real), DDIM(steps=50), seed=0, batch_size=600)
    name = "`python src/train.py`, whole command (imports, validation, grids, logs)"
    return row(name, f"{count:,}", seconds, steps * 128, samples, extract, real)


def bare(extract: ClassifierExtractor, real: Tensor, steps: int) -> list[str]:
    """Return the row of the bare loop with the same network and number of steps."""
    config = configuration()
    torch.manual_seed(0)
    net, _ = network(config)
    data = build.data(config)
    data.prepare_data()
    data.setup()
    loop = Bare(net, data.images("train")[:], batch=128, lr=2e-3, steps=steps, decay=0.995)
    begin = time.perf_counter()
    for _ in range(steps):
        loop.step()
    seconds = time.perf_counter() - begin
    count = sum(p.numel() for p in net.parameters())
    return row(
        "a bare loop, same network and steps", f"{count:,}", seconds, steps * 128, loop.sample(len(real)), extract, real
    )


def peer(extract: ClassifierExtractor, real: Tensor, limit: float, lr: float) -> list[str]:
    """Return the row of denoising-diffusion-pytorch after `limit` seconds: its U-Net, GaussianDiffusion, EMA, and Adam."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    torch.manual_seed(0)
    network = Unet(dim=24, dim_mults=(1, 2), channels=1)
    diffusion = GaussianDiffusion(network, image_size=8, sampling_timesteps=50)
    ema = EMA(diffusion, beta=0.995, update_every=10)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=lr, betas=(0.9, 0.99))
    x = to_float(real) / 2 + 0.5
    begin, steps = time.perf_counter(), 0
    while time.perf_counter() - begin < limit:
        loss = diffusion(x[torch.randint(len(x), (128,))])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        steps += 1
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        samples = (
            torch.cat([ema.ema_model.sample(batch_size=600) for _ in range(-(-len(real) // 600))])[: len(real)] * 2 - 1
        )
    count = sum(p.numel() for p in network.parameters())
    return row(f"denoising-diffusion-pytorch, lr {lr:g}", f"{count:,}", seconds, steps * 128, samples, extract, real)


def main(quick: bool) -> str:
    """Return the table; `quick` trains a twentieth of the steps."""
    steps, limit = (120, 6.0) if quick else (2400, 120.0)
    data = build.data(configuration())
    data.prepare_data()
    data.setup()
    with tempfile.TemporaryDirectory() as folder:
        extract = ClassifierExtractor(classifier.for_dataset(data, Path(folder), train_classifier))
    real = torch.from_numpy(np.asarray(data.images("all")))
    rows = [
        ours(extract, real, steps),
        bare(extract, real, steps),
        peer(extract, real, limit, 1e-4),
        peer(extract, real, limit, 2e-3),
    ]
    accuracy = f"Classifier: accuracy {extract.trained.accuracy:.1%} on held-out images."
    note = f"{accuracy} Two halves of the real images: {halves(extract, real)}."
    return table(HEAD, rows) + "\n\n" + note


if __name__ == "__main__":
    print(main(quick=False))

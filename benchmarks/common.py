"""Common parts of the benchmarks: a configuration, the bare training loop of the comparisons, timing, tables."""

import copy
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from diffusion_lab import composition
from diffusion_lab.commands.train import build
from diffusion_lab.conditions import Condition
from diffusion_lab.data.images import to_float
from diffusion_lab.instantiation import locate
from diffusion_lab.variances import Learned

ROOT = Path(__file__).resolve().parents[1]


def configuration(*overrides: str) -> dict[str, Any]:
    """Return the resolved configuration of `python src/train.py OVERRIDES…`."""
    plain = OmegaConf.to_container(composition.composed("train", overrides), resolve=False)
    assert isinstance(plain, dict)
    del plain["hydra"]
    resolved = OmegaConf.to_container(OmegaConf.create({**plain, "run_dir": "unused"}), resolve=True)
    assert isinstance(resolved, dict)
    return resolved


def network(config: dict[str, Any]) -> tuple[nn.Module, Condition]:
    """Return the network of a resolved configuration with initial weights, and its condition."""
    condition, _ = build.condition(config, build.data(config))
    learned = locate(config["variance"], "variance") is Learned
    net, _ = build.model(config, condition, learned)
    return net, condition


def loggers(config: dict[str, Any], folder: Path) -> list[Any]:
    """Return the loggers of a configuration, which write to `folder`."""
    from diffusion_lab.training.loggers import identity

    nodes = {name: {**node, "save_dir": str(folder)} for name, node in config["logger"].items()}
    return build.loggers({**config, "logger": nodes}, folder, identity({}, [], None, None))


class Bare:
    """A training loop without a framework: cosine ᾱ in closed form, v, stratified t, AdamW, gradient clipping, EMA.

    It is independent of the package, except for the network.

    Args:
        network: the network to train.
        images: uint8 (N, C, H, W).
        batch: batch size.
        lr: initial learning rate, which decays linearly to 0.
        steps: number of updates.
        decay: of the EMA.
        average: whether to keep the EMA; False for timing.
    """

    def __init__(
        self,
        network: nn.Module,
        images: np.ndarray,
        *,
        batch: int,
        lr: float,
        steps: int,
        decay: float,
        average: bool = True,
    ) -> None:
        self.network, self.batch, self.steps, self.decay = network.train(), batch, steps, decay
        self.x = to_float(torch.from_numpy(images))
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=lr, fused=True)
        self.rate = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda i: max(1 - i / steps, 0.0))
        self.average = copy.deepcopy(network).eval().requires_grad_(False) if average else None
        self.done = 0

    def step(self) -> Tensor:
        """Update the weights once; return the loss."""
        x0 = self.x[torch.randint(len(self.x), (self.batch,))]
        u = (torch.arange(self.batch) + torch.rand(self.batch)) / self.batch
        i = (u * 1000).floor() + 1
        angle = (i / 1000 + 0.008) / 1.008 * (torch.pi / 2)
        alpha, sigma = (f(angle)[:, None, None, None] for f in (torch.cos, torch.sin))
        noise = torch.randn_like(x0)
        v = self.network(alpha * x0 + sigma * noise, i - 1)
        loss = (v - (alpha * noise - sigma * x0)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.rate.step()
        self.done += 1
        if self.average is not None:
            d = min(self.decay, (1 + self.done) / (10 + self.done))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - d)
        return loss

    @torch.no_grad()
    def sample(self, n: int, steps: int = 50) -> Tensor:
        """Return DDIM samples with `steps` trailing steps and EMA weights, float (n, C, H, W) in [−1, 1]."""
        network = self.average if self.average is not None else self.network
        x = torch.randn(n, *self.x.shape[1:])
        nodes = [round(1000 - 1000 * k / steps) for k in range(steps)] + [0]
        for i, j in itertools.pairwise(nodes):
            angle, after = ((k / 1000 + 0.008) / 1.008 * (torch.pi / 2) if k else 0.0 for k in (i, j))
            alpha, sigma = np.cos(angle), np.sin(angle)
            v = torch.cat([network(part, torch.full((len(part),), i - 1.0)) for part in x.split(512)])
            x0 = (alpha * x - sigma * v).clamp(-1, 1)
            x = np.cos(after) * x0 + np.sin(after) * (x - alpha * x0) / sigma
        return x


def fitted(config: dict[str, Any], steps: int, warm: int) -> Callable[[], float]:
    """Return a function that trains `steps` steps with the callbacks and loggers of the command and returns seconds per step.

    Building the objects and opening the data are excluded; periodic work is included.
    """
    import pytorch_lightning as pl

    class Clock(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == warm:  # without the first steps, which allocate memory
                self.begin = time.perf_counter()
            if trainer.global_step == trainer.max_steps:
                self.seconds = (time.perf_counter() - self.begin) / steps

    def run() -> float:
        with tempfile.TemporaryDirectory() as folder:
            config["trainer"]["max_steps"] = warm + steps
            data, (net, condition) = build.data(config), network(config)
            module = build.module(config, net, condition, {})
            clock = Clock()
            hooks = [*build.callbacks(config, Path(folder)), clock]
            trainer = build.trainer(config, Path(folder), loggers(config, Path(folder)), hooks)
            trainer.fit(module, datamodule=data)
            return clock.seconds

    return run


def bare_seconds(loop: Bare, steps: int, warm: int) -> float:
    """Return seconds per step of the bare loop."""
    for _ in range(warm):
        loop.step()
    begin = time.perf_counter()
    for _ in range(steps):
        loop.step()
    return (time.perf_counter() - begin) / steps


def paired(a: Callable[[], float], b: Callable[[], float], rounds: int) -> tuple[float, float, list[float]]:
    """Return the medians of a and b, called alternately, and the sorted ratios a/b, in which drifts of the machine cancel."""
    pairs = [(a(), b()) for _ in range(rounds)]
    return (
        statistics.median(x for x, _ in pairs),
        statistics.median(y for _, y in pairs),
        sorted(x / y for x, y in pairs),
    )


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def machine() -> str:
    """Return device and versions of the measurements."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{device}, torch {torch.__version__}, Python {platform.python_version()}"


def command(name: str, *arguments: str) -> None:
    """Run src/NAME.py with command-line arguments."""
    subprocess.run(
        [sys.executable, str(ROOT / "src" / f"{name}.py"), *arguments], check=True, stdout=subprocess.DEVNULL
    )


def measured(out: Path, *arguments: str) -> list[dict[str, Any]]:
    """Return the rows of an evaluation against all images of the data set, from its file if it exists."""
    if not (out / "metrics.json").is_file():
        command("evaluate", f"out={out}", "split=all", *arguments)
    rows: list[dict[str, Any]] = json.loads((out / "metrics.json").read_text())
    return rows

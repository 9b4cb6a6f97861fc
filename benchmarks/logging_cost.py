"""Overhead of the loggers: seconds inside their calls and CPU seconds of the W&B process, as a share of the run.

Measured within one run, since the difference of two runs is below the noise of a shared machine.
"""

import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import wandb
from common import configuration, loggers, network, table

from diffusion_lab.commands.train import build
from diffusion_lab.training.callbacks import WandbSummary

CALLS = ("log_metrics", "log_image", "save", "finalize")


def _children() -> float:
    """Return the CPU seconds of ended child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(chosen: list[str], steps: int) -> list[str]:
    """Return one row: seconds of the run, seconds inside the loggers, CPU seconds of W&B, and the share of both."""
    config = configuration(
        f"logger=[{','.join(chosen)}]", "callbacks.progress=null", "trainer=cpu", f"trainer.max_steps={steps}",
        *(["logger.wandb.mode=offline"] if "wandb" in chosen else []),
    )  # fmt: skip
    inside = [0.0]

    def timed(call: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                inside[0] += time.perf_counter() - begin

        return wrapped

    with tempfile.TemporaryDirectory() as folder:
        place, before = Path(folder), _children()
        data, (net, condition) = build.data(config), network(config)
        module = build.module(config, net, condition, {})
        written = loggers(config, place)
        for logger in written:
            for name in CALLS:
                if hasattr(logger, name):
                    setattr(logger, name, timed(getattr(logger, name)))
        hooks: list[pl.Callback] = [*build.callbacks(config, place), WandbSummary()]
        trainer = build.trainer(config, place, written, hooks)
        if "wandb" in chosen:
            _ = next(
                logger for logger in written if isinstance(logger, pl.loggers.WandbLogger)
            ).experiment  # once a run
        begin = time.perf_counter()
        trainer.fit(module, datamodule=data)
        seconds = time.perf_counter() - begin
        wandb.finish()
        wandb.teardown()  # ends its process, whose CPU seconds are counted at its end
        service = _children() - before
    share = (inside[0] + service) / seconds
    return [", ".join(chosen), f"{seconds:.1f}", f"{inside[0]:.2f}", f"{service:.2f}", f"{share:.1%}"]


def main(quick: bool) -> str:
    """Return the table."""
    steps = 100 if quick else 1200
    rows = [measure(chosen, steps) for chosen in (["csv"], ["csv", "wandb"], ["csv", "wandb", "tensorboard"])]
    head = ["logger", "the run, s", "inside the loggers, s", "W&B process, CPU s", "share"]
    return f"Digits, {steps:,} steps with the rows, grids and validations of the quick start.\n\n" + table(head, rows)


if __name__ == "__main__":
    print(main(quick=False))

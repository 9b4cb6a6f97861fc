"""What the loggers add to a step: the seconds inside their calls and those that W&B's own process computes, of the run's.

Counted inside one run, not as a difference of two, which on a shared machine is lost in the noise.
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
from diffusion_lab.commands.train.trainer import build_trainer
from diffusion_lab.training.callbacks import Dashboard

CALLS = ("log_metrics", "log_image", "save", "finalize")


def _children() -> float:
    """Seconds that ended processes of this one have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(chosen: list[str], steps: int) -> list[str]:
    """One row: seconds of the run, inside the loggers, of W&B's process, and the share of both."""
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
        hooks: list[pl.Callback] = [*build.callbacks(config, place), Dashboard()]
        trainer = build_trainer(config, place, written, hooks)
        if "wandb" in chosen:
            _ = next(
                logger for logger in written if isinstance(logger, pl.loggers.WandbLogger)
            ).experiment  # once a run
        begin = time.perf_counter()
        trainer.fit(module, datamodule=data)
        seconds = time.perf_counter() - begin
        wandb.finish()
        wandb.teardown()  # or its process would live on, and its seconds count at the end only
        service = _children() - before
    share = (inside[0] + service) / seconds
    return [", ".join(chosen), f"{seconds:.1f}", f"{inside[0]:.2f}", f"{service:.2f}", f"{share:.1%}"]


def main(quick: bool) -> str:
    """The table."""
    steps = 100 if quick else 1200
    rows = [measure(chosen, steps) for chosen in (["csv"], ["csv", "wandb"], ["csv", "wandb", "tensorboard"])]
    head = ["logger", "seconds of the run", "inside the loggers", "W&B's process, seconds of a core", "share"]
    return f"Digits, {steps:,} steps with the quick start's rows, grids and validations.\n\n" + table(head, rows)


if __name__ == "__main__":
    print(main(quick=False))

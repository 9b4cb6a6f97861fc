"""What a resumed run takes from the folder of the run before: its rows of metrics.csv, and best.ckpt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger

from diffusion_lab import checkpoint as checkpoints
from diffusion_lab.commands.train.configuration import Resume
from diffusion_lab.io import remove_partials, write_file
from diffusion_lab.training.callbacks import Checkpoints
from diffusion_lab.training.callbacks.checkpoints import measured_by
from diffusion_lab.training.saving import carry_rows


def carry(
    resume: Resume,
    settings: Mapping[str, Any],
    folder: Path,
    loggers: list[Logger],
    callbacks: Sequence[pl.Callback],
) -> None:
    """Begin metrics.csv with the rows up to the checkpoint, and copy best.ckpt where it belongs to this run.

    best.ckpt is left where it is if it measures something else than this run would, or is newer than the checkpoint: the run
    before has then replaced the one of the checkpoint, and this run finds its own.
    """
    before = resume.content["config"]
    kept = (before["callbacks"] or {}).get("checkpoints") or {}
    run = resume.path.absolute().parents[len(Path(kept.get("folder", "checkpoints")).parts)]
    carry_rows(loggers, folder, run / "metrics.csv", resume.step, before["trainer"]["log_every_n_steps"])
    remove_partials(resume.path.parent)
    best = resume.path.with_name("best.ckpt")
    writer = next((callback for callback in callbacks if isinstance(callback, Checkpoints)), None)
    if writer is None or not best.is_file() or measured_by(before) != measured_by(settings):
        return
    if int(checkpoints.read(best)["global_step"]) <= resume.step:
        write_file(writer.best_path, best.read_bytes())

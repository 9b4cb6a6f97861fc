"""What a run keeps through a kill: checkpoints written beside their target, and the rows of metrics.csv."""

import csv
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.loggers import CSVLogger, Logger
from pytorch_lightning.plugins.io import TorchCheckpointIO

from diffusion_lab.checkpoint.archive import sealed
from diffusion_lab.io import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints with a hash of their content, to a temporary name in their own folder; sync and rename them.

    Lightning's class moves them from the system's temporary folder, which may be on another disk, and does not sync them.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with replacing(Path(path)) as partial, partial.open("wb") as file:
            try:
                torch.save(sealed(checkpoint), file)
            except RuntimeError as error:  # torch's own error follows the OSError of the file
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise


def carry_rows(loggers: list[Logger], folder: Path, before: Path, step: int, every: int) -> None:
    """Begin metrics.csv of `folder` with the rows of the run that is resumed, up to its checkpoint's step.

    Args:
        loggers: of the run; one of them writes metrics.csv.
        folder: of the run.
        before: metrics.csv of the run that is resumed; nothing is carried where it is missing.
        step: of the checkpoint.
        every: steps between two rows of the training loss in `before`. The row that a run writes at its end between two of
            them is not carried: the next row of the resumed run covers its steps.
    """
    if not before.is_file():
        return
    with before.open(newline="") as file:
        complete = [row for row in csv.DictReader(file) if _is_complete(row)]
    rows = [
        row
        for row in complete
        if (at := int(float(row["step"]))) <= step and not (row.get("train/loss") and at % every)
    ]
    for logger in loggers:
        if isinstance(logger, CSVLogger) and Path(logger.log_dir) == folder and rows:
            logger.experiment.metrics.extend(rows)  # text, written as it was read
            logger.save()


def _is_complete(row: dict[str, Any]) -> bool:
    """Whether a row has all its columns: the last one of a killed run may be cut."""
    return None not in row.values() and bool(row.get("step"))

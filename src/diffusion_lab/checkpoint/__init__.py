"""Checkpoints, fits, classifiers: the only room that depends on the formats of their files.

| module | contents |
|---|---|
| `files` | find a checkpoint, read it without running code, select weights |
| `upgrade` | older formats |
| `run` | `load_checkpoint` → `Run`: denoiser, configuration, samples |
| `fits`, `guidance` | `variance=` and `guidance=` of a run, from files where they need one |
| `classifiers` | files of classifiers |
"""

from diffusion_lab.checkpoint.files import EXPORTED, find, metadata, read, select
from diffusion_lab.checkpoint.run import Run, load_checkpoint, with_clip
from diffusion_lab.checkpoint.upgrade import FORMAT

__all__ = [
    "EXPORTED",
    "FORMAT",
    "Run",
    "find",
    "load_checkpoint",
    "metadata",
    "read",
    "select",
    "with_clip",
]

"""Read checkpoints, variance fits and classifiers. Only this package depends on their file formats.

| module | contents |
|---|---|
| `archive` | write and read files of tensors and plain values: hash, checks before anything is allocated |
| `files` | find a checkpoint, read it with `weights_only=True`, select weights |
| `upgrade` | convert older formats |
| `run` | `load_checkpoint` → `Run`: denoiser, configuration, samples |
| `fits`, `guidance` | build `variance=` and `guidance=` for a loaded run, and read their files |
| `classifiers` | write and read trained classifiers |
"""

from diffusion_lab.checkpoint.files import EXPORTED, exported, find, metadata, read, select
from diffusion_lab.checkpoint.run import Run, load_checkpoint, with_clip
from diffusion_lab.checkpoint.upgrade import FORMAT

__all__ = [
    "EXPORTED",
    "FORMAT",
    "Run",
    "exported",
    "find",
    "load_checkpoint",
    "metadata",
    "read",
    "select",
    "with_clip",
]

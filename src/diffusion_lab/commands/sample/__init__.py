"""`src/sample.py`: images from a checkpoint. A file for each task; `tasks` checks what it was given, `work` is what all share."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffusion_lab import io as files
from diffusion_lab.commands.sample import tasks

__all__ = ["run", "write"]


def run(config: DictConfig) -> int:
    """Does the task as configured, writes its files and says what it did; returns the exit code."""
    with files.os_errors():
        settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        tasks.check(settings)
        said = tasks.do(settings)
    print(said)
    return 0


def __getattr__(name: str) -> Any:
    if name == "write":
        from diffusion_lab.commands.sample import work

        return work.write
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

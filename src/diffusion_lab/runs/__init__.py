"""What a command does. `load_checkpoint` is imported on use: the command line checks its options before torch is loaded."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_lab.runs.checkpoints import Run, load_checkpoint

__all__ = ["Run", "load_checkpoint"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from diffusion_lab.runs import checkpoints

        return getattr(checkpoints, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Where a command computes."""

import torch

from diffusion_lab.errors import ConfigError


def device(name: str, processes: int = 1, rank: int = 0) -> str:
    """The device that `device=` means to process `rank` of `processes`; of several, each has a GPU of its own.

    Raises:
        ValueError: unknown, or not there.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={name} is unknown: write auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no CUDA device: write device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return "cpu"
    if processes > torch.cuda.device_count():
        raise ConfigError(f"devices={processes}, but torch sees {torch.cuda.device_count()} GPU(s)")
    return f"cuda:{rank}" if processes > 1 else "cuda"

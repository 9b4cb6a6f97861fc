"""The device of a command."""

import torch

from diffusion_lab.errors import ConfigError


def device(name: str, processes: int = 1, rank: int = 0) -> str:
    """Return the device of a process: "cpu", "cuda", or "cuda:RANK" for several processes.

    Args:
        name: the option `device=`: auto, cpu or cuda.
        processes: number of processes, each with a separate GPU.
        rank: rank of this process.

    Raises:
        ConfigError: if the name is unknown, or there are fewer GPUs than processes.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={name} is unknown: write auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no CUDA device: write device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return "cpu"
    if processes > (count := torch.cuda.device_count()):
        raise ConfigError(f"devices={processes}, but torch sees {count} GPU(s): write devices={count}")
    return f"cuda:{rank}" if processes > 1 else "cuda"

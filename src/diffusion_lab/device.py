"""The device of a command."""

import torch

from diffusion_lab.errors import ConfigError


def device(name: str, processes: int = 1, rank: int = 0) -> str:
    """Return the device of process `rank` out of `processes`: "cpu", "cuda", or "cuda:RANK" where several share a machine's GPUs.

    Args:
        name: the option `device=`: auto, cpu or cuda.
        processes: number of processes, each on a GPU of its own.
        rank: of this process.

    Raises:
        ConfigError: another name, no CUDA device, or fewer GPUs than processes.
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

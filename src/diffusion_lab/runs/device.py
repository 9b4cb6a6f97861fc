"""Where a command computes."""

import torch


def device(name: str) -> str:
    """The device that `device=` means. ValueError: unknown, or not there."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={name} is unknown: write auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device: write device=cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name

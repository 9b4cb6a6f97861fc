"""Root keys of each command and their types. This module does not import torch.

A key of type `Node` is the selected option of a group. Its arguments are checked against the constructor's signature.
"""

from dataclasses import dataclass
from typing import Any

Node = dict[str, Any]


@dataclass
class Validation:
    """Number of steps between two validations, and of draws (t, ε) per validation image."""

    every: int
    draws: int


@dataclass
class Inpaint:
    """Arguments of RePaint's resampling."""

    jump_length: int
    resample: int


@dataclass
class Train:
    data: Node
    condition: Node
    model: Node
    schedule: Node
    objective: Node
    weighting: Node
    loss: Node
    time_sampler: Node
    sampler: Node
    variance: Node
    clip: Node
    optimizer: Node
    lr_scheduler: Node
    callbacks: Node
    trainer: Node
    logger: Node
    seed: int
    ckpt: str | None
    init: str | None
    validation: Validation
    compile: bool
    print_config: bool
    overwrite: bool
    trust: list[str]
    run_dir: str


@dataclass
class Sample:
    sampler: Node
    clip: Node
    guidance: Node
    task: str
    ckpt: str | None
    weights: str
    n: int
    seed: int
    labels: str | list[Any]
    condition_data: str | None
    batch_size: int
    device: str
    out: str | None
    save_images: bool
    overwrite: bool
    trust: list[str]
    images: list[str] | None
    image: str | None
    latents: str | None
    mask: str | None
    inpaint: Inpaint
    strength: float
    run_dir: str
    variance: Node | None = None


@dataclass
class Evaluate:
    data: Node
    clip: Node
    guidance: Node
    logger: Node
    ckpt: str | None
    images: str | None
    weights: str
    metrics: Node
    extractor: str | Node | None
    weights_path: str | None
    n: int | None
    split: str
    nll_split: str
    reference: str | None
    save_reference: str | None
    samplers: list[Any]
    steps: list[int]
    budget: int | list[int] | None
    repeats: int
    seed: int
    labels: str | list[Any]
    batch_size: int
    device: str
    devices: int
    cache: str
    out: str | None
    overwrite: bool
    trust: list[str]
    run_dir: str
    variance: Node | None = None


@dataclass
class FitVariance:
    variance: Node
    ckpt: str | None
    weights: str
    n: int
    nodes: int | None
    steps: int
    lr: float
    ema: float | None
    batch_size: int
    seed: int
    device: str
    devices: int
    data: Node
    overwrite: bool
    trust: list[str]
    run_dir: str


@dataclass
class TrainClassifier:
    data: Node
    schedule: Node
    noisy: bool
    steps: int | None
    device: str
    cache: str
    out: str | None
    overwrite: bool
    run_dir: str


@dataclass
class Export:
    ckpt: str | None
    weights: str
    out: str
    diffusers: bool
    overwrite: bool
    trust: list[str]
    run_dir: str


@dataclass
class Report:
    paths: list[str]
    out: str | None
    title: str | None
    run_dir: str


@dataclass
class Dashboard:
    entity: str | None
    project: str
    name: str
    dry: bool
    run_dir: str


COMMANDS: dict[str, type] = {
    "train": Train,
    "sample": Sample,
    "evaluate": Evaluate,
    "fit_variance": FitVariance,
    "train_classifier": TrainClassifier,
    "export": Export,
    "report": Report,
    "dashboard": Dashboard,
}
POSITIONAL = {"report": "paths"}  # the key to which positional arguments of a command are assigned
OUT_FILE = ("export", "report")  # commands whose `out` is a file

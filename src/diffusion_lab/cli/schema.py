"""Root keys of each command and their types. This module does not import torch.

A key of type `Node` is the selected option of a group. Its arguments are checked against the constructor's signature. The
text in `Annotated` is the range of a number.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from diffusion_lab.errors import SEEDS

Node = dict[str, Any]
Seed = Annotated[int, SEEDS]
Count = Annotated[int, "[1, 1000000000]"]
BatchSize = Annotated[int, "[1, 1000000]"]
Processes = Annotated[int, "[1, 4096]"]


@dataclass
class Validation:
    """Number of steps between two validations, and of draws (t, ε) per validation image."""

    every: Annotated[int, "[0, 1000000000]"]
    draws: Annotated[int, "[1, 100000]"]


@dataclass
class Inpaint:
    """Arguments of RePaint's resampling."""

    jump_length: Annotated[int, "[1, 100000]"]
    resample: Annotated[int, "[1, 10000]"]


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
    seed: Seed
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
    n: Count
    seed: Seed
    labels: str | list[Any]
    condition_data: str | None
    batch_size: BatchSize
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
    strength: Annotated[float, "(0, 1]"]
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
    n: Annotated[int, "[2, 1000000000]"] | None
    split: str
    nll_split: str
    reference: str | None
    save_reference: str | None
    samplers: list[Any]
    steps: list[Annotated[int, "[1, 100000]"]]
    budget: BatchSize | list[BatchSize] | None
    repeats: Annotated[int, "[1, 10000]"]
    seed: Seed
    labels: str | list[Any]
    batch_size: BatchSize
    device: str
    devices: Processes
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
    n: Count
    nodes: Annotated[int, "[1, 100000]"] | None
    steps: Count
    lr: Annotated[float, "(0, 1]"]
    ema: Annotated[float, "[0, 1)"] | None
    batch_size: BatchSize
    seed: Seed
    device: str
    devices: Processes
    data: Node
    overwrite: bool
    trust: list[str]
    run_dir: str


@dataclass
class TrainClassifier:
    data: Node
    schedule: Node
    noisy: bool
    steps: Count | None
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
# Keys of groups that the command itself reads, so that ~KEY must not remove them.
READ = {
    "trainer": (
        "accelerator", "accumulate_grad_batches", "deterministic", "devices", "gradient_clip_val", "log_every_n_steps",
        "max_steps", "num_nodes", "precision", "strategy",
    ),
    "data": ("batch_size", "channels", "image_size", "val"),
}  # fmt: skip
POSITIONAL = {"report": "paths"}  # the key to which positional arguments of a command are assigned
OUT_FILE = ("export", "report")  # commands whose `out` is a file

"""From images to features: Inception of 2015-12-05, or a module of one's own; the project's classifier is in `classifier`."""

import hashlib
import io
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusion_lab.data.download import Remote, fetch
from diffusion_lab.data.images import to_float
from diffusion_lab.errors import ConfigError

WEIGHTS = Remote(
    "weights-inception-2015-12-05-6726825d.pth",
    (
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    ),
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
INSTEAD = "or measure without it: metrics=[fd_classifier,prdc] extractor=classifier"


class Features(NamedTuple):
    """What an extractor says of images."""

    features: Tensor  # float32 (B, D)
    logits: Tensor | None  # float32 (B, K), where there are any


class Extractor(ABC):
    """extractor(images) → Features, for uint8 images (B, C, H, W).

    Attributes:
        name: "inception", "classifier" or the name of a module; its Fréchet distance is `distance`.
        key: of the weights, 16 hexadecimal digits; reference statistics are filed under it.
        dim: D, the number of features.
        classes: K, the number of logits; 0 where there are none.
        has_class_logits: whether the logits are of the data set's own classes.
    """

    name: str
    key: str
    dim: int
    classes: int
    has_class_logits = False
    part = 1024  # images at a time

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)
        self.device = torch.device("cpu")

    @property
    def distance(self) -> str:
        """What its Fréchet distance is called. Only Inception's is FID."""
        return "fid" if self.name == "inception" else f"fd_{self.name}"

    def to(self, device: torch.device | str) -> "Extractor":
        """Moves the network; returns itself."""
        self.device = torch.device(device)
        self.network.to(self.device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Features of uint8 images (B, C, H, W), on the extractor's device. ValueError: other images than these."""
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ConfigError(f"features are of uint8 images (B, C, H, W), not of {images.dtype} {tuple(images.shape)}")
        # Equal values in another order of memory would take another kernel: grey images of an .npz count as channels-last.
        laid = torch.empty(images.shape, dtype=torch.uint8, device=self.device).copy_(images)
        found = [self.extract(part) for part in laid.split(self.part)]
        logits = [f.logits for f in found if f.logits is not None]
        return Features(torch.cat([f.features for f in found]).float(), torch.cat(logits).float() if logits else None)

    @abstractmethod
    def extract(self, images: Tensor) -> Features:
        """Features of at most `part` images, uint8 (b, C, H, W)."""


class Inception(Extractor):
    """InceptionV3 as FID was defined with it: 2048 pooled features, the 1008 logits without their bias (torch-fidelity's port).

    The network resizes to 299×299 itself, as TensorFlow 1 did; nothing resizes before it. Grey images get three equal channels.

    Args:
        network: from `inception_network`, with weights.
        key: of the weights.
    """

    name, dim, classes, part = "inception", 2048, 1008, 64

    def __init__(self, network: nn.Module, key: str) -> None:
        super().__init__(network)
        self.key = key[:16]

    def extract(self, images: Tensor) -> Features:
        features, logits = self.network(images.expand(-1, 3, -1, -1).contiguous())
        return Features(features, logits)


class Module(Extractor):
    """Any module that maps images float32 (B, C, H, W) in [−1, 1] to features (B, D), or to (features, logits).

    Args:
        module: it.
        shape: (C, H, W) of the images.

    Raises:
        ValueError: its output is neither.
    """

    def __init__(self, module: nn.Module, shape: tuple[int, int, int]) -> None:
        super().__init__(module)
        name = type(module).__name__.lower()
        self.name = f"own_{name}" if name in ("inception", "classifier") else name
        self.key = digest(module)
        probe = self.extract(torch.zeros(2, *shape, dtype=torch.uint8))
        if probe.features.ndim != 2 or len(probe.features) != 2:
            raise ConfigError(
                f"extractor {type(module).__name__} gives {tuple(probe.features.shape)} for 2 images: "
                "return features (B, D), or (features, logits)"
            )
        self.dim = probe.features.shape[1]
        self.classes = 0 if probe.logits is None else probe.logits.shape[1]

    @torch.no_grad()
    def extract(self, images: Tensor) -> Features:
        out: Any = self.network(to_float(images))
        return Features(*out) if isinstance(out, tuple) else Features(out, None)


def digest(module: nn.Module) -> str:
    """A hash of a module's weights and buffers, 16 hexadecimal digits."""
    found = hashlib.sha256(type(module).__name__.encode())
    for name, value in module.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


# Inception ----------------------------------------------------------------------------------------------------------------


def inception(weights_path: str | None = None, download: bool = True) -> Inception:
    """Inception with the published weights.

    Args:
        weights_path: the file; None is torch-fidelity's place for it, a download away.
        download: whether to.

    Raises:
        ValueError: the file is missing and cannot be downloaded, or is another one; the line names file, folder, address.
    """
    path = weights(weights_path, download)
    network = inception_network()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return Inception(network, WEIGHTS.checksum)


def weights(weights_path: str | None = None, download: bool = True) -> Path:
    """The checked file of Inception's weights. Arguments and errors as in `inception`."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / WEIGHTS.name if weights_path is None else Path(weights_path).expanduser()
    if not path.is_file():
        if weights_path is not None:
            raise ConfigError(
                f"there are no Inception weights at {path.absolute()}: download {WEIGHTS.urls[0]} to it, {INSTEAD}"
            )
        by_hand = f"put {WEIGHTS.name} into {folder} from {WEIGHTS.urls[0]}, or write weights_path=FILE, {INSTEAD}"
        if not download:
            raise ConfigError(f"Inception's weights are missing: {by_hand}")
        try:
            fetch(folder, [WEIGHTS], download=True)
        except ConfigError as error:
            reason = str(error).rpartition(": put ")[0]
            raise ConfigError(f"{reason}: {by_hand}") from None
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WEIGHTS.checksum:
        raise ConfigError(
            f"{path.absolute()} is not the published Inception of 2015-12-05 (SHA-256 {found[:8]}…, not "
            f"{WEIGHTS.checksum[:8]}…; a broken download?): replace it by {WEIGHTS.urls[0]}"
        )
    return path


def inception_network() -> nn.Module:
    """torch-fidelity's InceptionV3 with random weights: uint8 (B, 3, H, W) → (features (B, 2048), unbiased logits (B, 1008))."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Network(FeatureExtractorInceptionV3):
        """Its constructor would unpickle a file; this one is built without, and loads tensors only."""

        def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
            return super().load_state_dict(state, *args, **kwargs) if state else None

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    network: nn.Module = Network(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=nothing
    )
    return network


def resolve(spec: str | nn.Module, shape: tuple[int, int, int], weights_path: str | None = None) -> Extractor:
    """The extractor that an option means, but for "classifier", which needs the data.

    Args:
        spec: "inception", or a module of one's own.
        shape: (C, H, W) of the images.
        weights_path: of Inception.

    Raises:
        ValueError: an unknown name, a module that gives no features, weights that are missing or wrong.
    """
    if isinstance(spec, nn.Module):
        return Module(spec, shape)
    if spec == "inception":
        if shape[0] not in (1, 3):
            raise ConfigError(f"Inception takes 1 or 3 channels, not {shape[0]}: write extractor=classifier")
        return inception(weights_path)
    raise ConfigError(
        f"extractor={spec} is unknown: write inception, classifier, or a class {{_target_: package.Module}}"
    )

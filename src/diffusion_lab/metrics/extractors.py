"""Feature extractors: Inception of 2015-12-05, and modules of the user. `classifier` has that of a data set's classifier."""

import hashlib
import io
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from diffusion_lab.data.download import Remote, fetch
from diffusion_lab.data.images import to_float
from diffusion_lab.errors import ConfigError
from diffusion_lab.io import require_file

WEIGHTS = Remote(
    "weights-inception-2015-12-05-6726825d.pth",
    (
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    ),
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
MOST_BYTES = 128 << 20  # the published file has 96 million
ALTERNATIVE = "or measure without Inception: metrics=[fd_classifier,prdc] extractor=classifier"


class Features(NamedTuple):
    """Output of an extractor."""

    features: Float[Tensor, "b d"]
    logits: Float[Tensor, "b k"] | None  # None without a classification layer


class Extractor(ABC):
    """Base class of feature extractors. An extractor returns float32 features, and logits if the network has them.

    Args:
        network: the network. It is set to eval mode, and its gradients are disabled.

    Attributes:
        name: "inception", "classifier" or the name of a module.
        key: hash of the weights, 16 hexadecimal digits. It is part of the key of reference statistics.
        dim: the number of features D.
        classes: the number of logits K; 0 without logits.
        has_class_logits: whether the logits are those of the classes of the data set.
    """

    name: str
    key: str
    dim: int
    classes: int
    has_class_logits = False
    batch_size = 1024  # maximum number of images per forward pass

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)
        self.device = torch.device("cpu")

    @property
    def distance(self) -> str:
        """Name of the Fréchet distance of this extractor: "fid" for Inception, else "fd_NAME"."""
        return "fid" if self.name == "inception" else f"fd_{self.name}"

    def to(self, device: torch.device | str) -> "Extractor":
        """Move the network to a device, and return the extractor."""
        self.device = torch.device(device)
        self.network.to(self.device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Return the features of images, uint8 (B, C, H, W), on the extractor's device.

        Raises:
            ConfigError: if the dtype is not uint8, or the images do not have four dimensions.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ConfigError(
                f"features need uint8 images (B, C, H, W), not {images.dtype} {tuple(images.shape)}: convert them first"
            )
        # Contiguous, since the kernel and thus the rounding depend on the memory format, and gray images of an .npz are
        # channels-last.
        contiguous = torch.empty(images.shape, dtype=torch.uint8, device=self.device).copy_(images)
        parts = [self.extract(part) for part in contiguous.split(self.batch_size)]
        logits = [part.logits for part in parts if part.logits is not None]
        features = torch.cat([part.features for part in parts])
        return Features(features.float(), torch.cat(logits).float() if logits else None)

    @abstractmethod
    def extract(self, images: UInt8[Tensor, "b c h w"]) -> Features:
        """Return the features of at most `batch_size` images."""


class Inception(Extractor):
    """InceptionV3 of the original FID, ported by torch-fidelity: 2048 pooled features, and 1008 logits without bias.

    The network resizes images to 299×299 as TensorFlow 1 does. Gray images are repeated to three channels.

    Args:
        network: the result of `inception_network`, with weights.
        key: checksum of the weights.
    """

    name, dim, classes, batch_size = "inception", 2048, 1008, 64

    def __init__(self, network: nn.Module, key: str) -> None:
        super().__init__(network)
        self.key = key[:16]

    def extract(self, images: UInt8[Tensor, "b c h w"]) -> Features:
        features, logits = self.network(images.expand(-1, 3, -1, -1).contiguous())
        return Features(features, logits)


class ModuleExtractor(Extractor):
    """Features of any module that maps images, float32 (B, C, H, W) in [−1, 1], to features (B, D) or (features, logits).

    Args:
        module: the module.
        shape: (C, H, W) of the images.

    Raises:
        ConfigError: another output.
    """

    def __init__(self, module: nn.Module, shape: tuple[int, int, int]) -> None:
        super().__init__(module)
        name = type(module).__name__.lower()
        self.name = f"own_{name}" if name in ("inception", "classifier") else name
        self.key = digest(module)
        probe = self.extract(torch.zeros(2, *shape, dtype=torch.uint8))
        if probe.features.ndim != 2 or len(probe.features) != 2:
            raise ConfigError(
                f"extractor {type(module).__name__} returns {tuple(probe.features.shape)} for 2 images: "
                "return features (B, D), or (features, logits)"
            )
        self.dim = probe.features.shape[1]
        self.classes = 0 if probe.logits is None else probe.logits.shape[1]

    @torch.no_grad()
    def extract(self, images: UInt8[Tensor, "b c h w"]) -> Features:
        out: Any = self.network(to_float(images))
        return Features(*out) if isinstance(out, tuple) else Features(out, None)


def digest(module: nn.Module) -> str:
    """Return a hash of the weights and buffers of a module, 16 hexadecimal digits."""
    sha = hashlib.sha256(type(module).__name__.encode())
    for name, value in module.state_dict().items():
        sha.update(name.encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


# Inception ----------------------------------------------------------------------------------------------------------------


def inception(weights_path: str | None = None, download: bool = True) -> Inception:
    """Return Inception with the published weights.

    Args:
        weights_path: file of the weights; None for the path of torch-fidelity.
        download: whether to download a missing file to the path of torch-fidelity.

    Raises:
        ConfigError: if the file is missing and cannot be downloaded, or has another checksum. The message contains file, folder
            and URL.
    """
    path = weights(weights_path, download)
    network = inception_network()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return Inception(network, WEIGHTS.checksum)


def weights(weights_path: str | None = None, download: bool = True) -> Path:
    """Return the path of Inception's weights after verifying the checksum. Arguments and errors are those of `inception`."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / WEIGHTS.name if weights_path is None else Path(weights_path).expanduser()
    if not path.is_file():
        if weights_path is not None:
            raise ConfigError(
                f"there are no Inception weights at {path.absolute()}: download {WEIGHTS.urls[0]} to this path, {ALTERNATIVE}"
            )
        by_hand = f"put {WEIGHTS.name} into {folder} from {WEIGHTS.urls[0]}, or write weights_path=FILE, {ALTERNATIVE}"
        if not download:
            raise ConfigError(f"Inception's weights are missing: {by_hand}")
        try:
            fetch(folder, [WEIGHTS], download=True)
        except ConfigError as error:
            reason = str(error).rpartition(": put ")[0]
            raise ConfigError(f"{reason}: {by_hand}") from None
    require_file(path, "weights_path" if weights_path else "")
    with path.open("rb") as file:  # of another file, which may be of any size, the first bytes are enough
        checksum = hashlib.sha256(file.read(MOST_BYTES)).hexdigest()
    if checksum != WEIGHTS.checksum:
        raise ConfigError(
            f"{path.absolute()} is not the published Inception of 2015-12-05 (SHA-256 {checksum[:8]}…, not "
            f"{WEIGHTS.checksum[:8]}…; perhaps a broken download): replace it by {WEIGHTS.urls[0]}"
        )
    return path


def inception_network() -> nn.Module:
    """Return the InceptionV3 of torch-fidelity with random weights.

    It maps uint8 (B, 3, H, W) to (features (B, 2048), logits (B, 1008)).
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Network(FeatureExtractorInceptionV3):
        """Ignore the empty state dict that the constructor unpickles. The weights are loaded afterwards, as tensors."""

        def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
            return super().load_state_dict(state, *args, **kwargs) if state else None

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    network: nn.Module = Network(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=empty
    )
    return network


def resolve(spec: str | nn.Module, shape: tuple[int, int, int], weights_path: str | None = None) -> Extractor:
    """Return the extractor of an option. "classifier" needs the data and is not supported here (see `classifier`).

    Args:
        spec: "inception", or a module.
        shape: (C, H, W) of the images.
        weights_path: file of Inception's weights; None for the path of torch-fidelity.

    Raises:
        ConfigError: if the name is unknown, the output of the module is not supported, or weights are missing or wrong.
    """
    if isinstance(spec, nn.Module):
        return ModuleExtractor(spec, shape)
    if spec == "inception":
        if shape[0] not in (1, 3):
            raise ConfigError(
                f"Inception accepts images with 1 or 3 channels, not {shape[0]}: write extractor=classifier"
            )
        return inception(weights_path)
    raise ConfigError(
        f"extractor={spec} is unknown: write inception, classifier, or a class {{_target_: package.Module}}"
    )

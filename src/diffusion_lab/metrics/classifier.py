"""The project's own classifier: trained on demand, kept in a file that is keyed by what made it."""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from diffusion_lab.data.images import to_float
from diffusion_lab.models.classifier import Classifier
from diffusion_lab.noise import Stream, permutation

VERSION = 1  # of the recipe below: a change makes older files another key
EPOCHS, STEPS, BATCH, RATE = 60, 4_000, 128, 3e-3  # as many epochs as fit into STEPS, at most EPOCHS


class Trained(NamedTuple):
    """A classifier and the share of held-out images that it gets right."""

    network: Classifier
    accuracy: float
    path: Path


def trained(images: np.ndarray, labels: np.ndarray, held: np.ndarray, held_labels: np.ndarray, folder: Path) -> Trained:
    """The classifier of a data set: from its file if there is one, else trained and written.

    Args:
        images: uint8 (N, C, H, W), the training split.
        labels: int64 (N,).
        held: uint8 (M, C, H, W), what the accuracy is measured on.
        held_labels: int64 (M,).
        folder: where the file is.

    Raises:
        ValueError: no labels.
    """
    if labels is None or not len(labels):
        raise ValueError("the classifier needs a labelled data set; this one has no labels")
    network = Classifier(channels=images.shape[1], num_classes=int(labels.max()) + 1)
    path = folder / f"classifier-{_key(images, labels)}.pt"
    if path.is_file():
        network.load_state_dict(torch.load(path, weights_only=True))
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = Classifier(channels=images.shape[1], num_classes=int(labels.max()) + 1)
            _fit(network, images, labels)
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        torch.save(network.state_dict(), partial)
        os.replace(partial, path)
    network.eval().requires_grad_(False)
    right = logits(network, torch.from_numpy(held)).argmax(1) == torch.from_numpy(held_labels)
    return Trained(network, float(right.double().mean()), path)


def _key(images: np.ndarray, labels: np.ndarray) -> str:
    recipe = json.dumps([VERSION, EPOCHS, STEPS, BATCH, RATE, images.shape])
    digest = hashlib.sha256(recipe.encode())
    digest.update(images.tobytes())
    digest.update(labels.tobytes())
    return digest.hexdigest()[:16]


def _fit(network: Classifier, images: np.ndarray, labels: np.ndarray) -> None:
    """AdamW with a one-cycle rate and random shifts by a pixel; about half a minute for the digits on two cores."""
    per_epoch = max(len(images) // BATCH, 1)
    epochs = max(1, min(EPOCHS, STEPS // per_epoch))
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.05, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * per_epoch)
    for epoch in tqdm(range(epochs), desc="training the classifier", unit="epoch", leave=False):
        order = permutation(len(images), seed=0, draw=epoch, stream=Stream.SHUFFLE)
        for i in range(per_epoch):
            chosen = order[i * BATCH : (i + 1) * BATCH]
            x = to_float(torch.from_numpy(np.ascontiguousarray(images[chosen.numpy()])))
            dy, dx = (int(v) for v in torch.randint(-1, 2, (2,)))
            x = torch.roll(F.pad(x, (1, 1, 1, 1), value=-1.0), (dy, dx), (2, 3))[:, :, 1:-1, 1:-1]
            loss = F.cross_entropy(network(x), torch.from_numpy(labels[chosen.numpy()]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()


@torch.no_grad()
def features(network: Classifier, images: Tensor) -> Tensor:
    """Penultimate features of uint8 images (N, C, H, W), float32 (N, D)."""
    return torch.cat([network.features(to_float(part)) for part in images.split(1024)])


@torch.no_grad()
def logits(network: Classifier, images: Tensor) -> Tensor:
    """Logits of uint8 images (N, C, H, W), float32 (N, K)."""
    return torch.cat([network(to_float(part)) for part in images.split(1024)])

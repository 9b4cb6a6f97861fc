"""Classifier of a data set: accuracy, cached file, clean and noisy images."""

import os
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion_lab.checkpoint.classifiers import load_classifier
from diffusion_lab.data.images import Examples, to_float
from diffusion_lab.metrics.classifier import (
    NOISY,
    ClassifierExtractor,
    Noise,
    Recipe,
    file_of,
    fingerprint,
    for_dataset,
    load_or_train,
)
from diffusion_lab.models.classifier import Classifier
from diffusion_lab.schedules import VE, Cosine
from diffusion_lab.training.classifier import train_classifier

TINY = replace(Recipe(), epochs=1, width=8)


@pytest.mark.integration
def test_the_digits_are_recognized(digits, tmp_path):
    """The recipe as evaluate.py uses it: at least 98 % of 180 held-out digits; a second call loads the file."""
    first = for_dataset(digits, tmp_path, train_classifier)
    assert first.accuracy is not None
    assert first.accuracy >= 0.98
    stamp = first.path.stat().st_mtime_ns
    held_out = digits.examples("test")
    second = for_dataset(digits, tmp_path, train_classifier)
    out = ClassifierExtractor(second)(torch.from_numpy(np.asarray(held_out.images)))
    assert first.path.stat().st_mtime_ns == stamp
    accuracy = (out.logits.argmax(1).numpy() == held_out.labels).mean()
    assert accuracy == pytest.approx(first.accuracy)  # the stored accuracy is that of the loaded network
    assert out.features.shape == (180, 64)


def test_its_file_holds_tensors_and_plain_values_and_its_description(quick):
    saved = torch.load(quick.path, weights_only=True)
    config = saved["config"]
    assert config["data"] == {"name": "digits", "shape": [1, 8, 8], "classes": 10, "class_names": []}
    assert config["schedule"] is None
    network = Classifier(**config["model"])
    network.load_state_dict(saved["state"])
    assert 0 < saved["accuracy"] < 1


def test_another_set_recipe_or_noise_is_another_file(digits, tmp_path):
    train = digits.examples("train")
    node = {"_target_": "diffusion_lab.schedules.Cosine", "steps": 1000}
    noise = Noise(Cosine(), node)
    files = {
        file_of(train, tmp_path, "digits", Recipe()),
        file_of(train, tmp_path, "digits", TINY),
        file_of(digits.examples("test"), tmp_path, "digits", Recipe()),
        file_of(Examples(train.images, train.labels[::-1].copy()), tmp_path, "digits", Recipe()),
        file_of(train, tmp_path, "digits", NOISY, noise),
        file_of(train, tmp_path, "digits", NOISY, Noise(VE(), {"_target_": "diffusion_lab.schedules.VE"})),
    }
    assert len(files) == 6
    assert file_of(train, tmp_path, "digits", Recipe()) in files


def test_a_fingerprint_depends_on_every_image_order_and_shape():
    images = np.random.default_rng(0).integers(0, 256, (50, 1, 4, 4), dtype=np.uint8)
    other = images.copy()
    other[31, 0, 2, 2] ^= 1
    assert len({fingerprint(x) for x in (images, other, images[::-1], images[:49], images.reshape(50, 1, 2, 8))}) == 5
    assert fingerprint(images) == fingerprint(images.copy())


def test_processes_that_come_at_once_train_one(digits, tmp_path):
    trainings, paths = [], []

    def counted(*arguments):
        trainings.append(1)
        return train_classifier(*arguments)

    train, held_out = digits.examples("train"), digits.examples("test")
    call = lambda: paths.append(load_or_train(train, held_out, tmp_path, counted, recipe=TINY).path)  # noqa: E731
    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trainings) == 1
    assert paths == [paths[0]] * 3
    assert [p.name for p in tmp_path.iterdir()] == [paths[0].name]


@pytest.mark.parametrize(("schedule", "time"), [(Cosine(), "sinusoidal"), (VE(), "fourier")])
def test_it_classifies_noisy_images_with_a_time_input(digits, tmp_path, schedule, time):
    """A short training: nearly clean images are recognized, noise is not, and the file rebuilds what guidance needs."""
    recipe = replace(NOISY, epochs=12, width=16)
    node = {"_target_": f"diffusion_lab.schedules.{type(schedule).__name__}"}
    train, test = digits.examples("train"), digits.examples("test")
    noisy = load_or_train(train, test, tmp_path, train_classifier, recipe=recipe, noise=Noise(schedule, node))
    assert noisy.config["schedule"] == node
    assert noisy.config["model"]["time"] == time
    by_noise = list(noisy.by_noise.values())
    assert by_noise[0] > 0.85
    assert by_noise[-1] < 0.3
    x = to_float(torch.from_numpy(np.asarray(digits.images("test"))[:7])).requires_grad_(True)
    t = torch.full((7,), 0.2, dtype=torch.float64)
    alpha, sigma = (v[:, None, None, None].float() for v in schedule.alpha_sigma(t))
    logits = noisy.network(alpha * x + sigma * torch.randn_like(x), schedule.conditioning(t).float())
    (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), x)
    assert logits.shape == (7, 10)
    assert bool((gradient.flatten(1).norm(dim=1) > 0).all())
    with pytest.raises(ValueError, match="noisy=false"):
        ClassifierExtractor(noisy)
    with pytest.raises(ValueError, match=r"pass c = schedule\.conditioning"):
        noisy.network(x)


def test_large_noise_is_scaled_away_where_alpha_is_one():
    network = Classifier(channels=1, num_classes=3, time="fourier").eval()
    x, c = torch.randn(4, 1, 8, 8), torch.full((4,), float(torch.tensor(50.0).log() / 4))
    seen = []
    network.convolutions[0].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    network(50 * x, c)
    assert torch.allclose(seen[0], 50 / (1 + 50**2) ** 0.5 * x, rtol=1e-5)


def test_missing_labels_wrong_files_and_wrong_images_are_refused(digits, quick, tmp_path):
    train, test = digits.examples("train"), digits.examples("test")
    with pytest.raises(ValueError, match="labeled data set"):
        load_or_train(Examples(np.zeros((4, 1, 8, 8), np.uint8)), test, tmp_path, train_classifier)
    with pytest.raises(ValueError, match="no classifier at"):
        load_classifier(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no")
    torch.save({"config": {}}, tmp_path / "other.pt")
    (tmp_path / "short.pt").write_bytes(quick.path.read_bytes()[:-500])
    for name in ("text.pt", "other.pt", "short.pt"):
        with pytest.raises(ValueError, match="delete it and run again"):
            load_classifier(tmp_path / name)
    with pytest.raises(ValueError, match="trained on clean images"):
        quick.network(torch.zeros(1, 1, 8, 8), torch.zeros(1))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cache=FOLDER"):
        load_or_train(train, test, tmp_path / "file" / "cache", train_classifier, recipe=TINY)


def test_a_set_without_held_out_images_has_no_known_accuracy(digits, tmp_path):
    none = digits.examples("test").select(np.arange(0))
    trained = load_or_train(digits.examples("train"), none, tmp_path, train_classifier, recipe=TINY)
    assert (trained.accuracy, trained.by_noise) == (None, {})
    assert os.listdir(tmp_path) == [trained.path.name]


def test_a_loss_that_is_nan_stops_the_training(digits, tmp_path):
    recipe = replace(TINY, steps=3, rate=float("inf"))
    train, test = digits.examples("train"), digits.examples("test")
    with pytest.raises(ValueError, match="the training loss of the classifier is nan at step"):
        load_or_train(train, test, tmp_path, train_classifier, recipe=recipe)
    assert os.listdir(tmp_path) == []

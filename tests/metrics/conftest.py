"""A briefly trained classifier, for tests that do not need its accuracy."""

from dataclasses import replace

import pytest
import quick_classifier

from diffusion_lab.checkpoint.classifiers import load_classifier
from diffusion_lab.metrics.classifier import ClassifierExtractor, Recipe, load_or_train
from diffusion_lab.training.classifier import train_classifier


@pytest.fixture(scope="session")
def digits():
    return quick_classifier.digits()


@pytest.fixture(scope="session")
def quick(digits, tmp_path_factory):
    """Two epochs on the digits."""
    folder = tmp_path_factory.mktemp("classifier")
    train, test = digits.examples("train"), digits.examples("test")
    recipe = replace(Recipe(), epochs=2, width=8)
    return load_or_train(train, test, folder, train_classifier, name="digits", recipe=recipe)


@pytest.fixture
def extractor(quick):
    return ClassifierExtractor(load_classifier(quick.path))

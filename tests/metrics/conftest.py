"""A classifier that was hardly trained, where a test needs one and not its accuracy."""

from dataclasses import replace

import pytest
import quick_classifier

from diffusion_lab.checkpoint.classifiers import load_classifier
from diffusion_lab.metrics.classifier import ClassifierExtractor, Recipe, load_or_train


@pytest.fixture(scope="session")
def digits():
    return quick_classifier.digits()


@pytest.fixture(scope="session")
def quick(digits, tmp_path_factory):
    """Two epochs of the digits."""
    folder = tmp_path_factory.mktemp("classifier")
    recipe = replace(Recipe(), epochs=2, width=8)
    return load_or_train(digits.examples("train"), digits.examples("test"), folder, name="digits", recipe=recipe)


@pytest.fixture
def judge(quick):
    return ClassifierExtractor(load_classifier(quick.path))

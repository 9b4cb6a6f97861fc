"""Shapes and types of the mathematics are checked in every test: the hook must be there before the package is imported."""

import pytest
from jaxtyping import install_import_hook

MATHEMATICS = (
    "noise",
    "schedules",
    "objectives",
    "weightings",
    "gaussian",
    "variances",
    "clipping",
    "denoiser",
    "models",
    "times",
    "losses",
    "samplers",
    "likelihood",
    "guidance",
    "editing",
)

install_import_hook([f"diffusion_lab.{room}" for room in MATHEMATICS], "typecheck.checked")

import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first, or one worker would be left with it at the end."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")

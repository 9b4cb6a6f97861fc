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
    "denoiser",
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

"""Install the runtime type checks before the package is imported, and seed torch before each test."""

import pytest
from jaxtyping import install_import_hook
from typecheck import CHECKED

install_import_hook([f"diffusion_lab.{module}" for module in CHECKED], "typecheck.checked")

import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest file first, so that no worker is left with it at the end."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")

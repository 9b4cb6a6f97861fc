"""Install the runtime type checks before the package is imported, and seed torch before each test."""

import pytest
import typecheck

typecheck.install()

import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _each_test() -> None:
    torch.manual_seed(0)
    typecheck.begin_test()


# Of minutes each: first, so that no worker is left with one of them at the end.
LONGEST = ("test_readme.py", "test_notebooks.py", "test_every_option.py", "test_recipes.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))

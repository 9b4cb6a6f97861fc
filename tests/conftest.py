"""Install the runtime type checks before the package is imported, and seed torch before each test."""

import pytest
import typecheck

typecheck.install()

import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _each_test() -> None:
    torch.manual_seed(0)
    typecheck.begin_test()


# First, so that no worker is left with one of them at the end: of the integration tests, then of the unit tests.
LONGEST = (
    *("test_readme.py", "test_notebooks.py", "test_every_option.py", "test_recipes.py"),
    *(
        "test_contract.py",
        "test_options.py",
        "test_optimizers.py",
        "test_run.py",
        "test_hostile_files.py",
        "test_solvers.py",
    ),
    *("test_likelihood_ode.py", "test_build.py", "test_refusals.py", "test_plugging_in.py", "test_guidance.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))

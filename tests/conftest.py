"""Shared by all tests: no GPU unless there is one, and quiet imports."""

import pytest
import torch
import torch._dynamo


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips ``gpu`` tests with the reason where there is no device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _fresh_dynamo() -> None:
    """Dynamo keeps its entries by the code of a model's class, and gives up on code that has many: so do many tests."""
    torch._dynamo.reset()

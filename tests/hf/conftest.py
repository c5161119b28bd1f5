import pytest


@pytest.fixture(autouse=True, scope="module")
def small_models(one_thread: None) -> None:
    """All tests here, without a mark in each file."""

"""The walk goes first where tests are spread over processes."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A process that runs out of tests takes some from the end of another's list: the walk's last stops, were they
    there, would walk the whole way a second time."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path.parent != HERE)

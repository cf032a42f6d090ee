"""Skips these tests, with the reason, where there is no CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.gpu import HERE, NO_CUDA


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not HERE:
                item.add_marker(pytest.mark.skip(reason=NO_CUDA))

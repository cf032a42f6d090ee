"""Skips these tests, with the reason, where there is no CUDA."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from tests.gpu import HERE, NO_CUDA

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts


@pytest.fixture
def deterministic() -> Iterator[None]:
    """As `cudnn_deterministic_mode=error`; only so is attention's backward pass deterministic."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not HERE:
                item.add_marker(pytest.mark.skip(reason=NO_CUDA))

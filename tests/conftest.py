"""What all tests share: one thread per process, no network, the folder of real data."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["MYTUNE_CACHE_DIR"] = tempfile.mkdtemp(prefix="mytune-cache-")
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")  # transformers imports torchao


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest, whole pages of the docs: else one process ends with them alone."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/docs/"))


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["MYTUNE_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data: Llama 3's tokenizer, stories260K, ...; skips without it."""
    folder = os.environ.get("MYTUNE_TEST_DATA")
    if not folder:
        pytest.skip("MYTUNE_TEST_DATA is not set: the real data is not here")
    return Path(folder)

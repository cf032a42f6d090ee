"""A tiny checkpoint and some tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpointing import tiny


@pytest.fixture
def tokens() -> Tensor:
    """Some ids [2, 12]."""
    return torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    """A tiny checkpoint in Hugging Face's layout, in one file."""
    tiny.write_hf(tmp_path / "hf", tiny.SIZES)
    return tmp_path / "hf"

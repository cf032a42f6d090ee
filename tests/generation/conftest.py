"""A random Llama beside its Hugging Face twin, and the stories model from both of its formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mytune.models import auto_model
from mytune.models.llama3 import llama3_tokenizer
from mytune.modules import Decoder
from mytune.tokenizers import Llama3Tokenizer
from mytune.training import (
    FullModelHFCheckpointer,
    FullModelMetaCheckpointer,
    load_weights,
)

# Weights so large that a random model's greedy text does not repeat itself.
VARIED = {"initializer_range": 0.2}


@pytest.fixture(params=["hf", "meta"])
def stories(data_dir: Path, request: pytest.FixtureRequest) -> tuple[Decoder, Llama3Tokenizer]:
    """The stories model and its tokenizer."""
    folder = data_dir / "stories260K" / request.param
    formats = {"hf": FullModelHFCheckpointer, "meta": FullModelMetaCheckpointer}
    with torch.device("meta"):
        model = auto_model(str(folder)).eval()
    weights = formats[request.param](str(folder)).weights(model.config)
    load_weights(model, weights, torch.device("cpu"), torch.float32)
    return model, llama3_tokenizer(folder / "tokenizer.model")


@pytest.fixture
def expected(data_dir: Path) -> dict[str, Any]:
    """What the stories model says, by another implementation."""
    return json.loads((data_dir / "stories260K" / "EXPECTED.json").read_text())

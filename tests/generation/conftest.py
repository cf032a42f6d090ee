"""A random Llama beside its Hugging Face twin, and the stories model from both of its formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from mytune.models import auto_model
from mytune.models.auto import sizes_from_hf
from mytune.models.llama3 import llama3_tokenizer
from mytune.modules import Decoder
from mytune.tokenizers import Llama3Tokenizer
from mytune.training import (
    FullModelHFCheckpointer,
    FullModelMetaCheckpointer,
    load_weights,
)
from tests.hf import our_names, tiny_llama

# Weights so large that a random model's greedy text does not repeat itself.
VARIED = {"initializer_range": 0.2}


def twins(**shape: Any) -> tuple[Decoder, LlamaForCausalLM]:
    """Return our model and Hugging Face's with the same random weights."""
    theirs = tiny_llama(**shape)
    ours = Decoder(sizes_from_hf(theirs.config.to_dict())).eval()
    weights = our_names(theirs.state_dict())
    if ours.lm_head is None:
        del weights["lm_head.weight"]
    ours.load_state_dict(weights)
    return ours, theirs


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

"""A random Llama beside its Hugging Face twin, and the stories model from both of its formats."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest

from mytune.models.llama3 import llama3_tokenizer
from mytune.modules import Decoder
from mytune.tokenizers import Llama3Tokenizer
from mytune.training import (
    FullModelHFCheckpointer,
    FullModelMetaCheckpointer,
)
from tests.hf import load, tiny_llama, with_adapter

# Weights so large that a random model's greedy text does not repeat itself.
VARIED = {"initializer_range": 0.2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in Hugging Face's format, and a tokenizer of bytes and special tokens."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(vocab_size=512, **VARIED).save_pretrained(folder)
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)]
    (folder / "tokenizer.model").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter made by PEFT, large enough to change the text."""
    folder = tmp_path_factory.mktemp("adapter")
    model = tiny_llama(vocab_size=512, **VARIED)
    with_adapter(model, std=0.2, lora_alpha=8).save_pretrained(folder)
    return folder


@pytest.fixture(params=["hf", "meta"])
def stories(data_dir: Path, request: pytest.FixtureRequest) -> tuple[Decoder, Llama3Tokenizer]:
    """The stories model and its tokenizer."""
    folder = data_dir / "stories260K" / request.param
    formats = {"hf": FullModelHFCheckpointer, "meta": FullModelMetaCheckpointer}
    model = load(folder, reader=formats[request.param])
    return model, llama3_tokenizer(folder / "tokenizer.model")


@pytest.fixture
def expected(data_dir: Path) -> dict[str, Any]:
    """What the stories model says, by another implementation."""
    return json.loads((data_dir / "stories260K" / "EXPECTED.json").read_text())


def sequences(seed=0):
    """Return sequences of which many begin alike, some are equal, some are parts of others."""
    draw = random.Random(seed)
    found = [[draw.randrange(3, 160) for _ in range(draw.randrange(1, 30))] for _ in range(5)]
    for _ in range(40):
        stem = draw.choice(found)
        end = [draw.randrange(3, 160) for _ in range(draw.randrange(0, 9))]
        found.append(stem[: draw.randrange(1, len(stem) + 1)] + end)
    return found

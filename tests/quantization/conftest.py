"""A random model in Hugging Face's format, and what loads it."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
import torch

from mytune.modules import Decoder
from mytune.quantization import (
    Float8WeightOnlyQuantizer,
    Int4WeightOnlyQuantizer,
    Int8DynActInt4WeightQuantizer,
    Int8DynActInt8WeightQuantizer,
    Int8WeightOnlyQuantizer,
)
from mytune.training import FullModelHFCheckpointer
from tests import hf

CPU = torch.device("cpu")
# Those that run on a CPU, the class of their weights, and how far logits may move.
ON_CPU = {
    "int8": (Int8WeightOnlyQuantizer(), "Int8Tensor", 0.03),
    "int8 dynamic": (Int8DynActInt8WeightQuantizer(), "Int8Tensor", 0.04),
    "float8": (Float8WeightOnlyQuantizer(), "Float8Tensor", 0.1),
    "int4": (Int4WeightOnlyQuantizer(32), "Int4OpaqueTensor", 0.25),
    "int4 dynamic": (Int8DynActInt4WeightQuantizer(32), "IntxUnpackedToInt8Tensor", 0.35),
}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied model in bfloat16, and a tokenizer of bytes and special tokens."""
    folder = tmp_path_factory.mktemp("base")
    model = hf.tiny_llama(vocab_size=512)
    model.bfloat16().save_pretrained(folder)
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)]
    (folder / "tokenizer.model").write_text("".join(lines))
    return folder


def load(folder: Path, dtype: torch.dtype = torch.bfloat16, **how) -> Decoder:
    """Load a checkpoint for inference."""
    return hf.load(folder, dtype, **how)


def save(base: Path, target: Path, quantizer, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    """Quantize a checkpoint, publish it, and return the model."""
    model = load(base, dtype, quantizer=quantizer)
    FullModelHFCheckpointer(str(base)).save_quantized(target, model, quantizer)
    return model


def some_tokens(vocab_size: int, shape: tuple[int, int] = (2, 24)) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))

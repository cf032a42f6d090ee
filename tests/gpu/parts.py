"""What stands in for files: random weights made on the device, random rows, a stop after n steps.

Components of the configs that the suite gives to the fine-tuning recipe.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mytune.datasets.tokens import Stats
from mytune.models.llama3 import LLAMA3_8B
from mytune.modules.decoder import Decoder, DecoderConfig
from mytune.training.metric_logging import MetricLogger
from tests.gpu import DEVICE, TINY

# Llama 3 8B; its like for a CPU keeps every ratio that decides which code runs.
SIZES = replace(
    LLAMA3_8B,
    **(
        dict(
            vocab_size=512,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            embed_dim=128,
            intermediate_dim=256,
            head_dim=32,
        )
        if TINY
        else {}
    ),
)


def sizes(num_layers: int | None = None) -> DecoderConfig:
    """Return the suite's model, perhaps with fewer blocks."""
    return replace(SIZES, num_layers=num_layers or SIZES.num_layers)


def arguments(config: DecoderConfig) -> dict[str, Any]:
    """Return what the generic Llama 3 builders need for these sizes."""
    names = "vocab_size num_layers num_heads num_kv_heads embed_dim intermediate_dim max_seq_len"
    return {name: getattr(config, name) for name in names.split()}


def llama(config: DecoderConfig, dtype: torch.dtype) -> Any:
    """Return transformers' model of these sizes on the device, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(dtype)
    try:
        with DEVICE:
            return LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=config.vocab_size,
                    hidden_size=config.embed_dim,
                    intermediate_size=config.intermediate_dim,
                    num_hidden_layers=config.num_layers,
                    num_attention_heads=config.num_heads,
                    num_key_value_heads=config.num_kv_heads,
                    max_position_embeddings=config.max_seq_len,
                    rms_norm_eps=config.norm_eps,
                    rope_theta=config.rope_base,
                    use_cache=False,
                )
            )
    finally:
        torch.set_default_dtype(torch.float32)


class RandomWeights(Mapping[str, Tensor]):
    """A model's weights by name, each made when it is asked for, the same every time.

    Args:
        std: 0.02 is what training starts from; more makes a fault show.
    """

    def __init__(
        self, config: DecoderConfig, device: torch.device | str, std: float = 0.02
    ) -> None:
        with torch.device("meta"):
            self._shapes = {name: p.shape for name, p in Decoder(config).named_parameters()}
        self._device, self._std = torch.device(device), std

    def __getitem__(self, name: str) -> Tensor:
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        weight = torch.empty(self._shapes[name], device=self._device, dtype=torch.bfloat16)
        weight.normal_(std=self._std, generator=generator)
        return weight.add_(1) if "norm" in name else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


class RandomCheckpointer:
    """A checkpointer that reads random weights and saves nothing."""

    resume = False

    def __init__(self, device: str, output_dir: str) -> None:
        self.device, self.output_dir = device, Path(output_dir)
        self.source_dir = self.output_dir / "none"

    def weights(self, config: DecoderConfig) -> RandomWeights:
        return RandomWeights(config, self.device)

    def adapter_weights(self) -> None:
        return None

    def plan(self, config: DecoderConfig, dtype: torch.dtype) -> SimpleNamespace:
        return SimpleNamespace(nbytes=0)

    def set_aside_newer(self) -> None:
        pass

    def save(self, name: str, **state: Any) -> None:
        pass

    def finish(self) -> None:
        pass


class Rows:
    """Random rows of one length, every token of them trained; in documents, if told, as packed.

    Args:
        document: tokens of a document; the row is one if not given.
    """

    pad_to = None
    fingerprint = "random"

    def __init__(
        self, tokenizer: Any, length: int, count: int, document: int | None = None
    ) -> None:
        self.lengths = np.full(count, length)
        self.stats = Stats(rows=count, tokens=count * length, trainable_tokens=count * length)
        self._document = document

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        length = int(self.lengths[0])
        tokens = np.random.default_rng(index).integers(3, SIZES.vocab_size, length + 1)
        row = {"tokens": tokens[:-1].astype(np.int32), "labels": tokens[1:].astype(np.int32)}
        if self._document:
            place = np.arange(length, dtype=np.int32)
            row["positions"] = place % self._document
            row["document_ids"] = place // self._document
        return row


class Enough(BaseException):
    """All steps that were wanted are done."""


class StopAfter(MetricLogger):
    """A metric logger that ends the run, before it saves, after so many steps."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def _write(self, values: dict[str, float], step: int) -> None:
        if step == self._steps:
            raise Enough


class WholeLogits:
    """The loss without mytune's: all logits, and torch's cross entropy in float32."""

    ignore_index = -100

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        logits = model(batch["tokens"], batch.get("positions")).flatten(0, 1).float()
        return F.cross_entropy(logits, batch["labels"].flatten(), reduction="sum")

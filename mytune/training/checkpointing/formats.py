"""The checkpoint formats as tables: each row names one tensor on both sides and is read in both directions.

`{}` stands for the layer. Our own names and order are those of `Decoder`: RoPE's half-split order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mytune.modules.decoder import Decoder, DecoderConfig

Heads = Literal["num_heads", "num_kv_heads"]


@dataclass(frozen=True)
class Row:
    """One tensor of a model (one per layer): our name, theirs, and what differs in its content.

    `heads` names the number of heads whose rows stand in Meta's interleaved RoPE order over there:
    rows (0, 1, 2, 3, ...) of a head are our (0, e/2, 1, e/2 + 1, ...).
    """

    ours: str
    theirs: str
    heads: Heads | None = None

    def to_ours(self, tensor: Tensor, config: DecoderConfig) -> Tensor:
        """Turn their tensor into ours; a view where nothing has to move."""
        return self._swap(tensor, config, (-1, 2))

    def to_theirs(self, tensor: Tensor, config: DecoderConfig) -> Tensor:
        """The inverse of `to_ours`."""
        return self._swap(tensor, config, (2, -1))

    def _swap(self, tensor: Tensor, config: DecoderConfig, halves: tuple[int, int]) -> Tensor:
        if self.heads is None:
            return tensor
        heads: int = getattr(config, self.heads)
        return tensor.unflatten(0, (heads, *halves)).transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True)
class Format:
    """How one kind of checkpoint names its tensors and its files.

    Attributes:
        rows: the table.
        buffers: their tensors that are computed, not learned: not read, but written back as they came.
        single: the name of a checkpoint in one file.
        found: glob patterns of weight files, tried in this order where no index tells.
        published: names that mean "what this run saved in epoch N", as torchtune's tutorials use them.
        file_name: what file `i` (from 1) of `n` is called when we write it.
        parts: several files hold parts of every tensor (model parallel), not different tensors.
        needs: the file that must lie beside the weights.
    """

    name: str
    rows: tuple[Row, ...]
    single: str
    found: tuple[str, ...]
    published: str
    file_name: str
    buffers: tuple[str, ...] = ()
    parts: bool = False
    needs: str | None = None
    by_ours: Mapping[str, Row] = field(init=False, repr=False)
    by_theirs: Mapping[str, Row] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_ours", {row.ours: row for row in self.rows})
        object.__setattr__(self, "by_theirs", {row.theirs: row for row in self.rows})

    def theirs(self, name: str) -> str | None:
        """Return their name of our tensor, or None."""
        row, layer = _lookup(self.by_ours, name)
        return row and row.theirs.format(layer)

    def ours(self, name: str) -> str | None:
        """Return our name of their tensor, or None."""
        row, layer = _lookup(self.by_theirs, name)
        return row and row.ours.format(layer)

    def row(self, name: str) -> Row:
        """Return the row of our tensor."""
        row, _ = _lookup(self.by_ours, name)
        if row is None:
            raise KeyError(name)
        return row

    def is_buffer(self, name: str) -> bool:
        """Say whether their tensor is one that is computed, not learned."""
        return _pattern(name)[0] in self.buffers


def _pattern(name: str) -> tuple[str, str]:
    """Split a name into its pattern and its layer: `a.3.b` -> (`a.{}.b`, `3`)."""
    number = re.search(r"(?<=\.)\d+(?=\.)", name)
    if number is None:
        return name, ""
    return f"{name[: number.start()]}{{}}{name[number.end() :]}", number.group()


def _lookup(rows: Mapping[str, Row], name: str) -> tuple[Row | None, str]:
    pattern, layer = _pattern(name)
    return rows.get(pattern), layer


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a decoder's parameters, in the model's order."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Decoder(config).named_parameters()}


HF = Format(
    name="Hugging Face",
    rows=(
        Row("embed_tokens.weight", "model.embed_tokens.weight"),
        Row("layers.{}.attn_norm.weight", "model.layers.{}.input_layernorm.weight"),
        Row("layers.{}.attn.q_proj.weight", "model.layers.{}.self_attn.q_proj.weight"),
        Row("layers.{}.attn.k_proj.weight", "model.layers.{}.self_attn.k_proj.weight"),
        Row("layers.{}.attn.v_proj.weight", "model.layers.{}.self_attn.v_proj.weight"),
        Row("layers.{}.attn.o_proj.weight", "model.layers.{}.self_attn.o_proj.weight"),
        Row("layers.{}.mlp_norm.weight", "model.layers.{}.post_attention_layernorm.weight"),
        Row("layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.gate_proj.weight"),
        Row("layers.{}.mlp.up_proj.weight", "model.layers.{}.mlp.up_proj.weight"),
        Row("layers.{}.mlp.down_proj.weight", "model.layers.{}.mlp.down_proj.weight"),
        Row("norm.weight", "model.norm.weight"),
        Row("lm_head.weight", "lm_head.weight"),
    ),
    buffers=("model.layers.{}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
    single="model.safetensors",
    found=("model-*-of-*.safetensors", "pytorch_model.bin", "pytorch_model-*-of-*.bin"),
    published=r"hf_model_\d+_(?P<epoch>\d+)\.(pt|safetensors)",
    file_name="model-{i:05d}-of-{n:05d}.safetensors",
    needs="config.json",
)

META = Format(
    name="Meta",
    rows=(
        Row("embed_tokens.weight", "tok_embeddings.weight"),
        Row("layers.{}.attn_norm.weight", "layers.{}.attention_norm.weight"),
        Row("layers.{}.attn.q_proj.weight", "layers.{}.attention.wq.weight", "num_heads"),
        Row("layers.{}.attn.k_proj.weight", "layers.{}.attention.wk.weight", "num_kv_heads"),
        Row("layers.{}.attn.v_proj.weight", "layers.{}.attention.wv.weight"),
        Row("layers.{}.attn.o_proj.weight", "layers.{}.attention.wo.weight"),
        Row("layers.{}.mlp_norm.weight", "layers.{}.ffn_norm.weight"),
        Row("layers.{}.mlp.gate_proj.weight", "layers.{}.feed_forward.w1.weight"),
        Row("layers.{}.mlp.up_proj.weight", "layers.{}.feed_forward.w3.weight"),
        Row("layers.{}.mlp.down_proj.weight", "layers.{}.feed_forward.w2.weight"),
        Row("norm.weight", "norm.weight"),
        Row("lm_head.weight", "output.weight"),
    ),
    buffers=("rope.freqs",),
    single="consolidated.00.pth",
    found=("consolidated.[0-9][0-9].pth", "meta_model_*.pt"),
    published=r"meta_model_(?P<epoch>\d+)\.pt",
    file_name="consolidated.{i0:02d}.pth",
    parts=True,
)

TORCHTUNE = Format(
    name="torchtune",
    rows=(
        Row("embed_tokens.weight", "tok_embeddings.weight"),
        Row("layers.{}.attn_norm.weight", "layers.{}.sa_norm.scale"),
        Row("layers.{}.attn.q_proj.weight", "layers.{}.attn.q_proj.weight", "num_heads"),
        Row("layers.{}.attn.k_proj.weight", "layers.{}.attn.k_proj.weight", "num_kv_heads"),
        Row("layers.{}.attn.v_proj.weight", "layers.{}.attn.v_proj.weight"),
        Row("layers.{}.attn.o_proj.weight", "layers.{}.attn.output_proj.weight"),
        Row("layers.{}.mlp_norm.weight", "layers.{}.mlp_norm.scale"),
        Row("layers.{}.mlp.gate_proj.weight", "layers.{}.mlp.w1.weight"),
        Row("layers.{}.mlp.up_proj.weight", "layers.{}.mlp.w3.weight"),
        Row("layers.{}.mlp.down_proj.weight", "layers.{}.mlp.w2.weight"),
        Row("norm.weight", "norm.scale"),
        Row("lm_head.weight", "output.weight"),
    ),
    single="torchtune_model.pt",
    found=("torchtune_model_*.pt", "model-*-of-*.bin"),
    published=r"torchtune_model_(?P<epoch>\d+)\.pt",
    file_name="torchtune_model-{i:05d}-of-{n:05d}.pt",
)

# PEFT wraps the Hugging Face model, so its rows follow from that table: every linear gains these.
PEFT = Format(
    name="PEFT",
    rows=tuple(
        Row(row.ours.replace(".weight", gain), "base_model.model." + row.theirs.replace(".weight", gain))
        for row in HF.rows
        if row.ours.endswith(("_proj.weight", "lm_head.weight"))
        for gain in (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
    ),
    single="adapter_model.safetensors",
    found=(),
    published=r"(?!)",
    file_name="adapter_model.safetensors",
)

FORMATS = (HF, META, TORCHTUNE)

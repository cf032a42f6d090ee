"""The checkpoint formats as tables: a row names one tensor on both sides, and is read both ways.

`{}` stands for the layer. Our own names and order are those of `Decoder`: RoPE's half-split order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
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
        rest = tensor.shape[1:]
        return tensor.reshape(heads, *halves, *rest).transpose(1, 2).reshape(-1, *rest)


class Table:
    """Rows that can be looked up from either side."""

    def __init__(self, *rows: Row) -> None:
        self.rows = rows
        self._by_ours = {row.ours: row for row in rows}
        self._by_theirs = {row.theirs: row for row in rows}

    def row(self, ours: str) -> Row:
        """Return the row of our tensor."""
        return self._by_ours[_pattern(ours)[0]]

    def theirs(self, ours: str) -> str:
        """Return their name of our tensor."""
        return self.row(ours).theirs.format(_pattern(ours)[1])

    def ours(self, theirs: str) -> str | None:
        """Return our name of their tensor, or None if the table does not know it."""
        pattern, layer = _pattern(theirs)
        row = self._by_theirs.get(pattern)
        return row.ours.format(layer) if row else None


@dataclass(frozen=True)
class Format:
    """How one kind of checkpoint names its tensors and its files.

    Attributes:
        checkpointer: the class that reads and writes it, for error messages.
        buffers: their tensors that are computed, not learned: not read, but written back.
        single: the file name of a checkpoint in one file.
        several: the file name of file `i` (from 1) of `n`.
        found: glob patterns of further weight files, tried in this order where no index tells.
        beside: a file, and the weight file that is of this format only where the first lies by it:
            torchtune gives two formats one name.
        published: names by which torchtune's tutorials mean "what this run saved in epoch N".
        parts: several files hold parts of every tensor (model parallel), not different tensors.
        indexes: files that map tensor names to several files; the first is the one we write.
    """

    name: str
    checkpointer: str
    table: Table
    single: str
    several: str
    found: tuple[str, ...]
    published: str
    buffers: tuple[str, ...] = ()
    beside: tuple[str, str] = ("", "")
    parts: bool = False
    indexes: tuple[str, ...] = ()

    def file_name(self, i: int, n: int) -> str:
        """Return what we call file `i` (from 1) of `n`."""
        return self.single if n == 1 else self.several.format(i=i, n=n, i0=i - 1)

    def is_buffer(self, theirs: str) -> bool:
        """Say whether their tensor is computed, not learned."""
        return _pattern(theirs)[0] in self.buffers


def _pattern(name: str) -> tuple[str, str]:
    """Split a name into its pattern and its layer: `a.3.b` -> (`a.{}.b`, `3`)."""
    number = re.search(r"(?<=\.)\d+(?=\.)", name)
    if number is None:
        return name, ""
    return f"{name[: number.start()]}{{}}{name[number.end() :]}", number.group()


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a decoder's parameters, in the model's order."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Decoder(config).named_parameters()}


def differences(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Return a line for every tensor, by name and shape, that is not as expected."""
    lines = [f"missing {name}: expected {list(expected[name])}" for name in expected.keys() - found]
    lines += [f"unexpected {name}: found {list(found[name])}" for name in found.keys() - expected]
    lines += [
        f"mismatched {name}: expected {list(shape)}, found {list(found[name])}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    return sorted(lines)


HF = Format(
    name="Hugging Face",
    checkpointer="FullModelHFCheckpointer",
    table=Table(
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
    several="model-{i:05d}-of-{n:05d}.safetensors",
    found=("model-*-of-*.safetensors", "pytorch_model.bin", "pytorch_model-*-of-*.bin"),
    published=r"hf_model_\d+_(\d+)\.(?:pt|safetensors)",
    indexes=("model.safetensors.index.json", "pytorch_model.bin.index.json"),
)

META = Format(
    name="Meta",
    checkpointer="FullModelMetaCheckpointer",
    table=Table(
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
    several="consolidated.{i0:02d}.pth",
    found=("consolidated.[0-9][0-9].pth", "meta_model_*.pt"),
    beside=("params.json", "model-00001-of-00001.bin"),
    published=r"meta_model_(\d+)\.pt",
    parts=True,
)

TORCHTUNE = Format(
    name="torchtune",
    checkpointer="FullModelTorchTuneCheckpointer",
    table=Table(
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
    several="torchtune_model-{i:05d}-of-{n:05d}.pt",
    found=("torchtune_model-*-of-*.pt", "torchtune_model_*.pt", "model-*-of-*.bin"),
    published=r"torchtune_model_(\d+)\.pt",
)

FORMATS = (HF, META, TORCHTUNE)

# PEFT wraps the Hugging Face model, so its rows follow from that table: a linear may gain these.
_GAINS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
_LINEARS = [row for row in HF.table.rows if row.ours.endswith(("_proj.weight", "lm_head.weight"))]
PEFT = Table(
    *(
        Row(
            row.ours.removesuffix(".weight") + gain,
            "base_model.model." + row.theirs.removesuffix(".weight") + gain,
        )
        for row in _LINEARS
        for gain in _GAINS
    )
)

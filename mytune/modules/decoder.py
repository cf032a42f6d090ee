"""The decoder: embeddings, blocks of attention and SwiGLU, a norm, a head; families are sizes.

Letters in shape comments: b batch, s sequence, t keys seen (cache + s), d embed_dim, h heads,
k key/value heads, e head_dim, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from mytune._triton import HAS_TRITON
from mytune.errors import ConfigError
from mytune.modules.derived import Derived, normed, project, project_each, swiglu
from mytune.modules.masks import Mask, attend_blocks


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of RoPE's slow frequencies to longer contexts."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    old_context_len: int = 8192


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes of a decoder; a model size is one of these."""

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    embed_dim: int
    intermediate_dim: int
    head_dim: int
    max_seq_len: int
    norm_eps: float = 1e-5
    rope_base: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attn_dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.attn_dropout < 1:
            raise ConfigError(f"attn_dropout is {self.attn_dropout}; it must be from 0 to below 1")


class Cache:
    """Keys and values of earlier positions, kept by whoever generates."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the newest keys and values [b, k, s, e] of a layer; return all [b, k, t, e]."""
        raise NotImplementedError

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend with one query to what `update` has returned, see `attend_one_query`."""
        return attend_one_query(q, k, v, mask)


Rope = tuple[Tensor, Tensor]


def rope_frequencies(config: DecoderConfig, device: torch.device) -> Tensor:
    """Return RoPE's angle per position, one for each pair of dimensions: [e / 2], float32."""
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    freq = 1.0 / (config.rope_base**exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    # Turns that fit into the old context: fast pairs are kept, slow ones slowed, the rest blended.
    turns = scaling.old_context_len * freq / (2 * torch.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return freq * keep + freq / scaling.factor * (1 - keep)


def rope_angles(config: DecoderConfig, positions: Tensor) -> Rope:
    """Return what `rotate` multiplies with, for every position: twice [b, 1, s, e], float32."""
    angles = positions[:, None, :, None].float() * rope_frequencies(config, positions.device)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn queries or keys [b, h, s, e] by their positions; pairs are (i, i + e/2), as in HF."""
    cos, sin = rope
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


def attend_one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend with one query [b, h, 1, e] to k, v [b, k, t, e]: heads of a group are rows.

    No key or value is repeated: at 300 keys in bfloat16 a CPU is 5 times as fast. The mask
    [b, 1, 1, t] is bool, or added to the scores. The output is [b, k, h / k, e].
    """
    q = q.view(len(q), k.shape[1], -1, q.shape[-1])
    if q.is_cuda and HAS_TRITON:
        from mytune.modules.attention_triton import attend_one, takes

        if takes(q, k, v, mask):
            out: Tensor = attend_one(q, k, v, mask)
            return out
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Causal attention with grouped key/value heads and RoPE."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.grouped = config.num_kv_heads != config.num_heads
        self.dropout = config.attn_dropout
        q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.embed_dim, q_dim, bias=False)
        self.k_proj = nn.Linear(config.embed_dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.embed_dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, config.embed_dim, bias=False)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # [b, h, s, e]

    def forward(self, x: Derived, rope: Rope, mask: Mask | None, cache: Cache | None) -> Tensor:
        q, k, v = map(self._heads, project_each((self.q_proj, self.k_proj, self.v_proj), x))
        q, k = rotate(q, rope), rotate(k, rope)
        if isinstance(mask, BlockMask):
            return self.o_proj(attend_blocks(q, k, v, mask).transpose(1, 2).flatten(2))
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
            if q.shape[2] == 1:
                return self.o_proj(cache.attend(self.layer, q, k, v, mask).flatten(1)[:, None])
        # Asked of shapes alone, a compiler that keeps them variable would not know it.
        causal = mask is None and (cache is None or q.shape[2] == k.shape[2])
        if mask is None and not causal:
            new, seen = q.shape[2], k.shape[2]  # the end of a text
            mask = torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(seen - new)
        # No fused CUDA kernel takes groups with a mask, or in float32.
        repeats = self.grouped and (mask is not None or (q.is_cuda and q.dtype is torch.float32))
        if repeats:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
            enable_gqa=self.grouped and not repeats,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.embed_dim, config.intermediate_dim, bias=False)
        self.up_proj = nn.Linear(config.embed_dim, config.intermediate_dim, bias=False)
        self.down_proj = nn.Linear(config.intermediate_dim, config.embed_dim, bias=False)

    def forward(self, x: Derived) -> Tensor:
        hidden = swiglu(*project_each((self.gate_proj, self.up_proj), x))
        return project(self.down_proj, hidden)


class Block(nn.Module):
    """One layer: attention, then SwiGLU, each behind a norm and beside a residual."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.attn = Attention(config, layer)
        self.mlp_norm = nn.RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rope: Rope, mask: Mask | None = None, cache: Cache | None = None
    ) -> Tensor:
        x = x + self.attn(normed(self.attn_norm, x), rope, mask, cache)
        return x + self.mlp(normed(self.mlp_norm, x))


class Decoder(nn.Module):
    """A decoder-only transformer.

    Embeddings are tied by use: a tied model has no `lm_head` and no second Parameter, which the
    meta device followed by `to_empty` would silently untie.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embed_dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = nn.RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        )

    @property
    def device(self) -> torch.device:
        """Where the model is, and its inputs must be."""
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what blocks hand on; weights may be quantized."""
        return self.norm.weight.dtype

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., v] of normed hidden states [..., d]."""
        if self.lm_head is None:
            return F.linear(hidden, self.embed_tokens.weight)
        return self.lm_head(hidden)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
        output_hidden: bool = False,
    ) -> Tensor:
        """Return logits [b, s, v], or the hidden states [b, s, d] that the head would read.

        Args:
            tokens: ids [b, s].
            positions: [b, s]; 0, 1, 2, ... if not given.
            mask: bool [b, 1, s, t], True where a query may look, or what `packed_mask` makes;
                causal if not given.
            cache: earlier keys and values; `positions` must then say where `tokens` stand.
            output_hidden: stop before the head, for losses that never hold all logits.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        rope = rope_angles(self.config, positions)
        hidden = self.embed_tokens(tokens)
        for layer in self.layers:
            hidden = layer(hidden, rope, mask, cache)
        hidden = self.norm(hidden)
        return hidden if output_hidden else self.head(hidden)

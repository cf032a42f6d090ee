"""What a token of a packed row may see, in the form that the device's fastest kernel reads.

On CUDA that is FlexAttention, which skips blocks with nothing to see and never holds a mask or
scores of [s, s]. Elsewhere it is a bool mask: FlexAttention has no backward pass on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

Mask = Tensor | BlockMask

_BLOCK = 128  # FlexAttention's
_PADDING = 2**31  # comes after every document
_SMALLEST_HEAD = 16  # that FlexAttention takes


def document_mask(document_ids: Tensor) -> Tensor:
    """Return a packed row's mask, bool [b, 1, s, s]: causal, and within a document [b, s] only."""
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same.tril()


def block_mask(document_ids: Tensor) -> BlockMask:
    """Return `document_mask` in blocks of 128 x 128, from each block's first and last document.

    It is right for documents in any order, and fastest where they ascend. Padding is -1.
    """
    length = document_ids.shape[1]
    ids = document_ids.where(document_ids >= 0, _PADDING)
    # A number that no document has, so that a block beyond the row's end is never wholly visible.
    blocks = F.pad(ids, (0, -length % _BLOCK), value=_PADDING + 1).unflatten(1, (-1, _BLOCK))
    first, last = blocks.amin(-1), blocks.amax(-1)  # [b, n]
    number = torch.arange(first.shape[1], device=ids.device)
    earlier = number[:, None] > number
    meet = (first[:, :, None] <= last[:, None]) & (first[:, None] <= last[:, :, None])
    single = first == last
    whole = earlier & meet & single[:, :, None] & single[:, None]
    partly = (earlier | (number[:, None] == number)) & meet & ~whole

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_ids[b, query] == document_ids[b, key])

    return BlockMask.from_kv_blocks(
        *_numbered(partly),
        *_numbered(whole),
        BLOCK_SIZE=_BLOCK,
        mask_mod=sees,
        seq_lengths=(length, length),
    )


def _numbered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks each row of [b, n, n] has, [b, 1, n], and which, those first."""
    chosen = blocks[:, None].int()
    order = chosen.argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.int()


# The best mask by the kind of device; `document_mask` is for every other.
_MASKS: dict[str, Callable[[Tensor], Mask]] = {"cuda": block_mask}


def packed_mask(document_ids: Tensor, head_dim: int, dropout: float = 0.0) -> Mask:
    """Return the mask of a batch of packed rows; make it once, it serves all blocks.

    Args:
        document_ids: [b, s]; -1 is padding.
        head_dim: width of the attention's heads.
        dropout: probability of attention dropout, which FlexAttention does not have.
    """
    if head_dim < _SMALLEST_HEAD or document_ids.shape[1] < _BLOCK or dropout:
        return document_mask(document_ids)
    return _MASKS.get(document_ids.device.type, document_mask)(document_ids)


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Return attention's output [b, h, s, e] for q [b, h, s, e] and k, v [b, kv_heads, s, e]."""
    attend: Any = flex_attention if torch.compiler.is_compiling() else _compiled()
    out: Tensor = attend(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out


@cache
def _compiled() -> Callable[..., Tensor]:
    """FlexAttention is a fused kernel only where it is compiled."""
    return torch.compile(flex_attention, dynamic=False)

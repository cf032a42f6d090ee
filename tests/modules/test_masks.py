"""Packed rows: FlexAttention's block mask against the bool mask, forward on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from mytune.models.llama3 import llama3
from mytune.modules import document_mask, masks, packed_mask
from mytune.modules.masks import block_mask
from mytune.training import compile_blocks


def packed(*rows: list[int], pad_to: int) -> Tensor:
    """Return document ids [rows, pad_to] of documents of these lengths, -1 after them."""
    ids = [[n for n, length in enumerate(row) for _ in range(length)] for row in rows]
    return torch.tensor([row + [-1] * (pad_to - len(row)) for row in ids])


BATCHES = {
    "documents end anywhere": packed([100, 1, 300, 60], [512], pad_to=512),
    "documents end with blocks": packed([128, 256, 128], [384, 128], pad_to=512),
    "padding": packed([130, 20], [400], pad_to=512),
    "padding only": packed([], [500], pad_to=512),
    "not a multiple of a block": packed([100, 200], [37, 200, 13], pad_to=300),
    "in any order": torch.randint(0, 3, (2, 300), generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("batch", BATCHES)
def test_the_blocks_are_those_with_something_to_see(batch: str) -> None:
    """Torch finds the same blocks, or fewer where documents do not ascend, from the whole mask."""
    documents = BATCHES[batch]
    ours, length = block_mask(documents), documents.shape[1]
    theirs = create_block_mask(ours.mask_mod, 2, None, length, length, device="cpu")
    needed, computed = theirs.to_dense().bool(), ours.to_dense().bool()
    assert not (needed & ~computed).any()
    if batch != "in any order":
        assert torch.equal(needed, computed)
        assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)
        assert torch.equal(ours.full_q_num_blocks, theirs.full_q_num_blocks)


def test_whole_blocks_are_seen_wholly_and_partial_ones_in_part() -> None:
    for documents in BATCHES.values():
        dense = document_mask(documents)[:, 0]
        padding = (0, -dense.shape[1] % 128) * 2
        blocks = F.pad(dense, padding).unflatten(1, (-1, 128)).unflatten(3, (-1, 128))
        mask = block_mask(documents)
        for row in range(2):
            for query in range(blocks.shape[1]):
                count = int(mask.full_kv_num_blocks[row, 0, query])
                for key in mask.full_kv_indices[row, 0, query, :count].tolist():
                    assert blocks[row, query, :, key].all()


@pytest.mark.parametrize("batch", ["padding", "not a multiple of a block"])
def test_attention_is_that_of_the_bool_mask(batch: str) -> None:
    documents = BATCHES[batch]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, documents.shape[1], 32, generator=generator) for heads in (4, 2, 2)
    )
    expected = F.scaled_dot_product_attention(
        q, k, v, attn_mask=document_mask(documents), enable_gqa=True
    )
    found = flex_attention(q, k, v, block_mask=block_mask(documents), enable_gqa=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_model_computes_the_same_with_either_mask(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel skips blocks; a batch of other documents is served by the same compilation."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = llama3(100, 2, 4, 2, 128, max_seq_len=512).eval()
    batches = [BATCHES["documents end anywhere"], BATCHES["padding"]]
    tokens = torch.randint(0, 100, batches[0].shape)
    expected = [model(tokens, mask=packed_mask(documents, 32)) for documents in batches]
    if compiled:
        compile_blocks(model)
    monkeypatch.setitem(masks._MASKS, "cpu", block_mask)
    counters.clear()
    for documents, logits in zip(batches, expected, strict=True):
        mask = packed_mask(documents, 32)
        assert isinstance(mask, BlockMask)
        torch.testing.assert_close(model(tokens, mask=mask), logits, rtol=0, atol=2e-6)
    assert counters["stats"]["unique_graphs"] == 1


def test_what_flex_attention_cannot_do_gets_a_bool_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = BATCHES["padding"]
    assert isinstance(packed_mask(documents, 32), Tensor)
    monkeypatch.setitem(masks._MASKS, "cpu", block_mask)
    assert isinstance(packed_mask(documents, 32), BlockMask)
    for ids, head_dim, dropout in (
        (documents, 8, 0.0),
        (documents, 32, 0.1),
        (documents[:, :99], 32, 0.0),
    ):
        assert torch.equal(packed_mask(ids, head_dim, dropout), document_mask(ids))

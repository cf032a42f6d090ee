"""With a KV cache the model computes what it computes without."""

from __future__ import annotations

import pytest
import torch

from mytune.generation import KVCache, generate
from mytune.generation.kv_cache import SharedPrefixKVCache
from mytune.modules.decoder import attend_one_query
from tests.generation.conftest import VARIED
from tests.hf import twins


def cache_for(model, batch_size, length):
    return KVCache(
        model.config, batch_size=batch_size, length=length, device="cpu", dtype=torch.float32
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("pieces", [[40], [1] * 40, [25, 1, 1, 1, 12], [1, 39]])
def test_pieces_through_the_cache_equal_one_pass(pieces, kv_heads):
    model, _ = twins(num_key_value_heads=kv_heads)
    tokens = torch.randint(0, 160, (3, 40), generator=torch.Generator().manual_seed(1))
    cache, positions = cache_for(model, 3, 40), torch.arange(40)[None]
    seen = []
    with torch.inference_mode():
        expected = model(tokens)
        for piece, where in zip(tokens.split(pieces, 1), positions.split(pieces, 1), strict=True):
            seen.append(model(piece, where, cache=cache))
    torch.testing.assert_close(torch.cat(seen, dim=1), expected, rtol=0, atol=2e-6)
    assert cache.filled == 40


def test_a_full_cache_refuses_another_position():
    model, _ = twins()
    cache = cache_for(model, 1, 3)
    model(torch.tensor([[1, 2, 3]]), cache=cache)
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        model(torch.tensor([[4]]), torch.tensor([[3]]), cache=cache)


def test_the_text_is_the_same_without_a_cache():
    model, _ = twins(**VARIED)
    text = [1, 7, 9]
    with torch.inference_mode():
        for _ in range(60):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    assert list(generate(model, text[:3], max_new_tokens=60)) == text[3:]
    assert len(set(text)) > 30


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_attention_in_two_parts_equals_attention_to_the_whole(dtype, atol):
    model, _ = twins()
    sizes, common, own = model.config, 40, 7
    cache = SharedPrefixKVCache(
        sizes, common=common, batch_size=3, length=common + own, device="cpu", dtype=dtype
    )
    for each in (*cache.common.keys, *cache.common.values, *cache.keys, *cache.values):
        each.normal_()
    q = torch.randn(3, sizes.num_heads, 1, sizes.head_dim, dtype=dtype)
    pads = torch.tensor([0, 2, 6])[:, None, None, None]
    mask = torch.zeros(3, 1, 1, own, dtype=dtype).masked_fill_(torch.arange(own) < pads, -torch.inf)
    k, v = (
        torch.cat((shared[1].expand(3, -1, -1, -1), each[1]), dim=2)
        for shared, each in (
            (cache.common.keys, cache.keys),
            (cache.common.values, cache.values),
        )
    )
    whole = torch.cat((torch.zeros(3, 1, 1, common, dtype=dtype), mask), dim=-1)
    expected = attend_one_query(q.float(), k.float(), v.float(), whole.float())
    found = cache.attend(1, q, cache.keys[1], cache.values[1], mask)
    assert found.dtype is dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=atol)

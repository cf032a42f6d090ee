"""NF4 embeddings and heads: rows and slices of a table that is never whole in full precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mytune.errors import ConfigError
from mytune.models.llama3 import lora_llama3, qlora_llama3
from mytune.modules.loss import linear_cross_entropy
from mytune.quantization import NF4Embedding, NF4Linear, apply_nf4, quantize_nf4
from mytune.quantization import nf4 as module
from mytune.training.prepare import count_parameters

SIZES = dict(vocab_size=90, num_layers=1, num_heads=2, num_kv_heads=1, embed_dim=64, max_seq_len=16)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def embedding(weight: Tensor) -> NF4Embedding:
    table = NF4Embedding(*weight.shape, device="meta")
    table.quantize_(weight)
    return table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [24, 64, 192])
def test_looked_up_rows_are_those_of_the_table(dim: int, dtype: torch.dtype) -> None:
    table = embedding(normal(300, dim, dtype=dtype))
    tokens = torch.tensor([[299, 0, 7], [7, 131, 298]])
    assert torch.equal(table(tokens), table.weight[tokens])
    assert table(tokens).dtype == dtype


def test_an_embedding_compiles_into_one_graph() -> None:
    table = embedding(normal(300, 64))
    tokens = torch.tensor([[299, 0, 7]])
    found = torch.compile(table, fullgraph=True)(tokens)
    torch.testing.assert_close(found, table(tokens), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 7), (16_384, 3), (40_000, 5)], ids=str)
def test_slices_are_the_weight(shape: tuple[int, int]) -> None:
    linear = NF4Linear(shape[1], shape[0], device="meta")
    linear.quantize_(normal(*shape))
    slices = list(linear.slices(torch.float32))
    assert len(slices) == -(-shape[0] // 16_384)
    assert torch.equal(torch.cat([part for _, part in slices]), linear.dequantize())
    assert all(len(part) == rows.stop - rows.start for rows, part in slices)


def test_weights_quantized_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(300, 200)
    whole = quantize_nf4(weight)
    monkeypatch.setattr(module, "_QUANTIZED_AT_ONCE", 16_384)
    for piece, tensor in zip(quantize_nf4(weight), whole, strict=True):
        assert torch.equal(piece, tensor)


def test_a_4_bit_head_has_loss_and_gradient_of_what_it_stands_for() -> None:
    head = NF4Linear(16, 40_000, device="meta")
    head.quantize_(normal(40_000, 16))
    hidden, labels = normal(50, 16), torch.arange(50) * 797
    results = []
    for weight in (head, head.dequantize()):
        x = hidden.clone().requires_grad_()
        loss = linear_cross_entropy(x, weight, labels, chunk=20)
        loss.backward()
        with torch.no_grad():
            assert torch.equal(linear_cross_entropy(x, weight, labels, chunk=20), loss)
        results.append((loss.detach(), x.grad))
    expected = F.cross_entropy(hidden @ head.dequantize().T, labels, reduction="sum")
    torch.testing.assert_close(results[0][0], expected, rtol=1e-6, atol=0)
    for found, plain in zip(*results, strict=True):
        torch.testing.assert_close(found, plain, rtol=0, atol=2e-6 * plain.abs().max().item())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_builder_quantizes_embedding_and_head(tied: bool) -> None:
    sizes = {**SIZES, "tie_word_embeddings": tied}
    model = qlora_llama3(["q_proj"], quantize_embeddings=True, **sizes)
    assert type(model.embed_tokens) is NF4Embedding
    assert type(model.lm_head) is (type(None) if tied else NF4Linear)
    plain = lora_llama3(["q_proj"], **sizes)
    assert count_parameters(model) == count_parameters(plain)
    model.embed_tokens.quantize_(normal(90, 64))
    tokens = torch.arange(8)[None]
    hidden = model(tokens, output_hidden=True)
    if tied:
        expected = F.linear(hidden, model.embed_tokens.weight)
        torch.testing.assert_close(model.head(hidden), expected, rtol=1e-6, atol=1e-6)


def test_4_bit_embeddings_need_a_4_bit_base() -> None:
    with pytest.raises(ConfigError, match="set quantize_base: true"):
        lora_llama3(["q_proj"], quantize_embeddings=True, **SIZES)


def test_apply_leaves_embeddings_alone_unless_told() -> None:
    model = nn.Module()
    model.embed_tokens = nn.Embedding(70, 64)
    weight = model.embed_tokens.weight.detach()
    apply_nf4(model)
    assert type(model.embed_tokens) is nn.Embedding
    apply_nf4(model, embeddings=True)
    assert torch.equal(model.embed_tokens.weight, embedding(weight).weight)

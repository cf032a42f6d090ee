"""The linear cross entropy is F.cross_entropy on whole logits: loss and both gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mytune.errors import ConfigError
from mytune.models.llama3 import llama3, lora_llama3
from mytune.modules.loss import LinearCrossEntropyLoss, linear_cross_entropy, target_index
from mytune.training.planning.simulate import Ledger

SIZES = dict(vocab_size=97, num_layers=1, num_heads=2, num_kv_heads=1, embed_dim=32, max_seq_len=16)


def whole(model, batch):
    logits = model(batch["tokens"]).flatten(0, 1)
    return F.cross_entropy(logits.float(), batch["labels"].flatten(), reduction="sum")


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def batch(masked_rows=0):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 97, (3, 16), generator=generator)
    labels = tokens.roll(-1, 1).masked_fill(torch.rand(3, 16, generator=generator) < 0.4, -100)
    labels[:masked_rows] = -100
    return {"tokens": tokens, "labels": labels}


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("masked", [0, 13, 39])
def test_loss_and_both_gradients_are_those_of_cross_entropy(chunk, masked):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 32, generator=generator)
    weight = torch.randn(97, 32, generator=generator) * 0.2
    labels = torch.randint(0, 97, (40,), generator=generator)
    labels[torch.randperm(40, generator=generator)[:masked]] = -100
    results = []
    for ours in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if ours:
            index = target_index(labels)
            loss = linear_cross_entropy(h[index], w, labels[index], chunk)
        else:
            loss = F.cross_entropy(h @ w.T, labels, reduction="sum")
        loss = loss / (40 - masked)
        loss.backward()
        results.append((loss.detach(), h.grad, w.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_loss_of_a_model_and_a_batch(tied):
    torch.manual_seed(0)
    model = llama3(**SIZES, tie_word_embeddings=tied)
    loss = LinearCrossEntropyLoss(chunk_size=7)(model, batch(masked_rows=1))
    expected = whole(model, batch(masked_rows=1))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    theirs = gradients(model, expected)
    for name, mine in gradients(model, loss).items():
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(mine, theirs[name], rtol=0, atol=2e-6 * scale, msg=name)


def test_a_batch_without_targets_gives_zero_and_zero_gradients():
    model = llama3(**SIZES)
    loss = LinearCrossEntropyLoss()(model, batch(masked_rows=3))
    assert loss == 0
    assert all(grad.abs().max() == 0 for grad in gradients(model, loss).values())


def test_a_head_with_adapters_has_the_same_loss_and_gradients():
    torch.manual_seed(0)
    model = lora_llama3(["q_proj"], False, True, lora_rank=2, **SIZES)
    loss = LinearCrossEntropyLoss(num_output_chunks=3)(model, batch())
    torch.testing.assert_close(loss, whole(model, batch()), rtol=1e-6, atol=0)
    expected = gradients(model, whole(model, batch()))
    assert "lm_head.lora_B.weight" in expected
    for name, mine in gradients(model, loss).items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(mine, expected[name], rtol=0, atol=2e-6 * scale, msg=name)


def test_the_loss_of_bfloat16_is_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4096, 16, generator=generator).bfloat16()
    weight = torch.randn(64, 16, generator=generator).bfloat16()
    labels = torch.randint(0, 64, (4096,), generator=generator)
    expected = F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")
    loss = linear_cross_entropy(hidden, weight, labels, chunk=100)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_another_ignore_index_is_refused():
    with pytest.raises(ConfigError, match=r"loss\.ignore_index is 0; .* labelled -100"):
        LinearCrossEntropyLoss(ignore_index=0)


def test_never_more_than_a_chunk_of_logits_is_held():
    hidden = torch.randn(256, 32, requires_grad=True)
    weight, labels = torch.randn(4096, 32), torch.randint(4096, (256,))
    with Ledger() as ledger:
        linear_cross_entropy(hidden, weight, labels, chunk=64).backward()
    logits = 64 * 4096 * 4  # and as much for the log softmax of them
    assert ledger.peak.total() == pytest.approx(2 * logits, rel=0.05)


def test_a_second_backward_is_an_error_and_not_a_wrong_gradient():
    hidden = torch.randn(4, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(9, 8), torch.arange(4), chunk=2)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()

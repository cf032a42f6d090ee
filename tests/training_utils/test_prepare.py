"""Recomputing and compiling blocks: both act, also together."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from mytune.models.llama3 import llama3
from mytune.modules.decoder import Block
from mytune.training import checkpoint_activations, compile_blocks, warn_of_untrained_tokens

SIZES = dict(vocab_size=50, num_layers=3, num_heads=2, num_kv_heads=1, embed_dim=32, max_seq_len=16)


def test_chat_tokens_that_the_base_never_learned_are_told(caplog, monkeypatch):
    monkeypatch.setattr("mytune.training.prepare.log.propagate", True)
    model = llama3(**SIZES)
    with torch.no_grad():
        model.embed_tokens.weight[[7, 9]] *= 1e-5
    special = {"<|start|>": 7, "<|end|>": 8, "<|eot|>": 9}
    warn_of_untrained_tokens(model, special)
    assert not caplog.records  # it trains
    model.requires_grad_(False)
    warn_of_untrained_tokens(model, {"<|end|>": 8})
    assert not caplog.records
    warn_of_untrained_tokens(model, special)
    assert "never learned <|start|>, <|eot|> (" in caplog.text


@pytest.mark.parametrize("keep_products", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_are_compiled_also_when_they_are_recomputed(monkeypatch, recompute, keep_products):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(Block, "compile", lambda self: nn.Module.compile(self, backend=backend))
    model = llama3(**SIZES)
    checkpoint_activations(model, recompute, keep_products)
    compile_blocks(model)
    model(torch.arange(8)[None]).sum().backward()
    assert len(graphs) == 1  # one for all blocks


def test_batches_of_many_lengths_break_no_graph():
    torch._dynamo.reset()
    counters.clear()
    model = llama3(**SIZES)
    for layer in model.layers:
        layer.compile(backend="eager")
    for length in (5, 8, 11, 13):
        model(torch.arange(length)[None]).sum().backward()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # of one length, and of any

"""Recomputing and compiling blocks: both act, also together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mytune.models.llama3 import llama3
from mytune.modules.decoder import Block
from mytune.training import checkpoint_activations, compile_blocks, offload_activations

SIZES = dict(vocab_size=50, num_layers=3, num_heads=2, num_kv_heads=1, embed_dim=32, max_seq_len=16)


@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_are_compiled_also_when_they_are_recomputed(monkeypatch, recompute):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(Block, "compile", lambda self: nn.Module.compile(self, backend=backend))
    model = llama3(**SIZES)
    checkpoint_activations(model, recompute)
    compile_blocks(model)
    model(torch.arange(8)[None]).sum().backward()
    assert len(graphs) == 1  # one for all blocks


def test_offloading_keeps_weights_in_place():
    model = llama3(**SIZES)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = []
    monitored = torch.Tensor.cpu

    def cpu(tensor):
        seen.append(tensor.untyped_storage().data_ptr())
        return monitored(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", cpu)
        with offload_activations(model, True):
            loss = model(torch.arange(8)[None]).sum()
    loss.backward()
    assert seen and not weights & set(seen)

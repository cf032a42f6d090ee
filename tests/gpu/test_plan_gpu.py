"""Plans against CUDA's allocator: a step of a real shape takes what was planned."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch

from mytune.config import instantiate
from mytune.models.llama3 import llama3, lora_llama3, qlora_llama3
from mytune.modules import LinearCrossEntropyLoss, target_index
from mytune.training import (
    StepSettings,
    checkpoint_activations,
    compile_blocks,
    offload_activations,
    plan_memory,
)
from mytune.training.planning.simulate import set_meta_dtype

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")

SIZES = dict(
    vocab_size=32_000, num_layers=6, num_heads=16, num_kv_heads=4, embed_dim=2048, max_seq_len=2048
)
LORA = dict(lora_attn_modules=["q_proj", "v_proj", "o_proj"], apply_lora_to_mlp=True, lora_rank=16)
ADAMW = {"_component_": "torch.optim.AdamW", "lr": 1e-4, "fused": True}
FOREACH = {"_component_": "torch.optim.AdamW", "lr": 1e-4}
full = partial(llama3, **SIZES)
lora = partial(lora_llama3, **SIZES, **LORA)
qlora = partial(qlora_llama3, **SIZES, **LORA)
ALL = range(6)
CASES = [  # builder, settings, compiled
    (full, {}, False),
    (full, {"recompute": ALL}, False),
    (full, {"recompute": ALL, "gradient_accumulation_steps": 2}, False),
    (full, {"recompute": ALL, "optimizer": FOREACH}, False),
    (partial(full, tie_word_embeddings=True), {"recompute": ALL}, False),
    (lora, {}, False),
    (lora, {"recompute": ALL}, False),
    (lora, {"recompute": [0, 1, 2]}, False),
    (lora, {"recompute": ALL, "keep_products": True}, False),
    (lora, {"packed": True}, False),
    (lora, {"offload": True}, False),
    (lora, {"dtype": torch.float32}, False),
    (lora, {}, True),
    (lora, {"recompute": ALL}, True),
    (partial(lora, lora_dropout=0.1), {}, False),
    (qlora, {}, False),
    (qlora, {"recompute": ALL}, False),
    (qlora, {}, True),
]


def measured(build, planned, compile):
    """Return `max_memory_allocated` in the third step of a model with random weights."""
    gc.collect()  # what an earlier test left would be freed later
    torch.cuda.empty_cache()
    start = torch.cuda.memory_allocated()
    with torch.device("meta"):
        model = build()
    set_meta_dtype(model, planned.dtype)
    checkpoint_activations(model, planned.recompute, planned.keep_products)
    if compile:
        compile_blocks(model)
    model.to_empty(device="cuda").train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.normal_(std=0.02)
            else:
                parameter.zero_()
    tokens = torch.randint(32_000, (planned.batch_size, planned.seq_len), device="cuda")
    batch = {"tokens": tokens, "labels": tokens, "target_index": target_index(tokens)}
    if planned.packed:
        positions = torch.arange(planned.seq_len, device="cuda").expand_as(tokens).contiguous()
        batch |= {"positions": positions, "document_ids": positions // 300}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, loss_fn = instantiate(planned.optimizer, trained), LinearCrossEntropyLoss()
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        for _ in range(planned.gradient_accumulation_steps):
            with offload_activations(model, planned.offload):
                loss = loss_fn(model, batch)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cuda.max_memory_allocated() - start


@pytest.mark.parametrize(("build", "given", "compile"), CASES, ids=range(len(CASES)))
def test_a_plan_is_what_cuda_allocates(build, given, compile):
    usual = dict(optimizer=ADAMW, dtype=torch.bfloat16, batch_size=2, seq_len=2048)
    planned = StepSettings(**{**usual, **given})
    with torch.device("meta"):
        model = build()
    plan = plan_memory(model, LinearCrossEntropyLoss(), planned)
    assert measured(build, planned, compile) == pytest.approx(plan.peak, rel=0.1)

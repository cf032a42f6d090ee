"""Plans of memory: against what the CPU's allocator says, and against figures modelled by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from mytune.models.llama3 import (
    llama3,
    llama3_8b,
    lora_llama3,
    lora_llama3_8b,
    qlora_llama3,
    qlora_llama3_8b,
)
from mytune.modules import LinearCrossEntropyLoss, target_index
from mytune.training import (
    StepSettings,
    checkpoint_activations,
    fewest_ranks,
    fewest_recomputed_blocks,
    plan_memory,
)
from mytune.training.planning.optimizer_size import optimizer_size
from mytune.training.planning.plan import GIB
from mytune.training.planning.simulate import Ledger, set_meta_dtype
from mytune.training.planning.smaller import _four_bits

SIZES = dict(
    vocab_size=2048, num_layers=3, num_heads=4, num_kv_heads=2, embed_dim=128, max_seq_len=256
)
LORA = dict(lora_attn_modules=["q_proj", "v_proj", "o_proj"], apply_lora_to_mlp=True)
ADAMW = {"_component_": "torch.optim.AdamW", "lr": 1e-4, "fused": True}
LOSS = LinearCrossEntropyLoss()
full = partial(llama3, **SIZES)
tied = partial(llama3, **SIZES, tie_word_embeddings=True)
lora = partial(lora_llama3, **SIZES, **LORA)
qlora = partial(qlora_llama3, **SIZES, **LORA)


def on_meta(build):
    with torch.device("meta"):
        return build()


def settings(**given):
    usual = dict(optimizer=ADAMW, dtype=torch.float32, batch_size=4, seq_len=128, device="cpu")
    return StepSettings(**{**usual, **given})


def measured(build, planned):
    """Return the peak in bytes of a real step on the CPU, weights and batch with it."""
    torch.manual_seed(0)
    model = on_meta(build)
    set_meta_dtype(model, planned.dtype)
    checkpoint_activations(model, planned.recompute)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        if parameter.is_floating_point():
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            parameter.zero_()
    tokens = torch.randint(2048, (planned.batch_size, planned.seq_len))
    batch = {"tokens": tokens, "labels": tokens, "target_index": target_index(tokens)}
    if planned.packed:
        positions = torch.arange(planned.seq_len).expand_as(tokens).contiguous()
        batch |= {"positions": positions, "document_ids": torch.zeros_like(tokens)}
    LOSS(model, batch).backward()  # what is made once, and the first micro-batch's gradients
    if not planned.accumulates:
        model.zero_grad()
    held = [*model.parameters(), *batch.values(), *(p.grad for p in model.parameters())]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        LOSS(model, batch).backward()
    now = peak = sum(each.nbytes for each in held if each is not None)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


RECOMPUTED = {"recompute": range(3)}
CASES = [
    (full, {}),
    (full, RECOMPUTED),
    (full, {"gradient_accumulation_steps": 2, "seq_len": 64}),
    (full, {"packed": True}),
    (tied, {}),
    (tied, {**RECOMPUTED, "batch_size": 1, "seq_len": 250}),
    (lora, {"gradient_accumulation_steps": 2}),
    (lora, {**RECOMPUTED, "batch_size": 3, "seq_len": 200}),
    (lora, {"recompute": [0], "packed": True}),
    (partial(lora, lora_dropout=0.1), {"seq_len": 77}),
    (partial(lora, lora_dropout=0.1), RECOMPUTED),
    (partial(lora, use_dora=True), {}),
    (qlora, {}),
    (qlora, {**RECOMPUTED, "packed": True}),
]


@pytest.mark.parametrize(("build", "given"), CASES, ids=range(len(CASES)))
def test_a_plan_is_what_the_allocator_counts(build, given):
    planned = settings(**given)
    plan = plan_memory(on_meta(build), LOSS, planned)
    step = plan.peak - plan.parts["optimizer state"]
    assert step == pytest.approx(measured(build, planned), rel=0.02)


def test_in_bfloat16_a_plan_lacks_only_what_the_cpu_repacks():
    planned = settings(dtype=torch.bfloat16, batch_size=2, seq_len=32)
    plan = plan_memory(on_meta(lora), LOSS, planned)
    step = plan.peak - plan.parts["optimizer state"]
    assert step == pytest.approx(measured(lora, planned), rel=0.1)


FIGURES = [  # modelled by hand for Llama 3 8B: builder, settings, tokens of a row, GiB
    (lora_llama3_8b, {}, 2048, 17.0),
    (qlora_llama3_8b, {}, 8192, 12.6),
    (llama3_8b, {}, 8192, 66.6),
    (llama3_8b, {"optimizer_in_bwd": True, "optimizer": "torchao.optim.AdamW8bit"}, 4096, 34.5),
]


@pytest.mark.parametrize(("build", "given", "seq_len", "figure"), FIGURES)
def test_8b_takes_what_was_modelled_by_hand(build, given, seq_len, figure):
    adapters = {**LORA, "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    model = on_meta(build if build is llama3_8b else partial(build, **adapters, lora_rank=16))
    if "optimizer" in given:
        given = {**given, "optimizer": {"_component_": given["optimizer"], "lr": 1e-4}}
    planned = settings(dtype=torch.bfloat16, batch_size=2, seq_len=seq_len, device="cuda", **given)
    plan = plan_memory(model, LOSS, replace(planned, recompute=range(32)))
    assert plan.peak / GIB == pytest.approx(figure, rel=0.1)


def test_bytes_alive_come_back_and_the_peak_stays():
    with Ledger() as ledger:
        a = torch.ones(1000)
        b = a + 1
        assert ledger.now.total() == ledger.peak.total() == 8000
        del b
        assert (ledger.now.total(), ledger.peak.total()) == (4000, 8000)
        a.add_(1)
        c = a[:10].view(2, 5)
        del a
        assert (ledger.now.total(), ledger.peak.total()) == (4000, 8000)
        del c
        assert ledger.now.total() == 0


def test_a_plan_changes_nothing():
    model, before = on_meta(lora), (F.rms_norm, F.scaled_dot_product_attention)
    plan = plan_memory(model, LOSS, settings(device="cuda", **RECOMPUTED))
    assert plan == plan_memory(model, LOSS, settings(device="cuda", **RECOMPUTED))
    assert (F.rms_norm, F.scaled_dot_product_attention) == before
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not [p for p in model.parameters() if p.grad is not None]
    assert all("forward" not in vars(layer) for layer in model.layers)


def test_what_each_lever_takes_away():
    model, base = on_meta(full), settings(device="cuda")
    plain = plan_memory(model, LOSS, base)
    recomputed = plan_memory(model, LOSS, replace(base, recompute=range(3)))
    elsewhere = plan_memory(model, LOSS, replace(base, offload=True, batch_size=16))
    in_backward = plan_memory(model, LOSS, replace(base, optimizer_in_bwd=True))
    assert recomputed.most["activations"] < plain.most["activations"] / 2
    assert (
        elsewhere.most["activations"]
        < plan_memory(model, LOSS, replace(base, batch_size=16)).most["activations"]
    )
    assert plain.most["gradients"] == sum(p.nbytes for p in model.parameters())
    assert not in_backward.most["gradients"]


@pytest.mark.parametrize("build", [full, lora])
def test_as_few_blocks_are_recomputed_as_memory_demands(build):
    model, base = on_meta(partial(build, num_layers=5)), settings(device="cuda", batch_size=16)
    needed = [plan_memory(model, LOSS, replace(base, recompute=range(n))).needed for n in range(6)]
    assert needed == sorted(needed, reverse=True) and len(set(needed)) > 4
    for memory in (needed[0], needed[0] - 1, needed[2] + 1, needed[5] - 1):
        blocks = fewest_recomputed_blocks(model, LOSS, base, memory)
        assert blocks == range(min((n for n in range(6) if needed[n] <= memory), default=5))


@pytest.mark.parametrize(
    ("builder", "twin"),
    [
        ("mytune.models.llama3.lora_llama3_8b", "mytune.models.llama3.qlora_llama3_8b"),
        ("mytune.models.lora_auto_model", "mytune.models.qlora_auto_model"),
        ("mytune.models.llama3.llama3_8b", None),
        ("mine.lora_model", None),
    ],
)
def test_a_lora_builder_of_ours_has_a_twin_in_4_bits(builder, twin):
    change = _four_bits(SimpleNamespace(model={"_component_": builder, "quantize_base": False}))
    assert (change and change.values["model"]) == (twin and {"_component_": twin})


OPTIMIZERS = [
    ADAMW,
    {"_component_": "torch.optim.Adam", "amsgrad": True},
    {"_component_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9},
    {"_component_": "torch.optim.SGD", "lr": 0.1},
    {"_component_": "torch.optim.Adafactor"},
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_keeps_what_it_was_measured_to_keep(optimizer, dtype):
    model = full().to(dtype)
    kwargs = {key: value for key, value in optimizer.items() if key != "_component_"}
    built = getattr(torch.optim, optimizer["_component_"].rpartition(".")[2])(
        model.parameters(), **kwargs
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    built.step()
    kept = sum(
        value.nbytes
        for state in built.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    size = sum(p.nbytes for p in model.parameters())
    assert optimizer_size(optimizer, model, "cuda").state == pytest.approx(kept, abs=0.02 * size)


def test_paged_state_is_not_on_the_device_and_only_fused_steps_take_nothing():
    model = full()
    size = sum(p.nbytes for p in model.parameters())
    largest = max(p.nbytes for p in model.parameters())
    adamw = {"_component_": "torch.optim.AdamW"}
    assert optimizer_size({"_component_": "bitsandbytes.optim.PagedAdamW"}, model) == (0, 0)
    assert optimizer_size(adamw, model) == (2 * size, size)
    assert optimizer_size(adamw, model, in_backward=True) == (2 * size, largest)
    assert optimizer_size(ADAMW, model) == (2 * size, 0)


def test_ranks_share_weights_and_gather_blocks():
    model, base = on_meta(full), settings(device="cuda", **RECOMPUTED)
    alone = plan_memory(model, LOSS, base)
    four = plan_memory(model, LOSS, replace(base, shard_ranks=4))
    whole = plan_memory(model, LOSS, replace(base, shard_ranks=4, reshard=False))
    away = plan_memory(model, LOSS, replace(base, shard_ranks=4, cpu_offload=True))
    for part in ("weights", "optimizer state"):
        assert four.parts[part] == alone.parts[part] // 4 and not away.parts[part]
    assert four.most["gradients"] == pytest.approx(alone.most["gradients"] / 4, rel=0.01)
    blocks = sum(p.nbytes for layer in model.layers for p in layer.parameters())
    assert whole.most["gathered"] - four.most["gathered"] == blocks / 3
    assert alone.most["gathered"] == 0 < four.most["gathered"]


def test_unsummed_gradients_of_micro_batches_are_whole_and_float32():
    base = settings(dtype=torch.bfloat16, device="cuda", gradient_accumulation_steps=2)
    base = replace(base, shard_ranks=4)
    model = on_meta(full)
    once = plan_memory(model, LOSS, base)
    each = plan_memory(model, LOSS, replace(base, sync_every_micro_batch=True))
    assert once.most["gradients"] == 4 * sum(p.numel() for p in model.parameters())
    assert each.most["gradients"] == pytest.approx(once.most["gradients"] / 8, rel=0.01)


def test_the_fewest_ranks_are_found():
    model, base = on_meta(full), settings(device="cuda")
    needed = {
        ranks: plan_memory(model, LOSS, replace(base, shard_ranks=ranks)).needed
        for ranks in (2, 4, 8)
    }
    assert needed[8] < needed[4] < needed[2]
    assert fewest_ranks(model, LOSS, base, needed[4]) == 4
    assert fewest_ranks(model, LOSS, base, needed[4] - 1) == 8
    assert fewest_ranks(model, LOSS, base, 1000) is None

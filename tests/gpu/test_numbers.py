"""A GPU's numbers at real widths: bfloat16, compiled, packed, in 4 bits, recomputed, sharded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from mytune._sharded import fill
from mytune.models import llama3
from mytune.modules import (
    Decoder,
    LinearCrossEntropyLoss,
    adapter_state,
    document_mask,
    masks,
    packed_mask,
)
from mytune.quantization import NF4Embedding, dequantize_nf4, quantize_nf4
from mytune.training import (
    checkpoint_activations,
    compile_blocks,
    load_adapters,
    load_weights,
    seed_step,
)
from mytune.training.checkpointing.formats import HF
from tests.gpu import DEVICE, TINY
from tests.gpu.parts import SIZES, RandomWeights, WholeLogits, arguments, llama, sizes
from tests.recipes.ranks import SHARES_4_BITS

LAYERS, LENGTH = 2, 128 if TINY else 1024
LORA = {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True}
BF16, FP32 = torch.bfloat16, torch.float32
Batch = dict[str, Tensor]


def build(builder: str, dtype: torch.dtype, prepare: Callable[[Decoder], object], **more: Any):
    """Return a model of two blocks with adapters that do something."""
    config = sizes(LAYERS)
    with torch.device("meta"):
        model = getattr(llama3, builder)(**arguments(config), **LORA, **more)
    prepare(model)
    load_weights(model, RandomWeights(config, DEVICE), DEVICE, dtype)
    load_adapters(model, None, DEVICE, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapter_state(model).items():
        if "lora_B" in name:
            drawn = torch.randn(parameter.shape, generator=generator) * 0.02
            with torch.no_grad():
                fill(parameter, drawn)
    return model.train()


def nothing(model: Decoder) -> None:
    pass


def rows(count: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, SIZES.vocab_size, (count, LENGTH + 1), generator=generator)
    return {"tokens": tokens[:, :-1].to(DEVICE), "labels": tokens[:, 1:].clone().to(DEVICE)}


def packed(lengths: list[int]) -> Batch:
    """Two equal rows of documents of these lengths, then padding."""
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    places = torch.cat([torch.arange(n) for n in lengths])
    rest = (0, LENGTH - len(ids))
    batch = rows()
    batch["labels"][:, len(ids) :] = -100
    more = {"document_ids": F.pad(ids, rest, value=-1), "positions": F.pad(places, rest)}
    return batch | {name: row.expand(2, -1).to(DEVICE) for name, row in more.items()}


def learn(model: nn.Module, batch: Batch, loss: Any = None) -> tuple[float, dict[str, Tensor]]:
    """Return the summed loss of a batch and the adapters' gradients."""
    seed_step(0, 0, 0, DEVICE)
    total = (loss or LinearCrossEntropyLoss())(model, batch)
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return float(total.detach()), gradients


def assert_near(found: Any, expected: Any, loss: float, gradient: float) -> None:
    """Losses differ by no more than `loss`, gradients by `gradient`, both relative."""
    assert found[0] == pytest.approx(expected[0], rel=loss)
    assert found[1].keys() == expected[1].keys() and found[1]
    for name, theirs in expected[1].items():
        distance = (found[1][name] - theirs).norm() / theirs.norm()
        assert distance <= gradient, name


NEAR = {FP32: (1e-5, 1e-4), BF16: (2e-3, 3e-2)}
DTYPES = pytest.mark.parametrize("dtype", NEAR, ids=str)


def assert_as_near(found: Any, other: Any, exact: Any) -> None:
    """What bfloat16 found is no further from float32's than what it finds another way."""
    assert found[0] == pytest.approx(exact[0], rel=NEAR[BF16][0])
    assert found[1].keys() == other[1].keys() == exact[1].keys() and found[1]
    for name, theirs in exact[1].items():
        ours, others = ((each[1][name].float() - theirs).norm() for each in (found, other))
        assert ours <= 1.25 * others + 1e-3 * theirs.norm(), name


def peft(model: Decoder, dtype: torch.dtype) -> nn.Module:
    """Return transformers' and PEFT's model with the weights and the adapters of ours."""
    from peft import LoraConfig, get_peft_model

    config = sizes(LAYERS)
    twin = llama(config, dtype)
    weights = RandomWeights(config, DEVICE)
    twin.load_state_dict({HF.table.theirs(name): weights[name] for name in weights})
    names = [*LORA["lora_attn_modules"], "gate_proj", "up_proj", "down_proj"]
    twin = get_peft_model(twin, LoraConfig(r=8, lora_alpha=16, target_modules=names))
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for name, adapter in adapter_state(model).items():
            parameters[their_name(name)].copy_(adapter)
    return twin.train()


def their_name(adapter: str) -> str:
    module, _, rest = adapter.partition(".lora_")
    linear = HF.table.theirs(f"{module}.weight").removesuffix(".weight")
    return f"base_model.model.{linear}.lora_{rest.replace('.weight', '.default.weight')}"


def learn_with_peft(model: Decoder, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    def loss(twin: nn.Module, batch: Batch) -> Tensor:
        logits = twin(batch["tokens"]).logits.flatten(0, 1).float()
        return F.cross_entropy(logits, batch["labels"].flatten(), reduction="sum")

    total, theirs = learn(peft(model, dtype), rows(), loss)
    return total, {name: theirs[their_name(name)] for name in adapter_state(model)}


def test_bfloat16_is_as_near_to_float32_as_pefts() -> None:
    exact = build("lora_llama3", FP32, nothing)
    expected = learn(exact, rows())
    assert_near(learn_with_peft(exact, FP32), expected, *NEAR[FP32])
    found = learn(build("lora_llama3", BF16, nothing), rows())
    assert_as_near(found, learn_with_peft(exact, BF16), expected)


@pytest.mark.parametrize(
    ("builder", "dtype"),
    [("lora_llama3", FP32), ("lora_llama3", BF16), ("qlora_llama3", BF16)],
    ids=str,
)
def test_compiled_blocks_compute_the_same(builder: str, dtype: torch.dtype) -> None:
    compiled = learn(build(builder, dtype, compile_blocks), rows())
    plain = learn(build(builder, dtype, nothing), rows())
    if dtype is FP32:
        assert_near(compiled, plain, *NEAR[FP32])
    else:
        assert_as_near(compiled, plain, learn(build(builder, FP32, nothing), rows()))


@DTYPES
def test_the_fused_loss_is_that_of_whole_logits(dtype: torch.dtype) -> None:
    model = build("lora_llama3", dtype, nothing)
    assert_near(learn(model, rows()), learn(model, rows(), WholeLogits()), *NEAR[dtype])


DOCUMENTS = [LENGTH // 2, 3, LENGTH // 4]


@DTYPES
@pytest.mark.parametrize("prepare", [nothing, compile_blocks], ids=["eager", "compiled"])
def test_packed_rows_compute_the_same_with_either_mask(
    prepare: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = packed(DOCUMENTS)
    found = learn(build("lora_llama3", dtype, prepare), batch)
    mask = packed_mask(batch["document_ids"], SIZES.head_dim)
    assert TINY or isinstance(mask, BlockMask)
    monkeypatch.setattr(masks, "_MASKS", {})
    assert isinstance(packed_mask(batch["document_ids"], SIZES.head_dim), Tensor)
    plain = learn(build("lora_llama3", dtype, nothing), batch)
    if dtype is FP32:
        assert_near(found, plain, *NEAR[FP32])
    else:
        assert_as_near(found, plain, learn(build("lora_llama3", FP32, nothing), batch))


@DTYPES
def test_packed_documents_are_strangers(dtype: torch.dtype) -> None:
    """The loss of a packed row is that of its documents alone."""
    model, batch = build("lora_llama3", dtype, nothing), packed(DOCUMENTS)
    alone, start = 0.0, 0
    for length in DOCUMENTS:
        cut = {key: batch[key][:, start : start + length] for key in ("tokens", "labels")}
        alone += learn(model, cut)[0]
        start += length
    assert learn(model, batch)[0] == pytest.approx(alone, rel=NEAR[dtype][0])


@pytest.mark.parametrize("builder", ["lora_llama3", "qlora_llama3"])
def test_recomputing_changes_nothing_dropout_included(builder: str, deterministic: None) -> None:
    plain = learn(build(builder, BF16, nothing, lora_dropout=0.1), rows())
    again = learn(build(builder, BF16, checkpoint_activations, lora_dropout=0.1), rows())
    assert_near(again, plain, 0, 0)
    other = learn(build(builder, BF16, nothing), rows())
    assert other[0] != plain[0]


def share(model: Decoder) -> None:
    """Shard as `shard_model` does, which leaves a single rank alone."""
    mesh = init_device_mesh(DEVICE.type, (1,))
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=module is not model)


@pytest.mark.parametrize(
    "builder", ["lora_llama3", pytest.param("qlora_llama3", marks=SHARES_4_BITS)]
)
def test_fsdp_with_one_rank_computes_the_same(
    builder: str, tmp_path: Path, deterministic: None
) -> None:
    backend = "gloo" if TINY else "nccl"
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        found = learn(build(builder, BF16, share), rows())
        whole = {name: gradient.full_tensor() for name, gradient in found[1].items()}
    finally:
        dist.destroy_process_group()
    assert_near((found[0], whole), learn(build(builder, BF16, nothing), rows()), 0, 1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (33, 129), (1024, SIZES.embed_dim)], ids=str)
@DTYPES
def test_nf4_is_the_same_on_every_device(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Codes and weights: the kernel's on a GPU, the table's on a CPU."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, theirs = quantize_nf4(weight.to(DEVICE)), quantize_nf4(weight)
    for found, expected in zip(ours, theirs, strict=True):
        assert torch.equal(found.cpu(), expected)
    found = dequantize_nf4(*ours, shape, dtype)
    assert torch.equal(found.cpu(), dequantize_nf4(*theirs, shape, dtype))


def test_nf4_embeddings_look_up_rows_of_the_table() -> None:
    table = NF4Embedding(1000, SIZES.embed_dim, device="meta")
    table.quantize_(torch.randn(1000, SIZES.embed_dim, device=DEVICE, dtype=BF16))
    tokens = torch.randint(1000, (2, 50), device=DEVICE)
    assert torch.equal(table(tokens), table.weight[tokens])


def test_a_4_bit_head_has_the_loss_of_what_it_stands_for() -> None:
    model = build("qlora_llama3", BF16, nothing, quantize_embeddings=True)
    expected = learn(model, rows(), WholeLogits())
    assert_near(learn(model, rows()), expected, *NEAR[BF16])


@pytest.mark.skipif(TINY, reason="a CPU does not tell how much memory tensors take")
def test_loading_8b_in_4_bits_never_holds_it_in_16() -> None:
    more = {"quantize_embeddings": True, **LORA}
    with torch.device("meta"):
        model = llama3.qlora_llama3(**arguments(SIZES), **more)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    load_weights(model, RandomWeights(SIZES, DEVICE), DEVICE, BF16)
    held = torch.cuda.memory_allocated() - before
    assert held < 4.2 * 2**30
    # The largest weight, and the float32 copies of a piece of it.
    assert torch.cuda.max_memory_allocated() - before < held + 2.5 * 2**30


def test_attention_of_a_whole_batch_with_a_bool_mask() -> None:
    """The mask that dropout falls back on is taken by a kernel that keeps no scores."""
    documents = packed(DOCUMENTS)["document_ids"]
    q = torch.randn(2, SIZES.num_heads, LENGTH, SIZES.head_dim, device=DEVICE, dtype=BF16)
    found = F.scaled_dot_product_attention(q, q, q, attn_mask=document_mask(documents))
    assert found.isfinite().all()

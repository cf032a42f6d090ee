"""torchao on a model that mytune built and loaded: what changes, what runs, what is refused."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    PerTensor,
    quantize_,
)
from torchao.quantization.quant_primitives import MappingType

from mytune.assets import ASSETS
from mytune.config import instantiate
from mytune.errors import ConfigError, ResourceError
from mytune.generation import can_compile, generate_batch, pack_linears
from mytune.generation.cpu_linear import DynamicInt8Linear, Int8Linear
from mytune.generation.packing import packed_linear
from mytune.generation.row_linear import KINDS
from mytune.models import auto_model
from mytune.models.llama3 import llama3
from mytune.modules import LinearCrossEntropyLoss
from mytune.quantization import (
    QUANTIZERS,
    Float8DynActFloat8WeightQuantizer,
    Float8WeightOnlyQuantizer,
    Int4WeightOnlyQuantizer,
    Int8DynActInt4WeightQuantizer,
    Int8DynActInt8WeightQuantizer,
    Int8WeightOnlyQuantizer,
    check_quantizer,
    quantize_linears,
    stored_bytes,
)
from mytune.quantization.tensors import numbers_and_scale
from tests.quantization.conftest import CPU, ON_CPU, load, some_tokens

BF16, FP32 = torch.bfloat16, torch.float32


def logits(model, tokens):
    with torch.inference_mode():
        return model(tokens).float()


def change(found, expected):
    """The relative RMS of what changed."""
    return float((found - expected).norm() / expected.norm())


TUTORIAL = {
    "int8": (Int8WeightOnlyConfig(), 0.02),
    "int8 dynamic": (Int8DynamicActivationInt8WeightConfig(), 0.03),
    "float8": (Float8WeightOnlyConfig(), 0.05),
    "int4": (PrototypeInt4WeightOnlyConfig(group_size=32), 0.15),
}


@pytest.mark.parametrize("name", TUTORIAL)
def test_quantize_works_as_torchaos_tutorial_shows_it(name):
    config, bound = TUTORIAL[name]
    model = load(ASSETS / "tiny")
    tokens = some_tokens(model.config.vocab_size)
    expected = logits(model, tokens)
    quantize_(model, config)
    assert type(model.layers[0].attn.q_proj.weight) is not nn.Parameter
    assert 0 < change(logits(model, tokens), expected) < bound


def test_tied_embeddings_stay_tied_and_unquantized():
    model = load(ASSETS / "tiny")
    before = model.embed_tokens.weight.clone()
    quantize_(model, Int8WeightOnlyConfig())
    assert model.lm_head is None and type(model.embed_tokens.weight) is nn.Parameter
    assert torch.equal(model.embed_tokens.weight, before)
    hidden = torch.randn(3, model.config.embed_dim, dtype=BF16)
    assert torch.equal(model.head(hidden), F.linear(hidden, before))


@pytest.mark.parametrize("name", ON_CPU)
def test_every_quantizer_changes_logits_a_little_and_saves_memory(base, name):
    quantizer, kind, bound = ON_CPU[name]
    model = load(base)
    tokens = some_tokens(512)
    expected, size = logits(model, tokens), sum(p.nbytes for p in model.parameters())
    model = load(base, quantizer=quantizer)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {type(m.weight).__name__ for m in linears.values()} == {kind} and "lm_head" in linears
    assert 0 < change(logits(model, tokens), expected) < bound
    assert sum(stored_bytes(p) for p in model.parameters()) < 0.85 * size
    assert quantizer.quantize(model) is model  # torchtune's verb; what is quantized stays


def test_a_quantized_model_compiles_once(base):
    model = load(base, quantizer=Int8WeightOnlyQuantizer())
    graphs = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=graphs)
    tokens = some_tokens(512)
    for shift in range(3):
        moved = (tokens + shift) % 512
        assert change(logits(compiled, moved), logits(model, moved)) < 0.02
    assert graphs.frame_count == 1


def test_a_quantized_head_has_the_same_loss_fused_or_not(base):
    model = load(base, FP32, quantizer=Int8WeightOnlyQuantizer())
    assert type(model.lm_head.weight).__name__ == "Int8Tensor"
    tokens = some_tokens(512)
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
    with torch.no_grad():
        fused = LinearCrossEntropyLoss(chunk_size=7)(model, batch)
        whole = model(batch["tokens"]).flatten(0, 1)
    expected = F.cross_entropy(whole, batch["labels"].flatten(), reduction="sum")
    assert torch.allclose(fused, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("quantizer", "is_made_of_them"),
    [
        (Int8WeightOnlyQuantizer(), True),
        (Float8WeightOnlyQuantizer(), True),
        (Int8DynActInt8WeightQuantizer(), False),  # rounds inputs, too
        (Int8DynActInt4WeightQuantizer(64), False),
        (Int4WeightOnlyQuantizer(64), False),
    ],
)
def test_numbers_and_a_scale_are_told_of_weights_that_are_no_more(quantizer, is_made_of_them):
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).to(BF16)
    quantize_(model, quantizer.config(CPU))
    found = numbers_and_scale(model[0].weight, KINDS)
    assert (found is not None) == is_made_of_them
    if found:
        numbers, scale = found
        weight = numbers.float() * scale[:, None].float()
        torch.testing.assert_close(weight, model[0].weight.dequantize().float(), rtol=1e-2, atol=0)


PACKED = {"int8": Int8Linear, "int8 dynamic": DynamicInt8Linear}


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("length", [4, 24], ids=["few rows", "many rows"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_8_bit_linears_compute_the_same(base, name, length, capability, monkeypatch):
    quantizer, kind = ON_CPU[name][0], PACKED[name]
    exact, model = load(base, FP32, quantizer=quantizer), load(base, quantizer=quantizer)
    tokens = some_tokens(512, (2, length))
    expected, plain = logits(exact, tokens), logits(model, tokens)
    size = sum(stored_bytes(p) for p in model.parameters())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    pack_linears(model)
    # In each block q, k and v joined, o, gate and up joined, down; and the head.
    assert sum(type(m) is kind for m in model.modules()) == 4 * len(model.layers) + 1
    assert 0.99 * size < sum(stored_bytes(p) for p in model.parameters()) <= size
    packed = logits(model, tokens)
    assert 0 < change(packed, expected) < 1.2 * change(plain, expected)


def test_rounded_inputs_are_torchaos():
    """In float32 to the bit: a row of zeros, one whose largest number rounds up, one of two."""
    model = nn.Sequential(nn.Linear(96, 40, bias=False))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    x = torch.cat([torch.zeros(1, 96), torch.eye(96)[:1] * 3, torch.randn(5, 96) * 1e3])
    for rows in (x, x[1:2], x[:, None], x.T.contiguous().T):
        found = packed_linear(model[0].weight, 1, 1)(rows)
        torch.testing.assert_close(found, model(rows), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "config",
    [
        Int8DynamicActivationInt8WeightConfig(granularity=PerTensor()),
        Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC),
    ],
    ids=["whole tensors", "asymmetric"],
)
def test_inputs_that_are_rounded_otherwise_are_left_to_torchao(config):
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).to(BF16)
    quantize_(model, config)
    assert packed_linear(model[0].weight, 1, 1) is None


@pytest.mark.parametrize(("hidden", "compiles"), [(80, True), (88, False)])
def test_8_bit_rows_that_fill_no_vectors_are_left_to_torchao(hidden, compiles):
    sizes = dict(vocab_size=97, num_layers=2, num_heads=2, num_kv_heads=1, embed_dim=64)
    model = llama3(**sizes, intermediate_dim=hidden, max_seq_len=64).to(BF16)
    quantize_(model, Int8WeightOnlyConfig())
    expected = logits(model, torch.arange(5)[None])
    pack_linears(model)
    assert isinstance(model.layers[0].mlp.down_proj, Int8Linear) == compiles == can_compile(model)
    assert change(logits(model, torch.arange(5)[None]), expected) < 0.02


def test_what_torch_compiles_wrongly_is_not_compiled(base):
    model = load(base, quantizer=Int8DynActInt8WeightQuantizer())
    assert not can_compile(model)
    settings = {"max_new_tokens": 12}
    expected = generate_batch(model, [[1, 5, 77]], **settings)
    assert generate_batch(model, [[1, 5, 77]], compile=True, **settings) == expected


def test_a_compiled_step_with_rounded_inputs_says_the_same(base):
    """torch compiles torchao's product of one such row on a CPU to garbage (2.11, 2.13)."""
    model = load(base, FP32, quantizer=Int8DynActInt8WeightQuantizer())
    settings = {"max_new_tokens": 12}
    expected = generate_batch(model, [[1, 5, 77]], **settings)
    pack_linears(model)
    assert can_compile(model)
    assert generate_batch(model, [[1, 5, 77]], compile=True, **settings) == expected


def test_a_cpu_compiles_no_packed_linears(base):
    model = load(base, FP32)
    expected = generate_batch(model, [[1, 5, 77]], max_new_tokens=12)
    pack_linears(model)
    assert not can_compile(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        found = generate_batch(model, [[1, 5, 77]], max_new_tokens=12, compile=True)
    assert found == expected


@pytest.mark.parametrize("groupsize", [100, 0, -32])
def test_groups_that_divide_no_row_are_told_and_one_that_does(base, groupsize):
    model, quantizer = load(base), Int8DynActInt4WeightQuantizer(groupsize)
    with pytest.raises(ConfigError, match=rf"groupsize is {groupsize}, .* are 64, 96: 32 does"):
        check_quantizer(quantizer, model, CPU, BF16)
    check_quantizer(Int8DynActInt4WeightQuantizer(32), model, CPU, BF16)


@pytest.mark.parametrize("name", sorted(ON_CPU.keys() - {"int8", "int8 dynamic"}))
def test_packing_leaves_other_quantized_linears_alone(base, name):
    model = load(base, quantizer=ON_CPU[name][0])
    expected = logits(model, some_tokens(512))
    pack_linears(model)
    linears = {n: m for n, m in model.named_modules() if n.endswith(("proj", "head"))}
    assert {type(m) for m in linears.values()} == {nn.Linear}
    assert torch.equal(logits(model, some_tokens(512)), expected)


def on_meta(folder):
    with torch.device("meta"):
        return auto_model(str(folder))


def test_trying_a_quantizer_draws_no_random_numbers(base):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    check_quantizer(Int8WeightOnlyQuantizer(), on_meta(base), CPU, BF16)
    assert torch.equal(torch.get_rng_state(), state)


def refused(quantizer, folder, dtype=BF16, save=True):
    with pytest.raises((ConfigError, ResourceError)) as found:
        check_quantizer(quantizer, on_meta(folder), CPU, dtype, save)
    return found.value


def test_what_cannot_run_is_refused_and_what_can_is_listed(base):
    for quantizer in (Float8DynActFloat8WeightQuantizer(), Int4WeightOnlyConfig(group_size=32)):
        error = refused(quantizer, base)
        assert error.exit_code == 5 and "cannot run with torchao" in error.message
        assert type(quantizer).__name__ in error.message
        assert error.details == [
            "these can: Int8WeightOnlyQuantizer, Int8DynActInt8WeightQuantizer, "
            "Int4WeightOnlyQuantizer, Int8DynActInt4WeightQuantizer, Float8WeightOnlyQuantizer"
        ]


def test_groups_that_fit_nothing_are_refused(base):
    for quantizer in (Int4WeightOnlyQuantizer(128), Int8DynActInt4WeightQuantizer(256)):
        error = refused(quantizer, base)  # linears of 64 and 96 inputs
        assert error.exit_code == 2, error
        assert "groupsize" in error.message or "divisible" in error.message


def test_a_config_of_torchaos_that_leaves_all_as_it_is_is_refused(base):
    error = refused(PrototypeInt4WeightOnlyConfig(group_size=128), base)
    assert error.exit_code == 2 and "would quantize nothing" in error.message


def test_groups_that_fit_some_linears_are_taken(base, caplog):
    model = load(base, quantizer=Int4WeightOnlyQuantizer(64))
    assert type(model.layers[0].mlp.down_proj.weight) is nn.Parameter  # 96 inputs
    assert type(model.layers[0].mlp.up_proj.weight) is not nn.Parameter  # 64 inputs
    assert "3 linears stay as they are" in caplog.text and "layers.0.mlp.down_proj" in caplog.text


def test_int4_in_float32_is_refused(base):
    for quantizer in (Int4WeightOnlyQuantizer(32), PrototypeInt4WeightOnlyConfig(group_size=32)):
        error = refused(quantizer, base, FP32)
        assert error.exit_code == 2 and "dtype=bf16, not float32" in error.message


def test_what_is_no_quantizer_is_refused(base):
    error = refused(nn.Identity(), base)
    assert error.exit_code == 2 and "quantizer is a Identity" in error.message
    assert "Int8WeightOnlyQuantizer" in error.message


def test_without_torchao_the_error_says_how_to_install_it(base, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
        monkeypatch.setitem(sys.modules, name, None)
    error = refused(Int8WeightOnlyQuantizer(), base)
    assert error.exit_code == 5 and "pip install 'torchao>=0.18'" in error.message


TORCHTUNE = {
    "torchtune.training.quantization.Int8DynActInt4WeightQuantizer": Int8DynActInt4WeightQuantizer,
    "torchtune.training.quantization.Int4WeightOnlyQuantizer": Int4WeightOnlyQuantizer,
    "torchtune.utils.quantization.Int4WeightOnlyQuantizer": Int4WeightOnlyQuantizer,
    "torchtune.training.quantization.Int8DynActInt4WeightQATQuantizer": (
        Int8DynActInt4WeightQuantizer
    ),
}


@pytest.mark.parametrize(("name", "kind"), TORCHTUNE.items(), ids=TORCHTUNE)
def test_torchtunes_names_and_arguments_mean_ours(name, kind):
    assert instantiate({"_component_": name, "groupsize": 64}) == kind(groupsize=64)
    assert {kind.__name__ for kind in QUANTIZERS} >= {kind.__name__}


def test_torchaos_own_configs_are_components():
    config = instantiate({"_component_": "torchao.quantization.Int8WeightOnlyConfig"})
    assert config == Int8WeightOnlyConfig()


def test_adapters_stay_as_they_are():
    model = auto_model(str(ASSETS / "tiny"))
    model.layers[0].attn.q_proj.lora_A = nn.Linear(128, 8, bias=False)
    assert quantize_linears(model, Int8WeightOnlyQuantizer()) == []
    assert type(model.layers[0].attn.q_proj.lora_A.weight) is nn.Parameter
    assert type(model.layers[0].attn.q_proj.weight) is not nn.Parameter

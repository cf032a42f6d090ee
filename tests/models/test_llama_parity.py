"""Our logits and gradients are the Hugging Face model's, for every shape of Llama."""

from __future__ import annotations

import inspect
import json

import pytest
import torch

from mytune.errors import CheckpointError, ConfigError
from mytune.models import auto, llama3, llama3_1, llama3_2, llama3_3
from mytune.models.auto import sizes_from_hf, sizes_from_meta
from mytune.modules.decoder import rope_frequencies
from mytune.modules.masks import document_mask
from tests.hf import LLAMA31_ROPE, our_names, tiny_llama, twins

SHAPES = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "scaled rope": {"rope_parameters": {**LLAMA31_ROPE, "rope_theta": 500_000.0}},
    "head_dim of its own": {"head_dim": 24},
    "tied, scaled rope": {
        "tie_word_embeddings": True,
        "rope_parameters": {**LLAMA31_ROPE, "factor": 32.0, "rope_theta": 500_000.0},
    },
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_equal_hugging_face(shape):
    ours, theirs = twins(**shape)
    tokens = torch.randint(0, 160, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=3e-5)
    assert expected.std() > 0.3  # large enough that a fault would show


@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_gradients_equal_hugging_face(shape):
    ours, theirs = twins(**shape)
    tokens = torch.randint(0, 160, (2, 40), generator=torch.Generator().manual_seed(1))
    weight = torch.randn(2, 40, 160, generator=torch.Generator().manual_seed(2))
    (ours(tokens) * weight).sum().backward()
    (theirs(tokens).logits * weight).sum().backward()
    expected = our_names({n: p.grad for n, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-5 * scale)


def test_scaled_rope_differs_from_plain():
    ours, _ = twins(rope_parameters={**LLAMA31_ROPE, "rope_theta": 500_000.0})
    plain, _ = twins()
    a, b = (rope_frequencies(m.config, torch.device("cpu")) for m in (ours, plain))
    assert torch.equal(a[0], b[0]) and torch.allclose(a[-1], b[-1] / 8)
    assert not torch.equal(a, b)


def test_packed_documents_give_the_logits_they_give_alone():
    ours, _ = twins()
    first, second = torch.arange(3, 40)[None], torch.arange(50, 63)[None]
    tokens = torch.cat((first, second), dim=1)
    positions = torch.cat((torch.arange(37), torch.arange(13)))[None]
    documents = torch.tensor([[0] * 37 + [1] * 13])
    with torch.no_grad():
        packed = ours(tokens, positions, document_mask(documents))
        alone = torch.cat((ours(first), ours(second)), dim=1)
        torch.testing.assert_close(packed, alone, rtol=0, atol=2e-6)
        assert (
            ours(tokens) - alone
        ).abs().max() > 1e-2  # without the mask they would see each other


PUBLISHED = {  # parameters, as the model cards say
    llama3.llama3_8b: 8_030_261_248,
    llama3.llama3_70b: 70_553_706_496,
    llama3_1.llama3_1_8b: 8_030_261_248,
    llama3_1.llama3_1_405b: 405_853_388_800,
    llama3_2.llama3_2_1b: 1_235_814_400,
    llama3_2.llama3_2_3b: 3_212_749_824,
    llama3_3.llama3_3_70b: 70_553_706_496,
}


@pytest.mark.parametrize("build", PUBLISHED, ids=lambda b: b.__name__)
def test_sizes_are_the_published_ones(build):
    with torch.device("meta"):
        model = build()
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[build]


@pytest.mark.parametrize("module", [llama3, llama3_1, llama3_2, llama3_3], ids=lambda m: m.__name__)
def test_every_builder_has_a_lora_and_a_qlora_twin(module):
    here = [n for n, f in vars(module).items() if getattr(f, "__module__", "") == module.__name__]
    plain = [n for n in here if n.startswith("llama3") and not n.endswith("_sizes")]
    assert plain
    for name in plain:
        for twin in (f"lora_{name}", f"qlora_{name}"):
            signature = inspect.signature(getattr(module, twin))
            assert list(signature.parameters)[:3] == [
                "lora_attn_modules",
                "apply_lora_to_mlp",
                "apply_lora_to_output",
            ]
            assert getattr(module, twin).__module__ == module.__name__


def test_generic_builders_take_sizes():
    sizes = dict(
        vocab_size=50, num_layers=1, num_heads=2, num_kv_heads=1, embed_dim=32, max_seq_len=16
    )
    assert llama3.llama3(**sizes).config.intermediate_dim == 256
    assert llama3_2.llama3_2(**sizes).lm_head is None
    assert llama3_1.llama3_1(**sizes, scale_factor=4).config.rope_scaling.factor == 4
    lora = llama3.lora_llama3(["q_proj"], **sizes, lora_rank=2)
    assert [n for n, p in lora.named_parameters() if p.requires_grad] == [
        "layers.0.attn.q_proj.lora_A.weight",
        "layers.0.attn.q_proj.lora_B.weight",
    ]


def test_meta_params_give_llama_8b():
    params = {
        "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
        "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500000.0,
    }  # fmt: skip
    assert sizes_from_meta(params) == llama3.LLAMA3_8B


@pytest.mark.parametrize("size", ["1B", "3B"])
def test_meta_params_give_llama_3_2(size):
    params = {
        "1B": {"dim": 2048, "n_layers": 16, "n_heads": 32, "ffn_dim_multiplier": 1.5},
        "3B": {"dim": 3072, "n_layers": 28, "n_heads": 24, "ffn_dim_multiplier": 1.0},
    }[size] | {
        "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 256, "norm_eps": 1e-5,
        "rope_theta": 500000.0, "use_scaled_rope": True,
    }  # fmt: skip
    assert sizes_from_meta(params) == getattr(llama3_2, f"LLAMA3_2_{size}")


SCALING = {
    "rope_type": "llama3",
    "factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}
WRONG = {
    "AttributeError": {"rope_scaling": "yarn"},
    "ZeroDivisionError": {"num_attention_heads": 0},
    "vocab_size is '10'": {"vocab_size": "10"},
    "num_layers is -1": {"num_hidden_layers": -1},
    "num_layers is 1000000": {"num_hidden_layers": 10**6},
    "vocab_size is 1000": {"vocab_size": 10**19},
    "norm_eps is '1e-5'": {"rms_norm_eps": "1e-5"},
    "rope_base is -1": {"rope_theta": -1},
    "rope_base is 1000000": {"rope_theta": 10**30},
    "rope_scaling.factor is 0": {"rope_scaling": SCALING | {"factor": 0}},
    "high_freq_factor is not above": {"rope_scaling": SCALING | {"high_freq_factor": 1}},
    "tie_word_embeddings is 'false'": {"tie_word_embeddings": "false"},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_config_with_wrong_values_is_told(tmp_path, message):
    right = tiny_llama().config.to_dict() | {"head_dim": None, "rope_parameters": None}
    (tmp_path / "config.json").write_text(json.dumps(right | WRONG[message]))
    with pytest.raises(CheckpointError, match=f"config.json does not describe .*{message}"):
        auto.auto_model(str(tmp_path))


@pytest.mark.parametrize("text", ["[]", "null", "[" * 100_000], ids=["list", "null", "deep"])
def test_a_config_that_is_none_is_told(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json does not describe a Llama model"):
        auto.auto_model(str(tmp_path))


def test_a_config_we_cannot_compute_is_refused_by_key():
    config = tiny_llama().config.to_dict() | {"attention_bias": True, "hidden_act": "gelu"}
    with pytest.raises(CheckpointError, match=r"(?s)hidden_act is 'gelu'.*attention_bias is True"):
        sizes_from_hf(config)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither config.json .* nor params.json"):
        auto.auto_model(str(tmp_path))
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(CheckpointError) as caught:
        auto.auto_model(str(tmp_path))
    assert "is an adapter: its base is checkpoint_dir" in caught.value.details[0]


def test_lora_on_a_tied_head_is_refused():
    with pytest.raises(ConfigError, match="tied"), torch.device("meta"):
        llama3_2.lora_llama3_2_1b(["q_proj"], apply_lora_to_output=True)

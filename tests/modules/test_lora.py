"""LoRA changes a built model and nothing else: names, the start, the merge, what trains."""

from __future__ import annotations

from dataclasses import replace

import peft
import pytest
import torch

from mytune.errors import ConfigError
from mytune.models.auto import sizes_from_hf
from mytune.models.builders import lora_decoder
from mytune.modules.decoder import Decoder
from mytune.modules.lora import (
    LoRAConfig,
    MergedWeights,
    adapter_config,
    adapter_state,
    apply_lora,
    init_adapters,
    is_adapter,
    lora_config_from_peft,
)
from tests.hf import our_names, tiny_llama

KINDS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
TOKENS = torch.randint(0, 160, (2, 30), generator=torch.Generator().manual_seed(3))


def build(**options):
    theirs = tiny_llama()
    config = sizes_from_hf(theirs.config.to_dict())
    model = lora_decoder(config, ["q_proj", "output_proj"], True, True, lora_rank=4, **options)
    model.load_state_dict(our_names(theirs.state_dict()), strict=False)
    init_adapters(model, seed=5)
    return model, theirs


def perturb(model):
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, adapter in adapter_state(model).items():
            scale = 1.0 if "magnitude" in name else 0.1
            adapter.add_(torch.randn(adapter.shape, generator=generator) * scale * 0.3)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_at_initialisation_the_model_is_its_base(options):
    model, theirs = build(**options)
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        if options.get("use_dora"):  # a division and a product by the same norm
            torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=1e-5)
        else:
            assert torch.equal(model(TOKENS), expected)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_merged_weights_are_base_and_adapter(options):
    model, _ = build(**options)
    before = {n: p.clone() for n, p in model.named_parameters()}
    perturb(model)
    merged = Decoder(model.config)
    merged.load_state_dict(dict(MergedWeights(model)))
    with torch.no_grad():
        torch.testing.assert_close(merged(TOKENS), model(TOKENS), rtol=0, atol=5e-6)
        assert (model(TOKENS) - build(**options)[0](TOKENS)).abs().max() > 0.1
    for name, parameter in model.named_parameters():  # reading them changes nothing
        assert ".lora_" in name or torch.equal(parameter, before[name])


def test_small_changes_of_doras_magnitudes_are_not_rounded_away_in_bfloat16():
    model, _ = build(use_dora=True)
    layer = model.layers[0].attn.q_proj.bfloat16()
    layer.lora_magnitude_vector.data = layer.lora_magnitude_vector.float()
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        before = layer(x).float()
        layer.lora_magnitude_vector.mul_(1.0015)
        scale = (layer(x).float() * before).sum() / (before * before).sum()
    assert scale.item() == pytest.approx(1.0015, abs=2e-4)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_forward_and_gradients_equal_peft(options):
    model, theirs = build(**options)
    perturb(model)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules="q_proj o_proj gate_proj up_proj down_proj lm_head".split(),
        **options,
    )
    oracle = peft.get_peft_model(theirs, config)
    own = adapter_state(model)
    pairs = []
    for name, parameter in oracle.named_parameters():
        if "lora_" in name:
            short = name.replace("base_model.model.", "", 1).replace(".default", "")
            short = next(iter(our_names({short: None})))
            short = short.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
            parameter.data.copy_(own[short])
            pairs.append((short, parameter))
    assert {short for short, _ in pairs} == set(own)
    weight = torch.randn(2, 30, 160, generator=torch.Generator().manual_seed(4))
    ours, expected = model(TOKENS), oracle(TOKENS).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    (ours * weight).sum().backward()
    (expected * weight).sum().backward()
    for short, parameter in pairs:
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(own[short].grad, parameter.grad, rtol=0, atol=2e-5 * scale)


def test_only_adapters_train_and_base_names_stay():
    model, theirs = build()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapter_state(model))
    assert set(our_names(theirs.state_dict())) == set(MergedWeights(model))


def test_adapters_are_float32_beside_bfloat16_weights():
    model, _ = build()
    model.bfloat16()
    for adapter in adapter_state(model).values():
        adapter.data = adapter.data.float()
    out = model(TOKENS)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(a.grad.dtype == torch.float32 for a in adapter_state(model).values())


def test_adapters_depend_on_the_seed_alone():
    model, _ = build()
    start = {n: a.clone() for n, a in adapter_state(model).items()}
    init_adapters(model, seed=5)
    assert all(torch.equal(a, start[n]) for n, a in adapter_state(model).items())
    init_adapters(model, seed=6)
    assert any(not torch.equal(a, start[n]) for n, a in adapter_state(model).items())


def test_dropout_acts_in_training_only():
    model, _ = build(lora_dropout=0.5)
    perturb(model)
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(TOKENS), model(TOKENS))
    model.eval()
    assert torch.equal(model(TOKENS), model(TOKENS))


def test_an_unknown_module_name_lists_those_that_exist():
    with pytest.raises(ConfigError, match=r"'k_porj'; did you mean 'k_proj'\?.* it has down_proj"):
        lora_decoder(sizes_from_hf(tiny_llama().config.to_dict()), ["q_proj", "k_porj"])


@pytest.mark.parametrize("setting", [{"lora_rank": 0}, {"lora_dropout": 1.0}, {"lora_dropout": -1}])
def test_an_impossible_rank_or_dropout_is_refused(setting):
    (name, value), sizes = *setting.items(), sizes_from_hf(tiny_llama().config.to_dict())
    with pytest.raises(ConfigError, match=f"{name} is {value}; it must be"):
        lora_decoder(sizes, ["q_proj"], **setting)
    with pytest.raises(ConfigError, match=r"attn_dropout is 1\.5; it must be"):
        replace(sizes, attn_dropout=1.5)


def test_lora_without_a_module_is_refused():
    with pytest.raises(ConfigError, match="no module to adapt"):
        lora_decoder(sizes_from_hf(tiny_llama().config.to_dict()))


def test_peft_settings_are_read_back():
    from mytune.modules.lora import adapter_config

    model, _ = build(use_rslora=True)
    config = lora_config_from_peft(adapter_config(model))
    assert config.use_rslora and config.rank == 4 and "o_proj" in config.modules


def test_modules_are_adapted_one_after_the_other_and_all_train():
    model = Decoder(sizes_from_hf(tiny_llama().config.to_dict()))
    apply_lora(model, LoRAConfig(("q_proj",), 4, 8))
    apply_lora(model, LoRAConfig(("up_proj",), 4, 8))
    assert all(p.requires_grad == is_adapter(name) for name, p in model.named_parameters())
    assert adapter_config(model)["target_modules"] == ["q_proj", "up_proj"]
    apply_lora(model, LoRAConfig(("v_proj",), 4, 16))
    with pytest.raises(ConfigError, match="of different rank, alpha or kind"):
        adapter_config(model)

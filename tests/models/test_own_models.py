"""A model of one's own: what it changes of the decoder holds in training, decoding and loading."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mytune.errors import CheckpointError
from mytune.generation import generate, pack_linears
from mytune.models.auto import sizes_from_hf
from mytune.modules import (
    Decoder,
    LinearCrossEntropyLoss,
    LoRAConfig,
    adapter_config,
    apply_lora,
    make_plain,
)
from mytune.quantization import apply_nf4
from mytune.training import FullModelHFCheckpointer, load_for_inference
from tests.hf import tiny_llama, twins

CPU = torch.device("cpu")
IDS = [5, 6, 7, 8, 9, 10, 11]


class Capped(Decoder):
    """Caps its logits, as Gemma 2 does."""

    def head(self, hidden):
        return 5 * torch.tanh(super().head(hidden) / 5)


class Scaled(Decoder):
    """Scales what it looks up, as Gemma does."""

    def forward(self, tokens, positions=None, mask=None, cache=None, output_hidden=False):
        handle = self.embed_tokens.register_forward_hook(lambda _module, _args, out: out * 8)
        try:
            return super().forward(tokens, positions, mask, cache, output_hidden)
        finally:
            handle.remove()


def own(kind):
    model, _ = twins()
    model.__class__ = kind
    return model


def test_the_loss_is_of_the_logits_that_its_head_gives():
    model, ids = own(Capped), torch.tensor([IDS])
    batch = {"tokens": ids[:, :-1], "labels": ids[:, 1:]}
    expected = F.cross_entropy(model(batch["tokens"])[0], ids[0, 1:], reduction="sum")
    expected.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    loss = LinearCrossEntropyLoss(chunk_size=4)(model, batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.lm_head.weight.grad, gradient, rtol=0, atol=1e-6)
    plain = LinearCrossEntropyLoss()(own(Decoder), batch)
    assert abs(plain - expected) > 0.01


@pytest.mark.parametrize("compile", [False, True])
def test_a_step_of_decoding_is_its_own_forward_pass(compile):
    model = own(Scaled)
    expected = list(IDS)
    with torch.no_grad():
        for _ in range(8):
            expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    found = list(generate(model, IDS, max_new_tokens=8, compile=compile))
    assert found == expected[len(IDS) :]
    assert found != list(generate(own(Decoder), IDS, max_new_tokens=8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_is_not_lost_when_linears_are_packed(dtype):
    model, _ = twins()
    for block in model.layers:
        linear = block.attn.k_proj
        linear.bias = nn.Parameter(torch.randn(len(linear.weight)))
    model.to(dtype)
    with torch.no_grad():
        expected = model(torch.tensor([IDS]))
        pack_linears(model)
        found = model(torch.tensor([IDS]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if dtype.itemsize == 4 else 0.1)


@pytest.fixture
def adapted(tmp_path):
    """A base model and an adapter, as PEFT saves them."""
    tiny_llama().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "adapter")
    return FullModelHFCheckpointer(
        str(tmp_path / "base"), adapter_checkpoint=str(tmp_path / "adapter")
    )


@pytest.mark.parametrize("built_with_adapters", [False, True])
def test_it_stays_itself_when_an_adapter_is_merged(adapted, built_with_adapters):
    def load(**how):
        with torch.device("meta"):
            model = Scaled(sizes_from_hf(tiny_llama().config.to_dict()))
            if built_with_adapters:
                apply_lora(model, LoRAConfig(("q_proj",), 4, 8))
        return load_for_inference(model, adapted, CPU, torch.float32, **how)

    merged, apart = load(), load(merge_adapter=False)
    assert adapter_config(merged) is None
    assert type(merged.layers[0].attn.q_proj) is nn.Linear
    with torch.no_grad():
        logits = [model(torch.tensor([IDS])) for model in (merged, apart)]
    torch.testing.assert_close(*logits, rtol=0, atol=2e-6)


def test_parameters_that_no_checkpoint_has_are_told(adapted):
    with torch.device("meta"):
        model = Decoder(sizes_from_hf(tiny_llama().config.to_dict()))
        model.layers[1].gain = nn.Parameter(torch.empty(3))
    with pytest.raises(CheckpointError, match="a component of yours adds them") as caught:
        load_for_inference(model, adapted, CPU, torch.float32)
    assert caught.value.details == ["layers.1.gain"]


@pytest.mark.parametrize("embeddings", [False, True])
def test_it_stays_itself_without_adapters_and_4_bits(adapted, embeddings):
    with torch.device("meta"):
        model = Scaled(sizes_from_hf(tiny_llama().config.to_dict()))
    apply_nf4(model, embeddings=embeddings, skip=() if embeddings else ("lm_head",))
    apply_lora(model, LoRAConfig(("q_proj", "up_proj")))
    make_plain(model)
    assert type(model) is Scaled
    base = FullModelHFCheckpointer(str(adapted.source_dir))
    found = load_for_inference(model, base, CPU, torch.float32)
    expected = own(Scaled)
    with torch.no_grad():
        assert torch.equal(found(torch.tensor([IDS])), expected(torch.tensor([IDS])))

"""Adapters are PEFT's: what we save, PEFT loads with our logits; what PEFT saves, we read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mytune.errors import CheckpointError
from mytune.modules.decoder import Decoder
from mytune.modules.lora import (
    LoRAConfig,
    MergedWeights,
    adapter_config,
    adapter_state,
    apply_lora,
    init_adapters,
)
from mytune.training.checkpointing.checkpointers import (
    FullModelHFCheckpointer,
    FullModelMetaCheckpointer,
)
from mytune.training.checkpointing.peft import check_adapter, read_adapter
from mytune.training.inference import load_for_inference
from tests.checkpointing import tiny

MODULES = ("q_proj", "k_proj", "o_proj", "down_proj", "lm_head")
KINDS = {
    "LoRA": LoRAConfig(MODULES, rank=4, alpha=16),
    "DoRA": LoRAConfig(MODULES, rank=4, alpha=16, use_dora=True),
    "rsLoRA": LoRAConfig(MODULES, rank=4, alpha=16, use_rslora=True),
}


def adapted(checkpointer: Any, lora: LoRAConfig) -> Any:
    """A model whose adapters do something."""
    model = tiny.our_model(tiny.SIZES, checkpointer.weights(tiny.SIZES))
    apply_lora(model, lora)
    init_adapters(model, seed=0)
    with torch.no_grad():
        for tensor in adapter_state(model).values():
            tensor.add_(
                0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2))
            )
    return model


def save(checkpointer: Any, model: Any, config: Any, merged: bool = True) -> Path:
    return checkpointer.save(
        "epoch_0",
        step=1,
        dtype=torch.float32,
        weights=MergedWeights(model) if merged else None,
        config=config,
        adapter=adapter_state(model),
        adapter_config=adapter_config(model),
        state={},
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", [FullModelHFCheckpointer, FullModelMetaCheckpointer])
def test_peft_loads_our_adapter_with_our_logits(
    kind: str, cls: Any, tmp_path: Path, tokens: Tensor
) -> None:
    from peft import PeftModel

    source = tmp_path / "source"
    (tiny.write_hf if cls is FullModelHFCheckpointer else tiny.write_meta)(source, tiny.SIZES)
    checkpointer = cls(str(source), output_dir=str(tmp_path / "out"))
    model = adapted(checkpointer, KINDS[kind])
    saved = save(checkpointer, model, tiny.SIZES)
    base = tiny.hf_model(tiny.SIZES)
    with torch.no_grad():
        plain = base(tokens).logits
        theirs = PeftModel.from_pretrained(base, saved / "adapter").eval()(tokens).logits
        ours = model(tokens)
    assert (plain - ours).abs().max() > 0.1
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


def test_transformers_loads_the_merged_model_without_applying_the_adapter_again(
    hf_dir: Path, tmp_path: Path, tokens: Tensor
) -> None:
    from transformers import AutoModelForCausalLM

    checkpointer = FullModelHFCheckpointer(str(hf_dir), output_dir=str(tmp_path / "out"))
    model = adapted(checkpointer, KINDS["LoRA"])
    theirs = AutoModelForCausalLM.from_pretrained(save(checkpointer, model, tiny.SIZES))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_alone_is_saved_and_read_back_exactly(
    kind: str, hf_dir: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    checkpointer = FullModelHFCheckpointer(str(hf_dir), output_dir=out)
    model = adapted(checkpointer, KINDS[kind])
    saved = save(checkpointer, model, tiny.SIZES, merged=False)
    assert {p.name for p in saved.iterdir()} == {"adapter", "recipe_state", "MANIFEST.json"}
    named = FullModelHFCheckpointer(
        str(hf_dir), output_dir=out, adapter_checkpoint="epoch_0/adapter"
    )
    latest = named.latest()
    assert latest is not None
    for state, config in (named.adapter_weights(), latest.adapter_weights()):  # type: ignore[misc]
        check_adapter((state, config), adapter_state(model))
        assert all(torch.equal(state[name], t) for name, t in adapter_state(model).items())
        said = adapter_config(model)
        assert said is not None
        assert {**said, "target_modules": sorted(said["target_modules"])}.items() <= config.items()


def test_an_adapter_that_peft_saved_is_read(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny.hf_model(tiny.SIZES)
    peft = get_peft_model(base, LoraConfig(r=3, target_modules="all-linear", use_dora=True))
    peft.save_pretrained(tmp_path / "adapter")
    state, config = read_adapter(tmp_path / "adapter")
    assert read_adapter(tmp_path)[1] == config  # a checkpoint stands for the adapter in it
    linears = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == linears and len(state) == 2 * 7 * 3
    own = peft.state_dict()
    name = "model.layers.1.self_attn.k_proj.lora_A.default.weight"
    assert torch.equal(state["layers.1.attn.k_proj.lora_A.weight"], own[f"base_model.model.{name}"])


@pytest.mark.parametrize(
    "where",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
        {"target_modules": r".*layers\.[12].*(v_proj|down_proj)"},
    ],
)
@pytest.mark.parametrize("merge", [True, False])
def test_pefts_adapters_of_some_linears_give_its_logits(
    where: dict[str, Any], merge: bool, hf_dir: Path, tmp_path: Path, tokens: Tensor
) -> None:
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(tiny.hf_model(tiny.SIZES), LoraConfig(r=4, **where)).eval()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        theirs = peft(tokens).logits
    peft.save_pretrained(tmp_path / "adapter")
    named = FullModelHFCheckpointer(str(hf_dir), adapter_checkpoint=str(tmp_path / "adapter"))
    with torch.device("meta"):
        model = Decoder(tiny.SIZES)
    model = load_for_inference(model, named, torch.device("cpu"), torch.float32, merge)
    with torch.no_grad():
        assert (theirs - tiny.hf_model(tiny.SIZES)(tokens).logits).abs().max() > 0.01
        torch.testing.assert_close(model(tokens), theirs, atol=1e-5, rtol=0)


def test_the_adapter_names_its_base_model(hf_dir: Path, tmp_path: Path) -> None:
    def named(out: str) -> str:
        checkpointer = FullModelHFCheckpointer(str(hf_dir), output_dir=str(tmp_path / out))
        saved = save(checkpointer, adapted(checkpointer, KINDS["LoRA"]), tiny.SIZES)
        config = json.loads((saved / "adapter" / "adapter_config.json").read_text())
        return str(config["base_model_name_or_path"])

    assert named("a") == str(hf_dir.resolve())
    config = json.loads((hf_dir / "config.json").read_text())
    (hf_dir / "config.json").write_text(json.dumps({**config, "_name_or_path": "me/tiny"}))
    assert named("b") == "me/tiny"
    (hf_dir / "original_repo_id.json").write_text('{"repo_id": "hub/tiny"}')
    assert named("c") == "hub/tiny"
    (tuned := tmp_path / "c" / "tuned").mkdir()
    for file in hf_dir.iterdir():
        (tuned / file.name).write_bytes(file.read_bytes())
    (tuned / "MANIFEST.json").write_text("{}")  # a run left it: its weights are of no repository
    hf_dir = tuned
    assert named("d") == str(tuned.resolve())


def test_an_adapter_that_does_not_fit_is_told_tensor_by_tensor() -> None:
    with pytest.raises(CheckpointError) as caught:
        check_adapter(
            ({"a": torch.ones(2), "b": torch.ones(3)}, {"r": 4}),
            {"b": torch.ones(4), "c": torch.ones(5)},
        )
    assert caught.value.details == [
        "mismatched b: expected [4], found [3]",
        "missing c: expected [5]",
        "unexpected a: found [2]",
    ]


def test_torchtunes_own_file_of_an_adapter_is_told_from_pefts(hf_dir: Path, tmp_path: Path) -> None:
    checkpointer = FullModelHFCheckpointer(str(hf_dir), output_dir=str(tmp_path / "out"))
    folder = save(checkpointer, adapted(checkpointer, KINDS["LoRA"]), tiny.SIZES) / "adapter"
    torch.save(
        {"layers.0.attn.q_proj.lora_a.weight": torch.ones(4, 32)}, folder / "adapter_model.pt"
    )
    with pytest.raises(CheckpointError, match=f"torchtune's own .*\\.adapter_checkpoint={folder}$"):
        read_adapter(folder / "adapter_model.pt")
    assert len(read_adapter(folder)[0]) == len(
        read_adapter(folder / "adapter_model.safetensors")[0]
    )


def test_of_an_adapter_of_another_model_not_every_tensor_is_told() -> None:
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    told = "70 of its tensors differ; .*lora_rank=4 model.lora_alpha=8 .*=\\[q_proj,v_proj\\]'"
    with pytest.raises(CheckpointError, match=told) as caught:
        check_adapter(({}, config), {f"{i:02}": torch.ones(2) for i in range(70)})
    assert caught.value.details[-2:] == ["missing 03: expected [2]", "and 66 more"]


@pytest.mark.parametrize("name", ["adapter", "adapter/adapter_model.safetensors", "."])
def test_an_adapter_is_not_added_to_the_weights_it_is_merged_into(
    hf_dir: Path, tmp_path: Path, name: str
) -> None:
    checkpointer = FullModelHFCheckpointer(str(hf_dir), output_dir=str(tmp_path / "out"))
    saved = save(checkpointer, adapted(checkpointer, KINDS["LoRA"]), tiny.SIZES)
    named = FullModelHFCheckpointer(str(saved), adapter_checkpoint=str(saved / name))
    with pytest.raises(CheckpointError, match=r"epoch_0 has the adapter .*/adapter merged in"):
        named.adapter_weights()
    base = FullModelHFCheckpointer(str(hf_dir), adapter_checkpoint=str(saved / name))
    assert base.adapter_weights() is not None
    manifest = json.loads((saved / "MANIFEST.json").read_text())
    files = {file: said for file, said in manifest["files"].items() if "adapter/" not in file}
    (saved / "MANIFEST.json").write_text(json.dumps({**manifest, "files": files}))
    assert named.adapter_weights() is not None  # it came there later

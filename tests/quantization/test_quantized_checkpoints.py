"""Quantized checkpoints: saved and loaded bit for bit, read by others, refused when damaged."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torchao.quantization import (
    Float8Tensor,
    Int4TilePackedTo4dTensor,
    Int8WeightOnlyConfig,
    PerRow,
)
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs
from transformers import AutoModelForCausalLM, TorchAoConfig

from mytune.assets import ASSETS
from mytune.cli.main import main
from mytune.errors import CheckpointError, ConfigError, NumericalError, ResourceError
from mytune.generation import generate, pack_linears
from mytune.quantization import Int4WeightOnlyQuantizer, Int8WeightOnlyQuantizer
from mytune.quantization.tensors import flatten, inner_tensors, is_quantized, keys_of, rebuild
from mytune.training import (
    FullModelHFCheckpointer,
    FullModelMetaCheckpointer,
)
from mytune.training.checkpointing.publish import verify
from mytune.training.checkpointing.safetensors_io import write_safetensors
from tests.hf import with_adapter
from tests.quantization.conftest import ON_CPU, load, save, some_tokens

INT8 = Int8WeightOnlyQuantizer()


def hashes(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def plain(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return inner_tensors(tensor) if is_quantized(tensor) else {"": tensor}


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(some_tokens(512))


@pytest.fixture
def quantized(base, tmp_path) -> Path:
    save(base, tmp_path / "quantized", INT8)
    return tmp_path / "quantized"


@pytest.mark.parametrize("name", ON_CPU)
def test_saved_and_loaded_weights_are_the_same_bit_for_bit(base, tmp_path, name):
    before = hashes(base)
    target = tmp_path / "quantized"
    model = save(base, target, ON_CPU[name][0])
    again = load(target)
    expected = dict(model.named_parameters())
    for key, parameter in again.named_parameters():
        assert type(parameter) is type(expected[key])
        found, wanted = plain(parameter), plain(expected[key])
        assert found.keys() == wanted.keys()
        for part in found:
            assert found[part].dtype is wanted[part].dtype
            assert torch.equal(found[part], wanted[part])
    assert torch.equal(logits(again), logits(model))
    texts = [list(generate(each, [5, 6, 7], max_new_tokens=20)) for each in (model, again)]
    assert texts[0] == texts[1] and len(set(texts[0])) > 3
    assert verify(target) == [] and hashes(base) == before


@pytest.mark.parametrize("shift", [0, 1, 8, 9])
def test_weights_begin_where_vectors_may_wherever_a_file_has_them(quantized, shift):
    """torch's kernel for 8-bit weights ends the process if it must load them from elsewhere."""
    file = quantized / "model.safetensors"
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header, data = file.read_bytes()[8 : 8 + size], file.read_bytes()[8 + size :]
    file.write_bytes((size + shift).to_bytes(8, "little") + header + b" " * shift + data)
    model = load(quantized)
    for name, parameter in model.named_parameters():
        assert all(part.data_ptr() % 64 == 0 for part in plain(parameter).values()), name
    expected = list(generate(model, range(5, 12), max_new_tokens=5))
    pack_linears(model)
    assert list(generate(model, range(5, 12), max_new_tokens=5)) == expected


@pytest.mark.parametrize("name", [name for name in ON_CPU if name != "int4"])
def test_transformers_computes_the_same(base, tmp_path, name):
    save(base, tmp_path / "q", ON_CPU[name][0], torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32).eval()
    assert is_quantized(theirs.lm_head.weight)
    with torch.inference_mode():
        expected = theirs(some_tokens(512)).logits
    assert torch.allclose(logits(load(tmp_path / "q", torch.float32)), expected, atol=1e-5)


def test_the_companions_say_what_it_is(base, quantized):
    names = {file.name for file in quantized.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.model"} <= names
    assert {"model.safetensors", "quantization.json", "MANIFEST.json"} <= names
    config = json.loads((quantized / "config.json").read_text())
    original = json.loads((base / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "torchao"
    assert config == original
    said = json.loads((quantized / "quantization.json").read_text())
    assert said["quantizer"] == "Int8WeightOnlyConfig" and said["dtype"] == "bfloat16"
    assert said["versions"].keys() == {"mytune", "python", "torch", "torchao"}


def test_its_own_dtype_is_kept(quantized, caplog):
    model = load(quantized, torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert "quantized in bf16 and computes in it, not in fp32: set dtype=bf16" in caplog.text


def test_a_tied_model_stays_tied(tmp_path):
    model = save(ASSETS / "tiny", tmp_path / "q", INT8)
    again = load(tmp_path / "q")
    assert again.lm_head is None
    assert torch.equal(again.embed_tokens.weight, model.embed_tokens.weight)
    with safe_open(tmp_path / "q" / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "lm_head" in key]  # noqa: SIM118


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_stays_beside_quantized_weights(base, quantized, tmp_path, use_dora):
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    theirs = with_adapter(theirs, std=0.1, use_dora=use_dora)
    theirs.save_pretrained(tmp_path / "adapter")
    with torch.inference_mode():
        expected = theirs.eval()(some_tokens(512)).logits.float()

    model = load(quantized, adapter=tmp_path / "adapter")
    assert is_quantized(model.layers[0].attn.q_proj.weight)
    plainly, adapted = logits(load(quantized)).float(), logits(model).float()
    assert (adapted - expected).norm() / expected.norm() < 0.04
    assert (plainly - expected).norm() / expected.norm() > 0.2


def test_nothing_is_quantized_twice(quantized):
    assert torch.equal(logits(load(quantized, quantizer=INT8)), logits(load(quantized)))
    with pytest.raises(ConfigError, match="is quantized already, with Int8WeightOnlyConfig"):
        load(quantized, quantizer=Int4WeightOnlyQuantizer(32))


def test_training_on_it_is_refused(tmp_path, capsys):
    command = ["run", "full_finetune_single_device", "--config", "tiny/full_single_device"]
    save(ASSETS / "tiny", tmp_path / "tiny", INT8)
    words = [f"checkpointer.checkpoint_dir={tmp_path / 'tiny'}", f"output_dir={tmp_path / 'run'}"]
    assert main([*command, *words, "epochs=1", "max_steps_per_epoch=1"]) == 4
    error = capsys.readouterr().err.splitlines()[-1]
    assert "holds a quantized model, and mytune trains" in error and str(tmp_path) in error


def test_weights_that_are_not_finite_are_not_saved(base, tmp_path):
    model = load(base, quantizer=INT8)
    with torch.no_grad():
        model.norm.weight[3] = float("inf")
    with pytest.raises(NumericalError, match=r"norm\.weight holds NaN or Inf"):
        FullModelHFCheckpointer(str(base)).save_quantized(tmp_path / "q", model, INT8)
    assert list(tmp_path.iterdir()) == []


def rewrite(folder: Path, change) -> None:
    """Write model.safetensors anew, with tensors and metadata changed by `change`."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    path.unlink()
    write_safetensors(path, tensors, metadata)


Q = "model.layers.0.self_attn.q_proj"


def renamed(tensors, metadata):
    tensors[f"{Q}._weight_quark"] = tensors.pop(f"{Q}._weight_qdata")


def reshaped(tensors, metadata):
    tensors[f"{Q}._weight_qdata"] = tensors[f"{Q}._weight_qdata"][:32].clone()


def no_json(tensors, metadata):
    metadata[f"{Q}.weight"] = "{"


def another_class(tensors, metadata):
    said = json.loads(metadata[f"{Q}.weight"])
    metadata[f"{Q}.weight"] = json.dumps({**said, "_type": "AffineQuantizedTensor"})


def no_dtype(tensors, metadata):
    said = json.loads(metadata[f"{Q}.weight"])
    said["_data"]["dtype"] = {"_type": "torch.dtype", "_data": "load"}
    metadata[f"{Q}.weight"] = json.dumps(said)


def unknown_attribute(tensors, metadata):
    said = json.loads(metadata[f"{Q}.weight"])
    said["_data"]["path"] = "/etc/passwd"
    metadata[f"{Q}.weight"] = json.dumps(said)


def no_rounding(tensors, metadata):
    said = json.loads(metadata[f"{Q}.weight"])
    said["_data"]["act_quant_kwargs"] = 5
    metadata[f"{Q}.weight"] = json.dumps(said)


DAMAGE = {
    renamed: rf"2 quantized tensors.*missing {Q}._weight_qdata.*unexpected {Q}._weight_quark",
    reshaped: r"mismatched layers.0.attn.q_proj.weight: expected \[64, 64\], found \[32, 64\]",
    no_json: "metadata is damaged",
    another_class: "damaged.*'AffineQuantizedTensor' is none of Int8Tensor",
    no_dtype: "damaged.*'load' is no dtype",
    no_rounding: "damaged.*act_quant_kwargs is 5",
    unknown_attribute: "damaged.*Failed to create instance of Int8Tensor",
}


@pytest.mark.parametrize("change", DAMAGE, ids=lambda change: change.__name__)
def test_what_is_damaged_is_refused_and_named(quantized, change):
    rewrite(quantized, change)
    with pytest.raises(CheckpointError) as error:
        load(quantized)
    assert str(quantized / "model.safetensors") in error.value.message
    assert re.search(DAMAGE[change], str(error.value), re.DOTALL), error.value


def test_a_cut_file_is_named_on_the_command_line(quantized, capsys):
    path = quantized / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    words = [f"{key}.checkpoint_dir={quantized}" for key in ("model", "checkpointer")]
    command = ["run", "generate", "--config", "tiny/generation", *words, "prompt=Hi"]
    assert main(command) == 4
    assert str(path) in capsys.readouterr().err


def test_weights_laid_out_for_another_cpu_are_refused(base, tmp_path):
    save(base, tmp_path / "q", Int4WeightOnlyQuantizer(32))

    def another_cpu(tensors, metadata):
        said = json.loads(metadata[f"{Q}.weight"])
        assert said["packed_for"].startswith("cpu, ")
        metadata[f"{Q}.weight"] = json.dumps({**said, "packed_for": "cpu, ANOTHER"})

    rewrite(tmp_path / "q", another_cpu)
    with pytest.raises(ResourceError, match="quantized for cpu, ANOTHER and cannot be read on cpu"):
        load(tmp_path / "q")


def test_another_checkpointer_is_told_which_one_reads_it(quantized):
    with pytest.raises(CheckpointError) as error:
        FullModelMetaCheckpointer(str(quantized))
    assert f"use FullModelHFCheckpointer with checkpoint_dir={quantized}" in str(error.value)


@pytest.mark.data
def test_metas_format_is_quantized_too(data_dir, tmp_path):
    folder = data_dir / "stories260K" / "meta"
    model = load(folder, torch.float32, reader=FullModelMetaCheckpointer, quantizer=INT8)
    FullModelMetaCheckpointer(str(folder)).save_quantized(tmp_path / "q", model, INT8)
    again = load(tmp_path / "q", torch.float32)
    tokens = some_tokens(512)
    with torch.inference_mode():
        assert torch.equal(again(tokens), model(tokens))


def test_what_transformers_quantized_is_read(base, tmp_path):
    how = TorchAoConfig(Int8WeightOnlyConfig())
    theirs = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=how
    )
    theirs.save_pretrained(tmp_path / "q")
    with torch.inference_mode():
        expected = theirs.eval()(some_tokens(512)).logits
    assert torch.allclose(logits(load(tmp_path / "q", torch.float32)), expected, atol=1e-5)


def test_a_merged_adapter_is_quantized_with_its_base(base, tmp_path):
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = with_adapter(theirs, std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    theirs.merge_and_unload().save_pretrained(tmp_path / "merged")
    expected = load(tmp_path / "merged", torch.float32, quantizer=INT8)

    model = load(base, torch.float32, adapter=tmp_path / "adapter", quantizer=INT8)
    assert is_quantized(model.layers[0].attn.q_proj.weight)
    assert not hasattr(model.layers[0].attn.q_proj, "lora_A")
    # A weight at the edge of two codes may fall to either side.
    assert (logits(model) - logits(expected)).norm() / logits(expected).norm() < 1e-3


def cuda_int4():
    codes = torch.arange(8 * 2 * 32 * 4, dtype=torch.int32).view(8, 2, 32, 4)
    return Int4TilePackedTo4dTensor(
        codes, torch.ones(2, 64, 2, dtype=torch.bfloat16), [1, 128], torch.Size((64, 256))
    )


def cuda_float8():
    kwargs = QuantizeTensorToFloat8Kwargs(granularity=PerRow())
    codes = torch.ones(64, 256).to(torch.float8_e4m3fn)
    return Float8Tensor(
        codes, torch.ones(64, 1), block_size=[1, 256], act_quant_kwargs=kwargs, dtype=torch.bfloat16
    )


@pytest.mark.parametrize("make", [cuda_int4, cuda_float8])
def test_classes_that_only_cuda_uses_survive_too(make):
    tensor = make()
    parts, text = flatten("a.weight", tensor)
    said = json.loads(text)
    keys = keys_of("a.weight", said)
    again = rebuild(said, {part: parts[key] for part, key in keys.items()})
    assert type(again) is type(tensor) and again.shape == tensor.shape == (64, 256)
    assert again.dtype is tensor.dtype is torch.bfloat16
    optional = getattr(tensor, "optional_tensor_attribute_names", [])
    for name in (*tensor.tensor_attribute_names, *optional):
        assert getattr(again, name) == getattr(tensor, name), name
    assert keys.keys() == inner_tensors(tensor).keys()

"""What is read and written back is the same, bit for bit; what is written, transformers loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mytune.training.checkpointing.checkpointers import (
    FullModelHFCheckpointer,
    FullModelMetaCheckpointer,
    FullModelTorchTuneCheckpointer,
)
from mytune.training.checkpointing.safetensors_io import write_safetensors
from tests.checkpointing import tiny


def republished(cls: Any, folder: Path, config: Any, out: Path, dtype: Any = torch.float32) -> Path:
    """Read a checkpoint and save it as it is."""
    checkpointer = cls(str(folder), output_dir=str(out))
    weights = checkpointer.weights(config)
    return checkpointer.save("epoch_0", step=1, dtype=dtype, weights=weights, config=config)


def assert_same(state: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(state) == list(other)
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_hf_files_come_back_byte_for_byte(
    tied: bool, kv_heads: int, shard: str, tmp_path: Path
) -> None:
    config = replace(tiny.SIZES, num_kv_heads=kv_heads, tie_word_embeddings=tied)
    tiny.write_hf(tmp_path / "hf", config, shard)
    saved = republished(FullModelHFCheckpointer, tmp_path / "hf", config, tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "40KB")
    assert sorted(path.name for path in saved.glob("*.safetensors")) == files
    for name in [*files, "config.json", "generation_config.json"]:
        assert (saved / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name
    if len(files) > 1:
        index = "model.safetensors.index.json"
        before, after = (json.loads((d / index).read_text()) for d in (tmp_path / "hf", saved))
        assert before["weight_map"] == after["weight_map"]
        assert before["metadata"]["total_size"] == after["metadata"]["total_size"]


def test_a_tied_source_that_holds_the_head_gets_it_back(tmp_path: Path) -> None:
    config = replace(tiny.SIZES, tie_word_embeddings=True)
    tiny.write_hf(tmp_path / "hf", config)
    file = tmp_path / "hf" / "model.safetensors"
    state = load_file(file)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, file, {"format": "pt"})
    saved = republished(FullModelHFCheckpointer, tmp_path / "hf", config, tmp_path / "out")
    assert (saved / "model.safetensors").read_bytes() == file.read_bytes()


def test_bin_files_are_read_and_become_safetensors(tmp_path: Path) -> None:
    model = tiny.write_hf(tmp_path / "hf", tiny.SIZES)
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    saved = republished(FullModelHFCheckpointer, tmp_path / "hf", tiny.SIZES, tmp_path / "out")
    assert not list(saved.glob("*.bin"))
    state = load_file(saved / "model.safetensors")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize(("parts", "embedding_dim"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("tied", [False, True])
def test_meta_files_come_back_with_the_same_keys_and_parts(
    parts: int, embedding_dim: int, tied: bool, tmp_path: Path
) -> None:
    config = replace(tiny.SIZES, tie_word_embeddings=tied)
    model = tiny.write_meta(tmp_path / "meta", config, parts, embedding_dim)
    saved = republished(FullModelMetaCheckpointer, tmp_path / "meta", config, tmp_path / "out")
    files = sorted(path.name for path in saved.glob("*.pth"))
    assert files == [f"consolidated.{part:02d}.pth" for part in range(parts)]
    for name in files:
        before, after = (torch.load(d / name) for d in (tmp_path / "meta", saved))
        assert_same(before, after)
    weights = FullModelMetaCheckpointer(str(saved)).weights(config)
    q_proj = model.state_dict()["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(weights["layers.1.attn.q_proj.weight"], q_proj)


def test_torchtunes_files_come_back(tmp_path: Path) -> None:
    meta = tiny.meta_state(tiny.hf_model(tiny.SIZES).state_dict(), tiny.SIZES)
    state = tiny.torchtune_state(meta)
    (tmp_path / "tt").mkdir()
    torch.save(state, tmp_path / "tt" / "torchtune_model_3.pt")
    saved = republished(
        FullModelTorchTuneCheckpointer, tmp_path / "tt", tiny.SIZES, tmp_path / "out"
    )
    assert_same(torch.load(saved / "torchtune_model.pt"), state)


def test_transformers_loads_what_was_saved_with_our_logits(
    hf_dir: Path, tmp_path: Path, tokens: Tensor
) -> None:
    from transformers import AutoModelForCausalLM

    checkpointer = FullModelHFCheckpointer(str(hf_dir), output_dir=str(tmp_path / "out"))
    model = tiny.our_model(tiny.SIZES, checkpointer.weights(tiny.SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        expected = model(tokens)
    weights = dict(model.named_parameters())
    saved = checkpointer.save(
        "epoch_0",
        step=1,
        dtype=torch.float32,
        weights=weights,
        config=tiny.SIZES,
        tensors={"x": torch.ones(2)},
        state={},
    )
    theirs = AutoModelForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, expected, atol=1e-5, rtol=0)


def test_config_json_names_the_type_that_was_saved(hf_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    saved = republished(
        FullModelHFCheckpointer, hf_dir, tiny.SIZES, tmp_path / "out", torch.bfloat16
    )
    source = json.loads((hf_dir / "config.json").read_text())
    assert json.loads((saved / "config.json").read_text()) == {**source, "dtype": "bfloat16"}
    assert AutoModelForCausalLM.from_pretrained(saved, dtype="auto").dtype == torch.bfloat16


def test_saving_changes_neither_the_model_nor_the_inputs(hf_dir: Path, tmp_path: Path) -> None:
    files = {path: path.read_bytes() for path in hf_dir.iterdir()}
    checkpointer = FullModelHFCheckpointer(str(hf_dir), output_dir=str(hf_dir))
    weights = dict(checkpointer.weights(tiny.SIZES))
    for tensor in weights.values():
        tensor.mul_(2)  # mapped memory: must not reach the file
    before = {name: tensor.clone() for name, tensor in weights.items()}
    checkpointer.save("step_1", step=1, dtype=torch.bfloat16, weights=weights, config=tiny.SIZES)
    assert_same(before, weights)
    assert {path: path.read_bytes() for path in files} == files


def test_the_tutorials_name_of_epoch_0_finds_its_weights(tmp_path: Path) -> None:
    tiny.write_meta(tmp_path / "meta", tiny.SIZES, parts=2)
    saved = republished(FullModelMetaCheckpointer, tmp_path / "meta", tiny.SIZES, tmp_path / "out")
    found = FullModelMetaCheckpointer(str(tmp_path / "out"), ["meta_model_0.pt"])
    assert found.source.paths == [saved / f"consolidated.0{part}.pth" for part in range(2)]


@pytest.mark.data
@pytest.mark.parametrize("sub", ["hf", "meta"])
def test_real_weights_come_back_bit_for_bit(sub: str, data_dir: Path, tmp_path: Path) -> None:
    from mytune.models.auto import sizes_of_checkpoint

    folder = data_dir / "stories260K" / sub
    cls = {"hf": FullModelHFCheckpointer, "meta": FullModelMetaCheckpointer}[sub]
    saved = republished(cls, folder, sizes_of_checkpoint(str(folder)), tmp_path)
    for path in folder.iterdir():
        if path.suffix == ".pth":
            assert_same(torch.load(path), torch.load(saved / path.name))
        else:
            assert (saved / path.name).read_bytes() == path.read_bytes(), path.name
    added = {p.name for p in saved.iterdir()} - {p.name for p in folder.iterdir()}
    assert added - {"tokenizer.json", "tokenizer_config.json"} == {"MANIFEST.json"}


def test_the_writer_writes_what_safetensors_writes(tmp_path: Path) -> None:
    types = [torch.int64, torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.bool]
    tensors = {f"b.{i}": torch.arange(6).view(2, 3).to(d) for i, d in enumerate(types)}
    tensors |= {'a "é"': torch.tensor(1.5), "empty": torch.zeros(0, 3), "a.10": torch.ones(3)}
    tensors["turned"] = torch.arange(6.0).view(2, 3).t()
    write_safetensors(tmp_path / "ours", tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "x", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "x").read_bytes()


def test_load_checkpoint_gives_the_model_under_our_names(hf_dir: Path) -> None:
    loaded = FullModelHFCheckpointer(str(hf_dir), model_type="LLAMA3").load_checkpoint()
    assert tiny.our_model(tiny.SIZES, loaded["model"]).state_dict().keys() == loaded["model"].keys()

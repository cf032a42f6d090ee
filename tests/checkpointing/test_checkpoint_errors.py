"""Checkpoints that are wrong or hostile are refused with a message that says what and where."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mytune.errors import CheckpointError, ConfigError
from mytune.modules.lora import lora_config_from_peft
from mytune.training.checkpointing.checkpointers import (
    FullModelHFCheckpointer,
    FullModelMetaCheckpointer,
)
from mytune.training.checkpointing.companions import companion_files
from mytune.training.checkpointing.peft import read_adapter
from mytune.training.checkpointing.safetensors_io import SafetensorsFile
from tests.checkpointing import tiny


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors of a checkpoint in one file."""
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})


def test_all_tensors_that_do_not_fit_are_named_with_both_shapes(hf_dir: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        del state["model.norm.weight"]
        state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(47, 32)
        state["model.layers.9.mlp.up_proj.weight"] = torch.zeros(48, 32)
        state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(48, 32).to(torch.float8_e4m3fn)

    rewrite(hf_dir, change)
    with pytest.raises(CheckpointError) as caught:
        FullModelHFCheckpointer(str(hf_dir)).weights(tiny.SIZES)
    assert sorted(caught.value.details) == [
        "mismatched model.layers.0.mlp.up_proj.weight: expected [48, 32], found [47, 32]",
        "mismatched model.layers.1.mlp.up_proj.weight: expected floating-point weights, found "
        "float8_e4m3fn [48, 32]; mytune trains unquantized checkpoints",
        "missing model.norm.weight: expected [32]",
        "unexpected model.layers.9.mlp.up_proj.weight: found float32 [48, 32]",
    ]
    assert caught.value.exit_code == 4


def test_a_tied_model_whose_head_differs_is_refused(hf_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="tie_word_embeddings: false"):
        FullModelHFCheckpointer(str(hf_dir)).weights(replace(tiny.SIZES, tie_word_embeddings=True))


def test_an_adapter_in_the_place_of_a_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        FullModelHFCheckpointer(str(tmp_path))
    assert caught.value.details == [
        f"{tmp_path} is an adapter: its base is checkpoint_dir, it is adapter_checkpoint"
    ]


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/../../b", "", "a" * 5000, "\ud800"]
)
def test_an_index_cannot_name_files_elsewhere(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").touch()
    folder = tmp_path / "hf"
    folder.mkdir()
    index = {"weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is not the name of a file inside"):
        FullModelHFCheckpointer(str(folder))


def test_a_link_out_of_the_directory_is_refused(hf_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (hf_dir / "tokenizer.json").symlink_to(tmp_path / "secret")
    FullModelHFCheckpointer(str(hf_dir))  # reading weights is not in question
    with pytest.raises(CheckpointError, match="leads out of its directory"):
        FullModelHFCheckpointer(str(hf_dir), output_dir=str(tmp_path / "out"))


def test_a_snapshot_of_the_hub_cache_may_link_to_its_blobs(hf_dir: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    hf_dir.rename(blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert FullModelHFCheckpointer(str(snapshot), output_dir=str(tmp_path)).weights(tiny.SIZES)
    assert set(companion_files(snapshot)) == {"config.json", "generation_config.json"}


def test_only_known_files_are_copied(hf_dir: Path) -> None:
    for name in ("run.py", "README.md", ".env", "tokenizer.json", "LICENSE.txt"):
        (hf_dir / name).touch()
    (hf_dir / "original").mkdir()
    (hf_dir / "original" / "tokenizer.model").touch()
    assert set(companion_files(hf_dir)) == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "LICENSE.txt",
        "original/tokenizer.model",
    }


class _Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("echo exploded > exploded",)


def _expanded() -> dict[str, Any]:
    return {"tok_embeddings.weight": torch.zeros(1).expand(10**9)}


def _meta_dir(folder: Path, content: Any) -> Path:
    folder.mkdir()
    torch.save(content, folder / "consolidated.00.pth")
    return folder


def test_a_pickle_that_runs_code_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder = _meta_dir(tmp_path / "meta", {"tok_embeddings.weight": _Bomb()})
    with pytest.raises(CheckpointError, match="runs no code"):
        FullModelMetaCheckpointer(str(folder)).weights(tiny.SIZES)
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_of_torchaos_tensors_is_told_to_be_quantized_again(tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    linear = torch.nn.Sequential(torch.nn.Linear(32, 32))
    quantize_(linear, Int8WeightOnlyConfig())
    folder = _meta_dir(tmp_path / "meta", linear.state_dict())
    code = (
        "import sys; from mytune.training.checkpointing.pickle_io import PickledFile\n"
        "from pathlib import Path; PickledFile(Path(sys.argv[1]))"
    )  # in a process in which torchao has not told torch that its classes are safe
    file = str(folder / "consolidated.00.pth")
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True)
    told = done.stderr.splitlines()[-1]
    assert "it holds torchao." in told and told.endswith("checkpoint again (`tune run quantize`)")
    assert "two options" not in done.stderr.partition("CheckpointError: ")[2]


@pytest.mark.parametrize("content", [_expanded(), [1, 2], {"a": 3}], ids=str)
def test_what_is_not_a_dict_of_plain_tensors_is_refused(content: Any, tmp_path: Path) -> None:
    folder = _meta_dir(tmp_path / "meta", content)
    with pytest.raises(CheckpointError, match=r"not a (plain tensor|dict of tensors)"):
        FullModelMetaCheckpointer(str(folder)).weights(tiny.SIZES)


def _compressed(file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(10**6))


def _overlapping(file: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x/data.pkl", bytes(100))
        archive.writestr("x/data/0", bytes(100))
        archive.infolist()[0].file_size = archive.infolist()[0].compress_size = 150
    file.write_bytes(stream.getvalue())


def _legacy(file: Path) -> None:
    file.write_bytes(pickle.dumps({"a": 1}))


def _empty(path: Path) -> None:
    path.write_bytes(b"PK\5\6" + bytes(18))


@pytest.mark.parametrize("write", [_compressed, _overlapping, _legacy, _empty])
def test_zip_files_that_are_not_torchs_are_refused(write: Any, tmp_path: Path) -> None:
    write(tmp_path / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"not stored plainly|not a file that torch\.save"):
        FullModelMetaCheckpointer(str(tmp_path)).weights(tiny.SIZES)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"\xff" * 8 + b[8:], lambda b: b""])
def test_a_damaged_safetensors_file_is_refused(damage: Any, hf_dir: Path) -> None:
    file = hf_dir / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=r"not a usable safetensors file.*copy it again"):
        FullModelHFCheckpointer(str(hf_dir)).weights(tiny.SIZES)


def test_files_can_be_listed_patterned_or_left_out(tmp_path: Path) -> None:
    tiny.write_hf(tmp_path, tiny.SIZES, "40KB")
    found = FullModelHFCheckpointer(str(tmp_path)).source.paths
    n = f"{len(found):05d}"
    pattern = {"filename_format": "model-{}-of-{}.safetensors", "max_filename": n}
    names = [path.name for path in found]
    assert len(names) > 1
    assert FullModelHFCheckpointer(str(tmp_path), pattern).source.paths == found
    assert FullModelHFCheckpointer(str(tmp_path), names).source.paths == found
    with pytest.raises(ConfigError, match="filename_format"):
        FullModelHFCheckpointer(str(tmp_path), {"filename_format": "x"})


def test_several_whole_models_are_not_taken_for_parts_of_one(tmp_path: Path) -> None:
    tiny.write_meta(tmp_path / "meta", tiny.SIZES)
    whole = tmp_path / "meta" / "consolidated.00.pth"
    for epoch in range(2):
        (tmp_path / f"meta_model_{epoch}.pt").write_bytes(whole.read_bytes())
    with pytest.raises(CheckpointError, match="name one in checkpoint_files"):
        FullModelMetaCheckpointer(str(tmp_path)).weights(tiny.SIZES)
    named = FullModelMetaCheckpointer(str(tmp_path), ["meta_model_1.pt"])
    assert named.weights(tiny.SIZES)


def test_errors_point_at_the_weights_that_are_there(hf_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"did you mean 'model.safetensors'"):
        FullModelHFCheckpointer(str(hf_dir), ["model.safetensor"])
    (hf_dir / "original").mkdir()
    torch.save({}, hf_dir / "original" / "consolidated.00.pth")
    with pytest.raises(CheckpointError) as caught:
        FullModelMetaCheckpointer(str(hf_dir))
    assert any("FullModelHFCheckpointer" in line for line in caught.value.details)
    assert any(f"checkpoint_dir={hf_dir}/original" in line for line in caught.value.details)
    with pytest.raises(CheckpointError, match="no directory"):
        FullModelHFCheckpointer(str(tmp_path / "nowhere"))


def test_torchtunes_one_name_of_two_formats_is_metas_by_its_params(tmp_path: Path) -> None:
    tiny.write_meta(tmp_path / "meta", tiny.SIZES)
    saved = tmp_path / "meta" / "model-00001-of-00001.bin"
    (tmp_path / "meta" / "consolidated.00.pth").rename(saved)
    meta = FullModelMetaCheckpointer(str(saved.parent))
    assert meta.source.paths == [saved] and meta.weights(tiny.SIZES)
    for reader in ("FullModelMetaCheckpointer", "FullModelTorchTuneCheckpointer"):
        with pytest.raises(CheckpointError) as caught:
            FullModelHFCheckpointer(str(saved.parent))
        assert [reader in line for line in caught.value.details] == [True]
        (saved.parent / "params.json").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="no Meta weights"):
        FullModelMetaCheckpointer(str(saved.parent))


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ({"model_type": "LAMA3"}, "did you mean 'LLAMA3'"),
        ({"safe_serialization": False}, "safe_serialization"),
        ({"keep_last_n_checkpoints": 0}, "keep_last_n_checkpoints is 0"),
    ],
)
def test_arguments_that_cannot_be_are_config_errors(argument: Any, said: str, hf_dir: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        FullModelHFCheckpointer(str(hf_dir), **argument)


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "bias": "all"}')
    save_file({"base_model.model.x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        read_adapter(tmp_path)
    assert caught.value.details == [
        "bias is 'all', not 'none'",
        "unexpected base_model.model.x: found float32 [1]",
    ]


ODD = {
    "init_lora_weights": "pissa",
    "use_qalora": True,
    "layer_replication": [[0, 1]],
    "use_rslora": "no",
}


@pytest.mark.parametrize("key", ODD)
def test_an_adapter_that_computes_something_else_is_refused(tmp_path: Path, key: str) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [], key: ODD[key]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"{key} is ") as caught:
        read_adapter(tmp_path)
    assert len(caught.value.details) == 1


@pytest.mark.parametrize(
    "wrong", [{"r": "8"}, {"r": 10**30}, {"lora_alpha": "x"}, {"lora_dropout": 2}]
)
def test_numbers_of_an_adapter_are_checked(wrong: dict[str, object]) -> None:
    config = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], **wrong}
    with pytest.raises(CheckpointError, match="must be a whole number above 0"):
        lora_config_from_peft(config)


def test_ctrl_c_while_a_tensor_is_read_is_no_bug(hf_dir: Path) -> None:
    """A handler that runs inside the library raises what the library then loses."""
    path = next(hf_dir.glob("*.safetensors"))
    file = SafetensorsFile(path)
    name = next(iter(file.specs))
    ended = []

    def interrupt(*_: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for trial in range(200):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + trial * 1e-6)
                while True:
                    file[name]
            except BaseException as error:
                ended.append(type(error))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert set(ended) == {KeyboardInterrupt}

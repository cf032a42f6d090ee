"""Ranks train as one does: same losses, gradient norms and weights, however they hold the model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mytune.training.checkpointing.safetensors_io import SafetensorsFile
from tests.hf import tiny_llama
from tests.recipes.conftest import LORA, assert_same_curve, curve, metrics_of, recipe_of
from tests.recipes.ranks import SHARES_4_BITS, run_ranks

pytestmark = pytest.mark.ranks

QLORA = {**LORA, "_component_": "mytune.models.qlora_auto_model"}
DORA = {**LORA, "use_dora": True}
SHARDED = "data_parallel_shard_dim=-1"


def assert_same_weights(left, right, atol=1e-4):
    left, right = load_file(f"{left}/model.safetensors"), load_file(f"{right}/model.safetensors")
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=0, atol=atol)


def test_torchrun_starts_the_ranks(run, config, tmp_path):
    """The whole way: `tune run --nproc_per_node 2`, twenty steps over rows of unequal length."""
    config |= {"epochs": 4, "clip_grad_norm": 1.0}
    alone = run({**config, "output_dir": config["output_dir"] + "_alone"})
    file = tmp_path / "ranks.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "mytune", "run", "--nproc_per_node", "2"]
    command += [recipe_of(config, "distributed"), "--config", str(file)]
    command += ["gradient_accumulation_steps=1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "copies of the model: 1, each shared by 2 ranks" in result.stderr
    assert_same_curve(metrics_of(config), alone)
    assert_same_weights(config["output_dir"] + "_alone/epoch_3", config["output_dir"] + "/epoch_3")


# name: model, overrides of all runs, ranks, overrides of the ranks
HELD = {
    "full, sharded": (None, [], 2, []),
    "full, whole on each": (None, [], 2, ["data_parallel_shard_dim=1"]),
    "full, 4 sharded, summed after each micro-batch": (
        None,
        ["gradient_accumulation_steps=4", "batch_size=4"],
        4,
        ["gradient_accumulation_steps=2", "batch_size=2", "fsdp_sync_every_micro_batch=True"],
    ),
    "full, 2 copies of 2 halves, gradients kept": (
        None,
        ["gradient_accumulation_steps=4", "batch_size=4"],
        4,
        ["gradient_accumulation_steps=2", "batch_size=2", "data_parallel_replicate_dim=2"],
    ),
    "full, recomputed, gathered throughout": (
        None,
        ["enable_activation_checkpointing=True"],
        2,
        ["fsdp_reshard_after_forward=False"],
    ),
    "full, stepped in the backward pass": (
        None,
        ["batch_size=8", "gradient_accumulation_steps=1", "clip_grad_norm=null"],
        2,
        ["batch_size=4", "optimizer_in_bwd=True"],
    ),
    "full, offloaded": (None, [], 2, ["enable_activation_offloading=True"]),
    "LoRA, whole on each": (LORA, [], 2, []),
    "LoRA, sharded": (LORA, [], 2, [SHARDED]),
    "DoRA, sharded": (DORA, [], 2, [SHARDED]),
    "QLoRA, sharded, recomputed": (QLORA, ["enable_activation_checkpointing=True"], 2, [SHARDED]),
}


@pytest.mark.parametrize(
    "held", [pytest.param(name, marks=[SHARES_4_BITS] * ("QLoRA" in name)) for name in HELD]
)
def test_ranks_equal_one(run, config, tmp_path, held):
    model, both, n, own = HELD[held]
    config |= {"epochs": 2, "clip_grad_norm": 1.0, "run_val_every_n_steps": 2}
    config |= {"model": model} if model else {}
    config["dataset_val"] = config["dataset"]
    alone = run({**config, "output_dir": config["output_dir"] + "_alone"}, *both)
    if not any("gradient_accumulation_steps" in each for each in (*both, *own)):
        own = [*own, "gradient_accumulation_steps=1"]
    ranks = run_ranks(config, tmp_path, *both, *own, n=n)
    assert_same_curve(ranks, alone)
    left, right = ([m["val_loss"] for m in run if "val_loss" in m] for run in (ranks, alone))
    assert len(left) >= 3 and left == pytest.approx(right, rel=1e-6)
    assert_same_weights(config["output_dir"] + "_alone/epoch_1", config["output_dir"] + "/epoch_1")


@pytest.fixture(scope="module")
def tied(tmp_path_factory, checkpoint):
    """The checkpoint of the other tests, but with tied embeddings."""
    folder = tmp_path_factory.mktemp("tied")
    model = tiny_llama(vocab_size=1024, num_hidden_layers=2, tie_word_embeddings=True)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model", ["full", "lora"])
def test_tied_embeddings_stay_tied(run, config, tmp_path, tied, model):
    config |= {"max_steps_per_epoch": 4, "model": LORA if model == "lora" else config["model"]}
    config["checkpointer"]["checkpoint_dir"] = str(tied)
    alone = run({**config, "output_dir": config["output_dir"] + "_alone"})
    assert_same_curve(run_ranks(config, tmp_path, SHARDED, "gradient_accumulation_steps=1"), alone)
    assert_same_weights(config["output_dir"] + "_alone/epoch_0", config["output_dir"] + "/epoch_0")


def test_compiled_blocks_are_sharded(run, config, tmp_path):
    config |= {"max_steps_per_epoch": 2, "compile": True, "batch_size": 40, "shuffle": False}
    config |= {"gradient_accumulation_steps": 1}
    alone = run({**config, "output_dir": config["output_dir"] + "_alone"}, "compile=False")
    assert_same_curve(run_ranks(config, tmp_path, "batch_size=20"), alone, rel=1e-5)


@pytest.mark.parametrize("model", ["full", "lora"])
@pytest.mark.parametrize("background", [False, True])
def test_r1_two_ranks_stopped_and_resumed_equal_two_never_stopped(
    config, tmp_path, model, background
):
    """To the bit, from a whole checkpoint as from one written in the background."""
    config |= {"save_every_n_steps": 2, "enable_async_checkpointing": background}
    config |= {"model": LORA} if model == "lora" else {}
    own = [SHARDED, "max_steps_per_epoch=4"]
    straight = {**config, "output_dir": config["output_dir"] + "_straight"}
    expected = run_ranks(straight, tmp_path, *own, "save_every_n_steps=null")
    run_ranks(config, tmp_path, *own)
    run_folder = Path(config["output_dir"])
    (run_folder / "epoch_0").rename(tmp_path / "gone")
    saved = {p.name for p in (run_folder / "step_2").rglob("*.safetensors")}
    assert ("model.safetensors" in saved) != background
    assert "optimizer-00001-of-00002.safetensors" in saved
    assert curve(run_ranks(config, tmp_path, *own, "resume_from_checkpoint=True")) == curve(
        expected
    )
    left, right = (Path(c["output_dir"], "epoch_0") for c in (config, straight))
    for file in left.rglob("*.safetensors"):
        theirs = load_file(right / file.relative_to(left))
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor, theirs[name]), (file.name, name)


@pytest.mark.parametrize("held", [SHARDED, "data_parallel_shard_dim=1"], ids=["sharded", "whole"])
def test_r7_a_signal_to_one_rank_ends_the_validation_of_all(config, tmp_path, held):
    config |= {"dataset_val": config["dataset"], "run_val_every_n_steps": 2}
    config |= {"max_steps_per_epoch": 4, "batch_size_val": 2}
    expected = run_ranks({**config, "output_dir": config["output_dir"] + "_all"}, tmp_path, held)
    stopping = [held, "loss._component_=tests.recipes.ranks.StoppingLoss"]
    stopped = run_ranks(config, tmp_path, *stopping, code=75)
    assert [line["step"] for line in stopped] == [1, 2] and "val_loss" not in stopped[-1]
    resumed = run_ranks(config, tmp_path, held, "resume_from_checkpoint=True")
    assert curve(resumed) == curve(expected)
    left, right = ([m["val_loss"] for m in run if "val_loss" in m] for run in (resumed, expected))
    assert left and left == right


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(run, config, tmp_path, before, after):
    config |= {"max_steps_per_epoch": 3, "enable_async_checkpointing": True, "batch_size": 8}
    expected = run({**config, "output_dir": config["output_dir"] + "_alone"}, "epochs=2")
    shares = {n: ["gradient_accumulation_steps=1", f"batch_size={16 // n}"] for n in (1, 2, 4)}
    run_ranks(config, tmp_path, *shares[before], "save_every_n_steps=2", n=before)
    (Path(config["output_dir"]) / "epoch_0").rename(tmp_path / "gone")
    resume = [*shares[after], "resume_from_checkpoint=True", "epochs=2"]
    assert_same_curve(run_ranks(config, tmp_path, *resume, n=after), expected)


def test_a_checkpoint_in_the_background_is_whole_and_training_goes_on(run, config):
    """Saving beside training changes nothing, and what it saves is of the moment it was asked."""
    config |= {"max_steps_per_epoch": 4, "save_every_n_steps": 1}
    plain = {**config, "output_dir": config["output_dir"] + "_plain"}
    expected = run(plain)
    assert curve(run(config, "enable_async_checkpointing=True")) == curve(expected)
    for step in (1, 2, 3):
        weights = SafetensorsFile(
            Path(config["output_dir"], f"step_{step}/recipe_state/model.safetensors")
        )
        theirs = load_file(f"{plain['output_dir']}/step_{step}/model.safetensors")
        assert torch.equal(weights["embed_tokens.weight"], theirs["model.embed_tokens.weight"])


WRONG = {
    "data_parallel_shard_dim=3": "data_parallel_replicate_dim x data_parallel_shard_dim is 1 x 3",
    "data_parallel_replicate_dim=5": "is 5 x 1, and there are 2 processes",
    "device=cuda:1": "device is cuda:1 for 2 processes",
    "optimizer._component_=torchao.optim.AdamW8bit": "does not step weights that 2 ranks share",
}


@pytest.mark.parametrize("override", WRONG)
def test_impossible_layouts_are_refused(config, tmp_path, override):
    run_ranks(config, tmp_path, override, code=2)
    assert WRONG[override] in (tmp_path / "ranks.log").read_text()


def test_the_rows_of_all_ranks_are_told_where_numbers_are_not_finite(config, tmp_path):
    wrong = ("optimizer.lr=1e30", "shuffle=False", "batch_size=1", "gradient_accumulation_steps=1")
    run_ranks(config, tmp_path, *wrong, code=6)
    assert re.search(
        r"step 2: loss is .* \(rows \[2, 3\] of the", (tmp_path / "ranks.log").read_text()
    )


def test_more_ranks_than_rows_are_refused(config, tmp_path):
    rows = Path(config["dataset"]["source"])
    one = tmp_path / "one.jsonl"
    one.write_text(rows.read_text().splitlines()[0] + "\n")
    run_ranks(config, tmp_path, f"dataset.source={one}", code=2)
    assert "there are 2 processes, but 1 rows" in (tmp_path / "ranks.log").read_text()

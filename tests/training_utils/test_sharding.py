"""Sharded models: what a rank reads of a checkpoint, and how ranks are laid out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from mytune.errors import ConfigError, ResourceError
from mytune.models import auto_model, qlora_auto_model
from mytune.models.llama3 import qlora_llama3
from mytune.modules import MergedWeights
from mytune.training import (
    FullModelHFCheckpointer,
    all_sum,
    load_adapters,
    load_weights,
    process_group,
    ranks_per_copy,
    shard_model,
    sum_gradients,
)
from mytune.training.distributed import from_rank_0
from tests.hf import tiny_llama
from tests.recipes.ranks import SHARES_4_BITS, free_port

TINY = dict(vocab_size=16, num_layers=1, num_heads=2, num_kv_heads=1, embed_dim=64, max_seq_len=8)
MODELS = {
    "full": auto_model,
    "QLoRA": lambda folder: qlora_auto_model(["q_proj"], checkpoint_dir=folder),
}


def resident(file: Path) -> int:
    """Return how many bytes of a mapped file this process has touched."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    found = [i for i, line in enumerate(lines) if line.endswith(f" {file}")]
    sizes = [next(each for each in lines[i:] if each.startswith("Rss:")) for i in found]
    return sum(int(size.split()[1]) * 1024 for size in sizes)


def _rank(rank: int, port: int, model: str, folder: str) -> None:
    where = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in where.items()})
    device = torch.device("cpu")
    with torch.device("meta"):
        built = MODELS[model](folder)
    file = Path(folder, "model.safetensors")
    with process_group(device, 60):
        shard_model(built, device, 2)
        weights = FullModelHFCheckpointer(folder).weights(built.config)
        load_weights(built, weights, device, torch.bfloat16)
        read = resident(file)
        load_adapters(built, None, device, seed=0)
        held = sum(p.to_local().nbytes for p in built.parameters())
        whole = MergedWeights(built)["layers.0.mlp.up_proj.weight"]
    assert 0.3 * file.stat().st_size < read < 0.6 * file.stat().st_size
    # The other half is on the other rank; bfloat16 takes half of the file's float32.
    assert held < 0.3 * file.stat().st_size
    expected = weights["layers.0.mlp.up_proj.weight"]
    error = (whole.float() - expected).norm() / expected.norm()
    assert error < (0.1 if model == "QLoRA" else 0.01)


@pytest.mark.ranks
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("model", ["full", pytest.param("QLoRA", marks=SHARES_4_BITS)])
def test_a_rank_reads_and_holds_its_own_rows_only(tmp_path, model):
    sizes = {"vocab_size": 2000, "hidden_size": 512, "intermediate_size": 4096}
    tiny_llama(**sizes, num_hidden_layers=2).save_pretrained(tmp_path)
    # safetensors maps what was just written from memory, too; a copy is another file.
    folder = shutil.copytree(tmp_path, tmp_path / "copy")
    mp.spawn(_rank, args=(free_port(), model, str(folder)), nprocs=2)


def _sum(rank: int, port: int) -> None:
    where = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in where.items()})
    parameters = [torch.zeros(2, 3), torch.zeros(4, dtype=torch.bfloat16), torch.zeros(3, 2).T]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, number + rank)
    with process_group(torch.device("cpu"), 60):
        sum_gradients([*parameters, torch.zeros(1)])
        assert all_sum(rank + 0.5) == 2
        assert all_sum(2**24 + rank) == 2**25 + 1  # float32 would round it
        assert all_sum(torch.tensor([1.0, rank])).tolist() == [2, 1]
        assert from_rank_0(None if rank else {"seed": 3}) == {"seed": 3}
    for number, parameter in enumerate(parameters):
        assert torch.equal(parameter.grad, torch.full_like(parameter, 2 * number + 1))


@pytest.mark.ranks
def test_ranks_sum_and_agree():
    mp.spawn(_sum, args=(free_port(),), nprocs=2)


def test_a_torch_that_cannot_share_4_bit_weights_is_told(monkeypatch):
    with torch.device("meta"):
        model = qlora_llama3(["q_proj"], **TINY)
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.11.0"))
    with pytest.raises(ResourceError, match=r"torch 2\.11\.0 cannot share .* install torch 2\.12"):
        shard_model(model, torch.device("cpu"), 2)


@pytest.mark.parametrize(
    ("processes", "shard", "replicate", "fits", "expected"),
    [
        (1, None, None, True, 1),
        (1, None, None, False, 1),
        (8, None, None, True, 1),
        (8, None, None, False, 8),
        (8, -1, 1, True, 8),
        (8, -1, 2, True, 4),
        (8, None, 2, True, 4),
        (8, 4, None, True, 4),
        (8, 1, None, False, 1),
    ],
)
def test_ranks_that_share_a_copy(monkeypatch, processes, shard, replicate, fits, expected):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert ranks_per_copy(shard, replicate, fits=fits) == expected


@pytest.mark.parametrize(("shard", "replicate"), [(3, None), (0, None), (None, 3), (4, 4), (-2, 1)])
def test_layouts_that_do_not_add_up_are_refused(monkeypatch, shard, replicate):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="there are 8 processes"):
        ranks_per_copy(shard, replicate, fits=True)

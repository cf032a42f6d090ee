"""Memory figures and the profiler, on the CPU."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from mytune.errors import ConfigError
from mytune.training.memory import memory_stats, reset_peak_memory
from mytune.training.profiler import setup_torch_profiler

CPU = torch.device("cpu")


def test_on_the_cpu_the_peak_of_resident_memory_is_told_and_reset():
    reset_peak_memory(CPU)
    before = memory_stats(CPU)["peak_memory_rss"]
    block = torch.ones(2**26)  # 1/4 GiB
    during = memory_stats(CPU)["peak_memory_rss"]
    del block
    assert during - before == pytest.approx(0.25, abs=0.05)
    assert memory_stats(CPU)["peak_memory_rss"] == pytest.approx(during, abs=0.01)
    reset_peak_memory(CPU)
    assert memory_stats(CPU)["peak_memory_rss"] == pytest.approx(before, abs=0.05)


def test_on_cuda_the_names_are_torchtunes(monkeypatch):
    sizes = {"active": 2**30, "allocated": 2**29, "reserved": 2**31}
    stats = {f"{name}_bytes.all.peak": size for name, size in sizes.items()}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    assert memory_stats(torch.device("cuda:0")) == {
        "peak_memory_active": 1.0,
        "peak_memory_alloc": 0.5,
        "peak_memory_reserved": 2.0,
    }


def test_a_disabled_profiler_writes_nothing(tmp_path):
    profiler = setup_torch_profiler(output_dir=str(tmp_path / "profile"))
    with profiler:
        profiler.step()
    assert not list(tmp_path.iterdir())


def test_the_profiler_writes_a_trace_and_a_table(tmp_path):
    folder = tmp_path / "profile"
    profiler = setup_torch_profiler(
        True, str(folder), wait_steps=1, warmup_steps=1, active_steps=2, record_shapes=False
    )
    a = torch.ones(8, 8)
    with profiler:
        for _ in range(6):
            a @ a
            profiler.step()
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["trace_rank0_step4.json.gz", "trace_rank0_step4.txt"]
    events = json.loads(gzip.decompress((folder / files[0]).read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 2
    assert "aten::mm" in (folder / files[1]).read_text()


@pytest.mark.parametrize("wrong", [{"wait_steps": -1}, {"active_steps": 0}, {"cpu": False}])
def test_wrong_settings_are_config_errors(wrong, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="profiler"):
        setup_torch_profiler(True, **wrong)

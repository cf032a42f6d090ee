"""Devices, dtypes, float32 products, seeds."""

from __future__ import annotations

import time

import pytest
import torch
from torch.nn import functional as F

from mytune.errors import ConfigError, ResourceError
from mytune.training import device as devices
from mytune.training.device import describe_device, get_device, get_dtype, use_fast_float32_matmul
from mytune.training.seed import seed_step, set_deterministic, set_seed

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """Pretend that the machine has these devices, and record which one becomes current."""
    chosen = []

    class Module:
        set_device = staticmethod(chosen.append)

    def pretend(**present):
        monkeypatch.setattr(
            devices, "_present", lambda: {"cuda": 0, "xpu": 0, "mps": 0, "cpu": 1, **present}
        )
        monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
        return chosen

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    return pretend


def test_a_missing_device_is_an_error_and_not_a_cpu_run(machine):
    machine()
    for name in ("cuda", "cuda:0", "xpu", "mps"):
        with pytest.raises(ResourceError, match=r"1 x cpu.*device=cpu") as error:
            get_device(name)
        assert error.value.exit_code == 5
    machine(cuda=2)
    with pytest.raises(ResourceError, match=r"cuda:2 is not here, only 2 x cuda.*device=cuda:0"):
        get_device("cuda:2")


def test_each_process_takes_the_device_of_its_local_rank(machine, monkeypatch):
    chosen = machine(cuda=2)
    assert get_device("cuda") == torch.device("cuda:0")
    assert get_device("cuda:1") == torch.device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert get_device("cuda") == torch.device("cuda:1") == chosen[-1]
    with pytest.raises(ConfigError, match="device=cuda gives each its own"):
        get_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ResourceError, match="start 2 processes"):
        get_device("cuda")
    assert get_device("cpu") == CPU


@pytest.mark.parametrize("name", ["cdua", "cuda:", "cuda:x", "", "gpu", "cuda:-1", "cuda:²"])
def test_a_wrong_device_name_is_a_config_error(name):
    with pytest.raises(ConfigError, match="it can be cuda"):
        get_device(name)


def test_gpu_is_taken_for_cuda():
    with pytest.raises(ConfigError, match="did you mean 'cuda'"):
        get_device("gpu")


def test_dtypes_by_both_names_and_float16_is_refused_with_the_reason():
    assert {get_dtype(name, CPU) for name in ("fp32", "float32")} == {torch.float32}
    assert {get_dtype(name, CPU) for name in ("bf16", "bfloat16")} == {torch.bfloat16}
    with pytest.raises(ConfigError, match=r"65504.*dtype=bf16"):
        get_dtype("fp16", CPU)
    with pytest.raises(ConfigError, match="did you mean 'bf16'"):
        get_dtype("bf61", CPU)
    with pytest.raises(ConfigError, match=r"^dtype is 'float8'; it can be bf16 or fp32$"):
        get_dtype("float8", CPU)


def test_bfloat16_where_the_device_has_none_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(devices, "describe_device", lambda device: "Tesla T4")
    with pytest.raises(ResourceError, match=r"bf16, which Tesla T4 does not.*dtype=fp32"):
        get_dtype("bf16", torch.device("cuda:0"))


def test_the_cpu_is_described():
    assert describe_device(CPU).startswith("cpu (")


@pytest.fixture
def precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_fast_float32_products_stay_float32(precision):
    torch.set_float32_matmul_precision("highest")
    fast = use_fast_float32_matmul(CPU)
    assert torch.get_float32_matmul_precision() == ("medium" if fast else "highest")
    generator = torch.Generator().manual_seed(1)
    x, w = (torch.randn(300, 500, generator=generator) for _ in range(2))
    exact = x.double() @ w.double().T
    torch.testing.assert_close(
        F.linear(x, w).double(), exact, atol=1e-5 * exact.abs().max(), rtol=0
    )


def test_fast_products_that_round_to_bfloat16_are_refused(precision, monkeypatch):
    product = torch.bmm
    rounded = lambda a, b: product(a.bfloat16(), b.bfloat16()).float()  # noqa: E731
    monkeypatch.setattr(torch, "bmm", rounded)
    torch.set_float32_matmul_precision("high")
    assert use_fast_float32_matmul(CPU) is False
    assert torch.get_float32_matmul_precision() == "high"


def test_dropout_depends_on_seed_step_and_rank_alone():
    def mask(*numbers):
        seed_step(*numbers)
        return F.dropout(torch.ones(64), 0.5).tolist()

    first = mask(7, 3, 0)
    torch.rand(5)
    assert mask(7, 3, 0) == first
    others = [mask(*n) for n in ((7, 4, 0), (8, 3, 0), (7, 3, 1), (3, 7, 0), (2**62, 3, 0))]
    assert len({tuple(m) for m in [first, *others]}) == 6


def test_seeds_that_are_neighbours_differ_in_the_32_bits_that_count():
    draws = set()
    for seed in range(20):
        for step in range(20):
            seed_step(seed, step)
            draws.add(torch.randint(2**60, (1,)).item())
    assert len(draws) == 400


def test_seeding_a_step_is_cheap():
    seed_step(0, 0)
    start = time.process_time()
    for step in range(100):
        seed_step(0, step)
    assert (time.process_time() - start) / 100 < 100e-6


def test_a_seed_repeats_and_none_draws_a_new_one():
    assert set_seed(5) == 5
    first = torch.rand(3)
    assert set_seed(5) == 5
    assert torch.equal(torch.rand(3), first)
    assert set_seed(None) != set_seed(None)
    with pytest.raises(ConfigError, match="seed is -1"):
        set_seed(-1)


@pytest.mark.parametrize(
    "mode, level", [(None, 0), ("default", 0), ("warn", 1), (1, 1), ("error", 2)]
)
def test_deterministic_modes(mode, level, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    try:
        set_deterministic(mode)
        assert torch.get_deterministic_debug_mode() == level
        assert torch.backends.cudnn.deterministic == (level > 0)
    finally:
        set_deterministic(None)


def test_a_wrong_deterministic_mode_is_a_config_error():
    with pytest.raises(ConfigError, match="cudnn_deterministic_mode is 'always'"):
        set_deterministic("always")

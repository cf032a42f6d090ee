"""Where a run computes and in which precision: devices, dtypes, float32 matrix products."""

from __future__ import annotations

import os
import platform

import torch
from torch.nn import functional as F

from mytune.errors import ConfigError, ResourceError, did_you_mean
from mytune.training.distributed import world_size

_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


def get_device(name: str) -> torch.device:
    """Return the device that `name` means for this process, and make it the current one.

    `cuda` and `xpu` without a number are the device of the process's LOCAL_RANK.

    Raises:
        ConfigError: not a device's name, or a number where every process takes its own device.
        ResourceError: the device is not there; there is no silent fallback to the CPU.
    """
    present = _present()
    kind, _, number = name.partition(":")
    if kind not in present or (":" in name and not number.isdecimal()):
        hint = "; did you mean 'cuda'?" if kind == "gpu" else did_you_mean(kind, present)
        raise ConfigError(f"device is {name!r}{hint}; it can be cuda, cuda:N, xpu, mps or cpu")
    if kind == "mps" and world_size() > 1:
        raise ConfigError(
            f"device is mps for {world_size()} processes; there is one for one process"
        )
    if number and world_size() > 1:
        raise ConfigError(
            f"device is {name} for {world_size()} processes; device={kind} gives each its own"
        )
    if kind in ("cpu", "mps") and present[kind]:
        return torch.device(kind)
    index = int(number or os.environ.get("LOCAL_RANK", "0"))
    if index >= present[kind]:
        raise ResourceError(_missing(kind, index, present))
    device = torch.device(kind, index)
    torch.get_device_module(device).set_device(device)
    return device


def planned_device(name: str) -> torch.device:
    """Return the device that `name` means, also where it is not: for plans.

    Raises:
        ConfigError: not a device's name.
    """
    try:
        return get_device(name)
    except ResourceError:
        return torch.device(name)


def _present() -> dict[str, int]:
    """Return the number of devices of each kind."""
    return {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "xpu": torch.xpu.device_count() if torch.xpu.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }


def _missing(kind: str, index: int, present: dict[str, int]) -> str:
    there = ", ".join(f"{count} x {name}" for name, count in present.items() if count)
    if not present[kind]:
        return (
            f"device is {kind}, but torch {torch.__version__} finds none here, only {there}; "
            "device=cpu runs on the CPU"
        )
    remedy = f"start {present[kind]} processes" if world_size() > 1 else f"use device={kind}:0"
    return f"device {kind}:{index} is not here, only {there}; {remedy}"


def get_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of weights and computation: `fp32` (`float32`) or `bf16` (`bfloat16`).

    Raises:
        ConfigError: another name; float16 among them, whose gradients overflow.
        ResourceError: the device does not compute in bfloat16.
    """
    if name in ("fp16", "float16", "half"):
        raise ConfigError(
            f"dtype is {name}, which is not supported: numbers overflow its range of 65504; use "
            "dtype=bf16 (same size) or dtype=fp32"
        )
    if name not in _DTYPES:
        hint = did_you_mean(name, ("bf16", "fp32"))
        raise ConfigError(f"dtype is {name!r}{hint}; it can be bf16 or fp32")
    dtype = _DTYPES[name]
    if dtype is torch.bfloat16 and not _computes_bf16(device):
        raise ResourceError(
            f"dtype is bf16, which {describe_device(device)} does not support; use dtype=fp32"
        )
    return dtype


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:  # mps has it from macOS 14 on, and no function that says so
        return bool(torch.ones(1, device=device, dtype=torch.bfloat16).add(1).item() == 2)
    except (RuntimeError, TypeError):
        return False


def describe_device(device: torch.device) -> str:
    """Return a device in words, with its model and memory where they are known."""
    if device.type in ("cuda", "xpu"):
        properties = torch.get_device_module(device).get_device_properties(device)
        return f"{device} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)"
    if device.type == "cpu":
        kind = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
        threads = torch.get_num_threads()
        return f"cpu ({kind}, {threads} thread{'s' * (threads > 1)})"
    return str(device)


def use_fast_float32_matmul(device: torch.device) -> bool:
    """Let float32 products on the CPU use torch's "medium" precision where that loses nothing.

    On CPUs without bfloat16 matrix units "medium" only changes the library (MKL to oneDNN: 1.05 to
    2.2 times as fast on AMD); on others it rounds to bfloat16. So it is kept if the error of small
    products is that of float32: about 5e-7, in bfloat16 1e-3. It is not timed: a run and its
    resumption must choose alike.

    Returns:
        Whether "medium" is now set.
    """
    if device.type != "cpu":
        return False
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    if _matmul_error() < 1e-5:
        return True
    torch.set_float32_matmul_precision(before)
    return False


def _matmul_error() -> float:
    """Return the largest error of small float32 products, relative to their largest value."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 256, generator=generator)
    exact = a.double() @ b.double()
    products = (a @ b, F.linear(a, b.T.contiguous()), torch.bmm(a[None], b[None])[0])
    error = max(float((product - exact).abs().max()) for product in products)
    return error / float(exact.abs().max())

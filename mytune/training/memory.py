"""How much memory a run takes, as the device or the system says."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch


def memory_stats(device: torch.device) -> dict[str, float]:
    """Return memory figures in GiB by metric name; those that are 0 or unknown are left out.

    On cuda and xpu the peaks `peak_memory_active`, `_alloc` and `_reserved`; on mps, which keeps
    no peaks, `memory_alloc` and `memory_reserved` now; on the CPU `peak_memory_rss`, the most
    resident memory the process had.
    """
    if device.type in ("cuda", "xpu"):
        stats = torch.get_device_module(device).memory_stats(device)
        keys = {"active": "active", "alloc": "allocated", "reserved": "reserved"}
        sizes = {
            f"peak_memory_{ours}": stats.get(f"{torchs}_bytes.all.peak", 0)
            for ours, torchs in keys.items()
        }
    elif device.type == "mps":
        sizes = {
            "memory_alloc": torch.mps.current_allocated_memory(),
            "memory_reserved": torch.mps.driver_allocated_memory(),
        }
    else:
        sizes = {"peak_memory_rss": _peak_rss()}
    return {name: size / 2**30 for name, size in sizes.items() if size}


def peak_memory_gb(device: torch.device) -> float:
    """Return the most memory that the run held, in GB of 10^9 bytes; 0 if nothing tells it."""
    used = [n for name, n in memory_stats(device).items() if name.endswith(("alloc", "rss"))]
    return max(used, default=0.0) * 2**30 / 1e9


def reset_peak_memory(device: torch.device) -> None:
    """Start the peaks anew, where the device or the system can."""
    if device.type in ("cuda", "xpu"):
        torch.get_device_module(device).reset_peak_memory_stats(device)
    elif device.type == "cpu":
        with suppress(OSError):  # Linux only, see proc_pid_clear_refs(5)
            Path("/proc/self/clear_refs").write_text("5")


def _peak_rss() -> int:
    """Return the peak resident memory in bytes, 0 where the system does not say."""
    with suppress(OSError, StopIteration):
        # getrusage's figure would count what the parent had before it started us.
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    with suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    return 0

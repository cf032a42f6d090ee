"""How much memory a run takes: what the device says, and what can be counted on any device."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made while it is entered, the same on every device.

    `now` is what is alive of them, also for a backward pass; `peak` the most that was at once.
    Tensors that were there before (parameters, a batch) do not count, nor does what a kernel
    takes for itself, nor what compiled code makes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for tensor in _tensors((args, kwargs)):  # a view of what was there before is not new
            self._note(tensor, counts=False)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._note(tensor, counts=True)
        return result

    def _note(self, tensor: Tensor, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes() if counts else 0
        if key in self._known:
            return

        def forget(_: object) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def count_saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Return the bytes that a forward pass keeps for its backward pass.

    All of them: what autograd saves, and what checkpointing and our own functions keep beside it.
    Storages count once; parameters, what `forward` is given and the loss do not. Run it once
    before, where caches are filled in the first pass.
    """
    live = LiveBytes()
    with live:
        loss = forward()
        return live.now - loss.untyped_storage().nbytes()

"""What a forward pass keeps for its backward pass: compute it again, or let it wait on the CPU."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mytune._sharded import local
from mytune.errors import ConfigError, did_you_mean
from mytune.modules.decoder import Decoder
from mytune.modules.derived import around
from mytune.quantization.nf4 import nf4_product

_MODES = ("full", "selective", "auto")

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default}
_NF4_PRODUCT = nf4_product._opoverload  # what torch.compile makes of a 4-bit linear
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
}


def recomputed_blocks(
    num_layers: int, enabled: bool, mode: str | None = None, option: int | str | None = None
) -> range:
    """Return the numbers of the blocks that are to be computed again in the backward pass.

    Args:
        num_layers: blocks of the model.
        enabled: whether to recompute if `mode` is not given.
        mode: `full` for every block, `selective` for what `option` says, `auto` for as many as
            memory demands: that is for the caller to say, here it is every block.
        option: with `selective`, n for every n-th block, `op` for every block, but of the costly
            operations only every second one (`keep_products` of `checkpoint_activations`).

    Raises:
        ConfigError: an unknown mode, or an option that does not go with it.
    """
    if mode is not None and mode not in _MODES:
        names = ", ".join(_MODES)
        raise ConfigError(f"ac_mode is {mode!r}{did_you_mean(mode, _MODES)}; it can be {names}")
    if mode != "selective":
        if option is not None:
            raise ConfigError(f"ac_option is {option!r}, which only ac_mode=selective takes")
        return range(num_layers if mode or enabled else 0)
    if option == "op":
        return range(num_layers)
    if option is None or not str(option).isdecimal() or int(option) < 1:
        raise ConfigError(
            f"ac_option is {option!r}; with ac_mode=selective it is op, or n for every n-th block"
        )
    # From the first on: the last blocks are then free again when earlier ones are recomputed.
    return range(0, num_layers, int(option))


def checkpoint_activations(
    model: Decoder, blocks: Collection[int] | bool = True, keep_products: bool = False
) -> None:
    """Make blocks keep only their input and recompute the rest in the backward pass.

    Args:
        model: not yet compiled or sharded.
        blocks: which ones, by number; True for all of them.
        keep_products: keep what attention and every second matrix product return, too: half as
            much is made twice.
    """
    chosen = range(len(model.layers)) if blocks is True else blocks or ()
    for number in chosen:
        layer = model.layers[number]
        layer.forward = _recomputed(layer.forward, keep_products)


def _recomputed(forward: Callable[..., Tensor], keep_products: bool) -> Callable[..., Tensor]:
    options: dict[str, Any] = {"context_fn": _keeping_products} if keep_products else {}

    # A function of our own: torch.compile skips a module whose forward is `checkpoint` itself.
    def run(*args: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*args)  # it would keep the state of random numbers
        around.checkpoint = True
        try:
            result: Tensor = checkpoint(forward, *args, use_reentrant=False, **options)
        finally:
            around.checkpoint = False
        return result

    return run


def _keeping_products() -> Any:
    """Return the contexts in which a block is computed first and again.

    A large product costs as much per byte of its result as any other, so which ones are kept is a
    matter of how many. Of q, k, v, o, gate, up, down these are k, o and up: the last one's result
    is never asked for.
    """
    seen = {False: 0, True: 0}

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = operation in _ATTENTION
        if operation is _NF4_PRODUCT or (operation in _PRODUCTS and _is_large(*args[-1].shape)):
            seen[context.is_recompute] += 1
            keep = seen[context.is_recompute] % 2 == 0
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _is_large(inner: int, out: int) -> bool:
    """Say whether a product is not an adapter's, whose rank is small."""
    return inner * 8 > out and out * 8 > inner


@contextmanager
def offload_activations(
    model: nn.Module, enabled: bool, use_streams: bool = True, min_bytes: int = 2**20
) -> Iterator[OffloadedTensors | None]:
    """Let what is saved for the backward pass inside this context wait in the CPU's memory.

    Weights stay where they are, also as the transposed views that products save, and so do tensors
    under `min_bytes`, whose copies would cost more time than they save memory. A tensor that is
    saved several times is copied once. Nothing that is saved may be changed in place afterwards.

    Args:
        model: whose weights stay.
        enabled: False for a context that does nothing.
        use_streams: on CUDA, copy beside the computation, from and to pinned memory.
        min_bytes: size of the smallest tensor that is moved.
    """
    if not enabled:
        yield None
        return
    weights = {local(p).untyped_storage()._cdata for p in model.parameters()}
    waiting = OffloadedTensors(use_streams, weights, min_bytes)
    with torch.autograd.graph.saved_tensors_hooks(waiting.pack, waiting.unpack):
        yield waiting
    waiting.finish()


class OffloadedTensors:
    """The tensors of one forward pass that wait in the CPU's memory: `nbytes` in all."""

    def __init__(self, use_streams: bool, weights: Collection[int], min_bytes: int) -> None:
        self.nbytes = 0
        self._use_streams = use_streams
        self._weights = weights
        self._min_bytes = min_bytes
        self._copies: dict[torch.device, _Copies] = {}
        self._order: list[_Offloaded] = []
        self._known: dict[Any, tuple[weakref.ref[Any], _Offloaded]] = {}

    def pack(self, tensor: Tensor) -> Tensor | _Offloaded:
        """Send a tensor away; called by autograd in the forward pass."""
        if self._stays(tensor):
            return tensor
        storage = tensor.untyped_storage()
        view = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        key = (storage._cdata, tensor._version, *view)
        known, moved = self._known.get(key, (None, None))
        # An address alone says nothing: it is used again when its first storage is gone.
        if moved is None or known is None or known() is None:
            copies = self._copies_of(tensor.device)
            moved = _Offloaded(copies.out(tensor), tensor.device, copies, len(self._order))
            self._known[key] = weakref.ref(storage), moved
            self._order.append(moved)
            self.nbytes += moved.host.nbytes
        moved.owed += 1
        return moved

    def _copies_of(self, device: torch.device) -> _Copies:
        if device not in self._copies:
            beside = self._use_streams and device.type == "cuda"
            self._copies[device] = _StreamCopies(device) if beside else _Copies()
        return self._copies[device]

    def _stays(self, tensor: Tensor) -> bool:
        # Weights that FSDP has gathered have another storage; their type gives them away.
        return (
            isinstance(tensor, nn.Parameter | DTensor)
            or tensor.nbytes < self._min_bytes
            or isinstance(tensor._base, nn.Parameter)
            or tensor.untyped_storage()._cdata in self._weights
        )

    def unpack(self, packed: Tensor | _Offloaded) -> Tensor:
        """Return a tensor to its device; called by autograd in the backward pass."""
        if isinstance(packed, Tensor):
            return packed
        if packed.back is None:
            packed.copies.start(packed)
        packed.copies.wait(packed)
        tensor = packed.back
        assert tensor is not None
        packed.owed -= 1
        if packed.owed <= 0:  # whoever asked first shares it with those who saved it too
            packed.back = None
        # What was saved just before is asked for next.
        first = max(packed.number - packed.copies.ahead, 0)
        for moved in reversed(self._order[first : packed.number]):
            if moved.back is None and moved.owed > 0:
                moved.copies.start(moved)
        return tensor

    def finish(self) -> None:
        """Let go of what has been copied; the forward pass is over."""
        self._known.clear()
        for copies in self._copies.values():
            copies.finish()


@dataclass(eq=False)
class _Offloaded:
    """A tensor in the CPU's memory, and on its device again once it is asked for."""

    host: Tensor
    device: torch.device
    copies: _Copies
    number: int
    owed: int = 0  # times that autograd saved it and has not asked for it yet
    back: Tensor | None = None
    arrived: torch.cuda.Event | None = None

    def __del__(self) -> None:
        # A copy that nobody asked for must have ended before its memory is used again.
        if self.back is not None and self.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived)


class _Copies:
    """Copies that are done when the call returns."""

    ahead = 0

    def out(self, tensor: Tensor) -> Tensor:
        return tensor.to("cpu")

    def start(self, moved: _Offloaded) -> None:
        moved.back = moved.host.to(moved.device)

    def wait(self, moved: _Offloaded) -> None:
        pass

    def finish(self) -> None:
        pass


class _StreamCopies(_Copies):
    """Copies on a stream of their own, two at a time in either direction.

    All memory belongs to the stream that computes, which waits for a copy before it lets go of what
    is copied: `record_stream` would keep memory until the device has caught up, and so not save it.
    """

    ahead = 2

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _copy_stream(device)
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def _copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        # Which stream computes is asked each time: it is not always the one of the first call.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def _let_go(self) -> None:
        _tensor, event = self._leaving.popleft()
        torch.cuda.current_stream(self._device).wait_event(event)

    def out(self, tensor: Tensor) -> Tensor:
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._leaving.append((tensor, self._copy(host, tensor)))
        if len(self._leaving) > 2:
            self._let_go()
        return host

    def start(self, moved: _Offloaded) -> None:
        moved.back = torch.empty_like(moved.host, device=moved.device)
        moved.arrived = self._copy(moved.back, moved.host)

    def wait(self, moved: _Offloaded) -> None:
        assert moved.arrived is not None
        torch.cuda.current_stream(self._device).wait_event(moved.arrived)

    def finish(self) -> None:
        while self._leaving:
            self._let_go()


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream that copies run on, for the life of the process."""
    return torch.cuda.Stream(device)

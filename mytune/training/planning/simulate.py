"""A training step on the meta device: what it holds at its peak, exactly, without any memory.

The real model, loss and recomputation run; tensors have shapes and no data. Where a device's
kernels keep other tensors than the meta device's, a function of the same footprint stands in.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mytune.config import Component
from mytune.errors import ConfigError, first_line
from mytune.modules import loss as losses
from mytune.modules.decoder import Decoder
from mytune.modules.lora import is_adapter
from mytune.quantization import nf4
from mytune.quantization.nf4 import NF4Linear

_aten = torch.ops.aten


def set_meta_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model on the meta device the dtypes that `load_weights` and `load_adapters` give."""
    for prefix, module in model.named_modules():
        if isinstance(module, NF4Linear):
            module.dtype = dtype
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if not is_adapter(name):
                parameter.data = parameter.data.to(dtype)


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What of a run decides how much memory it takes; defaults are a plain run on one device."""

    optimizer: Component
    dtype: torch.dtype
    batch_size: int
    seq_len: int
    device: str = "cuda"
    # Several documents in a row, which takes a mask.
    packed: bool = False
    gradient_accumulation_steps: int = 1
    # Numbers of the blocks that are recomputed, and whether they keep their products.
    recompute: Collection[int] = ()
    keep_products: bool = False
    offload: bool = False
    optimizer_in_bwd: bool = False
    # Ranks that a parameter is cut over; whether blocks are given back after their forward pass.
    shard_ranks: int = 1
    reshard: bool = True
    # Shards, gradients and optimizer state wait in the CPU's memory.
    cpu_offload: bool = False
    # Whole gradients are kept until the last micro-batch, then summed over ranks once.
    sync_every_micro_batch: bool = False

    @property
    def share(self) -> float:
        """The part of parameters and their optimizer state that a device keeps."""
        return 0.0 if self.cpu_offload and self.shard_ranks > 1 else 1 / self.shard_ranks

    @property
    def accumulates(self) -> bool:
        """Whether gradients of several micro-batches are summed."""
        return self.gradient_accumulation_steps > 1


class Peak(NamedTuple):
    """When a step holds most: bytes of each part, the phase; and the most that each part takes."""

    parts: dict[str, int]
    moment: str
    most: dict[str, int]


def simulate_step(
    model: Decoder, loss_fn: Callable[[Any, Any], Tensor], settings: StepSettings
) -> Peak:
    """Return what a forward and backward pass hold when they hold most.

    Weights and optimizer state are not counted. The parts: `activations`, made by the forward pass
    up to the last block; `loss`, from there to the loss; `working`, by the backward pass; and
    `gradients` of parameters.

    Args:
        model: on the meta device, with its final dtypes, recomputed as it will run. Compiled
            blocks keep nearly the same.
    """
    ledger = Ledger()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter) if settings.accumulates else None
    hooks: list[Any] = [model.norm.register_forward_hook(lambda *_: ledger.enter("loss"))]
    kept = partial(_kept_of_gradient, settings)

    def keep(parameter: Tensor) -> None:
        if settings.optimizer_in_bwd:
            parameter.grad = None
        else:
            ledger.count(parameter.grad, "gradients", kept)

    hooks += [p.register_post_accumulate_grad_hook(keep) for p in trained]
    batch = meta_batch(settings)
    with kernels_of(settings.device), ledger:
        for tensor in batch.values():
            ledger.count(tensor, "activations")
        for parameter in trained if settings.accumulates else ():
            ledger.count(parameter.grad, "gradients", kept)
        with _elsewhere(model) if settings.offload else nullcontext():
            loss = _planned(loss_fn, model, batch)
        ledger.enter("working")
        torch.autograd.backward(loss)
    for hook in hooks:
        hook.remove()
    for parameter in trained:
        parameter.grad = None
    return Peak(dict(ledger.peak), ledger.moment, dict(ledger.most))


class NotPlanned(ConfigError):
    """A loss that asks for values, which a plan does not have."""


def _planned(loss_fn: Callable[[Any, Any], Tensor], model: Decoder, batch: Any) -> Tensor:
    try:
        return loss_fn(model, batch)
    except (RuntimeError, KeyError) as error:  # what meta tensors and batches without rows raise
        raise NotPlanned(
            f"loss {type(loss_fn).__name__} cannot be planned ({type(error).__name__}: "
            f"{first_line(error)}); it can take trained_hidden(model, batch), and may ask for no "
            "values"
        ) from error


def _kept_of_gradient(settings: StepSettings, gradient: Tensor) -> int:
    """Return the bytes that a gradient takes from when it is there to the optimizer's step.

    Whole ones that wait for the last micro-batch to be summed over ranks are float32.
    """
    if settings.shard_ranks > 1 and settings.accumulates and not settings.sync_every_micro_batch:
        return 4 * gradient.numel()
    return int(gradient.nbytes * settings.share)


def meta_batch(settings: StepSettings) -> dict[str, Tensor]:
    """Return a batch as `to_device` makes it, all of whose tokens are trained.

    On CUDA packed rows are as others: FlexAttention keeps what FlashAttention does, and no mask.
    """
    names = ["tokens", "labels", *(["positions"] if settings.packed else [])]
    names += ["document_ids"] if settings.packed and settings.device != "cuda" else []
    shape = (settings.batch_size, settings.seq_len)
    batch = {name: torch.empty(shape, dtype=torch.int64, device="meta") for name in names}
    return {**batch, "target_index": batch["labels"].new_empty(batch["labels"].numel())}


class Ledger(TorchDispatchMode):
    """Counts the bytes of tensors made while it is entered, by part: those alive now, and the peak.

    The same on every device. Tensors that were there before (weights, a batch) do not count unless
    they are given to `count`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.most: Counter[str] = Counter()  # of each part alone
        self.moment = self.phase = "activations"
        self._held: dict[int, tuple[str, int]] = {}

    def enter(self, phase: str) -> None:
        self.phase = phase

    def count(
        self, tensor: Tensor | None, part: str, size: Callable[[Tensor], int] | None = None
    ) -> None:
        """Enter a tensor's storage as `part`, or move it there; `size` says what it takes."""
        if tensor is None:
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._held:
            weakref.finalize(storage, self._drop, key)
        else:
            self.now.subtract(dict([self._held[key]]))
        self._held[key] = part, size(tensor) if size else storage.nbytes()
        self.now.update(dict([self._held[key]]))
        self._look()

    def _drop(self, key: int) -> None:
        self.now.subtract(dict([self._held.pop(key)]))

    def _look(self, extra: int = 0) -> None:
        self.most |= self.now + Counter({self.phase: extra})
        if self.now.total() + extra > self.peak.total():
            self.peak = self.now + Counter({self.phase: extra})
            self.moment = self.phase

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for tensor in _tensors((args, *(kwargs or {}).values())):  # a view of a weight is not new
            if id(tensor.untyped_storage()) not in self._held:
                self.count(tensor, "activations", lambda _: 0)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors((result,)):
            if id(tensor.untyped_storage()) not in self._held:
                self.count(tensor, self.phase)
        if inside := _INSIDE.get(func):
            self._look(inside(*args))
        return result


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _flash_backward(grad: Tensor, q: Tensor, k: Tensor, *rest: Any) -> int:
    """Bytes of FlashAttention 2's float32 dq and, for grouped heads, whole dk and dv."""
    grouped = q.shape[1] != k.shape[1]
    return 4 * q.numel() + 2 * q.nbytes * grouped


# What an operation takes for itself while it runs: the meta device does not know.
_INSIDE: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    _aten._scaled_dot_product_efficient_attention_backward.default: _flash_backward,
}


@contextmanager
def _elsewhere(model: nn.Module) -> Iterator[None]:
    """Let what is saved for the backward pass take no memory, as `offload_activations` does."""
    weights = {id(p.untyped_storage()) for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor | tuple[Any, ...]:
        if id(tensor.untyped_storage()) in weights or tensor.nbytes < 2**20:
            return tensor
        return tensor.shape, tensor.stride(), tensor.dtype

    def unpack(packed: Tensor | tuple[Any, ...]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        shape, stride, dtype = packed
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


@contextmanager
def kernels_of(device: str) -> Iterator[None]:
    """Let functions whose kernels differ by device keep what that device's keep."""
    stand_ins = _CPU if device == "cpu" else _OTHER
    stand_ins = [*stand_ins, _LOSS] if device == "cuda" else stand_ins
    own = [(where, name, getattr(where, name)) for where, name, _ in stand_ins]
    try:
        for each in stand_ins:
            setattr(*each)
        yield
    finally:
        for each in own:
            setattr(*each)


class _FusedNorm(torch.autograd.Function):
    """RMSNorm as one kernel: keeps its input and a float32 per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        scale = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        ctx.save_for_backward(x, weight, scale)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        return (
            torch.empty_like(x) if needs_x else None,
            torch.empty_like(weight) if needs_weight else None,
        )


def _fused_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _FusedNorm.apply(x, weight)  # type: ignore[no-untyped-call,no-any-return]


def _cuda_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if attn_mask is None and q.dtype is not torch.float32:
        flash = _aten._scaled_dot_product_flash_attention
        return flash(q, k, v, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:  # on CUDA attention repeats them itself
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    bias = None
    if attn_mask is not None:
        bias = torch.empty_like(attn_mask, dtype=q.dtype).expand(*q.shape[:2], -1, -1)
    efficient = _aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, bias, True, dropout_p, is_causal, scale=scale)[0]


def _cpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    bias = None if attn_mask is None else torch.empty_like(attn_mask, dtype=q.dtype)
    flash = _aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, dropout_p, is_causal, attn_mask=bias, scale=scale)[0]


def _dequantize_at_once(
    codes: Tensor, scales: Tensor, steps: Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Nothing is taken beside the result: by Triton, or on the CPU, piece by piece."""
    return codes.new_empty(shape, dtype=dtype)


def _loss_in_place(
    hidden: Tensor, weight: Tensor | NF4Linear, labels: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Logits whose gradient takes their place."""
    logits = losses._logits(hidden, weight)
    return logits.new_empty((), dtype=torch.float32), logits


_DEQUANTIZE = (nf4, "dequantize_nf4", _dequantize_at_once)
_CPU: list[tuple[Any, str, Any]] = [
    (F, "scaled_dot_product_attention", _cpu_attention),
    _DEQUANTIZE,
]
_OTHER: list[tuple[Any, str, Any]] = [
    (F, "scaled_dot_product_attention", _cuda_attention),
    (F, "rms_norm", _fused_norm),
    _DEQUANTIZE,
]
_LOSS = (losses, "_loss_and_gradient", _loss_in_place)

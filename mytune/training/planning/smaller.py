"""Settings under which a run takes less memory, in the order of what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from mytune.training.distributed import world_size

T = TypeVar("T")


class Change(NamedTuple):
    """What to type after the config's name, and the keys' new values."""

    words: str
    values: Mapping[str, Any]


Lever = Callable[[Any], Change | None]


def smaller_settings(cfg: T) -> Iterator[tuple[str, T]]:
    """Yield what to type, and the config that it gives: each takes less memory than `cfg`.

    First what changes no result (recomputing, smaller micro-batches), then fewer bits for what
    the optimizer or a frozen weight keeps. Keys that the recipe does not have are left alone.
    """
    seen = {""}
    for levers in _COMBINATIONS:
        words, smaller = _apply(cfg, levers)
        if words not in seen:
            seen.add(words)
            yield words, smaller


def settings_to_share(cfg: T) -> tuple[str, T]:
    """Return what to type for ranks that share a model, and its config: no result changes."""
    return _apply(cfg, (_recompute, _sync))


def _apply(cfg: T, levers: Iterable[Lever]) -> tuple[str, T]:
    words = []
    for lever in levers:
        if change := lever(cfg):
            words.append(change.words)
            cfg = replace(cfg, **change.values)  # type: ignore[type-var]
    return " ".join(words), cfg


def _recompute(cfg: Any) -> Change | None:
    mode, key = getattr(cfg, "ac_mode", None), "enable_activation_checkpointing"
    if mode in ("full", "auto") or (mode is None and getattr(cfg, key, True)):
        return None
    if mode:
        return Change("ac_mode=full ~ac_option", {"ac_mode": "full", "ac_option": None})
    return Change(f"{key}=True", {key: True})


def _smaller_batch(cfg: Any) -> Change | None:
    """As many rows per step, in smaller pieces."""
    if cfg.batch_size == 1 or getattr(cfg, "optimizer_in_bwd", False):
        return None
    pieces = cfg.batch_size * cfg.gradient_accumulation_steps
    return Change(
        f"batch_size=1 gradient_accumulation_steps={pieces}",
        {"batch_size": 1, "gradient_accumulation_steps": pieces},
    )


def _sync(cfg: Any) -> Change | None:
    """Sharded gradients are whole until they are summed."""
    key = "fsdp_sync_every_micro_batch"
    if getattr(cfg, key, True) or cfg.gradient_accumulation_steps == 1 or _has_adapters(cfg):
        return None
    return Change(f"{key}=True", {key: True})


def _sync_if_shared(cfg: Any) -> Change | None:
    return _sync(cfg) if world_size() > 1 else None


def _eight_bits(cfg: Any) -> Change | None:
    """AdamW whose two moments take a byte each."""
    name, own = cfg.optimizer["_component_"], ("_component_", "lr", "betas", "eps", "weight_decay")
    if name not in ("torch.optim.AdamW", "torch.optim.Adam") or _has_adapters(cfg):
        return None
    other = f"torchao.optim.{name.rpartition('.')[2]}8bit"
    kept = {key: value for key, value in cfg.optimizer.items() if key in own}
    dropped = "".join(f" ~optimizer.{key}" for key in cfg.optimizer if key not in own)
    return Change(
        f"optimizer._component_={other}{dropped}", {"optimizer": {**kept, "_component_": other}}
    )


def _step_in_backward(cfg: Any) -> Change | None:
    """Needs one micro-batch per step, and gradients that nobody looks at as a whole."""
    key = "optimizer_in_bwd"
    if getattr(cfg, key, True) or cfg.gradient_accumulation_steps > 1 or _has_adapters(cfg):
        return None
    return None if cfg.clip_grad_norm else Change(f"{key}=True", {key: True})


def _four_bits(cfg: Any) -> Change | None:
    """The QLoRA twin of a LoRA builder: each of mytune's has one."""
    package, _, name = cfg.model["_component_"].rpartition(".")
    if not (f"{package}.".startswith("mytune.models.") and name.startswith("lora_")):
        return None
    other = f"{package}.q{name}"
    values = {key: value for key, value in cfg.model.items() if key != "quantize_base"}
    return Change(f"model._component_={other}", {"model": {**values, "_component_": other}})


def _offload(cfg: Any) -> Change | None:
    key = "enable_activation_offloading"
    return None if getattr(cfg, key, True) else Change(f"{key}=True", {key: True})


def _has_adapters(cfg: Any) -> bool:
    return "lora_" in cfg.model["_component_"].rpartition(".")[2]


_EXACT: tuple[Lever, ...] = (_recompute, _sync_if_shared)
_COMBINATIONS: list[tuple[Lever, ...]] = [
    (_recompute,),
    _EXACT,
    (*_EXACT, _smaller_batch),
    (*_EXACT, _eight_bits),
    (*_EXACT, _eight_bits, _step_in_backward),
    (*_EXACT, _four_bits),
    (*_EXACT, _smaller_batch, _sync_if_shared, _eight_bits),
    (*_EXACT, _smaller_batch, _four_bits),
    (*_EXACT, _smaller_batch, _sync_if_shared, _eight_bits, _four_bits, _offload),
]

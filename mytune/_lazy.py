"""Imports on first use, so that a package costs nothing until it is used, and quiet ones."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

# What they warn of at import is nothing to act on.
_NOISY = ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops")


def lazy_names(package: str, files: Mapping[str, str]) -> tuple[list[str], Callable[[str], Any]]:
    """Return `__all__` and `__getattr__` (PEP 562) of a package whose names live in its files.

    Args:
        package: the package's `__name__`.
        files: file -> names that it defines; with a dot before it, one of a package beside.
    """
    where = {name: file for file, names in files.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{where[name]}", package), name)

    return list(where), get


def import_quietly(module: str) -> ModuleType:
    """Import and return a module, without libraries' warnings about themselves."""
    import logging  # a third of the time of `tune ls`

    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        return importlib.import_module(module)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

"""torchao behind one door: imported where it is used, which takes seconds, and quietly."""

from __future__ import annotations

import importlib
import logging
from typing import Any

from mytune.errors import ResourceError

_NOISY = ("torchao", "torch.utils._pytree")  # what they warn of at import is nothing to act on


def torchao(module: str) -> Any:
    """Import and return `torchao.<module>`.

    Raises:
        ResourceError: torchao is not installed, or too old.
    """
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        return importlib.import_module(f"torchao.{module}")
    except ImportError as error:
        raise ResourceError(
            f"quantizers need the package torchao, from 0.18 on ({error}): "
            "pip install 'torchao>=0.18'"
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

"""torchao behind one door: imported where it is used, which takes seconds, and quietly."""

from __future__ import annotations

from typing import Any

from mytune._lazy import import_quietly
from mytune.errors import ResourceError


def torchao(module: str) -> Any:
    """Import and return `torchao.<module>`.

    Raises:
        ResourceError: torchao is not installed, or too old.
    """
    try:
        return import_quietly(f"torchao.{module}")
    except ImportError as error:
        raise ResourceError(
            f"quantizers need the package torchao, from 0.18 on ({error}): "
            "pip install 'torchao>=0.18'"
        ) from error

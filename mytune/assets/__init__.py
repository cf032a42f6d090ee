"""What the package carries: a small Llama 3 in `tiny/`, data beside it, how all of it is made."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent

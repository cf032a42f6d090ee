"""What the package carries: a small Llama 3 in `tiny/`, the demo's data in `dates/`, and how both are made."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent

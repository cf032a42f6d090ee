"""What the package carries: a small Llama 3 in `tiny/`, data in `dates/`, how both are made."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent

"""What the package carries: a Llama 3 in `tiny/`, data in `dates/`, `stories/`, how they are made."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent

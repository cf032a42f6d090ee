"""A small recipe and a config in an empty current directory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mytune.config import LoadedConfig, read_config

RECIPE = '''\
"""A recipe for tests."""

from dataclasses import dataclass, field
from typing import Any, Literal

from mytune.config import Component, Components, component, instantiate


@dataclass(kw_only=True)
class Config:
    # Where things go

    output_dir: str  # the folder that everything is written to
    seed: int | None = None  # null draws one

    # The parts

    # what is trained;
    # a builder
    model: Component
    dataset: Components = component("my_parts.rows", source="a", packed=False)  # rows
    optimizer: Component = component("torch.optim.AdamW", lr=2e-5, fused=True)  # the optimizer
    lr_scheduler: Component | None = None  # null keeps the rate constant

    # The loop

    batch_size: int = 2  # rows per step
    lr_scale: float = 1  # a factor
    shuffle: bool = True  # draw the order anew
    dtype: Literal["bf16", "fp32"] = "bf16"  # how numbers are kept
    tags: list[str] = field(default_factory=lambda: ["a", "b"])  # for the log
    extra: dict[str, Any] = field(default_factory=lambda: {"x": {"y": 1}})  # anything
    note: str | None = None  # a text


def main(cfg: Config) -> None:
    model = instantiate(cfg.model)
    instantiate(cfg.optimizer, model.parameters())
    instantiate(cfg.lr_scheduler, None, num_training_steps=3)
'''

CONFIG = """\
output_dir: out
model:
  _component_: my_parts.model
  size: 3
"""

PARTS = """\
RAN = []
def model(size: int, inner=None, path: str | None = None): return ("model", size, inner)
def rows(source: str, packed: bool = False, **options): return ("rows", source, packed, options)
class Box:
    def __init__(self, side: float, lid=None): self.side = side
"""

Load = Callable[..., LoadedConfig]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]  # of the test before
    monkeypatch.setattr("mytune.config.components._allowed_by_user", set())
    (tmp_path / "recipe.py").write_text(RECIPE)
    (tmp_path / "my_parts.py").write_text(PARTS)
    return tmp_path


@pytest.fixture
def load(folder: Path) -> Load:
    """Return `load(*overrides, yaml=...)`, which reads the config and leaves its problems in it."""

    def read(*overrides: str, yaml: str = CONFIG, allow: tuple[str, ...] = ()) -> LoadedConfig:
        (folder / "c.yaml").write_text(yaml)
        return read_config(Path("recipe.py"), Path("c.yaml"), overrides, allow_components=allow)

    return read

"""Finding the newest checkpoint that verifies, and reading what a run needs to go on."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from torch import Tensor

from mytune.errors import CheckpointError
from mytune.modules.decoder import DecoderConfig
from mytune.training.checkpointing.files import PiecewiseFiles, inside, read_json
from mytune.training.checkpointing.formats import FORMATS
from mytune.training.checkpointing.peft import Adapter, read_adapter
from mytune.training.checkpointing.pieces import open_pieces
from mytune.training.checkpointing.publish import MANIFEST, candidates, read_manifest, verify
from mytune.training.checkpointing.source import Source, find_files

log = logging.getLogger("mytune")

STATE = "recipe_state/state.json"
OPTIMIZER, MODEL = "recipe_state/optimizer", "recipe_state/model"  # whole, or in pieces of ranks


@dataclass(frozen=True)
class Published:
    """A published checkpoint that was verified."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """The number of optimizer steps done."""
        return int(self.manifest["step"])

    @cached_property
    def state(self) -> dict[str, Any]:
        """The JSON that the recipe gave to `save`."""
        return read_json(inside(self.path, STATE))

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the optimizer's tensors that `save` was given; each is read when asked for."""
        return PiecewiseFiles(open_pieces(self.path, self.manifest["files"], OPTIMIZER))

    def weights(self, config: DecoderConfig) -> Mapping[str, Tensor]:
        """Return the weights by our names; with adapters, these are merged into them."""
        if trained := open_pieces(self.path, self.manifest["files"], MODEL):
            return PiecewiseFiles(trained)
        fmt = next(fmt for fmt in FORMATS if fmt.name == self.manifest["format"])
        return Source(fmt, find_files(fmt, self.path, None)).weights(config)

    def adapter_weights(self) -> Adapter | None:
        """Return the adapter's tensors and settings, or None where there is none."""
        folder = self.path / "adapter"
        return read_adapter(folder) if folder.is_dir() else None


def latest(output_dir: Path, name: str | None = None) -> Published | None:
    """Return the newest usable checkpoint; None if there is none at all.

    Args:
        name: take the newest of those that came from this one, or itself.

    Raises:
        CheckpointError: there are checkpoints, but none can be used.
    """
    there = candidates(output_dir)
    # What has no readable manifest comes first, so that it is named; the sort keeps the rest.
    found = [c.path for c in sorted(there, key=lambda c: c.step >= 0)]
    if name:
        found = [path for path in found if name in (path.name, _origin(path))]
        if not found:
            names = ", ".join(c.path.name for c in there) or "none"
            raise CheckpointError(
                f"recipe_checkpoint: {output_dir} has no checkpoint {name}; there: {names}"
            )
    skipped = []
    for path in found:
        problems = verify(path) or _problems(path)
        if not problems:
            return Published(path, read_manifest(path))
        skipped.append(f"{path}: {'; '.join(problems)}")
        log.warning("Skipping checkpoint %s", skipped[-1])
    if skipped:
        raise CheckpointError(
            f"none of the checkpoints in {output_dir} can be used to go on; start anew in another "
            "output_dir, or with overwrite_output_dir=True",
            skipped,
        )
    return None


class Branch(NamedTuple):
    """A run that goes on from an older checkpoint: its name, and the step it begins after."""

    name: str
    step: int


def set_aside(output_dir: Path, branch: Branch) -> None:
    """Rename newer checkpoints that did not come from where a branch begins: it replaces them."""
    for path, step in candidates(output_dir):
        if step > branch.step and _origin(path) != branch.name:
            aside = path.with_name(f"{path.name}.kept-{uuid4().hex}")
            os.rename(path, aside)
            log.warning("%s is newer than %s: it is now %s", path, branch.name, aside.name)


def _origin(path: Path) -> str | None:
    """Return the checkpoint that a run was told to go on from when it saved this one."""
    with suppress(CheckpointError):
        return read_manifest(path).get("recipe_checkpoint")
    return None


def _problems(path: Path) -> list[str]:
    """Return what is wrong with what a manifest says, which no hash protects."""
    manifest = read_manifest(path)
    if manifest.get("format") not in [fmt.name for fmt in FORMATS]:
        return [f"its format is {manifest.get('format')!r}"]
    if not (path / STATE).is_file():
        return ["it was saved without what a run needs to go on"]
    step = read_json(path / STATE).get("step", manifest["step"])
    if step != manifest["step"]:
        return [f"{MANIFEST} is of step {manifest['step']}, {STATE} of step {step}"]
    return []

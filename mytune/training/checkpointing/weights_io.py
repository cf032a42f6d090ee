"""Writing weights in the layout of the files they came from: same names, keys, shards and parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from mytune.errors import CheckpointError
from mytune.modules.decoder import DecoderConfig
from mytune.training.checkpointing.files import TensorSpec, check_finite_weight, to_json
from mytune.training.checkpointing.formats import Table
from mytune.training.checkpointing.pickle_io import PickledWriter
from mytune.training.checkpointing.publish import Draft
from mytune.training.checkpointing.safetensors_io import SafetensorsWriter
from mytune.training.checkpointing.source import EMBEDDING, HEAD, Entry, Group, Source


@dataclass(frozen=True)
class Plan:
    """What will be written: one item per group of files.

    `read` is the order in which our names will be asked for, once for each tensor in a file.
    """

    files: Sequence[PlannedFiles]
    config: DecoderConfig
    dtype: torch.dtype
    table: Table
    index: str | None

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes * len(f.names) for f in self.files for s in f.specs.values())

    @property
    def read(self) -> list[str]:
        return [f.ours(key) for f in self.files for key in f.order if f.entries[key].ours]


@dataclass(frozen=True)
class PlannedFiles:
    """Files with the same tensors: their names, what they hold, and how that maps to the model."""

    names: tuple[str, ...]
    group: Group
    entries: Mapping[str, Entry]
    specs: Mapping[str, TensorSpec]
    tied: bool

    @property
    def order(self) -> list[str]:
        return self.kind.order_of(self.specs)

    @property
    def kind(self) -> type[SafetensorsWriter] | type[PickledWriter]:
        return SafetensorsWriter if self.names[0].endswith(".safetensors") else PickledWriter

    def ours(self, key: str) -> str:
        """Return the name of the model's tensor behind a key; a tied head is the embedding."""
        name = self.entries[key].ours
        assert name is not None
        return EMBEDDING if self.tied and name == HEAD else name


def plan_weights(source: Source, config: DecoderConfig, dtype: torch.dtype) -> Plan:
    """Plan to write a model of `config` in the layout of `source`, cast to `dtype`."""
    count = len(source.paths)
    names = (source.format.file_name(i, count) for i in range(1, count + 1))
    files = [
        PlannedFiles(
            names=tuple(islice(names, len(group.files))),
            group=group,
            entries={entry.key: entry for entry in entries},
            specs={e.key: _part_spec(e, dtype, len(group.files)) for e in entries},
            tied=config.tie_word_embeddings,
        )
        for group, entries in zip(source.groups, source.entries(config), strict=True)
    ]
    index = next(iter(source.format.indexes), None) if count > 1 else None
    return Plan(files, config, dtype, source.format.table, index)


def _part_spec(entry: Entry, dtype: torch.dtype, parts: int) -> TensorSpec:
    if entry.ours is None:
        return entry.spec
    shape = (
        size // parts if dim == entry.dim else size for dim, size in enumerate(entry.spec.shape)
    )
    return TensorSpec(dtype, tuple(shape))


def write_weights(draft: Draft, plan: Plan, weights: Mapping[str, Tensor]) -> None:
    """Write all files of a plan, holding one of the model's tensors at a time.

    Raises:
        NumericalError: a weight is NaN or Inf.
        CheckpointError: `weights` lacks a tensor.
    """
    lacking = sorted(set(plan.read) - set(weights))
    if lacking:
        raise CheckpointError("the weights to save lack tensors of the model", lacking)
    for files in plan.files:
        _write_group(draft, plan, files, weights)
    if plan.index:
        draft.add_bytes(plan.index, _index(plan))


def _write_group(
    draft: Draft, plan: Plan, files: PlannedFiles, weights: Mapping[str, Tensor]
) -> None:
    """Write files whose tensors are parts of the same ones, side by side."""
    with ExitStack() as stack:
        writers = [
            stack.enter_context(files.kind(draft.target(name), files.specs)) for name in files.names
        ]
        for key in writers[0].order:
            parts = _parts(plan, files, key, weights)
            for writer, part in zip(writers, parts, strict=True):
                writer.add(part)
    for name, writer in zip(files.names, writers, strict=True):
        draft.records[name] = writer.record


def _parts(
    plan: Plan, files: PlannedFiles, key: str, weights: Mapping[str, Tensor]
) -> Iterator[Tensor]:
    """Yield what each file of a group gets of a tensor."""
    entry = files.entries[key]
    if entry.ours is None:
        yield from (file[key] for file in files.group.files)
        return
    name = files.ours(key)
    tensor = weights[name].detach().to("cpu", plan.dtype)
    check_finite_weight(name, tensor)
    theirs = plan.table.row(name).to_theirs(tensor, plan.config)
    count = len(files.names)
    yield from [theirs] * count if entry.dim is None else theirs.chunk(count, entry.dim)


def _index(plan: Plan) -> bytes:
    """Return Hugging Face's index: which file holds which tensor."""
    where = {key: files.names[0] for files in plan.files for key in files.order}
    return to_json(
        {"metadata": {"total_size": plan.nbytes}, "weight_map": dict(sorted(where.items()))}
    )

"""The conversion tables are one-to-one and know every tensor of every model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mytune.training.checkpointing.checkpointers import (
    FullModelHFCheckpointer,
    FullModelMetaCheckpointer,
)
from mytune.training.checkpointing.formats import FORMATS, HF, META, PEFT, parameter_shapes
from tests.checkpointing import tiny

TABLES = {**{fmt.name: fmt.table for fmt in FORMATS}, "PEFT": PEFT}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_one_to_one(name: str) -> None:
    rows = TABLES[name].rows
    assert len({row.ours for row in rows}) == len({row.theirs for row in rows}) == len(rows)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("tied", [False, True])
def test_every_models_names_survive_both_ways(fmt: Any, tied: bool) -> None:
    names = parameter_shapes(replace(tiny.SIZES, num_layers=12, tie_word_embeddings=tied))
    theirs = [fmt.table.theirs(name) for name in names]
    assert [fmt.table.ours(name) for name in theirs] == list(names)
    assert len(set(theirs)) == len(names) == 3 + 12 * 9 - tied


def test_names_are_those_that_transformers_uses() -> None:
    theirs = {HF.table.theirs(name) for name in parameter_shapes(tiny.SIZES)}
    assert theirs == set(tiny.hf_model(tiny.SIZES).state_dict())


def test_a_row_undoes_its_own_permutation_with_grouped_heads() -> None:
    for name, shape in parameter_shapes(tiny.SIZES).items():
        row = META.table.row(name)
        theirs = torch.arange(torch.Size(shape).numel()).view(shape)
        ours = row.to_ours(theirs, tiny.SIZES)
        assert torch.equal(row.to_theirs(ours, tiny.SIZES), theirs)
        moved = not torch.equal(ours, theirs)
        assert moved == name.endswith(("q_proj.weight", "k_proj.weight"))


@pytest.mark.data
def test_the_same_real_weights_come_out_of_both_formats(data_dir: Any) -> None:
    from mytune.models.auto import sizes_of_checkpoint

    folder = data_dir / "stories260K"
    config = sizes_of_checkpoint(str(folder / "hf"))
    hf = FullModelHFCheckpointer(str(folder / "hf")).weights(config)
    meta = FullModelMetaCheckpointer(str(folder / "meta")).weights(config)
    assert hf.keys() == meta.keys()
    assert all(torch.equal(hf[name], meta[name]) for name in hf)

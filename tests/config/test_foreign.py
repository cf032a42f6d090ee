"""Other libraries' keys: each leads to what does the same here, never to what only looks alike."""

from __future__ import annotations

import re
from inspect import signature
from pathlib import Path

import pytest

from mytune.config import read_config
from mytune.config.components import find_component
from mytune.config.foreign import NAMES, called_here
from mytune.config.schema import read_schema
from tests.docs.pages import load as load_page

RECIPES = Path(__file__).parents[2] / "recipes"
FINETUNE, GENERATE = RECIPES / "finetune.py", RECIPES / "generate.py"
# Components that a config of ours has at these keys.
USUAL = {
    "optimizer": "torch.optim.AdamW",
    "dataset": "mytune.datasets.text_completion_dataset mytune.datasets.instruct_dataset",
    "tokenizer": "mytune.models.llama3.llama3_tokenizer",
    "checkpointer": "mytune.training.FullModelHFCheckpointer",
    "model": "mytune.models.lora_auto_model",
    "lr_scheduler": "mytune.training.get_cosine_schedule_with_warmup",
}


@pytest.mark.parametrize(
    ("key", "here"),
    [
        ("gradient_checkpointing", "enable_activation_checkpointing"),
        ("eval_steps", "run_val_every_n_steps"),
        ("learning_rate", "optimizer.lr"),
        ("max_length", "tokenizer.max_seq_len"),
        ("adapter", "model=mytune.models.lora_auto_model"),
        ("bf16", "dtype (bf16 or fp32)"),
    ],
)
def test_a_key_of_another_library_is_told_what_it_is_here(tmp_path, key, here):
    (tmp_path / "theirs.yaml").write_text(f"output_dir: x\n{key}: 1\n")
    problems = read_config(FINETUNE, tmp_path / "theirs.yaml", [f"{key}=2"]).problems
    assert f"override '{key}=2': unknown key '{key}'; here it is {here}" in problems
    problems = read_config(FINETUNE, tmp_path / "theirs.yaml").problems
    assert any(p.endswith(f":2: unknown key '{key}'; here it is {here}") for p in problems)


def test_what_a_recipe_has_not_is_not_told():
    keys = read_schema(GENERATE).names
    assert called_here("learning_rate", keys) is None
    assert called_here("max_length", keys) == "max_new_tokens"


def test_what_is_told_is_there():
    recipes = [read_schema(each).names for each in (FINETUNE, GENERATE)]
    for key, argument in re.findall(r"\b([a-z_]+)(?:\.([a-z_]+))?", " ".join(NAMES)):
        if key in USUAL and argument:
            components = map(find_component, USUAL[key].split())
            assert any(argument in signature(each).parameters for each in components), argument
    for here, elsewhere in NAMES.items():
        key, _, component = re.split(r"[.,( ]", here)[0].partition("=")
        recipe = next(names for names in recipes if key in names)
        assert not component or find_component(here.partition("=")[2])
        for name in elsewhere.split():
            assert name not in recipe and called_here(name, [key]) is not None


def test_the_table_in_the_docs_is_the_codes():
    rows = load_page("docs/configs.md").table("elsewhere")
    told = {here.strip("`"): elsewhere for elsewhere, here in rows}
    assert told == {here: ", ".join(f"`{w}`" for w in each.split()) for here, each in NAMES.items()}

"""What a run leaves for other programs, and for who reads its numbers."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoTokenizer, GenerationConfig

from mytune.assets import ASSETS
from mytune.models.llama3 import llama3_tokenizer
from mytune.tokenizers import Message

EOS, EOT = 769, 777


@pytest.fixture
def base(config, tmp_path):
    """A base model's directory: it ends texts, not turns, and knows no conversations."""
    folder = tmp_path / "base"
    shutil.copytree(ASSETS / "tiny", folder)
    for name in ("config.json", "generation_config.json"):
        said = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**said, "eos_token_id": EOS}))
    said = json.loads((folder / "tokenizer_config.json").read_text())
    del said["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    config["checkpointer"]["checkpoint_dir"] = str(folder)
    config["tokenizer"]["path"] = str(folder / "tokenizer.model")
    config |= {"max_steps_per_epoch": 1}
    return folder


def test_a_base_model_that_learned_conversations_holds_them_elsewhere(run, config, base):
    run(config)
    left = config["output_dir"] + "/epoch_0"
    assert GenerationConfig.from_pretrained(left).eos_token_id == [EOS, EOT]
    with open(left + "/config.json") as file:
        assert json.load(file)["eos_token_id"] == [EOS, EOT]
    turns = [("user", "Hi."), ("assistant", "Hello.")]
    ids = AutoTokenizer.from_pretrained(left).apply_chat_template(
        [{"role": role, "content": text} for role, text in turns], return_dict=False
    )
    ours = llama3_tokenizer(left).tokenize_messages([Message(*turn) for turn in turns])[0]
    assert ids == ours


@pytest.mark.parametrize("kind", ["text", "own template", "nothing new"])
def test_what_is_no_conversation_of_llama_3_changes_no_file(run, config, base, kind, tmp_path):
    if kind == "text":
        (tmp_path / "rows.txt").write_text("Once upon a time.\n" * 20)
        component = "mytune.datasets.text_completion_dataset"
        config["dataset"] = {"_component_": component, "source": str(tmp_path / "rows.txt")}
    elif kind == "own template":
        config["tokenizer"]["prompt_template"] = {"user": ["Q: ", ""]}
        for name in ("config.json", "generation_config.json"):
            said = json.loads((base / name).read_text())
            (base / name).write_text(json.dumps({**said, "eos_token_id": [EOT, EOS]}))
    else:
        shutil.copytree(ASSETS / "tiny", base, dirs_exist_ok=True)
    run(config)
    for name in ("generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        left = (tmp_path / "run" / "epoch_0" / name).read_bytes()
        assert left == (base / name).read_bytes(), name


def test_a_step_without_a_trained_token_has_no_loss(run, config, tmp_path):
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}]
    rows = [[turns[0], {**turns[1], "weight": int(i != 1)}] for i in range(3)]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    config["dataset"] = {
        "_component_": "mytune.datasets.chat_dataset",
        "source": str(file),
        "conversation_column": "messages",
        "conversation_style": "openai",
    }
    steps = run(config, "batch_size=1", "gradient_accumulation_steps=1", "shuffle=False")
    assert [step["loss"] is None for step in steps] == [False, True, False]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best_loss"] == min(steps[0]["loss"], steps[2]["loss"])

"""Our model beside lm_eval's own Hugging Face one, on the same weights and ids; local tasks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import transformers
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._index import TaskIndex

from mytune.evaluation import HarnessModel, load_tasks
from mytune.models.llama3 import llama3_tokenizer
from mytune.modules import Decoder
from mytune.tokenizers import Llama3Tokenizer
from tests.hf import load, twins
from tests.tokenizers.conftest import convert_to_json, write_tiktoken


@pytest.fixture(scope="session", autouse=True)
def one_index():
    """Read each folder of tasks once: lm_eval's own has 14,000 files."""
    build, known = TaskIndex.build, {}

    def build_once(paths, **settings):
        for path in set(paths) - known.keys():
            known[path] = build([path], **settings)
        return {name: entry for path in paths for name, entry in known[path].items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(build_once))
        yield


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@dataclass
class Pair:
    """A model and tokenizer, ours and Hugging Face's, that are the same."""

    model: Decoder
    tokenizer: Llama3Tokenizer
    theirs: Any
    their_tokenizer: Any

    def ours(self, **settings: Any) -> HarnessModel:
        return HarnessModel(self.model, self.tokenizer, **settings)

    def hflm(self, **settings: Any) -> HFLM:
        model = HFLM(self.theirs, tokenizer=self.their_tokenizer, device="cpu", **settings)
        assert model.add_bos_token is None
        return model


def make_pair(model: Decoder, theirs: Any, tokenizer_file: Path, folder: Path) -> Pair:
    tokenizer = llama3_tokenizer(tokenizer_file)
    names = list(tokenizer.special_tokens)
    file = convert_to_json(tokenizer_file, folder / "tokenizer.json", names)
    their_tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<|finetune_right_pad_id|>",
        chat_template=CHAT_TEMPLATE,
    )
    theirs.generation_config.eos_token_id = tokenizer.stop_tokens
    return Pair(model, tokenizer, theirs, their_tokenizer)


@pytest.fixture(scope="session")
def random_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A random Llama with a vocabulary of bytes, a few words and the special tokens."""
    folder = tmp_path_factory.mktemp("random")
    file = write_tiktoken(folder / "tokenizer.model")
    sizes = dict(vocab_size=529, max_position_embeddings=512, initializer_range=0.12)
    return make_pair(*twins(**sizes), file, folder)


@pytest.fixture(scope="session")
def stories_pair(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The stories model."""
    folder = data_dir / "stories260K" / "hf"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    file = folder / "tokenizer.model"
    return make_pair(load(folder), theirs.eval(), file, tmp_path_factory.mktemp("hf"))


@pytest.fixture(params=["random_pair", "stories_pair"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.getfixturevalue(request.param)


ROWS = [
    {
        "question": f"What comes after the {word} user?",
        "choices": [f"the {word} as such", "the end", f"{word}", "nothing, the user is thesis"],
        "label": i % 4,
        # Never periodic: HFLM mixes up windows of equal tokens that are scored from other places.
        "text": " ".join(f"The {word} user is {(7 * i + 3) ** (j + 2)};" for j in range(2 + i)),
    }
    for i, word in enumerate(["first", "second", "third", "fourth", "fifth", "sixth", "seventh"])
]

TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "greedy": {
        "output_type": "loglikelihood",
        "doc_to_text": "",
        "doc_to_target": "{{choices[label]}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{text[:40 + 9 * label]}}",
        "doc_to_target": "{{choices[label]}}",
        # None is in the name of a special token: there HFLM stops too, though it leaves them out.
        "generation_kwargs": {"until": ['a"', "W", ".", "#"], "max_gen_toks": 24},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="session")
def tasks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks over a local file."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, task in TASKS.items():
        data = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **task}))
    return folder


@pytest.fixture
def truthfulqa(data_dir: Path, tmp_path: Path) -> Path:
    """A folder with TruthfulQA's own tasks, over the local file of its questions."""
    theirs = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa"
    questions = data_dir / "truthfulqa" / "truthfulqa_mc.jsonl"
    for name in ("truthfulqa_mc1", "truthfulqa_mc2"):
        task = {
            "include": str(theirs / f"{name}.yaml"),
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"validation": str(questions)}},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


def run_lm_eval(lm: Any, names: list[str], folder: Path, **settings: Any) -> dict[str, Any]:
    """Return the harness's results, with samples, for a model of either kind."""
    few = settings.pop("num_fewshot", None)
    tasks = load_tasks(names, folder, few)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=7)
    return lm_eval.evaluate(lm, tasks, bootstrap_iters=100, **settings)


def responses(results: dict[str, Any]) -> dict[str, list[Any]]:
    """Return what the model answered to each document of each task."""
    return {
        task: [sample["resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]
        for task, samples in results["samples"].items()
    }

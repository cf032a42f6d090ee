"""`tune run eleuther_eval`: every kind of checkpoint, comparison, ranks, and what can be wrong."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file

from mytune.assets import ASSETS
from mytune.cli.main import main
from mytune.errors import DataError
from mytune.evaluation import KeptAnswers, batches, continuing, harness
from mytune.training.progress import ProgressBar
from tests.checkpointing.tiny import torchtune_state
from tests.evaluation.conftest import run_lm_eval
from tests.hf import tiny_llama, twins, with_adapter

SIZES_OF = dict(vocab_size=529, max_position_embeddings=512, initializer_range=0.12)


@pytest.fixture(scope="module")
def base(random_pair, tmp_path_factory):
    """The random model's directory, with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    random_pair.theirs.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(random_pair.tokenizer.path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """An adapter made by PEFT that changes answers, and the model with it."""
    folder = tmp_path_factory.mktemp("adapter")
    model = with_adapter(tiny_llama(**SIZES_OF), std=0.3, lora_alpha=8)
    model.save_pretrained(folder)
    return folder, model.merge_and_unload()


@pytest.fixture
def tune(base, tasks_folder, tmp_path, capfd):
    """Run the recipe; return results, stdout and stderr of a run that ends with `code`."""

    def run(*overrides, code=0):
        settings = {
            "model._component_": "mytune.models.auto_model",
            "model.checkpoint_dir": base,
            "checkpointer.checkpoint_dir": base,
            "tokenizer.path": base / "tokenizer.model",
            "tasks": "[choice]",
            "include_path": tasks_folder,
            "output_dir": tmp_path / "out",
            "max_seq_length": "null",
            "device": "cpu",
            "dtype": "fp32",
        }
        words = [f"{key}={value}" for key, value in settings.items()]
        capfd.readouterr()
        config = ["--config", "eleuther_evaluation"]
        assert main(["run", "eleuther_eval", *config, *words, *overrides]) == code
        out, err = capfd.readouterr()
        file = tmp_path / "out" / "evaluation.json"
        return json.loads(file.read_text()) if file.exists() else {}, out, err

    return run


def expected(pair, folder, theirs=None):
    """Return what lm_eval's own model scores on the task `choice`."""
    lm = HFLM(theirs or pair.theirs, tokenizer=pair.their_tokenizer, device="cpu", batch_size=4)
    return run_lm_eval(lm, ["choice"], folder)["results"]["choice"]


def test_table_json_and_summary_hold_what_lm_eval_scores(tune, random_pair, tasks_folder, tmp_path):
    results, out, err = tune()
    wanted = expected(random_pair, tasks_folder)
    for name in ("acc,none", "acc_norm,none", "acc_stderr,none"):
        assert results["results"]["choice"][name] == pytest.approx(wanted[name], rel=1e-6)
    assert re.search(r"\|choice *\| *\S+ *\|none *\| *0\|acc *\|↑ *\|", out)
    assert results["software"]["lm_eval"] == "0.4.13"
    assert "tasks: [choice]" in results["config"]
    summary = (tmp_path / "out" / "evaluation.md").read_text()
    assert out.strip() in summary and "tasks: [choice]" in summary
    assert "Running evaluation on the following tasks: ['choice']" in err


@pytest.mark.parametrize("builder", ["auto_model", "lora_auto_model"])
def test_base_and_adapter_score_as_peft_does(tune, random_pair, adapter, tasks_folder, builder):
    lora = (
        f"model._component_=mytune.models.{builder}",
        *("model.lora_modules=[q_proj,down_proj]", "model.lora_rank=4", "model.lora_alpha=8"),
    )
    named = f"checkpointer.adapter_checkpoint={adapter[0]}"
    results, _, _ = tune(named, "tasks=[choice,rolling]", *lora[: 4 * ("lora" in builder)])
    lm = HFLM(adapter[1], tokenizer=random_pair.their_tokenizer, device="cpu", batch_size=4)
    wanted = run_lm_eval(lm, ["choice", "rolling"], tasks_folder)["results"]
    plain = run_lm_eval(random_pair.ours(), ["rolling"], tasks_folder)["results"]["rolling"]
    name = "bits_per_byte,none"
    assert results["results"]["rolling"][name] == pytest.approx(wanted["rolling"][name], rel=1e-6)
    assert results["results"]["choice"]["acc,none"] == wanted["choice"]["acc,none"]
    assert results["results"]["rolling"][name] != pytest.approx(plain[name], rel=1e-3)


def test_a_4_bit_base_with_its_adapter_is_evaluated(tune, adapter):
    results, _, _ = tune(
        "model._component_=mytune.models.qlora_auto_model",
        *("model.lora_modules=[q_proj,down_proj]", "model.lora_rank=4", "model.lora_alpha=8"),
        f"checkpointer.adapter_checkpoint={adapter[0]}",
        "tasks=[rolling]",
    )
    assert 0 < results["results"]["rolling"]["bits_per_byte,none"] < 20


def test_loaded_weights_can_be_quantized(tune):
    bits = "bits_per_byte,none"
    exact, _, _ = tune("tasks=[rolling]")
    quantizer = "quantizer=mytune.quantization.Int8WeightOnlyQuantizer"
    rounded, _, _ = tune("tasks=[rolling]", quantizer)
    before, after = (each["results"]["rolling"][bits] for each in (exact, rounded))
    assert before != after == pytest.approx(before, rel=0.02)


def test_a_quantized_checkpoint_is_evaluated(tune, base, tmp_path):
    quantizer = "mytune.quantization.Int8WeightOnlyQuantizer"
    in_memory, _, _ = tune("tasks=[rolling,choice]", f"quantizer={quantizer}")
    folder = tmp_path / "int8"
    config = ["run", "quantize", "--config", "quantization", f"quantizer={quantizer}"]
    places = [f"checkpointer.checkpoint_dir={base}", f"output_dir={folder}", "device=cpu"]
    model = ["model=mytune.models.auto_model", f"model.checkpoint_dir={base}", "dtype=fp32"]
    model += [f"tokenizer.path={base / 'tokenizer.model'}"]
    assert main([*config, *places, *model, "perplexity_file=null", "decode_tokens=0"]) == 0
    folder /= "quantized"
    saved, _, _ = tune(
        "tasks=[rolling,choice]",
        f"model.checkpoint_dir={folder}",
        f"checkpointer.checkpoint_dir={folder}",
        f"tokenizer.path={folder / 'tokenizer.model'}",
    )
    assert saved["results"] == in_memory["results"]


FORMATS = {
    "hf": "FullModelHFCheckpointer",
    "meta": "FullModelMetaCheckpointer",
    "torchtune": "FullModelTorchTuneCheckpointer",
}


@pytest.mark.data
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_scores_alike(tune, data_dir, stories_pair, tasks_folder, tmp_path, form):
    stories = data_dir / "stories260K"
    if form == "torchtune":
        (folder := tmp_path / form).mkdir()
        weights = torchtune_state(torch.load(stories / "meta" / "consolidated.00.pth"))
        torch.save(weights, folder / "torchtune_model_0.pt")
    else:
        folder = stories / form
    results, _, _ = tune(
        f"model.checkpoint_dir={stories / 'hf'}",
        f"checkpointer._component_=mytune.training.{FORMATS[form]}",
        f"checkpointer.checkpoint_dir={folder}",
        f"tokenizer.path={stories / 'hf' / 'tokenizer.model'}",
    )
    wanted = expected(stories_pair, tasks_folder)
    assert results["results"]["choice"]["acc,none"] == wanted["acc,none"]


@pytest.mark.parametrize("how", ["directory", "results"])
def test_base_and_fine_tuned_stand_side_by_side(tune, base, adapter, tmp_path, how):
    alone, _, _ = tune("tasks=[choice,rolling]")
    earlier = (tmp_path / "out" / "evaluation.json").rename(tmp_path / "earlier.json")
    compare = base if how == "directory" else earlier
    named = f"checkpointer.adapter_checkpoint={adapter[0]}"
    both, out, _ = tune("tasks=[choice,rolling]", named, "--compare", str(compare))
    before, after = alone["results"]["choice"], both["results"]["choice"]
    assert both["base"]["choice"] == before
    cells = [
        *(f"{before['acc,none']:.4f}", f"± {before['acc_stderr,none']:.4f}"),
        *(f"{after['acc,none']:.4f}", f"± {after['acc_stderr,none']:.4f}"),
    ]
    assert f"| choice | acc | ↑ | {' | '.join(cells)} |" in out
    assert re.search(r"\| rolling \| bits_per_byte \| ↓ \|", out)


def test_what_is_compared_and_was_measured_otherwise_is_told(tune, tmp_path):
    tune("seed=3", "max_seq_length=400")
    earlier = (tmp_path / "out" / "evaluation.json").rename(tmp_path / "earlier.json")
    _, _, err = tune("tasks=[choice,rolling]", "--compare", str(earlier))
    told = [line for line in err.splitlines() if "not measured alike" in line]
    assert [line.partition("alike: ")[2] for line in told] == [
        "rolling: there are no results for the base",
        "max_seq_length was 400 for the base and is None",
        "seed was 3 for the base and is 1234",
    ]
    (tmp_path / "results").mkdir()
    earlier.rename(tmp_path / "results" / "evaluation.json")
    _, _, err = tune("--compare", str(tmp_path / "results"), code=2)
    assert f"compare={tmp_path / 'results' / 'evaluation.json'}" in err


def test_documents_and_answers_can_be_looked_at(tune, tmp_path):
    results, _, err = tune("tasks=[choice,rolling]", "log_samples=true", "limit=3")
    file = tmp_path / "out" / "evaluation_samples.jsonl"
    assert f"samples: {file}" in err
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["task"] for row in rows] == ["choice"] * 3 + ["rolling"] * 3
    right = [row["acc"] for row in rows if row["task"] == "choice"]
    assert sum(right) / 3 == results["results"]["choice"]["acc,none"]
    assert {"doc", "target", "arguments", "resps"} <= rows[0].keys()
    assert "samples" not in results


def test_a_base_of_other_sizes_is_compared_with(tune, tmp_path):
    other = tmp_path / "other"
    tiny_llama(**SIZES_OF, num_hidden_layers=1).save_pretrained(other)
    both, _, _ = tune("--compare", str(other))
    words = [f"{key}.checkpoint_dir={other}" for key in ("checkpointer", "model")]
    alone, _, _ = tune(*words)
    assert both["base"]["choice"] == alone["results"]["choice"] != both["results"]["choice"]


def test_a_base_is_read_with_its_own_tokenizer_and_its_samples_are_kept(tune, base, tmp_path):
    other, theirs = tmp_path / "other", tmp_path / "out" / "evaluation_samples.jsonl"
    tiny_llama(**SIZES_OF).save_pretrained(other)
    tokens = [line.split()[0] for line in (base / "tokenizer.model").read_bytes().splitlines()]
    tokens[97:107], tokens[107:117] = tokens[107:117], tokens[97:107]
    lines = [token + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (other / "tokenizer.model").write_bytes(b"".join(lines))
    both, _, err = tune("--compare", str(other), "log_samples=true")
    kept = theirs.with_stem("evaluation_samples_base")
    assert f"samples of the base: {kept}" in err
    of_the_base = kept.read_text()
    words = [f"{key}.checkpoint_dir={other}" for key in ("checkpointer", "model")]
    words += [f"tokenizer.path={other / 'tokenizer.model'}", "log_samples=true"]
    alone, _, _ = tune(*words)
    assert both["base"]["choice"] == alone["results"]["choice"]
    assert of_the_base == theirs.read_text()
    assert kept.with_stem("evaluation_samples_base_1").read_text() == of_the_base
    tune(*words, f"tokenizer.path={base / 'tokenizer.model'}")
    assert of_the_base != theirs.read_text()


def test_a_base_that_cannot_be_built_is_told_before_anything_is_measured(tune, base, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    (other / "config.json").write_text("{")
    results, _, err = tune("--compare", str(other), code=4)
    assert results == {} and "does not describe a Llama model" in err


def test_a_base_that_does_not_fit_costs_no_results(tune, base, tmp_path):
    other = tmp_path / "other"
    tiny_llama(**SIZES_OF, num_hidden_layers=1).save_pretrained(other)
    shutil.copy(base / "config.json", other)
    results, _, _ = tune("--compare", str(other), code=4)
    assert results["results"]["choice"]["acc,none"] > 0
    assert not (tmp_path / "out" / "evaluation_1.json").exists()
    alone, _, _ = tune("--compare", str(base))
    assert alone["results"] == results["results"] == {"choice": alone["base"]["choice"]}
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {f"evaluation{n}.{kind}" for n in ("", "_1") for kind in ("json", "md")}


def test_the_embedded_config_runs(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["run", "eleuther_eval", "--config", "tiny/evaluation", "limit=5"]
    assert main(command) == 0
    assert re.search(r"\|dates *\|.*exact_match", capfd.readouterr().out)
    assert Path("outputs/tiny/evaluation/evaluation.md").is_file()


def test_the_tutorial_config_can_be_copied_and_edited(
    base, tasks_folder, tmp_path, monkeypatch, capfd
):
    """As in torchtune's tutorial, with its names of components."""
    monkeypatch.chdir(tmp_path)
    assert main(["cp", "eleuther_evaluation", "./custom_eval_config.yaml"]) == 0
    config = yaml.safe_load(Path("custom_eval_config.yaml").read_text())
    config |= {
        "model": {"_component_": "mytune.models.auto_model", "checkpoint_dir": str(base)},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": str(base),
            "checkpoint_files": ["model.safetensors"],
            "output_dir": str(tmp_path),
            "model_type": "LLAMA3",
        },
        "tokenizer": {
            "_component_": "torchtune.models.llama3.llama3_tokenizer",
            "path": str(base / "tokenizer.model"),
            "max_seq_len": None,
        },
        "tasks": ["choice"],
        "include_path": str(shutil.copytree(tasks_folder, tmp_path / "tasks")),
        "device": "cpu",
        "dtype": "fp32",
        "resume_from_checkpoint": False,
    }
    Path("custom_eval_config.yaml").write_text(yaml.safe_dump(config))
    assert main(["run", "eleuther_eval", "--config", "./custom_eval_config.yaml"]) == 0
    assert re.search(r"\|choice *\|.*\|acc ", capfd.readouterr().out)


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (
            ["tasks=[chioce,truthfulqa_mc3]"],
            2,
            r"no chioce; did you mean 'choice'.*no truthfulqa_mc3; did .*'truthfulqa_mc2'",
        ),
        (["tasks=[]"], 2, "tasks is empty"),
        (["include_path=/nowhere"], 2, "no directory /nowhere"),
        (["batch_size=0"], 2, "batch_size is 0; it must be 1 or more, or auto"),
        (["batch_size=some"], 2, "batch_size is 'some'"),
        (["limit=0"], 2, "limit is 0.0; it must be above 0"),
        (["compare=/nowhere"], 2, "compare: /nowhere does not exist"),
        (["num_fewshot=-1"], 2, "num_fewshot is -1"),
        (["limit=2.5"], 2, "limit is 2.5; above 1 it is a number of documents, and whole"),
        (["fewshot_as_multiturn=true"], 2, "fewshot_as_multiturn needs chat_template=true"),
        (["chat_template=yess"], 2, "chat_template: no template in yess; give true for the token"),
        (["output_dir=/proc/none"], 5, "output_dir: cannot write in /proc/none"),
        (["tasks=[truthfulqa_mc2]"], 5, "task truthfulqa_mc2: its data cannot be downloaded"),
        (["tasks=[writing]", "max_seq_length=20"], 2, "task writing generates up to 24 tokens"),
        (
            [
                "model={_component_: mytune.models.llama3.llama3, vocab_size: 300, num_layers: 1, "
                "num_heads: 1, num_kv_heads: 1, embed_dim: 8, max_seq_len: 99}"
            ],
            2,
            "the tokenizer has .* ids and the model only 300",
        ),
    ],
)
def test_what_is_wrong_is_one_line(tune, overrides, code, message):
    _, out, err = tune(*overrides, code=code)
    assert re.search(message, err)
    assert out == ""
    assert "weights" not in err


def test_tasks_run_no_code_of_a_folder_that_a_config_alone_names(
    tune, tasks_folder, tmp_path, monkeypatch, capfd
):
    folder = tmp_path / "downloaded"
    folder.mkdir()
    task = yaml.safe_load((tasks_folder / "choice.yaml").read_text())
    text = yaml.safe_dump({**task, "task": "evil"}) + "process_docs: !function code.run\n"
    (folder / "evil.yaml").write_text(text)
    (folder / "code.py").write_text("import pathlib\npathlib.Path('ran').touch()\nrun = list\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = Path("config.yaml")
    assert main(["cp", "eleuther_evaluation", str(config)]) == 0
    settings = yaml.safe_load(config.read_text())
    for tasks in (
        {"include_path": str(folder), "tasks": ["evil"]},
        {"tasks": [f"{folder}/evil.yaml"]},
    ):
        config.write_text(yaml.safe_dump({**settings, **tasks, "device": "cpu", "dtype": "fp32"}))
        command = ["run", "eleuther_eval", "--config", str(config), f"tokenizer.path={ASSETS}/tiny"]
        command.append(f"checkpointer.checkpoint_dir={ASSETS}/tiny")
        assert main(command) == 2
        assert f"--allow-component {folder} lets them" in capfd.readouterr().err
        assert not Path("ran").exists()
    trained = ["run", "lora_finetune_single_device", "--config", "lora.yaml"]
    assert main(["cp", "tiny/lora_single_device", "lora.yaml"]) == 0
    config = yaml.safe_load(Path("lora.yaml").read_text())
    config |= {"eval_include_path": str(folder), "dataset_val": None, "max_steps_per_epoch": 1}
    Path("lora.yaml").write_text(yaml.safe_dump({**config, "eval_tasks": ["evil"]}))
    assert main(trained) == 2
    assert f"--allow-component {folder} lets them" in capfd.readouterr().err
    Path("lora.yaml").write_text(yaml.safe_dump(config))
    assert main(trained) == 0  # nothing is evaluated
    assert not Path("ran").exists()
    tune("tasks=[evil]", f"include_path={folder}", code=3)  # run: no `process_docs`
    assert Path("ran").exists()


TEMPLATES = {
    "{% for m in messages %}": r"chat_template.jinja: Unexpected end of template",
    "{{ raise_exception('no system message') }}": r"chat_template.jinja: no system message",
    "{{ messages[0]['content'] + 1 }}": r"chat_template.jinja: can only concatenate str",
    "{{ messages.clear() }}": "chat_template.jinja: .*'clear' of 'list' object is unsafe",
    "{{ ''.__class__.__mro__ }}": "chat_template.jinja: .*'__class__' of 'str' object is unsafe",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_checkpoints_template_is_used_and_cannot_do_harm(tune, tmp_path, template):
    (tmp_path / "chat_template.jinja").write_text(template)
    _, out, err = tune("tasks=[choice]", f"chat_template={tmp_path}", code=2)
    assert re.search(TEMPLATES[template], err.splitlines()[-1]), err
    assert out == ""


def test_a_template_outside_of_its_folder_is_not_read(tune, tmp_path):
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    _, _, err = tune("tasks=[choice]", f"chat_template={folder}", code=4)
    assert "leads out of its directory" in err.splitlines()[-1]


def test_a_damaged_model_has_no_scores(tune, base, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(base, damaged)
    weights = load_file(damaged / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 4] = torch.nan
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    results, out, err = tune(f"checkpointer.checkpoint_dir={damaged}", code=6)
    assert "log-likelihoods are not finite" in err
    assert not results and not out


OWN = {
    "metric": (
        {"metric_list": [{"metric": "accc", "aggregation": "mean"}]},
        2,
        "has the metric accc, which lm_eval does not know",
    ),
    "aggregation": (
        {"metric_list": [{"metric": "acc", "aggregation": "meen"}]},
        2,
        "has the metric acc with an aggregation that lm_eval does not know",
    ),
    "choices": (
        {"doc_to_choice": "{{7 if label == 1 else choices}}"},
        3,
        r'task choices: lm_eval can make nothing of {"question": .*second user.*: TypeError \(',
    ),
    "number": (
        {
            "output_type": "loglikelihood",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc"}],
        },
        3,
        "task number: the model is asked for [0-9]+, which is no text",
    ),
    "unfit": (
        {
            "output_type": "generate_until",
            "doc_to_choice": None,
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
            "generation_kwargs": {"max_gen_toks": 2},
        },
        3,
        "lm_eval cannot score these tasks: TypeError .*does each metric fit its output_type",
    ),
    "nothing known": (
        {"metric_list": [{"metric": "accc"}]},
        3,
        "task nothing known: cannot be loaded: a metric of its metric_list is unknown",
    ),
    "group": (
        {"group": "group", "task": ["choise"]},
        3,
        "it is a group of tasks, and lm_eval has no choise",
    ),
    "examples": ({"num_fewshot": 50}, 3, "num_fewshot is 50, and it has fewer examples to show"),
    "split": ({"test_split": "tst"}, 3, "task split: cannot be loaded: there is no 'tst'"),
    "empty": ({"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}, 3, "there are no rows"),
}


@pytest.mark.parametrize("name", OWN)
def test_mistakes_in_a_task_of_ones_own_are_told(tune, tasks_folder, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("none.jsonl").touch()
    change, code, message = OWN[name]
    task = yaml.safe_load((tasks_folder / "choice.yaml").read_text())
    Path("own").mkdir()
    whole = {} if "group" in change else {**task, "task": name}
    Path(f"own/{name}.yaml").write_text(yaml.safe_dump({**whole, **change}))
    _, out, err = tune(f"tasks=[{name}]", "include_path=own", code=code)
    assert re.search(message, err.splitlines()[-1]), err
    assert out == ""


def test_what_the_harness_finds_odd_is_said(tune, tasks_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    task = yaml.safe_load((tasks_folder / "choice.yaml").read_text())
    task |= {"task": "odd", "doc_to_target": "{{9 if label == 3 else label}}"}
    Path("own").mkdir()
    Path("own/odd.yaml").write_text(yaml.safe_dump(task))
    tune("tasks=[odd]", "include_path=own")
    assert "Label index was not in within range" in caplog.text


def test_a_task_that_is_no_yaml_is_named(tune, tmp_path):
    (tmp_path / "bad.yaml").write_text("task: bad\nx: y: z\n")
    _, _, err = tune("tasks=[bad]", f"include_path={tmp_path}", code=2)
    assert "bad.yaml:2: not valid YAML: mapping values are not allowed" in err.splitlines()[-1]


def test_a_missing_harness_is_one_line_that_says_how_to_install_it(tune, monkeypatch):
    find = importlib.util.find_spec
    without = lambda name, *rest: None if name == "lm_eval" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    _, _, err = tune(code=5)
    assert "pip install 'lm_eval>=0.4.13'" in err.splitlines()[-1]


def test_an_evaluation_that_was_stopped_goes_on(tune, adapter, base, tmp_path, monkeypatch):
    """Ctrl-C while the model is asked, then while the base is: no batch is done twice."""
    keep, done, ends = KeptAnswers._keep, [], []

    def counted(self, key, answers):
        keep(self, key, answers)
        done.append((self.file, key))
        if len(done) in ends:
            raise KeyboardInterrupt

    monkeypatch.setattr(KeptAnswers, "_keep", counted)
    asked = ["tasks=[choice, rolling, writing]", "batch_size=2", f"compare={base}"]
    asked += [f"checkpointer.adapter_checkpoint={adapter[0]}", "log_samples=true"]
    results, table, _ = tune(*asked)
    needed, folder = len(done), tmp_path / "out"
    samples = (folder / "evaluation_samples.jsonl").read_text()

    done.clear()
    ends += [needed // 3, needed * 3 // 4]
    for code in (130, 130, 0):
        found, out, _ = tune(*asked, code=code)
    assert (found, out) == (results, table)
    assert (folder / "evaluation_samples.jsonl").read_text() == samples
    assert len(done) == len(set(done)) == needed
    assert not list(folder.glob("evaluation_unfinished*"))


@pytest.mark.ranks
def test_two_ranks_score_as_one(tune, base, tasks_folder, tmp_path):
    tasks = "tasks=[choice,rolling,writing]"
    alone, out, _ = tune(tasks, "batch_size=2", "log_samples=true")
    words = [f"model.checkpoint_dir={base}", f"checkpointer.checkpoint_dir={base}", tasks]
    words += [f"tokenizer.path={base / 'tokenizer.model'}", f"include_path={tasks_folder}"]
    words += ["model._component_=mytune.models.auto_model", "max_seq_length=null"]
    words += [f"output_dir={tmp_path / 'both'}", "device=cpu", "dtype=fp32", "batch_size=2"]
    words += ["log_samples=true"]
    command = [sys.executable, "-m", "mytune", "run", "--nproc_per_node", "2", "eleuther_eval"]
    command += ["--config", "eleuther_evaluation", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    both = json.loads((tmp_path / "both" / "evaluation.json").read_text())
    assert both["results"] == alone["results"]
    assert done.stdout == out  # and said once
    samples = [tmp_path / name / "evaluation_samples.jsonl" for name in ("out", "both")]
    assert samples[0].read_text() == samples[1].read_text()


def curve_of(folder):
    """Return each step's loss and gradient norm."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def evaluations(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "eval/dates/exact_match" in row]


@pytest.mark.parametrize("every", [None, 2])
def test_a_run_evaluates_while_it_trains(tmp_path, every):
    words = [f"output_dir={tmp_path}", "eval_tasks=[dates]", "eval_limit=3", "batch_size=4"]
    words += [f"eval_include_path={ASSETS / 'tasks'}", "eval_chat_template=true"]
    words += ["max_steps_per_epoch=3", "log_every_n_steps=10", "dataset_val=null"]
    words += [f"eval_every_n_steps={every}"] if every else []
    config = ["lora_finetune_single_device", "--config", "tiny/lora_single_device"]
    assert main(["run", *config, *words]) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [2, 3] if every else [3]
    assert lines == [{"step": step, "eval/dates/exact_match": 0.0} for step in steps]


def test_a_limit_that_cannot_be_is_told_before_training(capsys, tmp_path):
    words = [f"output_dir={tmp_path}", "eval_tasks=[dates]", "eval_limit=1.5"]
    assert (
        main(["run", "full_finetune_single_device", "--config", "tiny/full_single_device", *words])
        == 2
    )
    assert "eval_limit is 1.5; above 1 it is a number of documents" in capsys.readouterr().err


def test_a_task_that_fails_costs_nothing_that_was_trained(tmp_path, monkeypatch, capfd):
    def failing(*_, **settings):
        raise DataError(f"a task fails at a limit of {settings['limit']}")

    evaluate_scores = harness.evaluate_scores
    monkeypatch.setattr(harness, "evaluate_scores", failing)
    words = [f"output_dir={tmp_path}", "eval_tasks=[dates]", "eval_limit=3", "batch_size=4"]
    words += [f"eval_include_path={ASSETS / 'tasks'}", "dataset_val=null", "max_steps_per_epoch=2"]
    config = ["lora_finetune_single_device", "--config", "tiny/lora_single_device"]
    assert main(["run", *config, *words]) == 3
    assert "a task fails at a limit of 3" in capfd.readouterr().err
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    monkeypatch.setattr(harness, "evaluate_scores", evaluate_scores)
    for _ in range(2):  # what is known is not measured again
        assert main(["run", *config, *words, "resume_from_checkpoint=true"]) == 0
        assert len(evaluations(tmp_path)) == 1
    assert (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("at", [2, 4, 5])  # 5: at the end alone
def test_a_signal_ends_an_evaluation_and_the_run_can_go_on(tmp_path, monkeypatch, capfd, at):
    words = ["eval_tasks=[dates]", f"eval_include_path={ASSETS / 'tasks'}", "dataset_val=null"]
    words += ["eval_limit=6", f"eval_every_n_steps={at}", "max_steps_per_epoch=4", "batch_size=4"]
    config = ["run", "lora_finetune_single_device", "--config", "tiny/lora_single_device", *words]
    monkeypatch.setitem(batches._AUTO, "cpu", 1)  # a batch is a question
    assert main([*config, f"output_dir={tmp_path / 'straight'}"]) == 0

    answered = []
    answer = continuing.complete

    def answer_and_signal(*args, **settings):
        answered.append(args)
        if len(answered) == 2:
            signal.raise_signal(signal.SIGTERM)
        return answer(*args, **settings)

    monkeypatch.setattr(continuing, "complete", answer_and_signal)
    stopped = [*config, f"output_dir={tmp_path / 'stopped'}"]
    assert main(stopped) == 75
    assert len(answered) == 2
    assert "not measured: stopping" in capfd.readouterr().err
    assert (tmp_path / "stopped" / ("step_2" if at == 2 else "epoch_0")).exists()
    lines = (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()
    assert all("loss" in json.loads(line) for line in lines) and len(lines) == min(at, 4)
    answered.append(0)
    assert main([*stopped, "resume_from_checkpoint=true"]) == 0
    curves = [curve_of(tmp_path / name) for name in ("straight", "stopped")]
    assert curves[0] == curves[1] and len(curves[0]) == 4
    scores = [evaluations(tmp_path / name) for name in ("straight", "stopped")]
    assert scores[0] == scores[1] and len(scores[0]) == max(4 // at, 1)


def test_r7_a_stop_during_a_step_waits_for_no_evaluation(tmp_path, monkeypatch):
    words = ["eval_tasks=[dates]", f"eval_include_path={ASSETS / 'tasks'}", "dataset_val=null"]
    words += ["eval_limit=2", "eval_every_n_steps=1", "max_steps_per_epoch=2", "batch_size=4"]
    config = ["run", "lora_finetune_single_device", "--config", "tiny/lora_single_device", *words]
    config += [f"output_dir={tmp_path}"]
    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "update", lambda *_: signal.raise_signal(signal.SIGTERM))
        patch.setattr(harness, "evaluate", lambda *_, **__: pytest.fail("an evaluation begins"))
        assert main(config) == 75
    assert (tmp_path / "step_1").exists() and not evaluations(tmp_path)
    assert main([*config, "resume_from_checkpoint=true"]) == 0
    assert [row["step"] for row in evaluations(tmp_path)] == [1, 2]


def test_compiled_blocks_run_eagerly_while_tasks_are_evaluated(monkeypatch):
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    block = torch.compile(torch.sin, backend=backend)
    model, _ = twins()
    monkeypatch.setattr(
        harness, "evaluate", lambda *_, **__: {"results": {"t": {"acc,none": block(torch.ones(2))}}}
    )
    harness.evaluate_scores(model, None, {})
    assert not compiled and model.training
    block(torch.ones(2))
    assert compiled


def test_evaluating_changes_nothing_of_a_run(tmp_path):
    config = ["lora_finetune_single_device", "--config", "tiny/lora_single_device"]
    words = ["max_steps_per_epoch=3", "batch_size=4", "dataset_val=null"]
    tasks = ["eval_tasks=[dates]", "eval_limit=2", "eval_every_n_steps=1"]
    tasks += [f"eval_include_path={ASSETS / 'tasks'}"]
    for name, more in {"plain": [], "measured": tasks}.items():
        assert main(["run", *config, *words, f"output_dir={tmp_path / name}", *more]) == 0
    curves = [curve_of(tmp_path / name) for name in ("plain", "measured")]
    assert curves[0] == curves[1] and len(curves[0]) == 3

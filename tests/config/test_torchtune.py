"""Configs written for torchtune 0.6 mean the same here."""

from __future__ import annotations

from pathlib import Path

import pytest

from mytune.config import check_components, read_config
from mytune.config.torchtune import RETIRED, our_name
from tests.config.conftest import CONFIG, Load

FINETUNE = Path(__file__).parents[2] / "recipes" / "finetune.py"

THEIRS = """\
output_dir: /tmp/torchtune/llama3_8B/lora_single_device
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: /tmp/Meta-Llama-3-8B-Instruct/original/tokenizer.model
  max_seq_len: null
model:
  _component_: torchtune.models.llama3.lora_llama3_8b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: True
  apply_lora_to_output: False
  lora_rank: 8
  lora_alpha: 16
  lora_dropout: 0.0
checkpointer:
  _component_: torchtune.training.FullModelMetaCheckpointer
  checkpoint_dir: /tmp/Meta-Llama-3-8B-Instruct/original/
  checkpoint_files: [consolidated.00.pth]
  recipe_checkpoint: null
  output_dir: ${output_dir}
  model_type: LLAMA3
resume_from_checkpoint: False
save_adapter_weights_only: False
dataset: {_component_: torchtune.datasets.alpaca_cleaned_dataset, packed: False}
seed: null
shuffle: True
batch_size: 2
optimizer: {_component_: torch.optim.AdamW, fused: True, weight_decay: 0.01, lr: 3e-4}
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
loss: {_component_: torchtune.modules.loss.CEWithChunkedOutputLoss}
epochs: 1
max_steps_per_epoch: null
gradient_accumulation_steps: 8
clip_grad_norm: null
compile: False
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: ${output_dir}/logs
log_every_n_steps: 1
log_peak_memory_stats: True
device: cuda
dtype: bf16
enable_activation_checkpointing: True
enable_activation_offloading: False
low_cpu_ram: False
profiler:
  _component_: torchtune.training.setup_torch_profiler
  enabled: False
  output_dir: ${output_dir}/profiling_outputs
  cpu: True
  cuda: True
  profile_memory: False
  with_stack: False
  record_shapes: True
  with_flops: False
  wait_steps: 5
  warmup_steps: 3
  active_steps: 2
  num_cycles: 1
"""


def test_a_config_for_torchtune_runs_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(THEIRS)
    loaded = read_config(FINETUNE, tmp_path / "theirs.yaml")
    assert loaded.problems == []
    assert check_components(loaded, files=False) == []
    assert loaded.notices.count("torchtune.X is mytune.X here") == 1
    assert THEIRS.count("_component_: torchtune.") > len(loaded.notices)
    assert [each for each in loaded.notices if "low_cpu_ram is ignored" in each]


def test_torchtunes_names_become_ours_with_one_notice(load: Load) -> None:
    alpaca = "_component_: torchtune.datasets.alpaca_dataset"
    first = f"{{{alpaca}, template: torchtune.data.ChatMLTemplate}}"
    loaded = load(yaml=CONFIG + f"dataset: [{first}, {{{alpaca}}}]\n")
    assert loaded.problems == []
    assert loaded.values()["dataset"] == [
        {
            "_component_": "mytune.datasets.alpaca_dataset",
            "template": "mytune.datasets.ChatMLTemplate",
        },
        {"_component_": "mytune.datasets.alpaca_dataset"},
    ]
    assert sorted(loaded.notices) == [
        "torchtune.X is mytune.X here",
        "torchtune.data.ChatMLTemplate is mytune.datasets.ChatMLTemplate here",
    ]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("torchtune.models.llama3.lora_llama3_8b", "mytune.models.llama3.lora_llama3_8b"),
        ("torchtune.training.FullModelHFCheckpointer", "mytune.training.FullModelHFCheckpointer"),
        ("torchtune.utils.FullModelMetaCheckpointer", "mytune.training.FullModelMetaCheckpointer"),
        ("torchtune.utils.metric_logging.DiskLogger", "mytune.training.metric_logging.DiskLogger"),
        (
            "torchtune.modules.loss.CEWithChunkedOutputLoss",
            "mytune.modules.loss.LinearCrossEntropyLoss",
        ),
        (
            "torchtune.modules.loss.LinearCrossEntropyLoss",
            "mytune.modules.loss.LinearCrossEntropyLoss",
        ),
        ("torch.nn.CrossEntropyLoss", "mytune.modules.loss.LinearCrossEntropyLoss"),
        ("torch.nn.CrossEntropyLossy", "torch.nn.CrossEntropyLossy"),
        ("torchtunes.x", "torchtunes.x"),
        # A name in which only the package was changed.
        ("mytune.training.quantization.X", "mytune.quantization.X"),
        ("mytune.data.ChatMLTemplate", "mytune.datasets.ChatMLTemplate"),
        ("mytune.quantization.X", "mytune.quantization.X"),
        ("mytune.models.llama3.llama3_8b", "mytune.models.llama3.llama3_8b"),
    ],
)
def test_a_name_of_torchtunes_is_ours(theirs: str, ours: str) -> None:
    assert our_name(theirs) == ours


def test_retired_keys_are_noticed_and_wrong_ones_are_errors(load: Load) -> None:
    loaded = load("tensor_parallel_dim=2", yaml=CONFIG + "low_cpu_ram: True\ncollate_fn: null\n")
    assert [each.split(" is ignored")[0] for each in loaded.notices] == [
        "c.yaml:5: low_cpu_ram",
        "c.yaml:6: collate_fn",
    ]
    assert len(loaded.problems) == 1
    assert (
        "override 'tensor_parallel_dim=2': tensor_parallel_dim: 2 is not supported"
        in loaded.problems[0]
    )
    assert all(each.why for each in RETIRED.values())

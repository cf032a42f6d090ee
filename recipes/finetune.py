"""Fine-tune a language model: all weights, LoRA, DoRA or QLoRA, in one loop.

The model component decides what is trained: `llama3_8b` trains every weight, `lora_llama3_8b` adapters,
`qlora_llama3_8b` adapters beside 4-bit weights.

    tune run lora_finetune_single_device --config llama3/8B_lora_single_device
    tune run full_finetune_single_device --config llama3/8B_full_single_device epochs=3

Copy it with `tune cp lora_finetune_single_device my_recipe.py` and change what you like.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from mytune.config import Component, Components, component, instantiate
from mytune.datasets import BatchLoader, ConcatDataset, count_targets
from mytune.errors import ConfigError, StoppedEarly
from mytune.modules import adapter_config, adapter_state, merged_weights, target_index
from mytune.training import (
    StopSignal,
    all_sum,
    check_finite,
    check_finite_weights,
    checkpoint_activations,
    clip_grad_norm,
    compile_blocks,
    count_parameters,
    get_device,
    get_dtype,
    get_lr,
    load_adapters,
    load_optimizer_state,
    load_weights,
    log,
    memory_stats,
    offload_activations,
    open_run_directory,
    optimizer_state,
    progress_bar,
    rank,
    seed_step,
    set_deterministic,
    set_seed,
    setup_logging,
    write_report,
    world_size,
)

# What the recipe itself hands to a component, so that a config need not.
SUPPLIED = {
    "optimizer": ["params"],
    "lr_scheduler": ["optimizer", "num_training_steps", "last_epoch"],
    "dataset": ["tokenizer"],
    "dataset_val": ["tokenizer"],
}


@dataclass(kw_only=True)
class Config:
    """Every key of a fine-tuning config."""

    # Folder of the run: metrics, loss curve, summary, and the checkpoints epoch_N/ and step_N/.
    output_dir: str
    # Start over in an output_dir that holds another run, and remove that run's checkpoints.
    overwrite_output_dir: bool = False
    # Continue from the newest good checkpoint in checkpointer.output_dir, at the very next step.
    resume_from_checkpoint: bool = False

    # Builder of the model: llama3_8b trains all weights, lora_llama3_8b adapters, qlora_... on 4 bits.
    model: Component
    # Tokenizer and its file; max_seq_len cuts longer rows and is the length of packed ones.
    tokenizer: Component
    # Which files hold the weights, in whose format, and where new ones go.
    checkpointer: Component
    # Of a LoRA run save the adapter alone, not the merged model beside it.
    save_adapter_weights_only: bool = False
    # Save step_N/ every n optimizer steps, beside the one at the end of each epoch.
    save_every_n_steps: int | None = None

    # Rows to train on; a list of datasets is concatenated.
    dataset: Components
    # Rows to measure val_loss on.
    dataset_val: Components | None = None
    # Measure val_loss every n steps; if not given, at the end of each epoch.
    run_val_every_n_steps: int | None = None
    # Rows per micro-batch of the validation; if not given, batch_size.
    batch_size_val: int | None = None
    # Order rows anew in every epoch, from the seed.
    shuffle: bool = True
    # Rows per micro-batch and device.
    batch_size: int = 2
    # Micro-batches whose gradients are summed for one optimizer step.
    gradient_accumulation_steps: int = 1

    # Times the data is gone through.
    epochs: int = 1
    # Optimizer steps per epoch, if not all.
    max_steps_per_epoch: int | None = None
    # Any torch optimizer; it gets the parameters that train.
    optimizer: Component = component("torch.optim.AdamW", lr=2e-5, fused=True)
    # Schedule of the learning rate; constant if not given.
    lr_scheduler: Component | None = None
    # Loss, called with model and batch; the sum over trained tokens.
    loss: Component = component("mytune.modules.loss.LinearCrossEntropyLoss")
    # Largest gradient norm; longer gradients are scaled down to it.
    clip_grad_norm: float | None = None
    # Seed of data order, adapters and dropout; a random one, which is logged, if not given.
    seed: int | None = None

    # cuda, cuda:1, cpu, mps or xpu.
    device: str = "cuda"
    # Of weights and computation: bf16 or fp32; adapters are always fp32.
    dtype: str = "bf16"
    # Compile each block with torch.compile.
    compile: bool = False
    # Keep only each block's input for the backward pass and recompute the rest: less memory, more time.
    enable_activation_checkpointing: bool = False
    # Keep in the CPU's memory what the backward pass needs.
    enable_activation_offloading: bool = False
    # Deterministic kernels: default, warn, or error where there is none.
    cudnn_deterministic_mode: str | int | None = None

    # Where metrics go; a list writes to several.
    metric_logger: Components = component(
        "mytune.training.metric_logging.DiskLogger", log_dir="${output_dir}"
    )
    # Log every n steps.
    log_every_n_steps: int = 1
    # Log the device's peak memory with the other metrics.
    log_peak_memory_stats: bool = True
    # DEBUG, INFO, WARNING or ERROR.
    log_level: str = "INFO"
    # PyTorch's profiler around the steps.
    profiler: Component | None = None


def main(cfg: Config) -> None:
    """Run the whole fine-tuning: prepare, train, save, report."""
    setup_logging(cfg.log_level, rank())
    device = get_device(cfg.device)
    dtype = get_dtype(cfg.dtype, device)
    set_deterministic(cfg.cudnn_deterministic_mode)
    checkpointer = instantiate(cfg.checkpointer)
    with run_directory(cfg.output_dir, checkpointer, cfg.overwrite_output_dir):
        resumed = checkpointer.latest() if cfg.resume_from_checkpoint else None
        state = resumed.state if resumed else {}
        seed = state["seed"] if resumed else set_seed(cfg.seed)

        tokenizer = instantiate(cfg.tokenizer)
        train_data = load_dataset(cfg.dataset, tokenizer)
        val_data = load_dataset(cfg.dataset_val, tokenizer)

        model = load_model(cfg, checkpointer, resumed, device, dtype, seed)

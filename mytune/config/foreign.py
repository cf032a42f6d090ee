"""What keys of other libraries (TRL, Axolotl, LLaMA-Factory) are called here."""

from __future__ import annotations

import re
from collections.abc import Collection

# What to write here, which begins with a key of a recipe -> what it is called elsewhere.
NAMES = {
    "optimizer.lr": "learning_rate lr",
    "optimizer.weight_decay": "weight_decay",
    "optimizer.betas (both)": "adam_beta1 adam_beta2",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "lr_scheduler.num_warmup_steps": "warmup_steps num_warmup_steps warmup_ratio",
    "clip_grad_norm": "max_grad_norm",
    "epochs": "num_train_epochs num_epochs",
    "max_steps_per_epoch": "max_steps",
    "batch_size": "per_device_train_batch_size micro_batch_size",
    "batch_size_val": "per_device_eval_batch_size eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "dataset.source": "dataset_name datasets",
    "dataset.column": "dataset_text_field",
    "dataset.packed": "packing sample_packing",
    "dataset.train_on_input": "train_on_inputs",
    "dataset_val": "eval_dataset val_set_size val_size",
    "run_val_every_n_steps": "eval_steps eval_strategy evaluation_strategy",
    "max_new_tokens": "max_length max_gen_len max_tokens max_generated_tokens",
    "tokenizer.max_seq_len": "max_seq_length max_seq_len max_length cutoff_len sequence_len",
    "checkpointer.checkpoint_dir": "model_name_or_path base_model",
    "checkpointer.keep_last_n_checkpoints": "save_total_limit",
    "save_every_n_steps": "save_steps save_strategy",
    "resume_from_checkpoint": "resume",
    "log_every_n_steps": "logging_steps",
    "metric_logger": "report_to wandb_project",
    "model=mytune.models.lora_auto_model": "adapter finetuning_type use_peft",
    "model=mytune.models.qlora_auto_model": "load_in_4bit",
    "model.lora_rank": "lora_r lora_rank",
    "model.lora_alpha": "lora_alpha",
    "model.lora_dropout": "lora_dropout",
    "model.lora_attn_modules, model.apply_lora_to_mlp or model.lora_modules": (
        "lora_target_modules target_modules lora_target"
    ),
    "dtype (bf16 or fp32)": "bf16 fp16 torch_dtype",
    "compile": "torch_compile",
    "enable_activation_checkpointing": "gradient_checkpointing",
}


def called_here(name: str, keys: Collection[str]) -> str | None:
    """Return what to write for another library's key in a recipe with these keys, if anything."""
    meant = (here for here, elsewhere in NAMES.items() if name in elsewhere.split())
    return next((here for here in meant if re.split(r"\W", here)[0] in keys), None)

"""What recipes are made of: devices, checkpoints, metrics, gradients, ranks."""

from mytune._lazy import lazy_names

__all__, __getattr__ = lazy_names(
    __name__,
    {
        "activations": "checkpoint_activations offload_activations recomputed_blocks",
        "checkpointing": (
            "FullModelHFCheckpointer FullModelMetaCheckpointer FullModelTorchTuneCheckpointer "
            "Published load_optimizer_state optimizer_state"
        ),
        "device": "describe_device get_device get_dtype planned_device use_fast_float32_matmul",
        "distributed": "all_sum process_group restarts from_rank_0 rank sum_gradients world_size",
        "sharding": "ranks_per_copy reshard shard_model sync_gradients",
        "grad": "check_finite clip_grad_norm",
        "inference": "load_for_inference",
        "planning.smaller": "settings_to_share smaller_settings",
        "lr_schedulers": (
            "advanced get_constant_schedule_with_warmup get_cosine_schedule_with_warmup "
            "get_linear_schedule_with_warmup get_lr"
        ),
        "memory": "memory_stats peak_memory_gb reset_peak_memory",
        "metric_logging": (
            "CometLogger DiskLogger MetricLogger MetricLoggers MLFlowLogger read_metrics "
            "StdoutLogger TensorBoardLogger WandBLogger"
        ),
        "optimizers": ("StepInBackward check_optimizer check_sharding check_step_in_backward"),
        "planning.plan": (
            "MemoryPlan device_memory fewest_ranks fewest_recomputed_blocks plan_memory"
        ),
        "planning.simulate": "NotPlanned StepSettings",
        "planning.page": "RunFacts describe_plan measured_speed",
        "prepare": "compile_blocks count_parameters load_adapters load_weights "
        "warn_of_untrained_tokens",
        "profiler": "setup_torch_profiler",
        "progress": "ProgressBar log setup_logging",
        "report": "write_report",
        "disk": "check_disk_space write_atomic",
        "run_dir": "output_dir_lock check_output_dir take was_taken",
        "seed": "seed_step set_deterministic set_seed",
        "signals": "StopSignal",
    },
)

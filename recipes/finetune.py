"""Fine-tune a language model: all weights, LoRA, DoRA or QLoRA, in one loop.

The model component decides what is trained: `llama3_8b` trains every weight, `lora_llama3_8b`
adapters, `qlora_llama3_8b` adapters beside 4-bit weights.

    tune run lora_finetune_single_device --config llama3/8B_lora_single_device
    tune run full_finetune_single_device --config llama3/8B_full_single_device epochs=3

Copy it with `tune cp lora_finetune_single_device my_recipe.py` and change what you like.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from mytune.config import (
    Component,
    Components,
    check_may_run,
    component,
    config_yaml,
    instantiate,
)
from mytune.datasets import (
    Batch,
    BatchLoader,
    ConcatDataset,
    Dataset,
    RowFormat,
    count_targets,
    find_row_format,
)
from mytune.errors import (
    ConfigError,
    MissingTokenizer,
    ResourceError,
    StoppedEarly,
    UnreachableError,
    check_at_least,
)
from mytune.evaluation import (
    check_limit,
    check_tasks,
    evaluate_scores,
    load_tasks,
    read_chat_template,
)
from mytune.modules import (
    Decoder,
    MergedWeights,
    adapter_config,
    adapter_state,
    target_index,
)
from mytune.tokenizers import ModelTokenizer, check_vocabulary
from mytune.training import (
    MemoryPlan,
    MetricLoggers,
    NotPlanned,
    ProgressBar,
    Published,
    RunFacts,
    StepInBackward,
    StepSettings,
    StopSignal,
    advanced,
    all_sum,
    check_disk_space,
    check_finite,
    check_optimizer,
    check_output_dir,
    check_sharding,
    check_step_in_backward,
    checkpoint_activations,
    clip_grad_norm,
    compile_blocks,
    count_parameters,
    describe_plan,
    device_memory,
    fewest_ranks,
    fewest_recomputed_blocks,
    from_rank_0,
    get_device,
    get_dtype,
    get_lr,
    load_adapters,
    load_optimizer_state,
    load_weights,
    log,
    measured_speed,
    memory_stats,
    offload_activations,
    optimizer_state,
    output_dir_lock,
    plan_memory,
    planned_device,
    process_group,
    rank,
    ranks_per_copy,
    recomputed_blocks,
    reset_peak_memory,
    reshard,
    seed_step,
    set_deterministic,
    set_seed,
    settings_to_share,
    setup_logging,
    shard_model,
    smaller_settings,
    sum_gradients,
    sync_gradients,
    take,
    use_fast_float32_matmul,
    warn_of_untrained_tokens,
    was_taken,
    world_size,
    write_report,
)

# What the recipe hands to components itself: a config need not name it.
SUPPLIED = {
    "optimizer": ["params"],
    "lr_scheduler": ["optimizer", "num_training_steps"],
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

    # Builder of the model: llama3_8b trains all weights, lora_... adapters, qlora_... on 4 bits.
    model: Component
    # Tokenizer and its file; max_seq_len cuts longer rows and is the length of packed ones.
    tokenizer: Component
    # Which files hold the weights, in whose format, and where new ones go.
    checkpointer: Component
    # Of a LoRA run, save only the adapter, without the merged model beside it.
    save_adapter_weights_only: bool = False
    # Save step_N/ every n optimizer steps, beside the one at the end of each epoch.
    save_every_n_steps: int | None = None
    # Write step_N/ while training goes on, and in it only what resuming needs.
    enable_async_checkpointing: bool = False

    # Rows to train on; a list of datasets is concatenated.
    dataset: Components
    # Rows to measure val_loss on.
    dataset_val: Components | None = None
    # Measure val_loss every n steps and at the end; if not given, after each epoch.
    run_val_every_n_steps: int | None = None
    # Rows per micro-batch of the validation; if not given, batch_size.
    batch_size_val: int | None = None
    # Tasks of lm_eval, or your own, to evaluate on while training; logged as eval/TASK/METRIC.
    eval_tasks: list[str] | None = None
    # Evaluate every n steps and at the end; if not given, after each epoch.
    eval_every_n_steps: int | None = None
    # Documents per task, the first ones; below 1 a share of them; null for all.
    eval_limit: float | None = None
    # A folder with YAML files of your own tasks; functions that these name are run.
    eval_include_path: str | None = None
    # Put questions into the tokenizer's chat format, or that of a checkpoint directory's template.
    eval_chat_template: bool | str = False
    # Order rows anew in every epoch, from the seed.
    shuffle: bool = True
    # Rows per micro-batch and device.
    batch_size: int = 2
    # Micro-batches whose gradients are summed for one optimizer step.
    gradient_accumulation_steps: int = 1

    # Passes over the data.
    epochs: int = 1
    # Optimizer steps per epoch, if not all.
    max_steps_per_epoch: int | None = None
    # Any torch optimizer; it gets the parameters that train.
    optimizer: Component = component("torch.optim.AdamW", lr=2e-5, fused=True)
    # Schedule of the learning rate, by default constant.
    lr_scheduler: Component = component(
        "mytune.training.get_constant_schedule_with_warmup", num_warmup_steps=0
    )
    # Loss, called with model and batch; the sum over trained tokens.
    loss: Component = component("mytune.modules.loss.LinearCrossEntropyLoss")
    # Largest gradient norm; longer gradients are scaled down to it.
    clip_grad_norm: float | None = None
    # Seed of data order, adapters and dropout; a random one, which is logged, if not given.
    seed: int | None = None

    # cuda, cuda:1, cpu, mps or xpu.
    device: str = "cuda"
    # Type of weights and computation: bf16 or fp32; adapters are always fp32.
    dtype: str = "bf16"
    # Compile each block with torch.compile.
    compile: bool = False
    # Keep only each block's input and recompute the rest in the backward pass: less memory.
    enable_activation_checkpointing: bool = False
    # Which blocks do so: full (all), selective (see ac_option) or auto (as many as memory demands).
    ac_mode: str | None = None
    # With ac_mode=selective: n for every n-th block, op for all but attention and half the matmuls.
    ac_option: int | str | None = None
    # Keep in the CPU's memory what the backward pass needs.
    enable_activation_offloading: bool = False
    # Copy activations while computing, on a stream of their own (cuda only).
    activation_offloading_use_streams: bool = True
    # Step the optimizer in the backward pass and free each gradient at once: less memory.
    optimizer_in_bwd: bool = False

    # Ranks that share one copy of the model (FSDP2); -1: all, 1: each holds it whole, which is what
    # LoRA does by default where it fits.
    data_parallel_shard_dim: int | None = None
    # Copies of the model that those ranks make up, for instance one per node.
    data_parallel_replicate_dim: int | None = None
    # Free a block's gathered weights after its forward pass: less memory, more messages.
    fsdp_reshard_after_forward: bool = True
    # Keep sharded weights, gradients and optimizer state in the CPU's memory.
    fsdp_cpu_offload: bool = False
    # Sum sharded gradients after every micro-batch, not once a step: less memory, more messages.
    fsdp_sync_every_micro_batch: bool = False
    # Seconds that a rank waits for the others before the run ends.
    distributed_timeout: float = 600.0
    # Deterministic kernels: default, warn, or error where there is none. Only error gives the same
    # bits again on CUDA.
    cudnn_deterministic_mode: str | int | None = None

    # Print memory, steps and time of the run, and end: `tune run ... --dry-run`.
    dry_run: bool = False
    # GiB of memory of each device, for plans; if not given, what the device has.
    device_memory: float | None = None

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
    # PyTorch's profiler around the steps; enabled: true switches it on.
    profiler: Component = component(
        "mytune.training.setup_torch_profiler", output_dir="${output_dir}/profile"
    )


class Measurement(NamedTuple):
    """What is measured beside the steps: `measure` returns numbers by name, None if it was stopped.

    Args:
        names: how the names of its numbers begin.
        every: after so many steps, and at the end; None for the end of each epoch.
    """

    names: list[str]
    every: int | None
    measure: Callable[[], dict[str, float] | None]


def main(cfg: Config) -> None:
    """Run the whole fine-tuning: prepare, train, save, report."""
    setup_logging(cfg.log_level, rank())
    check(cfg)
    if cfg.dry_run:
        return dry_run(cfg)
    device = get_device(cfg.device)
    dtype = get_dtype(cfg.dtype, device)
    set_deterministic(cfg.cudnn_deterministic_mode)
    use_fast_float32_matmul(device)
    check_optimizer(cfg.optimizer, device)
    checkpointer = instantiate(cfg.checkpointer)

    with ExitStack() as stack:
        stack.enter_context(process_group(device, cfg.distributed_timeout))
        written = {"output_dir": cfg.output_dir, "checkpointer.output_dir": checkpointer.output_dir}
        folders = lock_output_dirs(stack, written)
        anew = all(map(was_taken, folders))  # started so by torchrun
        resume = cfg.resume_from_checkpoint or checkpointer.resume or anew
        check_output_dirs(cfg, folders, checkpointer, resume)
        stack.callback(checkpointer.finish)  # also after an error, and before the lock goes
        resumed = checkpointer.latest() if resume else None
        if resume and not resumed:
            log.warning("no checkpoint in %s: starting at step 0", checkpointer.output_dir)
        if resumed:
            log.info("resuming from %s, after step %d", resumed.path, resumed.step)
            if cfg.seed not in (None, resumed.state["seed"]):
                log.warning("seed: a run that goes on keeps its own, %d", resumed.state["seed"])
        seed = set_seed(resumed.state["seed"] if resumed else cfg.seed)
        step = resumed.step if resumed else 0

        # Data before weights: it is quicker to be found wrong.
        tokenizer = instantiate(cfg.tokenizer)
        loader = make_loader(cfg, instantiate(cfg.dataset, tokenizer), tokenizer, seed)
        val_loader = make_val_loader(cfg, instantiate(cfg.dataset_val, tokenizer), tokenizer)
        tasks = None
        if cfg.eval_tasks:
            tasks = load_tasks(cfg.eval_tasks, cfg.eval_include_path, prefix="eval_")
        chat = read_chat_template(cfg.eval_chat_template)
        run = run_identity(cfg, loader, tokenizer, seed, dtype)
        check_same_run(resumed, run)
        total_steps = cfg.epochs * loader.steps_per_epoch

        row_format = find_row_format(loader.dataset, tokenizer)
        model = build_model(cfg, checkpointer, tokenizer, dtype)
        longest = int(loader.dataset.lengths.max())
        if longest > model.config.max_seq_len:
            log.warning(
                "rows have up to %d tokens, the model %d positions: set tokenizer.max_seq_len",
                longest,
                model.config.max_seq_len,
            )
        loss_fn = instantiate(cfg.loss)
        logger = MetricLoggers(as_list(instantiate(cfg.metric_logger)))
        stack.callback(logger.close)
        if logger.metrics_file:
            log_dir = {"metric_logger.log_dir": logger.metrics_file.parent}
            logs = lock_output_dirs(stack, log_dir, folders)
            check_output_dirs(cfg, logs, checkpointer, resume)
            folders |= logs
        profiler = stack.enter_context(instantiate(cfg.profiler))

        settings = choose_memory_settings(
            cfg, model, device, dtype, loader.dataset.pad_to or longest
        )
        check_sharding(cfg.optimizer, settings.shard_ranks, cfg.optimizer_in_bwd)
        if tasks:
            check_tasks(tasks, model.config.max_seq_len, settings.shard_ranks)
        load_model(cfg, model, checkpointer, resumed, device, settings, seed)
        warn_of_untrained_tokens(model, row_format.special_tokens)
        optimizer = instantiate(cfg.optimizer, [p for p in model.parameters() if p.requires_grad])
        in_backward = StepInBackward(optimizer) if cfg.optimizer_in_bwd else None
        if resumed:
            load_optimizer_state(model, optimizer, resumed.tensors(), resumed.state["optimizer"])
        build = partial(instantiate, cfg.lr_scheduler, optimizer, num_training_steps=total_steps)
        lr_scheduler = advanced(build, optimizer, step)

        # From here on the folders are this run's.
        for folder in folders:
            take(folder, resume=resume)
        checkpointer.set_aside_newer()
        logger.resume_at(step)
        logger.log_config(config_yaml(cfg))
        model.train()
        stop = stack.enter_context(StopSignal())
        progress = stack.enter_context(ProgressBar(total_steps, done=step))
        reset_peak_memory(device)  # what is logged is the training's, not the loading's
        trained_tokens, seconds = resumed.state["totals"] if resumed else (0, 0.0)
        measurements: list[Measurement] = []
        if val_loader:
            loss_of_rows = partial(validate, model, loss_fn, val_loader, device, stop)
            measurements.append(Measurement(["val_loss"], cfg.run_val_every_n_steps, loss_of_rows))
        if tasks:
            how = {"limit": cfg.eval_limit, "chat_template": chat, "stop": stop}
            scores = partial(evaluate_scores, model, tokenizer, tasks, **how)
            names = [f"eval/{task}/" for task in tasks["tasks"]]
            measurements.append(Measurement(names, cfg.eval_every_n_steps, scores))
        complete = True
        if resumed:  # the run may have ended while it measured
            if step >= total_steps:
                log.info("all %d steps are done: more epochs make it go on", total_steps)
            epoch_ends, run_ends = step % loader.steps_per_epoch == 0, step == total_steps
            known = from_rank_0(logger.logged(step))
            complete = measure_due(measurements, step, epoch_ends, run_ends, logger, stop, known)
        offload = (cfg.enable_activation_offloading, cfg.activation_offloading_use_streams)
        publish = partial(save, cfg, checkpointer, model, optimizer, dtype, row_format, run, logger)
        steps = remaining_steps(loader, step, cfg.epochs) if complete else ()
        lap = time.perf_counter()
        for epoch, micro_batches in steps:
            seed_step(seed, step, rank(), device)
            tokens = int(all_sum(count_targets(micro_batches)))
            loss = torch.zeros((), device=device)
            for batch in micro_batches:
                last = batch is micro_batches[-1]
                sync_gradients(model, last or cfg.fsdp_sync_every_micro_batch)
                with offload_activations(model, *offload):
                    part = loss_fn(model, to_device(batch, device)) / max(tokens, 1)
                part.backward()
                loss += part.detach()
            sum_gradients(model.parameters())
            norm = (
                in_backward.grad_norm()
                if in_backward
                else clip_grad_norm(model.parameters(), cfg.clip_grad_norm)
            )
            rows = [row for batch in micro_batches for row in batch["rows"].tolist()]
            loss_value, grad_norm = check_finite(all_sum(loss), norm, step=step + 1, rows=rows)
            lr = get_lr(optimizer)
            optimizer.step()
            optimizer.zero_grad()
            lr_scheduler.step()
            step += 1

            trained_tokens += tokens
            spent = time.perf_counter() - lap
            seconds += spent
            speed = tokens / spent / world_size()
            measured_loss = loss_value if tokens else math.nan
            metrics = {"loss": measured_loss, "lr": lr, "grad_norm": grad_norm}
            metrics["tokens_per_second_per_gpu"] = speed
            if cfg.log_peak_memory_stats:
                metrics |= memory_stats(device)
            if is_due(step, cfg.log_every_n_steps):
                logger.log_dict(metrics, step)
            progress.update(step, measured_loss, speed)
            profiler.step()

            epoch_ends, run_ends = step % loader.steps_per_epoch == 0, step == total_steps
            name = f"epoch_{epoch}" if epoch_ends else f"step_{step}"
            if saved := epoch_ends or is_due(step, cfg.save_every_n_steps):
                publish(name, step, (trained_tokens, seconds))
            # After saving: it takes a while, and a task may fail.
            complete = measure_due(measurements, step, epoch_ends, run_ends, logger, stop)
            if not complete or stop.on_any_rank():
                if not saved:
                    publish(name, step, (trained_tokens, seconds))
                break
            lap = time.perf_counter()
        checkpointer.finish()

        report(cfg, checkpointer, logger, step, trained_tokens, seconds, model, device)
        if step < total_steps or not complete:
            done = "saved" if complete else "saved and not all measured"
            raise StoppedEarly(
                f"after step {step} of {total_steps}, {done}; "
                "to go on, run the same command with resume_from_checkpoint=True"
            )


def dry_run(cfg: Config) -> None:
    """Print what this run would take, and whether it fits; no weight is read, nothing written."""
    device = planned_device(cfg.device)
    facts, seq_len = count_data(cfg)
    model, settings, plan = plan_run(cfg, device, seq_len)
    speed = measured_speed(cfg.output_dir, model)
    print(describe_plan(plan, settings, model, facts, world_size=world_size(), speed=speed))
    if plan.fits is False:
        raise ResourceError(f"the run does not fit; {suggest_settings(cfg, device, seq_len)}")


def count_data(cfg: Config) -> tuple[RunFacts, int | None]:
    """Return rows and steps of the run and tokens of the longest row; None where data are away."""
    try:
        tokenizer = instantiate(cfg.tokenizer)
        data = instantiate(cfg.dataset, tokenizer)
    except (MissingTokenizer, UnreachableError) as error:
        return RunFacts(epochs=cfg.epochs, unknown=error.message), None
    loader = make_loader(cfg, data, tokenizer, seed=0)
    stats, longest = loader.dataset.stats, int(loader.dataset.lengths.max())
    per_step = cfg.batch_size * cfg.gradient_accumulation_steps * world_size()
    part = min(1.0, loader.steps_per_epoch * per_step / len(loader.dataset))
    facts = RunFacts(
        rows=round(part * stats.rows),
        tokens=round(part * stats.tokens),
        trained_tokens=round(part * stats.trainable_tokens),
        steps_per_epoch=loader.steps_per_epoch,
        epochs=cfg.epochs,
    )
    return facts, loader.dataset.pad_to or longest


def plan_run(
    cfg: Config, device: torch.device, seq_len: int | None
) -> tuple[Decoder, StepSettings, MemoryPlan]:
    """Return the model without memory, how it is trained, and what that takes on each device.

    Args:
        seq_len: tokens of the longest row; if not known, what the tokenizer cuts rows at, or 2048.
    """
    with torch.device("meta"):
        model = instantiate(cfg.model)
    seq_len = seq_len or cfg.tokenizer.get("max_seq_len") or min(2048, model.config.max_seq_len)
    dtype = get_dtype(cfg.dtype, torch.device("cpu"))
    settings = choose_memory_settings(cfg, model, device, dtype, seq_len)
    memory = device_memory(device, cfg.device_memory)
    return model, settings, plan_memory(model, instantiate(cfg.loss), settings, memory)


def choose_memory_settings(
    cfg: Config, model: Decoder, device: torch.device, dtype: torch.dtype, seq_len: int
) -> StepSettings:
    """Decide what depends on memory: how many ranks share the model, what is recomputed."""
    rule = (cfg.enable_activation_checkpointing, cfg.ac_mode, cfg.ac_option)
    settings = StepSettings(
        optimizer=cfg.optimizer,
        dtype=dtype,
        device=device.type,
        batch_size=cfg.batch_size,
        seq_len=seq_len,
        packed=any(each.get("packed", False) for each in as_list(cfg.dataset)),
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        recompute=recomputed_blocks(model.config.num_layers, *rule),
        keep_products=cfg.ac_option == "op",
        offload=cfg.enable_activation_offloading,
        optimizer_in_bwd=cfg.optimizer_in_bwd,
        reshard=cfg.fsdp_reshard_after_forward,
        cpu_offload=cfg.fsdp_cpu_offload,
        sync_every_micro_batch=cfg.fsdp_sync_every_micro_batch,
    )
    memory, loss_fn = device_memory(device, cfg.device_memory), instantiate(cfg.loss)
    dims = (cfg.data_parallel_shard_dim, cfg.data_parallel_replicate_dim)
    fits = bool(adapter_state(model))
    if fits and world_size() > 1 and dims == (None, None):
        try:
            fits = bool(plan_memory(model, loss_fn, settings, memory).fits)
        except NotPlanned as error:
            log.warning("each device is given the whole model: %s", error)
    settings = replace(settings, shard_ranks=ranks_per_copy(*dims, fits=fits))
    if cfg.ac_mode == "auto" and memory is not None:
        blocks = fewest_recomputed_blocks(model, loss_fn, settings, memory)
        log.info("ac_mode=auto: %d of %d blocks are recomputed", len(blocks), len(model.layers))
        settings = replace(settings, recompute=blocks)
    return settings


def suggest_settings(cfg: Config, device: torch.device, seq_len: int | None) -> str:
    """Return what to type so that the run fits: settings that need less, else more devices."""
    if cfg.ac_mode == "auto":  # it has tried to recompute all
        cfg = replace(cfg, ac_mode="full")
    for words, smaller in smaller_settings(cfg):
        if plan_run(smaller, device, seq_len)[2].fits:
            return f"it would with {words}"
    words, smaller = settings_to_share(cfg)
    model, settings, plan = plan_run(smaller, device, seq_len)
    ranks = fewest_ranks(model, instantiate(cfg.loss), settings, plan.memory or 0)
    if ranks is None:
        return "nor do the settings that need least"
    return f"it would on {ranks} devices that share the model{words and f', with {words}'}"


def check(cfg: Config) -> None:
    """Raise ConfigError for numbers and combinations that cannot be, before anything is loaded."""
    keys = ("epochs", "save_every_n_steps", "run_val_every_n_steps", "batch_size_val")
    keys += ("log_every_n_steps", "eval_every_n_steps")
    check_at_least(1, {key: getattr(cfg, key) for key in keys})
    check_limit("eval_limit", cfg.eval_limit)
    if cfg.eval_tasks:
        check_may_run(cfg.eval_tasks, cfg.eval_include_path)
    if cfg.device_memory is not None and not 0 < cfg.device_memory < 2**30:
        raise ConfigError(
            f"device_memory is {cfg.device_memory}; it must be above 0 GiB, below 2^30, or null"
        )
    if cfg.clip_grad_norm is not None and not cfg.clip_grad_norm > 0:
        raise ConfigError(f"clip_grad_norm is {cfg.clip_grad_norm}; it must be above 0, or null")
    if (loss := cfg.loss["_component_"]).startswith("torch.nn."):
        raise ConfigError(
            f"loss is {loss}, which compares logits with labels; here a loss is "
            "called with the model and a batch, as mytune.modules.LinearCrossEntropyLoss"
        )
    recomputed_blocks(1, cfg.enable_activation_checkpointing, cfg.ac_mode, cfg.ac_option)
    check_step_in_backward(
        cfg.optimizer, cfg.optimizer_in_bwd, cfg.gradient_accumulation_steps, cfg.clip_grad_norm
    )


def lock_output_dirs(
    stack: ExitStack, named: Mapping[str, Any], locked: Collection[str] = ()
) -> dict[str, str]:
    """Lock folders against other runs; return those that were not `locked`, with their keys."""
    folders: dict[str, str] = {}
    for key, path in named.items():
        folder = os.path.realpath(os.path.expanduser(path))
        if folder not in (*locked, *folders):
            stack.enter_context(output_dir_lock(folder, key))
            folders[folder] = key
    return folders


def check_output_dirs(
    cfg: Config, folders: Mapping[str, str], checkpointer: Any, resume: bool
) -> None:
    """Keep what another run left in these folders."""
    for folder, key in folders.items():
        check_output_dir(
            folder,
            key,
            resume=resume,
            overwrite=cfg.overwrite_output_dir,
            inputs=[checkpointer.source_dir],
        )


def make_loader(
    cfg: Config, data: Dataset | list[Dataset], tokenizer: ModelTokenizer, seed: int
) -> BatchLoader:
    """Lay out the training rows of every epoch, several datasets as one."""
    loader = BatchLoader(
        ConcatDataset(as_list(data)),
        batch_size=cfg.batch_size,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        seed=seed,
        shuffle=cfg.shuffle,
        pad_id=tokenizer.pad_id,
        rank=rank(),
        world_size=world_size(),
        max_steps_per_epoch=cfg.max_steps_per_epoch,
    )
    if len(loader.dataset) < world_size():
        raise ConfigError(
            f"there are {world_size()} processes, but {len(loader.dataset)} rows to train on; "
            "start fewer processes (--nproc_per_node)"
        )
    log.info("data: %s; steps per epoch: %d", loader.dataset.stats, loader.steps_per_epoch)
    return loader


def make_val_loader(
    cfg: Config, data: Dataset | list[Dataset] | None, tokenizer: ModelTokenizer
) -> BatchLoader | None:
    """Lay out the validation rows, always in the same order."""
    if data is None:
        return None
    return BatchLoader(
        ConcatDataset(as_list(data)),
        batch_size=cfg.batch_size_val or cfg.batch_size,
        gradient_accumulation_steps=1,
        seed=0,
        shuffle=False,
        pad_id=tokenizer.pad_id,
        rank=rank(),
        world_size=world_size(),
    )


def as_list(one_or_many: Any) -> list[Any]:
    """Return what a component or a list of them gave as a list."""
    return one_or_many if isinstance(one_or_many, list) else [one_or_many]


def run_identity(
    cfg: Config, loader: BatchLoader, tokenizer: ModelTokenizer, seed: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Return what makes a run this run; every checkpoint of it says so."""
    return {
        "seed": seed,
        "config_hash": hashlib.sha256(config_yaml(cfg).encode()).hexdigest(),
        "tokenizer": tokenizer.fingerprint,
        "data": loader.dataset.fingerprint,
        "shuffle": cfg.shuffle,
        "steps_per_epoch": loader.steps_per_epoch,
        "rows_per_step": cfg.batch_size * cfg.gradient_accumulation_steps * world_size(),
        "world_size": world_size(),
        "dtype": str(dtype).removeprefix("torch."),
    }


def check_same_run(resumed: Published | None, run: dict[str, Any]) -> None:
    """Refuse to go on over other data, batches or numbers, where step n would be another step."""
    if resumed is None:
        return
    was = {**run, **resumed.state["run"]}  # an older one may know less
    keys = ("data", "shuffle", "steps_per_epoch", "rows_per_step", "dtype")
    changed = [f"{key}: was {was[key]}, is {run[key]}" for key in keys if was[key] != run[key]]
    if changed:
        raise ConfigError(
            f"{resumed.path} was trained on other data or batches, or in another dtype; resume "
            "with the dataset, tokenizer, shuffle, batch_size, gradient_accumulation_steps, "
            "max_steps_per_epoch and dtype it had, or start a new run from it with "
            f"checkpointer.checkpoint_dir={resumed.path}",
            changed,
        )


def build_model(
    cfg: Config, checkpointer: Any, tokenizer: ModelTokenizer, dtype: torch.dtype
) -> Decoder:
    """Build the model without memory, and check what can be checked before a weight is read."""
    with torch.device("meta"):
        model = instantiate(cfg.model)
    if type(model) is not Decoder:
        log.warning(
            "model: %s is one of your own, and config.json in its checkpoints is of the base's "
            "kind: name model=... again where they are used",
            type(model).__name__,
        )
    total, trained = count_parameters(model)
    log.info("model: %s parameters, %s of them trained", f"{total:,}", f"{trained:,}")
    check_vocabulary(tokenizer, model.config.vocab_size)
    check_first_checkpoint_fits(cfg, checkpointer, model, dtype)
    return model


def load_model(
    cfg: Config,
    model: Decoder,
    checkpointer: Any,
    resumed: Published | None,
    device: torch.device,
    settings: StepSettings,
    seed: int,
) -> None:
    """Prepare the model for training and fill it, tensor by tensor."""
    checkpoint_activations(model, settings.recompute, settings.keep_products)
    if cfg.compile:
        compile_blocks(model)
    shard_model(
        model,
        device,
        settings.shard_ranks,
        reshard_after_forward=cfg.fsdp_reshard_after_forward,
        cpu_offload=cfg.fsdp_cpu_offload,
    )
    has_adapters = bool(adapter_state(model))
    weights = (checkpointer if has_adapters or not resumed else resumed).weights(model.config)
    load_weights(model, weights, device, settings.dtype)
    load_adapters(model, (resumed or checkpointer).adapter_weights(), device, seed)


def check_first_checkpoint_fits(
    cfg: Config, checkpointer: Any, model: Decoder, dtype: torch.dtype
) -> None:
    """Refuse to start where the first checkpoint would not fit on the disk."""
    adapters = bool(adapter_state(model))  # of float32, and saved beside what they are merged into
    trained = count_parameters(model)[1] * (4 if adapters else dtype.itemsize)
    merged = not (cfg.save_adapter_weights_only and adapters)
    weights = checkpointer.plan(model.config, dtype).nbytes if merged else 0
    # AdamW keeps two numbers for each that trains.
    check_disk_space(checkpointer.output_dir, weights + (2 + adapters) * trained)


def remaining_steps(
    loader: BatchLoader, step: int, epochs: int
) -> Iterator[tuple[int, list[Batch]]]:
    """Yield the epoch and the micro-batches of every optimizer step after `step`."""
    first, done = divmod(step, loader.steps_per_epoch)
    for epoch in range(first, epochs):
        for micro_batches in loader.steps(epoch, start=done if epoch == first else 0):
            yield epoch, micro_batches


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch, with the places of its trained tokens, so that the device need not look."""
    batch = {**batch, "target_index": target_index(batch["labels"])}
    del batch["rows"]
    if device.type == "cuda":  # a copy from other memory waits for what the device is doing
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def is_due(step: int, every: int | None, otherwise: bool = False) -> bool:
    """Say whether something that happens `every` n steps happens after this one."""
    return step % every == 0 if every else otherwise


@torch.no_grad()
def validate(
    model: Decoder, loss_fn: Any, loader: BatchLoader, device: torch.device, stop: StopSignal
) -> dict[str, float] | None:
    """Return the loss per trained token of the validation rows, or None if asked to stop."""
    model.eval()
    loss = torch.zeros((), device=device)
    tokens, stopping = 0, False
    for micro_batches in loader.steps(epoch=0):
        if stopping := stop.on_any_rank():
            break
        tokens += count_targets(micro_batches)
        for batch in micro_batches:
            loss += loss_fn(model, to_device(batch, device))
    reshard(model)
    model.train()
    if stopping:
        return None
    tokens = int(all_sum(tokens))
    return {"val_loss": all_sum(loss.item()) / tokens if tokens else math.nan}


def measure_due(
    measurements: Sequence[Measurement],
    step: int,
    epoch_ends: bool,
    run_ends: bool,
    logger: MetricLoggers,
    stop: StopSignal,
    known: Collection[str] = (),
) -> bool:
    """Measure and log what is due after a step and not known; say if nothing is left.

    Where the run is asked to stop before or meanwhile, the rest is measured when it goes on.
    """
    for each in measurements:
        missing = [name for name in each.names if not any(k.startswith(name) for k in known)]
        if missing and (run_ends or is_due(step, each.every, otherwise=epoch_ends)):
            # Asked here, too: a task takes a while before its first batch.
            scores = None if stop.on_any_rank() else each.measure()
            if scores is None:
                log.info("step %d: not measured: stopping", step)
                return False
            log.info("step %d: %s", step, " ".join(f"{k} {v:.4f}" for k, v in scores.items()))
            logger.log_dict({k: v for k, v in scores.items() if k not in known}, step)
    return True


def save(
    cfg: Config,
    checkpointer: Any,
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype,
    row_format: RowFormat,
    run: dict[str, Any],
    logger: MetricLoggers,
    name: str,
    step: int,
    totals: tuple[int, float],
) -> None:
    """Publish a checkpoint: weights to use, adapter, and what resuming needs."""
    adapter = adapter_state(model)
    tensors, optimizer_json = optimizer_state(model, optimizer)
    to_resume = cfg.enable_async_checkpointing and name.startswith("step_")
    adapter_only = bool(adapter) and cfg.save_adapter_weights_only
    checkpointer.save(
        name,
        step=step,
        dtype=dtype,
        weights=None if adapter_only or to_resume else MergedWeights(model),
        trained=dict(model.named_parameters()) if to_resume and not adapter else None,
        config=model.config,
        adapter=adapter,
        adapter_config=adapter_config(model),
        tensors=tensors,
        state={
            "seed": run["seed"],
            "optimizer": optimizer_json,
            "run": run,
            "totals": totals,
        },
        run={**run, "samples_seen": step * run["rows_per_step"]},
        stop_tokens=row_format.stop_tokens,
        chat_template=row_format.chat_template,
        val_losses=partial(logger.history, "val_loss"),
        background=to_resume,
    )


def report(
    cfg: Config,
    checkpointer: Any,
    logger: MetricLoggers,
    step: int,
    tokens: int,
    seconds: float,
    model: Decoder,
    device: torch.device,
) -> None:
    """Write summary and loss curve, and say where everything is."""
    locations = {"checkpoints": checkpointer.output_dir}
    if logger.metrics_file:
        locations["metrics"] = logger.metrics_file
    written = write_report(
        cfg.output_dir,
        steps=step,
        tokens=tokens,
        seconds=seconds,
        parameters=count_parameters(model),
        device=device,
        locations=locations,
        metrics=logger.metrics_file,
    )
    for what, path in {**locations, **written}.items():
        log.info("%s: %s", what, path)

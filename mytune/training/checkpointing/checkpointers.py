"""The checkpointers that configs name: one class, three formats."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mytune._sharded import whole
from mytune.errors import CheckpointError, ConfigError, did_you_mean
from mytune.modules.decoder import Decoder, DecoderConfig
from mytune.quantization.quantizers import describe_config, torchao_config
from mytune.quantization.tensors import stored_bytes
from mytune.training.checkpointing.companions import companion_files, companions
from mytune.training.checkpointing.files import FileRecord, to_json
from mytune.training.checkpointing.formats import HF, META, TORCHTUNE, Format
from mytune.training.checkpointing.peft import Adapter, base_model_name, read_adapter, write_adapter
from mytune.training.checkpointing.pieces import own_pieces, write_pieces
from mytune.training.checkpointing.publish import (
    MANIFEST,
    NAME,
    Draft,
    prune,
    publication_of_ranks,
    read_manifest,
    verify,
)
from mytune.training.checkpointing.quantized import publish_quantized, read_quantized
from mytune.training.checkpointing.resume import (
    MODEL,
    OPTIMIZER,
    STATE,
    Branch,
    Published,
    latest,
    set_aside,
)
from mytune.training.checkpointing.source import ADAPTER, CheckpointFiles, Source, find_files
from mytune.training.checkpointing.weights_io import Plan, plan_weights, write_weights
from mytune.training.disk import check_disk_space, format_size
from mytune.training.distributed import barrier_without_timeout, from_rank_0, rank

log = logging.getLogger("mytune")

# torchtune's names of the families whose weights these tables fit. The files say which one it is.
_MODEL_TYPES = ("LLAMA2", "LLAMA3", "LLAMA3_2", "MISTRAL")


class _Checkpointer:
    """Reads a model's weights and publishes checkpoints in the same format.

    Args:
        checkpoint_dir: where the weights are; never written to, though it may be `output_dir`.
        checkpoint_files: names in it, or `{filename_format, max_filename}`; if None, all there.
        model_type: torchtune's name of the family; accepted, but the files decide.
        output_dir: where checkpoints are published.
        adapter_checkpoint: a PEFT directory or file, relative to `output_dir`, `checkpoint_dir` or
            the current directory.
        recipe_checkpoint: the checkpoint to resume from, e.g. `epoch_0`; the newest if None. See
            `latest`.
        resume_from_checkpoint: torchtune's older way to ask for resuming; kept in `.resume`.
        safe_serialization: weights are safetensors; False is refused.
        should_load_recipe_state: the same as `resume_from_checkpoint`.
        keep_last_n_checkpoints: how many published checkpoints stay, beside the one with the
            lowest validation loss; all if None.

    Raises:
        ConfigError: an argument that cannot be.
        CheckpointError: files that are missing or lie outside the directory.
    """

    format: ClassVar[Format]

    def __init__(
        self,
        checkpoint_dir: str,
        checkpoint_files: CheckpointFiles = None,
        model_type: str | None = None,
        output_dir: str | None = None,
        adapter_checkpoint: str | None = None,
        recipe_checkpoint: str | None = None,
        resume_from_checkpoint: bool = False,
        safe_serialization: bool = True,
        should_load_recipe_state: bool = False,
        keep_last_n_checkpoints: int | None = None,
    ) -> None:
        _check(model_type, safe_serialization, keep_last_n_checkpoints)
        self.checkpoint_dir = Path(checkpoint_dir).expanduser()
        self._output_dir = Path(output_dir).expanduser() if output_dir else None
        self.resume = resume_from_checkpoint or should_load_recipe_state
        self._keep = keep_last_n_checkpoints
        self._recipe_checkpoint = recipe_checkpoint
        self._branch: Branch | None = None
        self._adapter_checkpoint = adapter_checkpoint
        self._background = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        paths = find_files(self.format, self.checkpoint_dir, checkpoint_files, self._output_dir)
        self.source = Source(self.format, paths)
        self.source_dir = paths[0].parent
        if self._output_dir:
            companion_files(self.source_dir)  # what cannot be copied must be known before training

    @property
    def output_dir(self) -> Path:
        """Where checkpoints are published."""
        if self._output_dir is None:
            raise ConfigError("checkpointer.output_dir is not set: there is nowhere to save to")
        return self._output_dir

    def weights(self, config: DecoderConfig) -> Mapping[str, Tensor]:
        """Return the model's weights by our names, memory-mapped, each read when asked for.

        Raises:
            CheckpointError: they do not fit; tensors that do not are named, with both shapes.
        """
        size = sum(path.stat().st_size for path in self.source.paths)
        where = (format_size(size), self.format.name, self.source_dir)
        log.info("Reading %s of %s weights from %s", *where)
        return self.source.weights(config)

    def quantized_weights(
        self, config: DecoderConfig, device: torch.device
    ) -> dict[str, Tensor] | None:
        """Return the weights of a checkpoint that torchao quantized; None if it is not one.

        Raises:
            CheckpointError: they do not fit the model, or are damaged.
            ResourceError: they are laid out for another device.
        """
        if not self.source.is_quantized:
            return None
        log.info("Reading quantized weights from %s", self.source_dir)
        files = [file for group in self.source.groups for file in group.files]
        return read_quantized(files, config, device)

    def save_quantized(self, target: Path, model: Decoder, quantizer: Any) -> None:
        """Publish a model whose linears `quantizer` has quantized, for inference.

        It is in Hugging Face's layout whatever the checkpoint is in: `FullModelHFCheckpointer`
        reads it.

        Args:
            target: the directory to make; one that is there is replaced when the new one verifies.
            quantizer: a quantizer of mytune's or a config of torchao's.

        Raises:
            ResourceError: the disk is full, read-only or faulty.
            NumericalError: a weight or scale is not finite.
        """
        size = sum(stored_bytes(parameter) for parameter in model.parameters())
        check_disk_space(target.parent, size)
        config = torchao_config(quantizer, model.device)
        publish_quantized(target, model, describe_config(config), self.source_dir)
        log.info("Model checkpoint of size %s saved to %s", format_size(size), target)

    def load_checkpoint(self) -> dict[str, dict[str, Tensor]]:
        """Return `{"model": weights}`; the sizes come from the config.json or params.json there."""
        from mytune.models.auto import sizes_of_checkpoint

        return {"model": dict(self.weights(sizes_of_checkpoint(str(self.source_dir))))}

    def adapter_weights(self) -> Adapter | None:
        """Return tensors and settings of `adapter_checkpoint`, or None if there is none."""
        if self._adapter_checkpoint is None:
            return None
        homes = [self._output_dir or self.checkpoint_dir, self.checkpoint_dir, Path()]
        paths = [home / Path(self._adapter_checkpoint).expanduser() for home in homes]
        found = next((path for path in paths if path.exists()), None)
        if found is None:
            raise CheckpointError(
                f"adapter_checkpoint: there is no {' or '.join(map(str, dict.fromkeys(paths)))}"
            )
        folder = (found if found.is_dir() else found.parent).resolve()
        merged = (self.source_dir / "adapter").resolve()  # a run saves both
        if folder in (merged, merged.parent) and _has_adapter(self.source_dir):
            raise CheckpointError(
                f"{self.source_dir} has the adapter {merged} merged in: leave adapter_checkpoint "
                "out, or name the base that it was trained on in checkpoint_dir"
            )
        log.info("Reading an adapter from %s", found)
        return read_adapter(found)

    def latest(self) -> Published | None:
        """Return the newest checkpoint in `output_dir` that is complete and verifies.

        `recipe_checkpoint` names another one to go on from, once: then the newest of those that
        came from there. A `.pt` file is torchtune's way to say "the newest".
        """
        said = Path(self._recipe_checkpoint or "newest.pt")
        parts = [part.removesuffix(".pt") for part in said.parts]
        named = [part for part in parts if NAME.fullmatch(part)]
        wanted = named[-1] if named else None if said.suffix == ".pt" else str(said)
        # One rank reads it whole, and all agree on what it found.
        found = latest(self.output_dir, wanted) if rank() == 0 else None
        if found and (origin := wanted or found.manifest.get("recipe_checkpoint")):
            self._branch = Branch(origin, found.step)
        barrier_without_timeout()
        return from_rank_0(found)

    def set_aside_newer(self) -> None:
        """Rename checkpoints that the run, which goes on from an older one, will replace."""
        if self._branch:
            set_aside(self.output_dir, self._branch)

    def plan(self, config: DecoderConfig, dtype: torch.dtype) -> Plan:
        """Return what `save` writes: `.nbytes`, and `.read`, the order it asks for weights in."""
        return plan_weights(self.source, config, dtype)

    def save(
        self,
        name: str,
        *,
        step: int,
        dtype: torch.dtype,
        config: DecoderConfig,
        weights: Mapping[str, Tensor] | None = None,
        adapter: Mapping[str, Tensor] | None = None,
        adapter_config: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        trained: Mapping[str, Tensor] | None = None,
        state: Mapping[str, Any] | None = None,
        run: Mapping[str, Any] | None = None,
        stop_tokens: Sequence[int] = (),
        chat_template: str | None = None,
        val_losses: Callable[[], Mapping[int, float]] = dict,
        background: bool = False,
    ) -> Path:
        """Publish `output_dir / name` atomically, read it back, then drop what is too old.

        All ranks call it. Rank 0 writes the weights, gathered one at a time where they are
        sharded; of `tensors` and `trained` every rank writes the rows it holds.

        Args:
            name: `epoch_N` or `step_N`.
            step: optimizer steps done; checkpoints are ordered by it.
            dtype: what `weights` are cast to; adapters and `tensors` keep their own types.
            config: the model's.
            weights: the whole model's by our names, adapters merged; None to save adapters alone.
            tensors, state: what the recipe needs to go on.
            trained: the model's own parameters, for resuming where `weights` are not saved.
            run: what else the manifest says: samples_seen, world_size, config_hash, fingerprints.
            stop_tokens, chat_template: what the model has learned to end answers with, and its
                format of conversations, for other programs.
            val_losses: gives them by step; the checkpoint with the lowest stays beside the last.
            background: return when `tensors`, `trained` and the adapter are copied; what goes
                wrong later is raised by the next `save` or by `finish`.

        Raises:
            ResourceError: the disk is full, read-only or faulty.
            NumericalError: a weight is not finite.
        """
        self.finish()
        target = self.output_dir / name
        if from_rank_0("same" if rank() == 0 and _is_same(target, step, run) else ""):
            log.info("%s is already published", target)
            return target
        plan = None if weights is None else self.plan(config, dtype)
        parts = [part for part in (adapter, tensors, trained) if part]
        held = sum(tensor.nbytes for part in parts for tensor in part.values())
        facts: dict[str, Any] = {
            "step": step,
            "format": self.format.name,
            "dtype": str(dtype).removeprefix("torch."),
            "run": dict(run or {}),
        }
        if self._branch:
            facts["recipe_checkpoint"] = self._branch.name
        if rank() == 0:
            check_disk_space(self.output_dir, held + (plan.nbytes if plan else 0))
        with ExitStack() as stack:
            draft = stack.enter_context(publication_of_ranks(self.output_dir, name, facts))
            if plan and weights is not None:
                self._add_model(draft, plan, weights, stop_tokens, chat_template)
            if adapter and adapter_config:
                self._add_adapter(draft, adapter, adapter_config)
            stems = {OPTIMIZER: tensors, MODEL: trained}
            pieces = {s: own_pieces(t, copy=background) for s, t in stems.items() if t}
            publishing = stack.pop_all()

        def write() -> None:
            with publishing:
                for stem, each in pieces.items():
                    write_pieces(draft, stem, each, finite=stem == MODEL)
                if state is not None and rank() == 0:
                    draft.add_bytes(STATE, to_json({**state, "step": step}))
            if rank() == 0:
                _report(target, draft.records)
                if self._keep:
                    needed = {target, self.source_dir}
                    prune(self.output_dir, self._keep, needed, val_losses())

        self._pending = self._background.submit(write)
        if not background:
            self.finish()
            barrier_without_timeout()
        return target

    def finish(self) -> None:
        """Wait for what is being written in the background; raise what went wrong there."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def _add_model(
        self,
        draft: Draft,
        plan: Plan,
        weights: Mapping[str, Tensor],
        stop_tokens: Sequence[int],
        chat_template: str | None,
    ) -> None:
        if rank() != 0:
            for name in plan.read:  # gathering takes all ranks
                weights[name]
            return
        write_weights(draft, plan, weights)
        for name, content in companions(self.source_dir, plan.dtype, stop_tokens, chat_template):
            draft.add_bytes(name, content)

    def _add_adapter(
        self, draft: Draft, adapter: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> None:
        gathered = {name: whole(tensor.detach()) for name, tensor in adapter.items()}
        if rank() == 0:
            write_adapter(draft, gathered, settings, base_model_name(self.source_dir))


def _check(model_type: str | None, safe_serialization: bool, keep: int | None) -> None:
    if model_type is not None and model_type not in _MODEL_TYPES:
        raise ConfigError(
            f"checkpointer.model_type is {model_type!r}; it can be {', '.join(_MODEL_TYPES)} or be "
            f"left out{did_you_mean(model_type, _MODEL_TYPES)}"
        )
    if not safe_serialization:
        raise ConfigError(
            "checkpointer.safe_serialization is False, but mytune writes safetensors; remove it"
        )
    if keep is not None and keep < 1:
        raise ConfigError(
            f"checkpointer.keep_last_n_checkpoints is {keep}; use 1 or more, or null to keep all"
        )


def _is_same(target: Path, step: int, run: Mapping[str, Any] | None) -> bool:
    """Say whether `target` is this very checkpoint: same step, same config and data, and intact."""
    if not (run and "config_hash" in run and (target / MANIFEST).is_file()):
        return False
    try:
        manifest = read_manifest(target)
    except CheckpointError:
        return False
    return manifest["step"] == step and manifest.get("run") == run and not verify(target)


def _has_adapter(checkpoint: Path) -> bool:
    """Say whether a run saved an adapter in a checkpoint, as well as what it is merged into."""
    there = (checkpoint / MANIFEST).is_file()
    return there and f"adapter/{ADAPTER}" in read_manifest(checkpoint)["files"]


def _report(target: Path, records: Mapping[str, FileRecord]) -> None:
    for what, folder in (("Model", ""), ("Adapter", "adapter"), ("Recipe", "recipe_state")):
        sizes = [r.size for name, r in records.items() if name.rpartition("/")[0] == folder]
        if sum(sizes) and (folder or len(sizes) > 1):  # the manifest alone is no model
            size = format_size(sum(sizes))
            log.info("%s checkpoint of size %s saved to %s", what, size, target / folder)


class FullModelHFCheckpointer(_Checkpointer):
    """Hugging Face's layout: safetensors (or `.bin`, read only), `config.json`, tokenizer files."""

    format = HF


class FullModelMetaCheckpointer(_Checkpointer):
    """Meta's layout: `consolidated.*.pth` (or `meta_model_*.pt`), `params.json`."""

    format = META


class FullModelTorchTuneCheckpointer(_Checkpointer):
    """torchtune's own names of tensors, in `.pt` files."""

    format = TORCHTUNE

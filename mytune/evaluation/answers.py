"""What a model has answered, kept as it comes: an evaluation that was stopped goes on there."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mytune import versions
from mytune.modules.decoder import Decoder
from mytune.quantization.tensors import inner_tensors, is_quantized
from mytune.training.distributed import rank

log = logging.getLogger("mytune")

FOLDER = "evaluation_unfinished"

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[list[Item]], Mapping[int, Result]]


class KeptAnswers:
    """Answers by batch, in `evaluation_unfinished/` of a folder, of the model whose they are.

    A batch is known if a model of the same weights and code was asked the same. Each rank holds the
    whole model, and keeps what it finds in a file of its own.

    Args:
        output_dir: of the evaluation.
        model: filled with weights, before they are packed.
    """

    def __init__(self, output_dir: str | Path, model: Decoder) -> None:
        folder = Path(output_dir).expanduser() / FOLDER
        name = _fingerprint(model)
        self._known: dict[str, dict[int, Any]] = {}
        for file in sorted(folder.glob(f"{name}.*.jsonl")):
            self._known.update(_read(file))
        if self._known:
            told = (
                "going on with the answers to %d batches from an evaluation that was stopped (%s)"
            )
            log.info(told, len(self._known), folder)
        self._file: Path | None = folder / f"{name}.{rank()}.jsonl"

    def remembering(
        self, work: Work[Item, Result], asked: Callable[[Item], object]
    ) -> Work[Item, Result]:
        """Return `work` as a function that does no batch whose answers are known.

        Args:
            asked: all that the answer to an item depends on, beside the model; its repr counts.
        """

        def known_or_work(batch: list[Item]) -> Mapping[int, Result]:
            key = hashlib.sha256(repr([asked(item) for item in batch]).encode()).hexdigest()
            if key not in self._known:
                self._keep(key, work(batch))
            return self._known[key]

        return known_or_work

    def _keep(self, key: str, answers: Mapping[int, Any]) -> None:
        self._known[key] = dict(answers)
        if self._file is None:
            return
        line = json.dumps({"batch": key, "answers": list(answers.items())})
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as file:
                file.write(f"\n{line}")  # what comes before may be half a line
        except OSError as error:
            log.warning(
                "%s: %s: this evaluation cannot go on if it is stopped", self._file, error.strerror
            )
            self._file = None


def remove_kept_answers(output_dir: str | Path) -> None:
    """Remove what evaluations have kept in a folder, on rank 0: its results are written."""
    if rank() == 0:
        shutil.rmtree(Path(output_dir).expanduser() / FOLDER, ignore_errors=True)


def _read(file: Path) -> dict[str, dict[int, Any]]:
    """Return the answers in a file by batch, but for lines that were not finished."""
    found = {}
    for line in file.read_text(errors="replace").splitlines():
        try:
            said = json.loads(line)
            answers = {
                int(item): tuple(answer) if isinstance(answer, list) else answer
                for item, answer in said["answers"]
            }
            found[str(said["batch"])] = answers
        except (ValueError, TypeError, KeyError):
            continue
    return found


def _fingerprint(model: Decoder) -> str:
    """Return a name that no model of other weights, sizes or code has."""
    package = Path(__file__).parent.parent
    code = {Path(inspect.getfile(type(module))) for module in model.modules()}
    digest = hashlib.sha256(repr((model.config, model.device, versions("torch"))).encode())
    for file in sorted({*package.rglob("*.py"), *code}):
        digest.update(file.read_bytes())
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        parts: Sequence[Tensor] = [tensor]
        if is_quantized(tensor):
            parts = list(inner_tensors(tensor).values())
        digest.update(repr((name, [(p.dtype, p.shape, _sum(p)) for p in parts])).encode())
    return digest.hexdigest()[:16]


def _sum(tensor: Tensor) -> int:
    """Return the sum of a tensor's bytes, as whole numbers of 8 where there are: mod 2^64."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    end = len(flat) // 8 * 8
    return int(flat[:end].view(torch.int64).sum() + flat[end:].sum())

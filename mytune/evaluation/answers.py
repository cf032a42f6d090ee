"""What a model has answered, kept as it comes: an evaluation that was stopped goes on there."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mytune import versions
from mytune.modules.decoder import Decoder
from mytune.quantization.tensors import flatten
from mytune.training.distributed import rank

log = logging.getLogger("mytune")

FOLDER = "evaluation_unfinished"

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[list[Item]], Mapping[int, Result]]


class KeptAnswers:
    """Answers of one model by batch, in `evaluation_unfinished/` of a folder.

    A batch is known if a model of the same weights, settings and code was asked the same. Each rank
    holds the whole model, and keeps what it finds in a file of its own.

    Args:
        output_dir: of the evaluation.
        model: filled with weights, before they are packed.
        recipe: the file of the recipe that evaluates.

    Attributes:
        file: where this rank's answers are kept; None where or once it cannot be written.
    """

    def __init__(self, output_dir: str | Path, model: Decoder, recipe: str | Path) -> None:
        self._folder = Path(output_dir).expanduser() / FOLDER
        self._name = _fingerprint(model, Path(recipe))
        self.file: Path | None = None
        self._known: dict[str, dict[int, Any]] = {}
        if self._folder.is_symlink():  # it may lead out of output_dir
            return
        for file in self._files():
            self._known |= _read(file)
        if self._known:
            told = "the answers to %d batches are known, and are not asked for again: %s"
            log.info(told, len(self._known), self._folder)
        self.file = self._folder / f"{self._name}.{rank()}.jsonl"

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob(f"{self._name}.*.jsonl"))

    def remembering(
        self, work: Work[Item, Result], asked: Callable[[Item], object]
    ) -> Work[Item, Result]:
        """Return `work` as a function that does no batch whose answers are known.

        Args:
            asked: all that the answer to an item depends on, beside the model; its repr counts.
        """

        def known_or_work(batch: list[Item]) -> Mapping[int, Result]:
            key = _sha256(repr([asked(item) for item in batch]))
            if key not in self._known:
                self._keep(key, work(batch))
            return self._known[key]

        return known_or_work

    def _keep(self, key: str, answers: Mapping[int, Any]) -> None:
        self._known[key] = dict(answers)
        if self.file is None:
            return
        text = json.dumps([key, *answers.items()])
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as file:
                file.write(f"\n{_sha256(text)} {text}")  # what comes before may be half a line
        except OSError as error:
            told = "%s: %s: if this evaluation is stopped, it begins anew"
            log.warning(told, self.file, error.strerror)
            self.file = None

    def remove(self) -> None:
        """Remove the files, on rank 0 only: the results are written."""
        with suppress(OSError):
            for file in self._files() if rank() == 0 else ():
                file.unlink(missing_ok=True)
            self._folder.rmdir()  # unless others have kept something there


def _read(file: Path) -> dict[str, dict[int, Any]]:
    """Return the answers in a file by batch; lines that were not finished, or damaged, are none."""
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return {}
    found = {}
    for digest, _, text in (line.partition(" ") for line in lines):
        if digest == _sha256(text):
            key, *answers = json.loads(text)
            found[key] = {i: tuple(a) if isinstance(a, list) else a for i, a in answers}
    return found


def _fingerprint(model: Decoder, recipe: Path) -> str:
    """Return a name that no model of other weights, settings or code has."""
    device, packages = model.device, ["torch", *({"torchao"} & sys.modules.keys())]
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    about: list[Any] = [model.config, kind, versions(*packages)]
    about += [(name, type(module), _settings(module)) for name, module in model.named_modules()]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    parts: list[Tensor] = []
    for held, said in (flatten(name, tensor) for name, tensor in tensors):
        about.append((said, [(key, part.dtype, part.shape) for key, part in held.items()]))
        parts += held.values()
    loaded = (sys.modules.get(type(module).__module__) for module in model.modules())
    code = {Path(file) for module in loaded if (file := getattr(module, "__file__", None))}
    files = sorted({*Path(__file__).parent.parent.rglob("*.py"), *code, recipe})
    with ThreadPoolExecutor(8) as pool:
        about += pool.map(_hash_tensor, parts)
        about += pool.map(lambda file: _sha256(file.read_bytes()), files)
    return _sha256(repr(about))[:16]


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return what a module holds beside tensors and modules, such as the scale of an adapter."""
    plain = (bool, int, float, str, tuple, torch.dtype)
    return {k: v for k, v in vars(module).items() if isinstance(v, plain) or is_dataclass(v)}


def _hash_tensor(tensor: Tensor) -> str:
    return _sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _sha256(value: Any) -> str:
    return hashlib.sha256(value.encode() if isinstance(value, str) else value).hexdigest()

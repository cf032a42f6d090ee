"""Weights on the disk: finding the files, knowing their layout, reading them under our names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mytune.errors import TENSORS, CheckpointError, ConfigError, did_you_mean, shortened
from mytune.modules.decoder import DecoderConfig
from mytune.training.checkpointing.files import TensorFile, TensorSpec, inside, read_json
from mytune.training.checkpointing.formats import FORMATS, Format, parameter_shapes
from mytune.training.checkpointing.pickle_io import PickledFile
from mytune.training.checkpointing.quantized import is_quantized_file
from mytune.training.checkpointing.safetensors_io import SafetensorsFile

_OPEN: Mapping[str, type[PickledFile] | type[SafetensorsFile]] = {
    ".safetensors": SafetensorsFile,
    ".bin": PickledFile,
    ".pth": PickledFile,
    ".pt": PickledFile,
}
_FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
ADAPTER = "adapter_config.json"  # by which PEFT's folders are known
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"

CheckpointFiles = Sequence[str] | Mapping[str, str] | None


def find_files(
    fmt: Format, directory: Path, listed: CheckpointFiles, output_dir: Path | None = None
) -> list[Path]:
    """Return a checkpoint's weight files, in order.

    Args:
        listed: file names relative to `directory`, or torchtune's `{filename_format,
            max_filename}`; None: the index or the directory tells.
        output_dir: where names such as `meta_model_0.pt` mean "what was saved in epoch 0".

    Raises:
        CheckpointError: a file is missing, or lies outside the directory.
    """
    if not directory.is_dir():
        raise CheckpointError(
            f"checkpoint_dir: there is no directory {directory}; `tune download` makes one"
        )
    if listed == []:
        raise ConfigError("checkpoint_files is empty; leave it out for all files of the directory")
    names = _discover(fmt, directory) if listed is None else _names(listed)
    if not names:
        raise CheckpointError(
            f"no {fmt.name} weights in {directory} ({fmt.single}, {', '.join(fmt.found)})",
            _hints(directory),
        )
    paths = [inside(directory, name) for name in names]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        saved = _published(fmt, names, [directory, *([output_dir] if output_dir else [])])
        if saved:
            return saved
        present = [path.name for path in directory.iterdir() if path.is_file()]
        first = shortened([path.name for path in missing])
        told = [f"{name}{did_you_mean(name, present)}" for name in first]
        raise CheckpointError(
            f"checkpoint_files: {len(missing)} of {len(paths)} are not in {directory}",
            told + _hints(directory),
        )
    return paths


def _names(listed: Sequence[str] | Mapping[str, str]) -> list[str]:
    if not isinstance(listed, Mapping):
        return list(listed)
    try:
        pattern, last = listed["filename_format"], str(listed["max_filename"])
        total = int(last)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            "checkpoint_files: a mapping needs filename_format (with two {}) and max_filename "
            f"(a number such as '00004'), not {dict(listed)}"
        ) from error
    numbers = (str(i + 1).zfill(len(last)) for i in range(total))
    return [pattern.replace("{}", number, 1).replace("{}", last, 1) for number in numbers]


def _discover(fmt: Format, directory: Path) -> list[str]:
    """Return a directory's weight files, from the first thing there that knows them."""
    if (directory / fmt.single).is_file() and not fmt.parts:
        return [fmt.single]
    for index in fmt.indexes:
        if (directory / index).is_file():
            return _indexed(inside(directory, index))
    by, saved = fmt.beside
    beside = [saved] if by and (directory / by).is_file() else []
    for pattern in (*fmt.found, fmt.single, *beside):
        names = sorted(path.name for path in directory.glob(pattern))
        if names:
            return names
    return []


def _indexed(index: Path) -> list[str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names")
    return sorted(set(names.values()))


def _published(fmt: Format, names: Sequence[str], directories: Sequence[Path]) -> list[Path]:
    """Return the files of `epoch_N` if every name is one of torchtune's for its weights."""
    found = [re.fullmatch(fmt.published, name) for name in names]
    epochs = {int(match[1]) if match else None for match in found}
    if len(epochs) > 1:
        return []
    folders = [directory / f"epoch_{epoch}" for directory in directories for epoch in epochs]
    saved = next((folder for folder in folders if folder.is_dir()), None)
    return [saved / name for name in _discover(fmt, saved)] if saved else []


def _hints(directory: Path) -> list[str]:
    """Say which checkpoints a directory and those below it do hold."""
    if (directory / ADAPTER).is_file():
        return [f"{directory} is an adapter: its base is checkpoint_dir, it is adapter_checkpoint"]
    below = sorted(path for path in directory.iterdir() if path.is_dir())
    found: dict[Path, str] = {}
    for where in (directory, *below[:20]):
        for fmt in FORMATS:
            if names := _discover(fmt, where):
                found.setdefault(where / names[0], fmt.checkpointer)
    return [
        f"{file.parent} holds {file.name}: use {reader} with checkpoint_dir={file.parent}"
        for file, reader in found.items()
    ][:5]


@dataclass(frozen=True)
class Group:
    """Files that hold the same tensors: one file, or all model-parallel parts."""

    files: tuple[TensorFile, ...]

    def shape(self, key: str, expected: tuple[int, ...]) -> tuple[tuple[int, ...], int | None]:
        """Return the shape of a whole tensor, and the dimension along which it is cut, if it is.

        A part is cut along the one dimension that is shorter than in the model. (Which one it is
        differs between Llama 2 and 3 for the embedding, so the files know better than a table.)
        """
        part, n = self.files[0].specs[key].shape, len(self.files)
        if n > 1 and len(part) == len(expected):
            for dim, size in enumerate(expected):
                whole = (*part[:dim], part[dim] * n, *part[dim + 1 :])
                if part[dim] != size and whole == expected:
                    return whole, dim
        return part, None

    def read(self, key: str, dim: int | None) -> Tensor:
        """Read a whole tensor."""
        if dim is None:
            return self.files[0][key]
        return torch.cat([file[key] for file in self.files], dim)


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint as this model sees it.

    `ours` is None for buffers. `dim` is where model-parallel parts are cut.
    """

    key: str
    ours: str | None
    spec: TensorSpec
    dim: int | None


class Source:
    """A checkpoint's weight files in one format; opened on first use, read tensor by tensor."""

    def __init__(self, fmt: Format, paths: Sequence[Path]) -> None:
        self.format = fmt
        self.paths = list(paths)

    @cached_property
    def groups(self) -> list[Group]:
        """The files, grouped by the tensors they hold."""
        files = [open_tensors(path) for path in self.paths]
        if not self.format.parts:
            _demand_distinct(files)
            return [Group((file,)) for file in files]
        different = [str(f.path) for f in files if f.specs.keys() != files[0].specs.keys()]
        if different:
            raise CheckpointError(
                f"these files do not hold the same tensors as {files[0].path}", different
            )
        return [Group(tuple(files))]

    @property
    def is_quantized(self) -> bool:
        """Say whether the files hold weights that torchao quantized: to be used, not trained."""
        return any(is_quantized_file(file) for group in self.groups for file in group.files)

    def entries(self, config: DecoderConfig) -> list[list[Entry]]:
        """Return what each group holds, in the order of its files.

        Raises:
            CheckpointError: missing, unknown or different tensors.
        """
        if self.is_quantized:
            raise CheckpointError(
                f"{self.paths[0].parent} holds a quantized model, and mytune trains and quantizes "
                "unquantized checkpoints: name the one that it was made from in "
                "checkpointer.checkpoint_dir"
            )
        shapes = parameter_shapes(config)
        # A file may hold a tied head all the same: it must then equal the embedding.
        allowed = {**shapes, HEAD: shapes[EMBEDDING]}
        layout = [
            [self._entry(group, key, allowed) for key in group.files[0].specs]
            for group in self.groups
        ]
        flat = [entry for entries in layout for entry in entries]
        if self.format.parts and len(self.paths) > 1 and all(entry.dim is None for entry in flat):
            raise CheckpointError(
                "each of these files holds a whole model; name one in checkpoint_files",
                [str(path) for path in self.paths],
            )
        problems = [text for entry in flat if (text := self._problem(entry, allowed))]
        held = {entry.ours for entry in flat}
        problems += [
            f"missing {self.format.table.theirs(name)}: expected {list(shape)}{_tied_hint(name)}"
            for name, shape in shapes.items()
            if name not in held
        ]
        if problems:
            raise CheckpointError(
                f"{self.paths[0].parent}: tensors that do not fit the model: {len(problems)}; "
                f"mytune.models.auto_model with model.checkpoint_dir={self.paths[0].parent} takes "
                "the sizes from there, and lora_auto_model and qlora_auto_model do with adapters; "
                "if one of them is used already, config.json or params.json there is of another "
                "model than the weights",
                shortened(problems, TENSORS),
            )
        return layout

    def _entry(self, group: Group, key: str, shapes: Mapping[str, tuple[int, ...]]) -> Entry:
        spec, ours = group.files[0].specs[key], self.format.table.ours(key)
        if ours is None or ours not in shapes:
            return Entry(key, None, spec, None)
        shape, dim = group.shape(key, shapes[ours])
        return Entry(key, ours, TensorSpec(spec.dtype, shape), dim)

    def _problem(self, entry: Entry, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        if entry.ours is None:
            known = self.format.is_buffer(entry.key)
            return None if known else f"unexpected {entry.key}: found {entry.spec}"
        if entry.spec.dtype not in _FLOATS:
            return (
                f"mismatched {entry.key}: expected floating-point weights, found {entry.spec}; "
                "mytune trains unquantized checkpoints"
            )
        expected = shapes[entry.ours]
        if entry.spec.shape == expected:
            return None
        return f"mismatched {entry.key}: expected {list(expected)}, found {list(entry.spec.shape)}"

    def weights(self, config: DecoderConfig) -> Mapping[str, Tensor]:
        """Return the model's weights by our names; each is read when asked for."""
        held = {
            entry.ours: (group, entry)
            for group, entries in zip(self.groups, self.entries(config), strict=True)
            for entry in entries
            if entry.ours is not None
        }
        weights = _Weights(self.format, config, held)
        if config.tie_word_embeddings and HEAD in held:
            if not torch.equal(weights[HEAD], weights[EMBEDDING]):
                raise CheckpointError(
                    f"{self.paths[0].parent}: the model ties its embeddings, but "
                    f"{held[HEAD][1].key} is not {held[EMBEDDING][1].key}; if it is not tied, "
                    "config.json must say tie_word_embeddings: false"
                )
            del held[HEAD]
        return weights


class _Weights(Mapping[str, Tensor]):
    """Our names -> tensors in our order of rows."""

    def __init__(
        self, fmt: Format, config: DecoderConfig, held: Mapping[str, tuple[Group, Entry]]
    ) -> None:
        self._format, self._config, self._held = fmt, config, held

    def __getitem__(self, name: str) -> Tensor:
        group, entry = self._held[name]
        tensor = group.read(entry.key, entry.dim)
        return self._format.table.row(name).to_ours(tensor, self._config)

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def open_tensors(path: Path) -> TensorFile:
    """Open a file of tensors by its suffix."""
    if path.suffix not in _OPEN:
        raise CheckpointError(f"{path}: weights are in files that end in {', '.join(_OPEN)}")
    return _OPEN[path.suffix](path)


def _demand_distinct(files: Sequence[TensorFile]) -> None:
    seen: dict[str, Path] = {}
    for file in files:
        for key in file.specs:
            if key in seen:
                raise CheckpointError(f"{key} is both in {seen[key]} and in {file.path}")
            seen[key] = file.path


def _tied_hint(name: str) -> str:
    if name != HEAD:
        return ""
    return " (a model with tied embeddings says tie_word_embeddings: true in config.json)"

"""Which commands, recipes and configs there are, which belongs to which, where their files lie."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from mytune.errors import ConfigError, did_you_mean

VERBS = {
    "download": "fetch a model from the Hugging Face Hub, or copy an embedded one",
    "ls": "list the recipes and their configs",
    "cp": "copy a recipe or a whole config, to change it",
    "run": "run a recipe, here or under torchrun",
    "chat": "chat in the terminal with a model of yours",
    "validate": "check a config: keys, types, components, files",
    "cat": "print a whole config with a comment on every key",
    "completion": "print a completion script for bash, zsh or fish",
}

_PACKAGE = Path(__file__).resolve().parents[1]
# Holds recipes/ and configs/: of a wheel the package itself, of a checkout the folder around it.
ROOT = _PACKAGE if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent


class Recipe(NamedTuple):
    """A name for a recipe file, and the patterns of the names of its configs.

    `ranks` says whether torchrun may start it in several processes.
    """

    name: str
    file_name: str
    patterns: tuple[str, ...]
    ranks: bool = True

    @property
    def file(self) -> Path:
        return ROOT / "recipes" / self.file_name

    @property
    def kind(self) -> str:
        """What it does: full, lora, generate, ..."""
        return self.name.partition("_")[0]

    def owns(self, config: str) -> bool:
        return any(fnmatchcase(config, pattern) for pattern in self.patterns)

    def configs(self) -> list[str]:
        return [name for name in configs() if self.owns(name)]


# A name that ends in _distributed runs under torchrun.
_RECIPES = [
    Recipe(
        "full_finetune_single_device",
        "finetune.py",
        ("*/*_full_single_device", "*/full_single_device"),
    ),
    Recipe("full_finetune_distributed", "finetune.py", ("*/*_full",)),
    Recipe(
        "lora_finetune_single_device",
        "finetune.py",
        ("*/*_*lora_single_device", "*/*_*dora_single_device", "*/lora_single_device"),
    ),
    Recipe("lora_finetune_distributed", "finetune.py", ("*/*_*lora", "*/*_*dora")),
    Recipe("generate", "generate.py", ("generation", "*/generation"), ranks=False),
    Recipe("eleuther_eval", "eleuther_eval.py", ("eleuther_evaluation", "*/evaluation")),
    Recipe("quantize", "quantize.py", ("quantization", "*/quantization"), ranks=False),
    Recipe("chat", "chat.py", (), ranks=False),  # `tune chat` makes its config
]
RECIPES = {recipe.name: recipe for recipe in _RECIPES}
_TORCHTUNES = (
    r"(dev/)?((full|lora|async)_)?"
    r"(qat|dpo|ppo|grpo|knowledge_distillation|early_exit|generate_v2|multi_dataset)(_\w+)?"
)


def configs() -> list[str]:
    """Return the names of all configs, sorted: their paths below configs/ without the suffix."""
    folder = ROOT / "configs"
    return sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))


def config_path(name: str) -> Path:
    return ROOT / "configs" / f"{name}.yaml"


def recipe_of(config: str) -> Recipe | None:
    """Return the recipe that the config called `config` belongs to."""
    return next((recipe for recipe in RECIPES.values() if recipe.owns(config)), None)


def unknown(kind: str, name: str, names: Iterable[str]) -> ConfigError:
    """Return the error for a name that is not one of `names`, with the nearest of them."""
    if "recipe" in kind and re.fullmatch(_TORCHTUNES, name):
        return ConfigError(
            f"{name} is a recipe of torchtune's that is not here: docs/from_torchtune.md"
        )
    near = did_you_mean(name, names)
    return ConfigError(f"there is no {kind} {name!r} (`tune ls` lists them){near}")


def find_recipe(name: str) -> Path:
    """Return the file of a recipe's name, or of a path with or without `.py`."""
    if name in RECIPES:
        return RECIPES[name].file
    for path in (Path(name), Path(f"{name}.py")):
        if path.suffix == ".py" and path.is_file():
            return path.resolve()
    if name.endswith(".py"):
        raise ConfigError(f"there is no file {name}")
    if name in VERBS:
        raise ConfigError(f"{name} is a command, no recipe: tune {name}")
    raise unknown("recipe", name, RECIPES)


def find_config(name: str) -> Path:
    """Return the file of a config's name, or of a path."""
    if name in configs():
        return config_path(name)
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        raise ConfigError(
            f"there is no file {name}{did_you_mean(str(path.with_suffix('')), configs())}"
        )
    if name in RECIPES:
        raise ConfigError(f"{name} is a recipe: `tune ls {name}` lists its configs")
    raise unknown("config", name, configs())


def recipe_for(config: str) -> Path:
    """Return the file of the recipe that a config's name belongs to, or that a file fits best.

    A file does not say which recipe it is for: it is read as a config of each, and the one that
    finds least wrong with it is taken, the first of equals.
    """
    if config in configs() and (recipe := recipe_of(config)):
        return recipe.file
    from mytune.config import read_config

    file = find_config(config)
    recipes = dict.fromkeys(each.file for each in RECIPES.values() if each.file.is_file())
    return min(recipes, key=lambda recipe: len(read_config(recipe, file).problems))

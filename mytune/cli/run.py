"""`tune run`: checks the config, then runs the recipe here, or under torchrun."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from mytune._interrupts import ctrl_c_ends_at_once
from mytune.cli import registry
from mytune.cli.parser import Parser, setting_of
from mytune.cli.report import may_be_theirs, open_streams, report, say, take_debug
from mytune.errors import ConfigError

if TYPE_CHECKING:
    from mytune.config import LoadedConfig

# torchrun's options without a value; torch is not imported to learn that.
_SWITCHES = {"--standalone", "--virtual-local-rank", "-m", "--module", "--no-python", "--run-path"}
_OURS = {"-m", "--module", "--no-python", "--run-path"}  # `tune run` itself says what is run


class Job(NamedTuple):
    """What a command line asks for: files, and what was typed."""

    recipe: Path
    config: Path | None
    overrides: list[str]
    allow: list[str]
    dry_run: bool = False
    name: str = ""  # of the recipe, if it was asked for by that


def parser() -> Parser:
    parser = Parser(
        "run",
        usage="tune run [torchrun options] RECIPE --config CONFIG [key=value ...] [~key ...]",
        description="Run a recipe with a config.",
        epilog="It runs in this process, or under torchrun: if torchrun's options are given, before"
        " RECIPE (`torchrun --help`), or RECIPE ends in _distributed (then one process per GPU)."
        " `tune cat CONFIG` shows every key that can be overridden.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a name of `tune ls`, or a Python file")
    parser.add_argument("--config", metavar="CONFIG", help="a name of `tune ls`, or a YAML file")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="fine-tuning only: print the memory, steps and time of the run, then stop",
    )
    parser.add_argument(
        "--compare",
        metavar="BASE",
        help="eleuther_eval: also evaluate this base model, and show both",
    )
    parser.add_config_arguments()
    return parser


def main(argv: list[str]) -> int:
    options, words = split(argv)
    if {"-h", "--help"} & {*options, *words[1:]}:
        parser().print_help()
        return 0
    built_in = registry.RECIPES.get(words[0]) if options and words else None
    if built_in and not built_in.ranks:
        raise ConfigError(f"{words[0]} runs in one process: leave out {' '.join(options)}")
    job = parse(words)
    loaded = load(job)
    if options or job.recipe.stem.endswith("_distributed") or words[0].endswith("_distributed"):
        from mytune.cli.torchrun import as_one_of, launch

        if not job.dry_run:
            return launch(options, words)
        with as_one_of(options):
            return execute(job, loaded)
    return execute(job, loaded)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into torchrun's options and what begins with the recipe."""
    at = 0
    while at < len(argv) and argv[at].startswith("-"):
        name, equals, _ = argv[at].partition("=")
        name = name.replace("_", "-")
        if name in _OURS:
            raise ConfigError(
                f"torchrun's {name} cannot be used: `tune run` starts the recipe itself"
            )
        alone = equals or name in _SWITCHES or name in ("-h", "--help")
        at += 1 if alone else 2
    return list(argv[:at]), list(argv[at:])


def parse(words: Sequence[str]) -> Job:
    """Read `RECIPE --config CONFIG key=value ...` and find the files."""
    torchruns = ", torchrun's options come before the recipe"
    reader = parser()
    args, unknown = reader.parse_known_intermixed_args(words)
    recipe = registry.find_recipe(args.recipe)
    if unknown:
        raise ConfigError(
            f"{unknown[0]!r} is no option of `tune run`: settings are key=value"
            f"{_as_setting(unknown[0], words, recipe) or torchruns + reader.near(unknown[0])}"
        )
    config = registry.find_config(args.config) if args.config else None
    _check_pair(args)
    overrides = args.overrides + ([f"compare={args.compare}"] if args.compare else [])
    if args.dry_run:
        from mytune.config.schema import read_schema

        if "dry_run" not in read_schema(recipe).names:
            raise ConfigError(
                f"--dry-run: the recipe {args.recipe} has no key dry_run, so it makes no plan"
            )
        overrides.append("dry_run=True")
    return Job(recipe, config, overrides, args.allow_component, args.dry_run, args.recipe)


def _as_setting(option: str, words: Sequence[str], recipe: Path) -> str:
    """Return how an option is written as a setting of the recipe, if it has that."""
    from mytune.config.foreign import called_here
    from mytune.config.schema import read_schema

    key, value = setting_of([option, *words[words.index(option) + 1 :]])
    names = read_schema(recipe).names
    if key.partition(".")[0] in names:
        is_switch = key in names and names[key].type == "bool"
        return f"; write {key}={'...' if value == 'true' and not is_switch else value}"
    here = called_here(key, names)
    if here is None:
        return ""
    is_part = here in names and names[here].type.startswith("Component")
    fits = re.fullmatch(r"[\w.]+", here) and re.fullmatch(r"-?[\d.]+(e-?\d+)?", value)
    return f"; write {here}={value}" if fits and not is_part else f"; here it is {here}"


def _check_pair(args: argparse.Namespace) -> None:
    """Refuse a built-in recipe without a config, or with the config of another one."""
    built_in = registry.RECIPES.get(args.recipe)
    if built_in and not args.config:
        names = ", ".join(built_in.configs())
        ready = f", or one of {names}" if names else f" (`tune {args.recipe}` makes one)"
        meant = [
            w for w in args.overrides if w.endswith((".yaml", ".yml")) or w in registry.configs()
        ]
        near = f"; did you mean --config {meant[0]}?" if meant else ""
        raise ConfigError(f"--config is missing: a YAML file{ready}{near}")
    owner = registry.recipe_of(args.config) if args.config in registry.configs() else None
    if built_in and owner and owner.kind != built_in.kind:
        right = f"tune run {owner.name} --config {args.config}"
        raise ConfigError(f"{args.config} is a config of another recipe: `{right}`")


def _check_method(recipe: str, loaded: LoadedConfig) -> list[str]:
    """Return the problem of a model of mytune's that trains something else than the recipe says."""
    method = registry.RECIPES[recipe].kind if recipe in registry.RECIPES else ""
    model = loaded.values().get("model")
    named = model.get("_component_") if isinstance(model, dict) else None
    package, _, builder = str(named).rpartition(".")
    is_known = method in ("lora", "full") and package.startswith("mytune.models")
    if not is_known or (method == "lora") == builder.startswith(("lora_", "qlora_")):
        return []
    full = re.sub("^q?lora_", "", builder)
    trains, right = ("adapters", f"lora_{full}") if method == "lora" else ("all weights", full)
    other = recipe.replace(method, "full" if method == "lora" else "lora", 1)
    return [
        f"{loaded.where('model._component_')}: {recipe} trains {trains}, which {builder} does not: "
        f"model._component_={package}.{right}, or `tune run {other}`"
    ]


@ctrl_c_ends_at_once()
def load(job: Job) -> LoadedConfig:
    """Return the config, and print on stderr what the user should know about it.

    Raises:
        ConfigError: with all that is wrong in it, and in its components, which are imported.
    """
    from mytune.config import check_components, config_error, read_config

    _prepare_torch()
    loaded = read_config(job.recipe, job.config, job.overrides, allow_components=job.allow)
    found = check_components(loaded)
    # A plan needs no weights, and says so itself where it lacks something.
    needed = check_components(loaded, files=False) if job.dry_run else found
    if problems := loaded.problems + needed + _check_method(job.name, loaded):
        raise config_error(problems)
    loaded.tree.notices += [each for each in found if each not in needed]
    for notice in loaded.notices:
        say(f"notice: {notice}")
    return loaded


def execute(job: Job, loaded: LoadedConfig, module: ModuleType | None = None) -> int:
    """Run the recipe's `main` in this process and return its exit code."""
    from mytune.config.components import places_of_others

    module = module or _import_recipe(job.recipe)
    if not hasattr(module, "main"):
        raise ConfigError(f"{job.recipe} has no `def main(cfg: Config)`: a recipe starts there")
    with may_be_theirs(places_of_others(loaded.resolved)):
        code: int | None = module.main(loaded.build(module.Config))
    return code or 0


def run_recipe(file: str, argv: Sequence[str] | None = None) -> int:
    """Run the recipe in `file`, the caller's own, as `tune run` would, and return the exit code.

    A recipe file that ends in `if __name__ == "__main__": raise SystemExit(run_recipe(__file__))`
    is a script for `python my_recipe.py --config my.yaml` and for torchrun.
    """
    if argv is None:
        open_streams()
    words = [file, *take_debug(sys.argv[1:] if argv is None else argv)]
    caller = sys.modules["__main__"]
    same = getattr(caller, "__file__", None) and os.path.samefile(str(caller.__file__), file)

    def work() -> int:
        job = parse(words)
        return execute(job, load(job), caller if same else None)

    return report(work)


def _prepare_torch() -> None:
    """Let CUDA's allocator grow its segments, which loses less memory; the user's setting wins."""
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


@ctrl_c_ends_at_once()
def _import_recipe(file: Path) -> ModuleType:
    """Import a recipe under its own name, with its folder on the path, so that pickles find it."""
    import importlib.util

    from mytune.config.components import find_modules_here

    is_theirs = file.parent != registry.ROOT / "recipes"
    if is_theirs and file.is_relative_to(Path.cwd().resolve()):
        find_modules_here()  # as for components in files here
    taken = file.stem in sys.modules or file.stem in sys.stdlib_module_names
    name = f"{file.stem}_recipe" if taken else file.stem
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader  # `file` ends in .py
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""From a `_component_` name to the object: what may be named, how it is found, how it is called."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import pkgutil
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from mytune._interrupts import ctrl_c_ends_at_once
from mytune._lazy import import_quietly
from mytune.config.torchtune import our_name
from mytune.config.types import KEY, components
from mytune.errors import ConfigError, ResourceError, did_you_mean

# Of mytune only what a config is made of: another function could be made to run or delete a file.
_OUR_PACKAGES = tuple(
    f"mytune.{name}."
    for name in ("models", "modules", "tokenizers", "datasets", "training", "quantization")
)
_OURS = (
    "models.*",
    "modules.*Loss",
    "tokenizers.*_tokenizer",
    "tokenizers.*Tokenizer",
    "tokenizers.*Template",
    "datasets.*_dataset",
    "datasets.*Template",
    "datasets.*ToMessages",
    "training.*Checkpointer",
    "training.*Logger",
    "training.*get_*_schedule_with_warmup",
    "training.*setup_torch_profiler",
    "quantization.?*Quantizer",
)
# Of other packages only classes of these kinds: they have functions that run or write anything.
_OPTIMIZER = "torch.optim.optimizer.Optimizer"
_OTHERS = {
    "torch.optim": (_OPTIMIZER, "torch.optim.lr_scheduler.LRScheduler"),
    "torch.nn": ("torch.nn.modules.module.Module",),
    "torchao": (
        _OPTIMIZER,
        "torchao.core.config.AOBaseConfig",
        "torchao.quantization.granularity.Granularity",
        "enum.Enum",
    ),
    "bitsandbytes.optim": (_OPTIMIZER,),
}
_PACKAGES = {"mytune", "torchtune", "torch", "torchao", "bitsandbytes"}
_INSTALL = {"torchao": "pip install 'torchao>=0.18'"}

_FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
_EXAMPLE = " like 'mytune.models.llama3.llama3_8b'"

_allowed_by_user: set[str] = set()


def allow(names: Iterable[str]) -> None:
    """Let this process build components of these packages: the user's command line says so."""
    _allowed_by_user.update(names)


def refusal(name: str) -> str | None:
    """Return why a component of this name must not be built; None if it may. It is not imported."""
    if Path(name).suffix in _FILES and not local_file(name):
        return f"{name!r} is a file, not a component; one of data goes into dataset.source={name}"
    parts = name.split(".")
    if len(parts) < 2 or not all(part.isidentifier() and part[:2] != "__" for part in parts):
        full = " or ".join(map(repr, _full_names(name)))
        return f"{name!r} is not a dotted name" + (f"; did you mean {full}?" if full else _EXAMPLE)
    allowed = [*_OTHERS, *_allowed_by_user]
    if any(name.startswith(f"{prefix}.") for prefix in allowed) or local_file(name):
        return None
    if name.startswith(_OUR_PACKAGES) and not any(part.startswith("_") for part in parts):
        return None
    if parts[0] == "mytune":
        places = ", ".join(each.removesuffix(".") for each in _OUR_PACKAGES)
        return f"unknown component {name!r}; components are in {places}"
    return (
        f"{name!r} is not allowed{did_you_mean(parts[0], _PACKAGES - {parts[0]})}; components come "
        f"from mytune, {', '.join(_OTHERS)} or a Python file below the current directory; "
        f"--allow-component {parts[0]} lets this one in"
    )


def is_from_us_or_torch(name: str) -> bool:
    """Say whether a name is of a package that we know, and none that the command line lets in."""
    return name.partition(".")[0] in _PACKAGES and not _is_let_in(name)


def _is_let_in(name: str) -> bool:
    return any(name.startswith(f"{each}.") for each in _allowed_by_user)


def check_may_run(tasks: Sequence[str], include_path: str | None = None) -> None:
    """Refuse tasks of an evaluation in a folder that a config alone names: they can run code.

    Args:
        tasks: names, and paths of YAML files.
        include_path: a folder of such files.

    Raises:
        ConfigError: it is not below the current directory, nor does the command line name it.
    """
    folders = [os.path.dirname(name) for name in tasks if name.endswith(".yaml")]
    folders += [] if include_path is None else [include_path]
    trusted = [".", os.path.dirname(os.path.dirname(__file__)), *_allowed_by_user]
    for folder in folders:
        here = Path(os.path.expanduser(folder)).resolve()
        if not any(here.is_relative_to(Path(each).resolve()) for each in trusted):
            raise ConfigError(
                f"tasks in {folder} could run code, and are neither below the current directory "
                f"nor named on the command line: --allow-component {folder} lets them"
            )


def _full_names(short: str) -> list[str]:
    """Return what components of mytune's with a name, or with it in theirs, are called in full."""
    shown = [
        (name, f"{prefix}{name}")
        for prefix in _OUR_PACKAGES
        for name in getattr(importlib.import_module(prefix.removesuffix(".")), "__all__", ())
        if _is_ours(f"{prefix}{name}")
    ]
    exact = [full for name, full in shown if name == short]
    return (
        exact or [full for name, full in shown if short[2:] and short.lower() in name.lower()][:3]
    )


def local_file(name: str) -> tuple[Path, str] | None:
    """Return the file below the current directory that `name` points into, and its module."""
    parts = name.split(".")
    here = Path.cwd().resolve()
    for end in range(len(parts) - 1, 0, -1) if parts[0] not in _PACKAGES else ():
        stem = here.joinpath(*parts[:end])
        for file in (stem.with_suffix(".py"), stem / "__init__.py"):
            if file.is_file() and file.resolve().is_relative_to(here):
                return file.resolve(), ".".join(parts[:end])
    return None


def places_of_others(config: Any) -> list[str]:
    """Return where components of a config are from that are not ours: local files, packages."""
    names = [str(node[KEY]) for _, node in components(config)]
    others = [each for each in names if each.partition(".")[0] not in _PACKAGES]
    local = {each: local_file(each) for each in others}
    found = [os.path.relpath(at[0]) if at else each.split(".")[0] for each, at in local.items()]
    return list(dict.fromkeys(found))


def find_component(name: str) -> Any:
    """Import and return what `name` names.

    Raises `ConfigError` for a name that is unknown or not allowed, or whose object comes from
    elsewhere (`torch.nn.modules.os.system`), `ResourceError` for a package that is not installed.
    """
    if why := refusal(name):
        raise ConfigError(why)
    module, attributes = _import_module(name)
    found: Any = module
    for attribute in attributes:
        try:
            found = getattr(found, attribute)
        except AttributeError:
            raise ConfigError(f"unknown component {name!r}{_nearest(found, attribute)}") from None
        except Exception as error:  # a lazy name that cannot be imported
            raise _not_importable(name, error) from error
    if not callable(found):
        raise ConfigError(f"{name!r} is neither a function nor a class")
    if name.startswith("mytune.") and not _is_ours(name):
        raise ConfigError(f"{name!r} is not a component: no config is made of it")
    if why := _foreign(found) or _another_kind(name, found):
        raise ConfigError(f"{name!r} is not allowed: it {why}")
    return found


def _is_ours(name: str) -> bool:
    """Say whether a name of mytune's is one that configs may use."""
    allowed = "mytune" in _allowed_by_user
    return allowed or any(fnmatchcase(name, f"mytune.{pattern}") for pattern in _OURS)


def _another_kind(name: str, found: Any) -> str | None:
    """Return why an object of another package is none that configs may use; None if it is one."""
    prefix = next((each for each in _OTHERS if name.startswith(f"{each}.")), None)
    if prefix is None or _is_let_in(name):
        return None
    kinds = {f"{each.__module__}.{each.__qualname__}" for each in getattr(found, "__mro__", ())}
    if not kinds.isdisjoint(_OTHERS[prefix]):
        return None
    wanted = ", ".join(kind.rpartition(".")[2] for kind in _OTHERS[prefix])
    return f"is no class of these: {wanted}; --allow-component {prefix} lets it in"


@ctrl_c_ends_at_once()
def _import_module(name: str) -> tuple[ModuleType, list[str]]:
    """Import the longest part of `name` that is a module; return it and the attributes left."""
    parts = name.split(".")
    if local := local_file(name):
        return _import_local(*local), parts[local[1].count(".") + 1 :]
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        try:
            return import_quietly(module), parts[end:]
        except Exception as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing is None or not f"{module}.".startswith(f"{missing}.") or end == 1:
                raise _not_importable(name, error) from error
    raise AssertionError(name)


def find_modules_here() -> None:
    """Let modules in the current directory be imported, after all others of the same name."""
    if (here := str(Path.cwd().resolve())) not in sys.path:
        sys.path.append(here)  # last: a file here never stands in for an installed package
    importlib.invalidate_caches()


def check_not_hidden(file: Path, module: str) -> None:
    """Raise `ConfigError` if `module` is imported from elsewhere than below the current directory.

    A folder without `__init__.py` elsewhere hides nothing.
    """
    spec = find_spec(top := module.split(".")[0])
    if spec is None or (spec.origin is None and spec.submodule_search_locations):
        return
    here = Path.cwd().resolve()
    if not (spec.has_location and Path(str(spec.origin)).resolve().is_relative_to(here)):
        raise ConfigError(f"{file} is hidden by another module called {top!r}: rename what is here")


def _import_local(file: Path, module: str) -> ModuleType:
    find_modules_here()
    check_not_hidden(file, module)
    try:
        return importlib.import_module(module)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{file} cannot be imported: {why}") from error


def _not_importable(name: str, error: Exception) -> ResourceError:
    if isinstance(error, ModuleNotFoundError) and error.name:
        missing = error.name.split(".")[0]
        how = _INSTALL.get(missing, f"pip install {missing}")
        return ResourceError(f"{name} needs the package {missing}, which is not installed: {how}")
    return ResourceError(f"{name} cannot be imported: {type(error).__name__}: {error}")


def _nearest(owner: Any, attribute: str) -> str:
    known = {*getattr(owner, "__all__", dir(owner))}
    known |= {each.name for each in pkgutil.iter_modules(getattr(owner, "__path__", []))}
    near = did_you_mean(attribute, [each for each in known if each[0] != "_"])
    home = f"{getattr(owner, '__name__', '')}."
    ours = sorted(each for each in known if home in _OUR_PACKAGES and _is_ours(home + each))
    return near or (f"; there are {', '.join(ours)}" if 0 < len(ours) < 10 else "")


def _foreign(found: Any) -> str | None:
    """Return why an object does not come from an allowed place; None if it does."""
    while isinstance(found, functools.partial):
        found = found.func
    home = getattr(found, "__module__", None)
    if not isinstance(home, str):
        return "does not say which module it comes from"
    if home.startswith(_OUR_PACKAGES) or refusal(f"{home}.x") is None:
        local = local_file(f"{home}.x")
        file = getattr(sys.modules.get(home), "__file__", None)
        if local is None or (file and Path(file).resolve() == local[0]):
            return None
    return f"comes from {home}; --allow-component {home} lets it in"


def instantiate(node: Any, *args: Any, **kwargs: Any) -> Any:
    """Build a component: call it with `args`, the node's own arguments, and `kwargs`, which win.

    Components inside the arguments are built first. None gives None, a list a list of objects.
    Raises `ConfigError` for arguments that it does not take, and what `find_component` raises.
    """
    if node is None:
        return None
    if isinstance(node, Sequence) and not isinstance(node, str):
        return [instantiate(each, *args, **kwargs) for each in node]
    if not isinstance(node, Mapping) or not isinstance(node.get(KEY), str):
        raise ConfigError(f"a component is a mapping with {KEY}, not {node!r}")
    name = our_name(node[KEY])
    target = find_component(name)
    arguments = {key: _build(value) for key, value in node.items() if key != KEY} | kwargs
    try:
        signature = inspect.signature(target)
        signature.bind(*args, **arguments)
        for key in arguments.keys() & signature.parameters.keys():
            arguments[key] = _as_floats(arguments[key], signature.parameters[key].default)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}") from None
    except ValueError:
        pass  # a function without a signature
    try:
        return target(*args, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        # Of another library: a value that it does not take.
        if name.startswith("mytune."):
            raise
        given = ", ".join(f"{key}={value!r}" for key, value in node.items() if key != KEY)
        raise ConfigError(f"{name}({given}): {error}{_line_of(name, error)}") from error


def _line_of(name: str, error: Exception) -> str:
    """Return the line of a local component's file that raised, or led to what did."""
    file = str((local_file(name) or [""])[0])
    frames = traceback.extract_tb(error.__traceback__)
    lines = [each.lineno for each in frames if each.filename == file]
    return f" ({file}:{lines[-1]})" if lines else ""


def _as_floats(value: Any, default: Any) -> Any:
    """Return a list of numbers as floats where these are by default: AdamW wants them so."""
    wanted = isinstance(default, tuple) and {type(each) for each in default} == {float}
    numbers = isinstance(value, list) and all(type(each) in (int, float) for each in value)
    return [float(each) for each in value] if wanted and numbers else value


def _build(value: Any) -> Any:
    if isinstance(value, Mapping):
        return instantiate(value) if KEY in value else {k: _build(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_build(each) for each in value]
    return value

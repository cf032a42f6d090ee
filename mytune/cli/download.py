"""`tune download`: a model from the Hugging Face Hub, or one in the package, into a folder."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import TypeAlias

from mytune.cli import registry
from mytune.cli.parser import Parser
from mytune.errors import (
    CheckpointError,
    ConfigError,
    ResourceError,
    TuneError,
    did_you_mean,
    first_line,
)

# The same weights once more, where there are safetensors.
_DUPLICATES = ["*.pth", "*.pt", "*.bin", "*.h5", "*.msgpack", "*consolidated*"]
_Sizes: TypeAlias = dict[str, int | None]  # bytes of each file, None where the hub does not say
_TOKENIZERS = ("original/tokenizer.model", "tokenizer.model", "tokenizer.json")
_LOGIN = "pass --hf-token, set HF_TOKEN, or log in with `hf auth login`"
_AGAIN = "the same command goes on where this one ended"


def parser() -> Parser:
    parser = Parser(
        "download",
        description=f"Fetch a model from the Hugging Face Hub. After an interruption {_AGAIN}.",
        epilog="`mytune/tiny` is the model in the package: it is copied, without a network.",
    )
    parser.may_be_empty = ["--ignore-patterns"]
    add = parser.add_argument
    add("repo_id", metavar="REPO", help="for example meta-llama/Meta-Llama-3-8B-Instruct")
    add("--output-dir", type=Path, metavar="DIR", help="default: /tmp/NAME, as in the configs")
    add("--hf-token", metavar="TOKEN", help="or - for stdin; default: HF_TOKEN, the stored login")
    add(
        "--ignore-patterns",
        action="append",
        metavar="GLOBS",
        help='files to leave out, separated by commas; "" takes all;'
        " default: other formats of weights that are also there as safetensors",
    )
    add("--source", default="huggingface", choices=("huggingface", "kaggle"), help="huggingface")
    add("--output-dir-use-symlinks", metavar="X", help="accepted, and not needed any more")
    return parser


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.source == "kaggle":
        raise ConfigError("--source kaggle is not supported: models come from the Hugging Face Hub")
    if args.output_dir_use_symlinks:
        print("notice: --output-dir-use-symlinks is ignored: there are no links", file=sys.stderr)
    owner, _, name = args.repo_id.rpartition("/")
    folder = (args.output_dir or Path("/tmp") / name).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output-dir {folder} is a file")
    if not owner and name in _embedded():
        raise ConfigError(f"{name} is in the package: `tune download mytune/{name}`")
    if owner == "mytune":
        _copy_embedded(name, folder)
    else:
        _download(args, folder)
    print(f"\nThe model is in {folder}. What to run next:\n  {_next_command(name, folder)}")
    return 0


def _embedded() -> list[str]:
    from mytune.assets import ASSETS

    return sorted(file.parent.name for file in ASSETS.glob("*/config.json"))


def _copy_embedded(name: str, folder: Path) -> None:
    from mytune.assets import ASSETS

    models = _embedded()
    if name not in models:
        near = did_you_mean(name, models)
        raise ConfigError(f"the package has no model 'mytune/{name}', only {models}{near}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in (ASSETS / name).iterdir():
            shutil.copy(file, folder)
    except OSError as error:
        raise ResourceError(f"cannot write in {folder}: {error.strerror}") from error


def _download(args: argparse.Namespace, folder: Path) -> None:
    if args.hf_token:
        if args.hf_token == "-" and sys.stdin is None:
            raise ConfigError("--hf-token -: the token is read from stdin, which is closed")
        token = sys.stdin.readline().strip() if args.hf_token == "-" else args.hf_token
        os.environ["HF_TOKEN"] = token  # where the library looks, and what messages are cleared of
    os.environ.setdefault("HF_XET_CACHE", str(folder.resolve() / ".cache" / "xet"))
    from huggingface_hub import HfApi, snapshot_download

    with _explained(args.repo_id):
        info = HfApi().model_info(args.repo_id, files_metadata=True)
        wanted = _wanted({f.rfilename: f.size for f in info.siblings or []}, args.ignore_patterns)
        _check_space(wanted, folder)
        for name in _missing(wanted, folder):  # the library believes in a file that is there
            (folder / name).unlink(missing_ok=True)
        names = [escape(name) for name in wanted]
        snapshot_download(args.repo_id, revision=info.sha, local_dir=folder, allow_patterns=names)
        if missing := _missing(wanted, folder):  # and, without network, in a folder
            raise ResourceError(f"the download is not complete; {_AGAIN}", missing)
        (folder / "original_repo_id.json").write_text(json.dumps({"repo_id": args.repo_id}))


def _wanted(sizes: _Sizes, ignore: list[str] | None) -> _Sizes:
    """Return the files to take, and print which are left out."""
    if bad := [name for name in sizes if name.startswith("/") or ".." in name.split("/")]:
        raise CheckpointError("the repository has files that would lie outside the folder", bad)
    patterns = [each.strip() for each in ",".join(ignore or []).split(",")]
    why = ""
    if ignore is None and any(re.search(r"^(?!.*consolidated).*\.safetensors$", n) for n in sizes):
        patterns, why = _DUPLICATES, ' (--ignore-patterns "" takes all)'
    skipped = [name for name in sizes if any(fnmatchcase(name, each) for each in patterns)]
    wanted = {name: size for name, size in sizes.items() if name not in skipped}
    if skipped:
        print(f"Leaving out {', '.join(skipped)}{why}")
    print(f"{len(wanted)} files, {_gib(_bytes(wanted, wanted))}")
    return wanted


def _check_space(wanted: _Sizes, folder: Path) -> None:
    """Raise a ResourceError if what is still to come does not fit on the disk."""
    to_come = _bytes(wanted, _missing(wanted, folder))
    disk = next(each for each in (folder.resolve(), *folder.resolve().parents) if each.is_dir())
    free = shutil.disk_usage(disk).free
    if to_come > free:
        raise ResourceError(
            f"{_gib(to_come)} are to come and {folder} has {_gib(free)} free:"
            " choose another --output-dir, or leave files out with --ignore-patterns"
        )


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turn what the hub, the network and the disk say into one line for the user."""
    from huggingface_hub import errors, get_token

    token = bool(get_token())
    try:
        yield
    except TuneError:
        raise
    except errors.GatedRepoError:
        then = "your token's account has no access yet" if token else f"then {_LOGIN}"
        ask = f"ask for access at https://huggingface.co/{repo_id}"
        raise ConfigError(f"{repo_id} is gated: {ask}; {then}") from None
    except errors.RepositoryNotFoundError:
        how = "your token needs access to it" if token else _LOGIN
        known = f"there is no model {repo_id!r} on the Hugging Face Hub"
        raise ConfigError(f"{known}; if it is private, {how}") from None
    except errors.HFValidationError as error:
        raise ConfigError(f"{repo_id!r} is not the name of a repository: {error}") from None
    except errors.OfflineModeIsEnabled:
        raise ResourceError("HF_HUB_OFFLINE is set: unset it to download") from None
    except Exception as error:
        raise _failure(repo_id, error) from error


def _failure(repo_id: str, error: Exception) -> TuneError:
    """Return the error for what is not one of the hub's own."""
    text = first_line(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    number = getattr(error, "errno", None)
    if status in (401, 403):
        return ConfigError(f"the Hugging Face Hub refuses your token ({status}); {_LOGIN}")
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
        return ResourceError(f"the disk is full: make room, {_AGAIN}")
    if isinstance(error, OSError) and error.filename:
        return ResourceError(f"{error.strerror}: {error.filename}")
    return ResourceError(f"{repo_id} could not be downloaded: {text}; with a network {_AGAIN}")


def _next_command(name: str, folder: Path) -> str:
    """Return a `tune run` line for the model, with a config that names it if there is one."""
    mention = re.compile(rf"(?:/|asset:){re.escape(name)}(?![\w.-])")
    found = [c for c in registry.configs() if mention.search(registry.config_path(c).read_text())]
    config = next((c for c in found if c.endswith("lora_single_device")), "<one of `tune ls`>")
    tokenizer = next((each for each in _TOKENIZERS if (folder / each).is_file()), _TOKENIZERS[-1])
    return (
        f"tune run lora_finetune_single_device --config {config}"
        f" checkpointer.checkpoint_dir={folder} tokenizer.path={folder / tokenizer}"
    )


def _missing(wanted: _Sizes, folder: Path) -> list[str]:
    """Return the files that are not there in their full size."""
    files = {name: folder / name for name in wanted}
    there = {name: file.stat().st_size for name, file in files.items() if file.is_file()}
    return [n for n in wanted if n not in there or wanted[n] not in (None, there[n])]


def _bytes(sizes: _Sizes, names: Iterable[str]) -> int:
    return sum(sizes[name] or 0 for name in names)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"

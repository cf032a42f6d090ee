"""Dependencies point one way, and installing keeps recipes, configs and the embedded model."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BESIDE = {"errors", "_interrupts", "_lazy", "_sharded", "_triton"}  # files, for all packages
# What each package may import of mytune, besides itself and those.
ALLOWED = {
    "config": {"assets"},
    "cli": {"config", "assets"},
    "tokenizers": {"config"},
    "quantization": set(),
    "modules": {"quantization"},
    "models": {"modules", "quantization", "tokenizers"},
    "datasets": {"tokenizers"},
    "generation": {"modules", "quantization", "tokenizers"},
    "evaluation": {"modules", "quantization", "tokenizers", "generation", "training"},
    "training": {"modules", "models", "quantization", "config", "tokenizers"},
    "assets": {"tokenizers"},
}


def imports(file):
    """Yield the names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("package", ALLOWED)
def test_dependencies_point_one_way(package):
    for file in (ROOT / "mytune" / package).rglob("*.py"):
        used = {n.split(".")[1] for n in imports(file) if n.startswith("mytune.")}
        wrong = used - ALLOWED[package] - {package} - BESIDE
        assert not wrong, f"{file.relative_to(ROOT)} imports mytune.{', mytune.'.join(wrong)}"


def test_every_package_has_its_rule():
    packages = {p.parent.name for p in (ROOT / "mytune").glob("*/__init__.py")}
    assert packages == set(ALLOWED)


def test_the_library_never_imports_recipes():
    for file in (ROOT / "mytune").rglob("*.py"):
        assert not [name for name in imports(file) if name.split(".")[0] == "recipes"], file


def test_recipes_import_public_names_only():
    for file in (ROOT / "recipes").glob("*.py"):
        ours = [name for name in imports(file) if name.split(".")[0] == "mytune"]
        assert all(len(name.split(".")) <= 2 for name in ours), file


def build(kind, folder):
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "-o", folder, ROOT],
        check=True,
        capture_output=True,
    )
    return next(Path(folder).iterdir())


def test_a_wheel_runs_from_the_root_folder(tmp_path):
    wheel = build("wheel", tmp_path / "dist")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    for arguments in (["ls"], ["cat", "llama3/8B_lora_single_device"], ["--version"]):
        command = [sys.executable, "-P", "-m", "mytune", *arguments]
        done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    where = "import mytune.cli.registry as r; print(r.ROOT)"
    command = [sys.executable, "-P", "-c", where]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "site" / "mytune")
    assert (tmp_path / "site/mytune/assets/tiny/model.safetensors").is_file()
    assert (tmp_path / "site/mytune/recipes/finetune.py").is_file()
    assert wheel.stat().st_size < 4e6


def test_a_source_archive_holds_all_that_a_wheel_needs(tmp_path):
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"recipes/finetune.py", "configs/tiny/lora_single_device.yaml", "pyproject.toml"}
    assert wanted | {"mytune/assets/tiny/tokenizer.model", "README.md", "LICENSE"} <= names

"""The pages say what is so: links, commands, configs, snippets, tables, the map of the tree."""

from __future__ import annotations

import json
import re
import sys
from fnmatch import fnmatch
from itertools import takewhile
from pathlib import Path

import pytest

from mytune import errors
from mytune.cli import registry
from mytune.cli.main import VERBS
from mytune.config import components
from mytune.config.torchtune import NAMES, RETIRED
from tests.docs.commands import Checker, typed, wrong_settings
from tests.docs.pages import PAGES, ROOT, Block, Page, load
from tests.docs.running import Runner, dialogues

FIRST_RUN = "docs/first_run.md"
ALL = [Page(path) for path in PAGES]
each_page = pytest.mark.parametrize("page", ALL, ids=str)


def runs(page: Page) -> bool:
    """Say whether something on a page is run."""
    run = [b for b in page.blocks if b.language in ("console", "python") or "run" in b.notes]
    return bool(run) or str(page) == FIRST_RUN


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder; what a page imports or allows ends with the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(components, "_allowed_by_user", set())
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]


def write_files(page: Page) -> set[str]:
    """Write the files of a page into the current folder; return their names."""
    named = [(block.note("file:"), block.text) for block in page.blocks]
    for name, text in named:
        if name:
            Path(name).write_text(text)
    return {name for name, _ in named if name}


@each_page
def test_links_lead_somewhere(page):
    broken = []
    for line, target in page.links:
        file, _, anchor = target.partition("#")
        path = (page.path.parent / file).resolve() if file else page.path
        if "://" in target:
            continue
        if not path.exists() or not path.is_relative_to(ROOT):
            broken.append(f"{page}:{line}: {target}")
        elif anchor and anchor not in Page(path).anchors:
            broken.append(f"{page}:{line}: {target}: no such heading")
    assert broken == []


@each_page
def test_a_file_of_a_page_is_named_to_its_reader(page):
    shown = "\n".join(line for _, line in page.prose if not line.startswith("<!--"))
    shown += "".join(block.text for block in page.blocks)
    for name in filter(None, (block.note("file:") for block in page.blocks)):
        assert name in shown, f"{page}: {name}"


@each_page
def test_commands_exist_and_settings_fit(page, folder):
    checker = Checker(write_files(page))
    wrong = []
    for block in page.blocks:
        if block.language == "bash":
            commands = list(typed(block.text))
            wrong += [
                f"{page}:{block.line}: {c}: {p}" for c in commands for p in checker.problems(c)
            ]
    assert wrong == []


@pytest.mark.parametrize(
    "command",
    [
        "tune rnu",
        "tune ls no_such_recipe",
        "tune cp no_such_config x.yaml",
        "tune cat tiny/no_such_config",
        "tune validate tiny/lora_single_device optimiser.lr=1",
        "tune validate tiny/lora_single_device model.lora_rnak=4",
        "X=1 tune run no_such_recipe --config tiny/lora_single_device | head",
        "until true; do tune run generate --config tiny/generation promt=x; done",
        "tune run generate \\\n  --config no_such_config",
        "tune run --nproc_per_node 2 lora_finetune_distributed --config llama3/8B_lora lr=1",
        "tune run lora_finetune_single_device --config tiny/lora_single_device --epochs 2",
        "tune run lora_finetune_single_device --config no_such_file.yaml",
        "tune download --output DIR REPO",
        "make demos",
        "pip install -e '.[plt]'",
    ],
)
def test_a_wrong_command_is_noticed(command, folder):
    checker = Checker(set())
    assert [p for words in typed(command) for p in checker.problems(words)]


@each_page
def test_yaml_is_a_part_of_a_config(page, folder):
    recipes = dict.fromkeys(recipe.file for recipe in registry.RECIPES.values())
    for block in page.blocks:
        if block.language != "yaml" or block.note("file:"):
            continue
        Path("part.yaml").write_text(block.text)
        problems = [
            [p for p in wrong_settings(recipe, Path("part.yaml"), []) if "is missing" not in p]
            for recipe in recipes
        ]
        assert [] in problems, f"{page}:{block.line}: {min(problems, key=len)}"


@each_page
def test_snippets_compile(page):
    for block in page.blocks:
        if block.language == "python":
            compile(block.text, f"{page}:{block.line}", "exec")


@pytest.mark.parametrize("page", [page for page in ALL if runs(page)], ids=str)
def test_what_a_page_shows_happens(page, folder, capfd):
    Runner(page, capfd, everything=str(page) == FIRST_RUN).run()


@pytest.mark.parametrize("name", registry.configs())
def test_commands_above_a_config_fit(name):
    """The comment at the head of a config says how to run it."""
    head = takewhile(lambda line: line.startswith("#"), registry.config_path(name).open())
    text = "".join(line.removeprefix("#") for line in head)
    at = text.find("  tune ")
    assert at >= 0, "it does not say how to run it"
    assert problems_of_lines(text[at:]) == []


@pytest.mark.parametrize("file", sorted({r.file for r in registry.RECIPES.values()}), ids=str)
def test_commands_of_a_recipes_docstring_fit(file):
    text = file.read_text().split('"""')[1]
    assert re.search(r"\n    tune (run|chat) ", text)
    assert problems_of_lines(text) == []


def problems_of_lines(text: str) -> list[str]:
    """Return what is wrong with the lines of a text that are commands: `    tune ...`."""
    joined = text.replace("\\\n", " ")
    lines = [line.strip() for line in joined.splitlines() if re.match(r"\s{2,}tune ", line)]
    checker = Checker(set())
    return [f"{line}: {p}" for line in lines for c in typed(line) for p in checker.problems(c)]


def test_every_verb_is_shown():
    shown = {c[1] for page in ALL for c in commands(page) if c[0] == "tune" and len(c) > 1}
    assert shown >= VERBS.keys() - {"completion"}


def commands(page: Page) -> list[list[str]]:
    """Return the commands of a page's `bash` and `console` blocks."""
    found = [c for block in page.blocks if block.language == "bash" for c in typed(block.text)]
    return found + [
        words
        for block in page.blocks
        if block.language == "console"
        for words, _ in dialogues(block)
    ]


def test_the_table_of_exit_codes_is_complete():
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, Exception)]
    codes = {str(kind.exit_code): kind.__name__ for kind in kinds if kind is not errors.TuneError}
    rows = {row[0]: row[1:] for row in load("docs/errors.md").table("code")}
    assert rows.keys() == codes.keys() | {"0", "70", "128+n"}
    for code, kind in codes.items():
        assert kind in rows[code][0]


def test_the_table_of_torchtunes_names_is_the_codes():
    rows = load("docs/from_torchtune.md").table("torchtune")
    assert {row[0].strip("`"): row[1].strip("`") for row in rows} == NAMES


def test_the_table_of_ignored_keys_is_the_codes():
    def told(values):
        words = [json.dumps(value).strip('"') for value in values or ()]
        return ", ".join(f"`{word}`" for word in words) or "any value"

    rows = load("docs/from_torchtune.md").table("key")
    expected = {f"`{k}`": [told(r.harmless), r.why] for k, r in RETIRED.items()}
    assert {row[0]: row[1:] for row in rows} == expected


# The map for contributors: below these folders every file and folder has its line.
MAPPED = (".", "recipes", "configs", "mytune", "tests")


def test_the_map_of_the_tree_is_complete():
    block = next(b for b in load("docs/contributing.md").blocks if b.text.startswith("Makefile"))
    shown = mapped(block)
    missing = [name for folder in MAPPED for name in present(folder) if name not in shown]
    assert missing == [], "the map lacks these"
    gone = [name for name in shown if not (ROOT / name).exists()]
    assert gone == [], "the map has these, which are not there"


def mapped(block: Block) -> dict[str, str]:
    """Return the map's paths, each with its line of explanation."""
    folder, found = "", {}
    for line in block.lines:
        name, about = re.match(r" *(\S+) +(.*)", line).groups()
        folder = folder if line.startswith("  ") else name
        assert about, f"{name} has no explanation"
        found[(folder + name if line.startswith("  ") else name).rstrip("/")] = about
    return found


def present(folder: str) -> list[str]:
    """Return the files and folders in a folder that git does not leave out."""
    left_out = [each.strip("/") for each in (ROOT / ".gitignore").read_text().split()]
    names = [path.name for path in (ROOT / folder).iterdir() if path.name != ".git"]
    kept = [name for name in names if not any(fnmatch(name, each) for each in left_out)]
    return [name if folder == "." else f"{folder}/{name}" for name in kept]


def test_the_index_names_every_page():
    index = {target for _, target in load("docs/README.md").links}
    pages = {str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md")}
    assert pages - index == {"README.md"}


def test_the_comparison_counts_right():
    rows = {row[0]: row[2] for row in load("README.md").table("")}
    files = {recipe.file for recipe in registry.RECIPES.values()}
    assert rows["configs"] == str(len(registry.configs()))
    assert rows["recipes"].startswith(f"{len(registry.RECIPES)} names, {len(files)} files:")


def test_pages_name_no_folder_of_the_author():
    for page in ALL:
        found = [
            line for line in page.lines if re.search(r"(?<![\w.])/(home|root|work|Users)/", line)
        ]
        assert found == [], page

"""Markdown pages taken apart: fenced blocks with the comments above them, links, headings, tables.

docs/contributing.md, "These pages", says what the comments mean.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md")])

_COMMENT = re.compile(r"<!-- (.*?) -->")
_FENCE = re.compile(r"```(\w*)")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass
class Block:
    """A fenced block, the number of its first line, and the comments right above it."""

    language: str
    line: int
    notes: list[str]
    lines: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    def note(self, start: str) -> str | None:
        """Return what follows `start` in one of the comments; None if there is no such comment."""
        found = [note.removeprefix(start) for note in self.notes if note.startswith(start)]
        return found[0].strip() if found else None


class Page:
    """A page; `str()` is its name from the root of the repository."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = path.read_text(encoding="utf-8").splitlines()

    def __str__(self) -> str:
        return str(self.path.relative_to(ROOT))

    @cached_property
    def blocks(self) -> list[Block]:
        return self._parsed[0]

    @cached_property
    def prose(self) -> list[tuple[int, str]]:
        """The numbered lines outside of blocks."""
        return self._parsed[1]

    @cached_property
    def _parsed(self) -> tuple[list[Block], list[tuple[int, str]]]:
        blocks: list[Block] = []
        prose: list[tuple[int, str]] = []
        notes: list[str] = []
        block = None
        for number, line in enumerate(self.lines, start=1):
            fence = _FENCE.match(line)
            if block and line == "```":
                block = None
            elif block:
                block.lines.append(line)
            elif fence:
                block = Block(fence[1], number, notes)
                blocks.append(block)
                notes = []
            else:
                comment = _COMMENT.fullmatch(line)
                notes = [*notes, comment[1]] if comment else []
                prose.append((number, line))
        assert block is None, f"{self}: a block is not closed"
        return blocks, prose

    @cached_property
    def links(self) -> list[tuple[int, str]]:
        return [(number, target) for number, line in self.prose for target in _LINK.findall(line)]

    @cached_property
    def anchors(self) -> set[str]:
        """What `#...` may name: the headings, as GitHub makes them into ids."""
        titles = [line.lstrip("#").strip() for _, line in self.prose if line.startswith("#")]
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

    def table(self, first_column: str) -> list[list[str]]:
        """Return the rows of the tables whose first column has this title."""
        rows: list[list[str]] = []
        inside = False
        for _, line in self.prose:
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if inside and cells:
                rows.append(cells)
            inside = bool(cells) and (inside or cells[0] == first_column)
        return [row for row in rows if set(row[0]) != {"-"}]


def load(name: str) -> Page:
    """Return a page by its name from the root of the repository."""
    return Page(ROOT / name)

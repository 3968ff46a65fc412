"""The commands and the Python that documents show, and what is said of those that no test runs as they stand.

A comment at the end of the paragraph before a block, which readers do not see, says why its code is not run,
`<!-- not run: REASON -->`, or that the block is what a program prints, `<!-- output: OF WHAT -->`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\S*)\n(?P<text>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE)
_MARK = re.compile(r"<!-- (?P<kind>not run|output): (?P<reason>[^>]+?) -->\s*\Z")
_CONTINUED = re.compile(r"\\\n\s*")
Kind = Literal["command", "python", "not run", "output"]


@dataclass(frozen=True)
class Block:
    """A block of code: where it begins, and whether it is run."""

    document: Path
    line: int
    language: str
    text: str
    kind: Kind
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command, without comments; those joined by `&&` apart, programs by their own names."""
        found: list[list[str]] = []
        for line in _CONTINUED.sub(" ", self.text).splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                found.append([Path(words[0]).name, *words[1:end]])
                words = words[end + 1 :]
        return found


def blocks_of(document: Path) -> list[Block]:
    return list(_blocks(document))


def _blocks(document: Path) -> Iterator[Block]:
    text = document.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        mark = _MARK.search(text[: found.start()])
        kind: Kind = "python" if found["language"] == "python" else "command"
        reason = ""
        if mark is not None:
            kind, reason = ("output" if mark["kind"] == "output" else "not run"), mark["reason"]
        line = text[: found.start()].count("\n") + 1
        yield Block(document, line, found["language"], dedent(found["text"]), kind, reason)


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]


def quantload_arguments(words: list[str]) -> list[str] | None:
    """What a command gives to `quantload`, also where torchrun starts it; None for other programs."""
    if words[0] == "quantload":
        return words[1:]
    if words[0] == "torchrun":
        return words[words.index("quantload") + 1 :]
    return None

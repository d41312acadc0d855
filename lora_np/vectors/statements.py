"""The statements of the specification, by id, from spec/statements.md: what the cases and the pages are of."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple


class Statement(NamedTuple):
    """A part of the specification, or a statement: its title, and what it says, in Markdown with LaTeX in dollars.

    notes: what is said beside it, likewise, by its title.
    """

    title: str
    text: str
    notes: Mapping[str, str] = MappingProxyType({})

    @property
    def digest(self) -> str:
        """SHA-256 of the text and of the notes', one after another."""
        return hashlib.sha256("\n".join([self.text, *self.notes.values()]).encode()).hexdigest()


def _read(path: Path) -> dict[str, Statement]:
    """What stands under each heading "# L: title" or "## L1: title", by letter or id."""
    _, *rest = re.split(r"^##? (\w+): (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {
        name: Statement(title, *_with_notes(text))
        for name, title, text in zip(rest[::3], rest[1::3], rest[2::3], strict=True)
    }


def _with_notes(text: str) -> tuple[str, Mapping[str, str]]:
    """A statement's own text, and what stands under each heading "### title"."""
    own, *rest = re.split(r"^### (.+)$", text, flags=re.MULTILINE)
    return own.strip(), {title: note.strip() for title, note in zip(rest[::2], rest[1::2], strict=True)}


_ALL = _read(Path(__file__).parents[1] / "spec" / "statements.md")

PARTS: Mapping[str, Statement] = MappingProxyType({name: s for name, s in _ALL.items() if name.isalpha()})
STATEMENTS: Mapping[str, Statement] = MappingProxyType({name: s for name, s in _ALL.items() if not name.isalpha()})

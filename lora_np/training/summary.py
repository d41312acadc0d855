"""What was read of a file of examples, in one line; and in it what looks wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..batch import IGNORED
from ..formats.files.messages import shown
from .examples import Example

NAMES = {
    "conversations": "conversations", "pairs": "prompts with completions", "instructions": "instructions",
    "translations": "texts with translations", "texts": "texts", "labelled": "texts with labels",
    "tagged": "sentences with tags",
}  # fmt: skip
FEW = 5  # names in a line


@dataclass
class Summary:
    """Counts of a file's examples.

    kind       what its records are called, or "text" for a plain text
    longest    tokens of an example at most
    examples   that are trained on, or scored; tokens: of all of them; scored: tokens that count in the loss, or labels
    cut        those longer than `longest`: their ends, with the end tokens, are left out
    cut_sources  those whose source, which an encoder reads, is longer than `longest`
    left_out   of which nothing is scored within `longest`: their prompts fill it, or they are empty
    empty      completions without a character
    endless    conversations whose last answer does not end with a special token, at which generate --chat stops
    unscored   answers that the chat template writes otherwise once others follow
    labels     how often each comes
    same       whether all targets are equal
    """

    path: Path
    kind: str
    longest: int
    examples: int = 0
    tokens: int = 0
    scored: int = 0
    cut: int = 0
    cut_sources: int = 0
    left_out: int = 0
    empty: int = 0
    endless: int = 0
    unscored: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    same: bool = True
    _first: bytes | None = None

    def add(self, example: Example) -> None:
        """Counts an example."""
        targets = example.targets[example.targets != IGNORED]
        self.examples += 1
        self.tokens += example.length
        self.scored += targets.size
        self._first = targets.tobytes() if self._first is None else self._first
        self.same = self.same and targets.tobytes() == self._first

    def line(self) -> str:
        """All of it, in one line."""
        counts = f"{self.tokens:,} tokens"
        if self.kind == "text":
            return f"{shown(str(self.path))}: plain text, {counts}"
        counts = f"{self.examples:,} {NAMES[self.kind]}, {counts}"
        if not self.labels:
            counts += f", {self.scored / max(1, self.tokens):.0%} scored".replace("%", " %")
        else:
            counts += f", {len(self.labels)} labels"
        return "; ".join([f"{shown(str(self.path))}: {counts}", *self.remarks()])

    def remarks(self) -> list[str]:
        """What was left out or cut, and what looks wrong."""
        once = [label for label in sorted(self.labels) if self.labels[label] == 1]
        few = ", ".join(map(shown, once[:FEW])) + (f" and {len(once) - FEW} more" if len(once) > FEW else "")
        found = [
            (self.cut, f"{self.cut:,} longer than {self.longest} cut, their end tokens with them"),
            (self.cut_sources, f"{self.cut_sources:,} with a source longer than {self.longest}, cut"),
            (self.left_out, f"{self.left_out:,} left out: nothing to score in the first {self.longest} tokens"),
            (self.empty, f"{self.empty:,} with an empty completion"),
            (self.unscored, f"{self.unscored:,} answers not scored: the template writes them otherwise in the past"),
            (self.endless, f"{self.endless:,} do not end with a token at which generate --chat stops"),
            (self.same and self.examples > 1, "all targets are equal"),
            (once, f"{'a label occurs' if len(once) == 1 else 'labels occur'} once: {few}"),
        ]
        return [text for there, text in found if there]

    def none_left(self) -> str:
        """Why there may be no example, for an error; nothing if there is no reason."""
        return f": {'; '.join(self.remarks())}" if self.left_out else ""

    def as_json(self) -> dict[str, Any]:
        """The counts, and the remarks, for --json."""
        names = (
            "kind", "examples", "tokens", "scored", "cut", "cut_sources", "left_out", "empty", "endless", "unscored"
        )  # fmt: skip
        found = {name: getattr(self, name) for name in names}
        return {"path": str(self.path), **found, "labels": dict(sorted(self.labels.items())), "remarks": self.remarks()}

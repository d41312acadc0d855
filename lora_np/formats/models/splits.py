r"""Expressions by which a tokenizer cuts or replaces a text: only such as surely end soon, on any text.

The tokenizers package gives them to Oniguruma, which tries every way to match and cannot be stopped. So what a file
brings is read here first. Of what has to be tried again when something after it fails, there may be few choices and one
repeat, of letters or of spaces but not of both, so that it ends with the word. GPT-2's rule is such, and those of its
successors.

Such a repeat takes the square of a word's length if it is tried from each of its characters, as [a-z]+! on a row of
letters is. Where an alternative behind it takes the whole row, as in \s+!|\s+, it is tried once: so it is in those
rules. Of the others it is said here which rows they are slow on.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

MAX_LENGTH, MAX_DEPTH, MAX_COUNT, MAX_WAYS = 10_000, 8, 100, 1000
SET = r"\[\^?\]?(?:\\.|\[(?:\\.|[^\[\]\\])*\]|[^\[\]\\])*\]"  # it may hold sets, which hold none
ESCAPE = r"\\(?:[pP]\{\^?\w+\}|x\{[0-9A-Fa-f]+\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|[dDhHsSwWntrfvae]|[^\w])"
PART = re.compile(
    rf"(?P<flags>\(\?[im-]+\))|(?P<look>\(\?<?[=!])|(?P<group>\((?:\?[im-]*:|(?!\?)))"
    rf"|(?P<edge>[\^$]|\\[bBAzZ])|(?P<one>{SET}|{ESCAPE}|[^\\\[(){{}}|?*+^$])",
    re.ASCII | re.DOTALL,
)
COUNT = re.compile(r"(?:([?*+])|\{(\d*)(,?)(\d*)\})([?+]?)", re.ASCII)
SPACES, OTHERS = " \n\u3000", 'b7_é中.-"'


class UnsafeError(ValueError):
    """An expression that might take too long, or that is not understood."""


class Item(NamedTuple):
    """A part of an expression and how often it comes. high None: without end; inner: a group's alternatives.

    more: "?" if it comes as seldom as may be, "+" if it is not taken back.
    """

    kind: str
    text: str
    inner: list[list[Item]]
    low: int
    high: int | None
    more: str = ""


class Tries(NamedTuple):
    """In how many ways an alternative is tried at one place, and what is taken back: so often in one way, and which."""

    ways: int
    repeats: int
    items: list[Item]


BEFORE_NO_OTHER = Item("look", "(?!", [[Item("one", r"\S", [], 1, 1)]], 1, 1)


def check_split(text: str, tokenizers: Any) -> tuple[bool, list[tuple[str, int]]]:
    """Whether the expression may fit an empty text; and the rows of characters that take it the square of their length.

    These are expressions too, each with in how many ways it is tried. An UnsafeError if it might take too long.
    """
    if len(text) > MAX_LENGTH:
        raise UnsafeError(f"expected at most {MAX_LENGTH} characters, got {len(text)}")
    alternatives, end = _read(text, 0, 0)
    if end < len(text):
        raise UnsafeError(f"not understood at character {end}")
    tried = _tries(alternatives, False, tokenizers)
    if sum(one.ways for one in tried) > MAX_WAYS or any(one.repeats > 1 for one in tried):
        raise UnsafeError("too many ways to match")
    rows = [
        ("|".join(part.text for part in item.inner[0]) if item.inner else item.text, one.ways)
        for n, one in enumerate(tried)
        for item in one.items
        if not _is_taken(item, alternatives[n:])
    ]
    return _may_be_empty(alternatives), rows


def _read(text: str, at: int, depth: int) -> tuple[list[list[Item]], int]:
    """The alternatives that begin at a character, and where they end: at a bracket, or at what is not understood."""
    alternatives: list[list[Item]] = [[]]
    while depth < MAX_DEPTH:
        if text.startswith("|", at):
            alternatives.append([])
            at += 1
            continue
        part = PART.match(text, at)
        if part is None or (part.lastgroup == "flags" and alternatives != [[]]):
            break
        kind, end = str(part.lastgroup), part.end()
        inner: list[list[Item]] = []
        if kind in ("look", "group"):
            inner, end = _read(text, end, depth + 1)
            if not text.startswith(")", end):
                raise UnsafeError(f"not understood at character {end}")
            end += 1
        low, high, more, at = _count(text, end) if kind in ("one", "group") else (int(kind != "flags"), 1, "", end)
        alternatives[-1].append(Item(kind, part[0], inner, low, high, more))
    return alternatives, at


def _count(text: str, at: int) -> tuple[int, int | None, str, int]:
    """How often what ends here comes, at least and at most, in which order, and where that is said to its end."""
    count = COUNT.match(text, at)
    if count is None:
        return 1, 1, "", at
    sign, first, comma, last, more = count.groups()
    if sign:
        return int(sign == "+"), 1 if sign == "?" else None, more, count.end()
    low, high = int(first or 0), int(last or MAX_COUNT) if comma else int(first or 0)
    if more or not first + last or not low <= high <= MAX_COUNT:  # {1,3}+ is a repeat of a repeat
        raise UnsafeError(f"a count that is not supported at character {at}")
    return low, None if comma and not last else high, "", count.end()


def _tries(alternatives: list[list[Item]], fails: bool, tokenizers: Any) -> list[Tries]:
    """How each alternative is tried. fails: whether what comes after may fail."""
    tried = []
    for items in alternatives:
        ways, repeats, back, after = 1, 0, [], fails
        for item in reversed(items):
            if item.inner:
                if item.high != 1 and not _is_fixed(item.inner):
                    raise UnsafeError("a repeat of a group that fits in several ways")
                inner = _tries(item.inner, after or item.kind == "look", tokenizers)
                ways, repeats = ways * sum(one.ways for one in inner), repeats + max(one.repeats for one in inner)
                back += [part for one in inner for part in one.items]
            if after and item.high is None:
                if _runs_on(item, tokenizers):
                    raise UnsafeError("a repeat of both letters and spaces, and behind it what may fail")
                repeats += 1
                back.append(item)
            elif after and item.high is not None:
                ways *= item.high - item.low + 1
            after = after or item.low > 0
        tried.append(Tries(ways, repeats, back))
    return tried


def _is_taken(item: Item, alternatives: list[list[Item]]) -> bool:
    """Whether a repeat in the first alternative meets a row only once: one from there on surely takes the whole row.

    Those between must repeat the same, as often as may be: where they fit, nothing is left for them to fit again.
    """
    first, *others = alternatives
    at = [n for n, other in enumerate(first) if other is item]  # nowhere if it is in a group, under the flags of that
    while at and not _takes_row(first, at[0]):
        if not others:
            return False
        first, *others = others
        at = [n for n, other in enumerate(first) if other.text == item.text and _is_greedy(other)]
    return bool(at)


def _is_greedy(item: Item) -> bool:
    """Whether it is a row of characters, as many as may be."""
    return item.kind == "one" and item.high is None and item.more != "?"


def _takes_row(items: list[Item], n: int) -> bool:
    """Whether an alternative surely fits where its repeat does, and takes the whole row, or all but one space."""
    item, before, behind = items[n], items[:n], items[n + 1 :]
    if not _is_greedy(item) or any(i.kind not in ("one", "flags") or i.low or i.high is None for i in before):
        return False
    return all(i.low == 0 for i in behind) or (item.text, item.more, behind) == (r"\s", "", [BEFORE_NO_OTHER])


def _is_fixed(alternatives: list[list[Item]]) -> bool:
    """Whether a group is a row of characters, always as many."""
    return len(alternatives) == 1 and all(i.kind == "one" and i.low == i.high for i in alternatives[0])


def _runs_on(item: Item, tokenizers: Any) -> bool:
    """Whether a repeat may go on from a word to spaces, or back."""
    if item.inner:
        return all(_runs_on(inner, tokenizers) for inner in item.inner[0])
    cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(item.text), "removed")
    return all(any(not cut.pre_tokenize_str(char) for char in chars) for chars in (SPACES, OTHERS))


def _may_be_empty(alternatives: list[list[Item]]) -> bool:
    return any(
        all(i.low == 0 or i.kind in ("edge", "look") or (i.kind == "group" and _may_be_empty(i.inner)) for i in items)
        for items in alternatives
    )

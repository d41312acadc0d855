"""Expressions by which a tokenizer cuts or replaces a text: only such as surely end soon, on any text.

The tokenizers package gives them to Oniguruma, which tries every way to match and cannot be stopped. So what a file
brings is read here first. Of what has to be tried again when something after it fails, there may be few choices and one
repeat, of letters or of spaces but not of both, so that it ends with the word. GPT-2's rule is such, and those of its
successors.
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
    """A part of an expression and how often it comes. high None: without end; inner: a group's alternatives."""

    kind: str
    text: str
    inner: list[list[Item]]
    low: int
    high: int | None


def check_split(text: str, tokenizers: Any) -> bool:
    """Whether the expression may fit an empty text. An UnsafeError if it might take too long."""
    if len(text) > MAX_LENGTH:
        raise UnsafeError(f"expected at most {MAX_LENGTH} characters, got {len(text)}")
    alternatives, end = _read(text, 0, 0)
    if end < len(text):
        raise UnsafeError(f"not understood at character {end}")
    ways, repeats = _tries(alternatives, False, tokenizers)
    if ways > MAX_WAYS or repeats > 1:
        raise UnsafeError("too many ways to match")
    return _may_be_empty(alternatives)


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
        low, high, at = _count(text, end) if kind in ("one", "group") else (int(kind != "flags"), 1, end)
        alternatives[-1].append(Item(kind, part[0], inner, low, high))
    return alternatives, at


def _count(text: str, at: int) -> tuple[int, int | None, int]:
    """How often what ends here comes, at least and at most, and where that is said to its end."""
    count = COUNT.match(text, at)
    if count is None:
        return 1, 1, at
    sign, first, comma, last, more = count.groups()
    if sign:
        return int(sign == "+"), 1 if sign == "?" else None, count.end()
    low, high = int(first or 0), int(last or MAX_COUNT) if comma else int(first or 0)
    if more or not first + last or not low <= high <= MAX_COUNT:  # {1,3}+ is a repeat of a repeat
        raise UnsafeError(f"a count that is not supported at character {at}")
    return low, None if comma and not last else high, count.end()


def _tries(alternatives: list[list[Item]], fails: bool, tokenizers: Any) -> tuple[int, int]:
    """In how many ways they are tried at one place, and how many repeats within one way are taken back step by step.

    fails: whether what comes after may fail.
    """
    all_ways, most_repeats = 0, 0
    for items in alternatives:
        ways, repeats, after = 1, 0, fails
        for item in reversed(items):
            if item.inner:
                if item.high != 1 and not _is_fixed(item.inner):
                    raise UnsafeError("a repeat of a group that fits in several ways")
                inner_ways, inner_repeats = _tries(item.inner, after or item.kind == "look", tokenizers)
                ways, repeats = ways * inner_ways, repeats + inner_repeats
            if after and item.high is None:
                if _runs_on(item, tokenizers):
                    raise UnsafeError("a repeat of both letters and spaces, and behind it what may fail")
                repeats += 1
            elif after and item.high is not None:
                ways *= item.high - item.low + 1
            after = after or item.low > 0
        all_ways, most_repeats = all_ways + ways, max(most_repeats, repeats)
    return all_ways, most_repeats


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

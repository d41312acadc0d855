"""Texts into examples: their tokens and what is scored; and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from ..backend import Array
from ..batch import IGNORED, BatchDict
from .records import Pair

POOL = 32  # batches whose examples are sorted by length together
Item = TypeVar("Item")


class Tokens(Protocol):
    """A tokenizer, as far as it is needed here."""

    @property
    def eos(self) -> int | None: ...
    def special(self) -> dict[str, str]: ...
    def whole(self) -> list[str]: ...
    def encode(self, text: str, *, special: bool = True) -> list[int]: ...
    def encode_words(self, words: Sequence[str]) -> tuple[list[int], list[int | None]]: ...
    def decode(self, ids: Iterable[int]) -> str: ...


class Example(NamedTuple):
    """A text's tokens (T,), and what they are scored against: (T,), or () for a classifier.

    source: what an encoder-decoder's encoder reads (S,); tokens are then its decoder's.
    """

    tokens: Array
    targets: Array
    source: Array | None = None

    @property
    def length(self) -> int:
        """Tokens, those of the source too."""
        return len(self.tokens) + (0 if self.source is None else len(self.source))


class Piece(NamedTuple):
    """A part of a text, and whether it is what is learned."""

    text: str
    scored: bool


# --- Texts into tokens -----------------------------------------------------------------------------------------------


def prompt_ids(tokenizer: Tokens, text: str) -> list[int]:
    """The ids of a text that goes on: what is trained, and what `generate` goes on from.

    The first token that the tokenizer puts before a text is there, once, also where the text has it already; the last
    one, which would end the text, is not.
    """
    ids, first = tokenizer.encode(text, special=False), first_ids(tokenizer)
    return ids if ids[: len(first)] == first else first + ids


def first_ids(tokenizer: Tokens) -> list[int]:
    """What the tokenizer puts before a text."""
    within, around = tokenizer.encode("a", special=False), tokenizer.encode("a")
    starts = (i for i in range(len(around)) if around[i : i + len(within)] == within)
    return around[: next(starts, 0)]


def joined(tokenizer: Tokens, pieces: Sequence[Piece], most: int) -> tuple[list[int], list[bool]]:
    """The ids of pieces of a text one behind the other, and which of them are scored; at least `most`, if there are.

    An id belongs to one piece: where a token would reach over the end of a prompt, generate could never write it, as
    the prompt is encoded alone. So a piece gets the ids that it has in the whole text where those before it stay what
    they are, and else those that it has behind a line end: alone, a tokenizer as Llama's would put a space before it.
    """
    ids: list[int] = []
    scored: list[bool] = []
    before = ""
    for piece in pieces:
        if len(ids) >= most:
            break
        new = _behind(tokenizer, before, ids, piece.text)
        ids, scored, before = ids + new, scored + [piece.scored] * len(new), before + piece.text
    return ids, scored


def _behind(tokenizer: Tokens, before: str, ids: list[int], text: str) -> list[int]:
    """The ids of a text that stands behind another, which has these ids."""
    for start, known in ((before, ids), ("\n", tokenizer.encode("\n", special=False))):
        whole = tokenizer.encode(start + text, special=False)
        if whole[: len(known)] == known:
            return whole[len(known) :]
    return tokenizer.encode(text, special=False)


class Encoded(NamedTuple):
    """An example; whether its end was cut off, its end token with it; and whether its source was cut."""

    example: Example
    cut: bool
    source_cut: bool = False


def encode_pieces(
    tokenizer: Tokens, pieces: Sequence[Piece], longest: int, *, first: Sequence[int] = (), end: Sequence[int] = ()
) -> Encoded | None:
    """The tokens of a text in pieces, cut after `longest`; None where nothing is left that is scored.

    first: what stands before the text, if it has it not already, unscored. end: what stands behind it, scored as its
    last piece is. The very first token follows nothing.
    """
    ids, scored = joined(tokenizer, pieces, longest + 1)
    if ids[: len(first)] != [*first]:
        ids, scored = [*first, *ids], [False] * len(first) + scored
    ids, scored = [*ids, *end], scored + [pieces[-1].scored] * len(end)
    targets = np.where(scored[1:], ids[1:], IGNORED)[:longest]
    if not (targets != IGNORED).any():
        return None
    return Encoded(Example(np.array(ids[: len(targets)]), targets), len(ids) > longest + 1)


def encode_pair(tokenizer: Tokens, pair: Pair, longest: int) -> Encoded | None:
    """A prompt, its completion and the end of the text; the prompt is not scored. As of `encode_pieces`."""
    pieces = [Piece(pair.prompt, False), Piece(pair.completion, True)]
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    return encode_pieces(tokenizer, pieces, longest, first=first_ids(tokenizer), end=end)


def pieces_of(text: str, spans: Sequence[Sequence[int]]) -> list[Piece]:
    """A text, cut at the spans of characters that are scored."""
    pieces, at = [], 0
    for start, end in spans:
        pieces += [Piece(text[at:start], False), Piece(text[start:end], True)]
        at = end
    return [*pieces, Piece(text[at:], False)]


def encode_labelled(tokenizer: Tokens, text: str, label: int, longest: int) -> Example:
    """The tokens of a text, cut to `longest`; the last of an uncut text, which ends it, stays."""
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError(f"expected a text with a token in it, got {text!r:.80}")
    if len(ids) > longest:
        ids = ids[: longest - 1] + ids[-1:]
    return Example(np.array(ids), np.array(label))


def encode_tagged(tokenizer: Tokens, words: Sequence[str], tags: Sequence[int], longest: int) -> Example:
    """The tokens of words, cut to `longest`; a word's first token is labelled with its tag."""
    ids, word_of = tokenizer.encode_words(words)
    targets = np.full(len(ids), IGNORED)
    seen: set[int] = set()
    for t, word in enumerate(word_of):
        if word is not None and word not in seen:
            targets[t] = tags[word]
            seen.add(word)
    if not (targets[:longest] != IGNORED).any():
        raise ValueError(f"expected a word with a token in it, got {' '.join(words)!r:.80}")
    return Example(np.array(ids[:longest]), targets[:longest])


def each(
    path: Path, encode: Callable[[Item], Example | None], found: Sequence[Item], lines: Sequence[int]
) -> list[Example]:
    """`encode` of each, but for None; a ValueError names the line of the one that it could not encode."""
    examples = []
    for number, one in zip(lines, found, strict=True):
        try:
            example = encode(one)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if example is not None:
            examples.append(example)
    return examples


# --- Batches ---------------------------------------------------------------------------------------------------------


def padded(examples: Sequence[Example]) -> BatchDict:
    """A batch: the examples filled up on the right to the longest. -> tokens and mask (N,T), targets (N,T) or (N,).

    Where examples have sources, also source and source_mask (N,S).
    """
    tokens, mask = _filled([example.tokens for example in examples], 0)
    batch = {"tokens": tokens, "mask": mask}
    if examples[0].targets.ndim == 0:
        return batch | {"targets": np.array([example.targets for example in examples])}
    batch["targets"], _ = _filled([example.targets for example in examples], IGNORED)
    sources = [example.source for example in examples if example.source is not None]
    if sources:
        batch["source"], batch["source_mask"] = _filled(sources, 0)
    return batch


def _filled(rows: Sequence[Array], value: int) -> tuple[Array, Array]:
    """Rows filled up on the right to the longest, with a value (N,T); and where they were not (N,T)."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    found = np.full(mask.shape, value, dtype=np.int64)
    found[mask] = np.concatenate(rows)
    return found, mask


def steps_an_epoch(examples: Sequence[Example], N: int) -> int:
    """Batches of N in which each example comes once."""
    return -(-len(examples) // N)


def bucketed(examples: Sequence[Example], *, N: int, seed: int, step: int) -> BatchDict:
    """The batch of a step, from 0: N examples of about the same length, each once an epoch; one batch has the rest.

    The examples of an epoch are shuffled, those of POOL batches sorted by length, and the batches shuffled again: all
    from seed and step alone.
    """
    epoch, i = divmod(step, steps_an_epoch(examples, N))
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(examples))
    lengths = np.array([example.length for example in examples])
    batches = []
    for start in range(0, len(order), POOL * N):
        pool = order[start : start + POOL * N]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[first : first + N] for first in range(0, len(pool), N)]
    return padded([examples[n] for n in batches[rng.permutation(len(batches))[i]]])


def in_order(examples: Sequence[Example], *, N: int) -> Iterator[BatchDict]:
    """All examples, the shortest first, N at a time: for evaluation."""
    order = by_length(examples)
    for first in range(0, len(order), N):
        yield padded([examples[n] for n in order[first : first + N]])


def by_length(examples: Sequence[Example]) -> list[int]:
    """Which example comes first, second and so on, the shortest first."""
    return sorted(range(len(examples)), key=lambda n: examples[n].length)

"""Files of examples: a prompt and its completion, a text and its label, words and their tags; and batches of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from ..backend import Array
from ..batch import IGNORED, BatchDict
from .text import read_text

POOL = 32  # batches whose examples are sorted by length together
Item = TypeVar("Item")


class Tokens(Protocol):
    """A tokenizer, as far as it is needed here."""

    @property
    def eos(self) -> int | None: ...
    def encode(self, text: str, *, special: bool = True) -> list[int]: ...
    def encode_words(self, words: Sequence[str]) -> tuple[list[int], list[int | None]]: ...
    def decode(self, ids: Iterable[int]) -> str: ...


class Example(NamedTuple):
    """A text's tokens (T,), and what they are scored against: (T,), or () for a classifier."""

    tokens: Array
    targets: Array


# --- Files ---------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A prompt, which is left out of the loss, and what follows it."""

    prompt: str
    completion: str


def read_pairs(path: Path) -> list[Pair] | None:
    """Prompts and completions of a file, or None where it is plain text.

    A .jsonl file has an object a line, with `prompt` and `completion`, or `text` alone. Another file has pairs if there
    is a || in each of its lines: the prompt ends with it. A ValueError names the line that is wrong.
    """
    lines = _lines(path)
    if path.suffix == ".jsonl":
        return [_json_pair(line, f"{path}:{number}") for number, line in lines]
    if not all("||" in line for _, line in lines):
        return None
    pairs = []
    for _, line in lines:
        prompt, bars, completion = line.partition("||")
        pairs.append(Pair(prompt + bars, completion.rstrip()))
    return pairs


def _json_pair(line: str, where: str) -> Pair:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error!s:.100}") from None
    if isinstance(found, dict):
        parts = ("", found["text"]) if "text" in found else (found.get("prompt"), found.get("completion"))
        if all(isinstance(part, str) for part in parts):
            return Pair(*parts)
    raise ValueError(f"{where}: expected an object with prompt and completion, or text, as strings; got {line!r:.80}")


def read_labelled(path: Path) -> list[tuple[str, str]]:
    """Texts and labels: `text<TAB>label` a line, no header, no quoting. A ValueError names the line that is wrong."""
    found = []
    for number, line in _lines(path):
        columns = line.split("\t")
        if len(columns) != 2 or not columns[0].strip() or not columns[1].strip():
            raise ValueError(f"{path}:{number}: expected a text, a tab and a label, got {line!r:.80}")
        found.append((columns[0], columns[1].strip()))
    return found


def read_tagged(path: Path) -> list[tuple[list[str], list[str]]]:
    """Sentences of a CoNLL file: a word a line, its tag in the last column, an empty line behind each sentence.

    Lines of -DOCSTART- are left out. A ValueError names the line that is wrong.
    """
    sentences: list[tuple[list[str], list[str]]] = [([], [])]
    for number, line in enumerate(read_text(path).splitlines(), 1):
        columns = line.split()
        if not columns:
            sentences.append(([], []))
        elif columns[0] != "-DOCSTART-":
            if len(columns) < 2:
                raise ValueError(f"{path}:{number}: expected a word and, in the last column, its tag, got {line!r:.80}")
            sentences[-1][0].append(columns[0])
            sentences[-1][1].append(columns[-1])
    return [sentence for sentence in sentences if sentence[0]]


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not empty, and their numbers."""
    return [(number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]


def label_names(labels: Sequence[str]) -> tuple[str, ...]:
    """The different labels, in order: by size if all are whole numbers, then and else by the alphabet."""
    names = sorted(set(labels))
    return tuple(sorted(names, key=int) if all(name.isdecimal() for name in names) else names)


# --- Texts into tokens -----------------------------------------------------------------------------------------------


def encode_pair(tokenizer: Tokens, pair: Pair, longest: int) -> Example:
    """The tokens of a prompt, its completion and the end of the text, cut after `longest`; the prompt is not scored."""
    prompt = tokenizer.encode(pair.prompt)
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    ids = (prompt + tokenizer.encode(pair.completion, special=False) + end)[: longest + 1]
    targets = np.array(ids[1:])
    targets[: max(0, len(prompt) - 1)] = IGNORED
    if not (targets != IGNORED).any():
        raise ValueError(f"expected room for a completion in {longest} tokens, but the prompt takes {len(prompt)}")
    return Example(np.array(ids[:-1]), targets)


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


def each(path: Path, encode: Callable[[Item], Example], found: Sequence[Item]) -> list[Example]:
    """`encode` of each; a ValueError says which one of the file it could not encode."""
    examples = []
    for number, one in enumerate(found, 1):
        try:
            examples.append(encode(one))
        except ValueError as error:
            raise ValueError(f"{path}: example {number}: {error}") from None
    return examples


# --- Batches ---------------------------------------------------------------------------------------------------------


def padded(examples: Sequence[Example]) -> BatchDict:
    """A batch: the examples filled up on the right to the longest. -> tokens and mask (N,T), targets (N,T) or (N,)."""
    T = max(len(example.tokens) for example in examples)
    lengths = np.array([len(example.tokens) for example in examples])
    tokens, mask = np.zeros((len(examples), T), dtype=np.int64), np.arange(T) < lengths[:, None]
    for row, example in zip(tokens, examples, strict=True):
        row[: len(example.tokens)] = example.tokens
    if examples[0].targets.ndim == 0:
        return {"tokens": tokens, "mask": mask, "targets": np.array([example.targets for example in examples])}
    targets = np.full(tokens.shape, IGNORED)
    for row, example in zip(targets, examples, strict=True):
        row[: len(example.targets)] = example.targets
    return {"tokens": tokens, "mask": mask, "targets": targets}


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
    lengths = np.array([len(example.tokens) for example in examples])
    batches = []
    for start in range(0, len(order), POOL * N):
        pool = order[start : start + POOL * N]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[first : first + N] for first in range(0, len(pool), N)]
    return padded([examples[n] for n in batches[rng.permutation(len(batches))[i]]])


def in_order(examples: Sequence[Example], *, N: int) -> Iterator[BatchDict]:
    """All examples, the shortest first, N at a time: for evaluation."""
    by_length = sorted(examples, key=lambda example: len(example.tokens))
    for first in range(0, len(by_length), N):
        yield padded(by_length[first : first + N])

"""What a model is asked, in a file or on standard input: prompts, texts, sentences.

Files of examples are read too: what there is to learn in them, an answer or a label, is left out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..formats.models.chat_template import Conversation
from .records import (
    SOURCE,
    Kinds,
    Maker,
    conll_sentences,
    find_named_format,
    has_bars,
    instruction_of,
    messages_of,
    records_of,
    rows_of,
    text_of,
    tools_of,
)
from .rows import BLANK, numbered
from .text import decoded, read_text

STANDARD_INPUT = Path("-")
PROMPTS: Kinds = {
    "conversations": {"messages": ("messages", "conversations")},
    "prompts": {"prompt": ("prompt", "question", "source")},
    "instructions": {"instruction": ("instruction",)},
    "texts": {"text": ("text", "sentence")},
}
SOURCES: Kinds = {
    "sources": {"source": SOURCE}, "instructions": PROMPTS["instructions"], "texts": PROMPTS["texts"],
}  # fmt: skip
TEXTS: Kinds = {"texts": PROMPTS["texts"]}
SENTENCES: Kinds = {"sentences": {"tokens": ("tokens", "words")}}


def input_name(path: Path) -> Path:
    """What a file that is read is called, standard input too."""
    return Path("standard input") if path == STANDARD_INPUT else path


class Input(NamedTuple):
    """One of the things that a model is asked: a prompt, a text or a sentence's words; and the line it begins on."""

    line: int
    asked: Any


def read_prompts(path: Path, format: str | None = None) -> list[Input]:
    """The prompts of a file: each a str, or a Conversation whose last message is not the assistant's.

    A line is one, up to its bars if half of the lines have them (a||b); empty lines are none. JSON, CSV and TSV have
    messages, prompt, instruction or text. format: one of these, bars or text; None: as found. A ValueError names the
    line that is wrong, and what was expected there.
    """
    text, path = _read(path)
    if format == "parallel":
        raise ValueError(f"{path}: format parallel is for task translate")
    format = format or find_named_format(text, PROMPTS) or ("bars" if has_bars(text) else "text")
    if format in ("bars", "text"):
        lines = [Input(number, line) for number, line in numbered(text) if line.strip(BLANK)]
        return [_up_to_bars(one) for one in lines] if format == "bars" else lines
    return _in_rows(text, format, PROMPTS, path)


def read_sources(path: Path, format: str | None = None) -> list[Input]:
    """The texts of a file that are to be translated.

    A line is one, up to its bars if half of the lines have them (a||b), or to a tab; empty lines are none. JSON, CSV
    and TSV have source, prompt, instruction or text. Errors as of `read_prompts`.
    """
    text, path = _read(path)
    format = format or find_named_format(text, SOURCES) or ("bars" if has_bars(text) else "parallel")
    if format in ("bars", "parallel", "text"):
        end = "||" if format == "bars" else "\t"
        return [
            Input(number, line.partition(end)[0].strip(BLANK)) for number, line in numbered(text) if line.strip(BLANK)
        ]
    return _in_rows(text, format, SOURCES, path)


def read_texts(path: Path, format: str | None = None) -> tuple[list[Input], int]:
    """The texts of a file, and of how many a part is left out: what stands behind a tab, a label.

    A line is one, an empty line too. JSON, CSV and TSV have text. Errors as of `read_prompts`.
    """
    text, path = _read(path)
    format = format or find_named_format(text, TEXTS) or "text"
    if format == "conll":
        raise ValueError(f"{path}: format conll is for tags of words, and this is read for labels of texts")
    if format != "text":
        return _in_rows(text, format, TEXTS, path), 0
    lines = [(number, *line.partition("\t")[:2]) for number, line in numbered(text.removesuffix("\n"))]
    return [Input(number, line) for number, line, _ in lines], sum(bool(tab) for *_, tab in lines)


def read_sentences(path: Path, tags: Collection[str], format: str | None = None) -> list[Input]:
    """The sentences of a file, each a list of words.

    A line is one, with spaces between its words; empty lines are none. A file whose lines all end in one of the tags is
    CoNLL's: a word a line, in the first column, and an empty line behind each sentence. JSON has tokens. Errors as of
    `read_prompts`.
    """
    text, path = _read(path)
    format = format or find_named_format(text, SENTENCES)
    columns = [(number, [word for word in re.split("[ \t]+", line) if word]) for number, line in numbered(text)]
    lines = [Input(number, words) for number, words in columns if words]
    if format is None:
        format = "conll" if lines and all(len(words) > 1 and words[-1] in tags for _, words in lines) else "text"
    if format == "text":
        return lines
    if format == "conll":
        return [Input(words[0][0], [columns[0] for _, columns in words]) for words in conll_sentences(text)]
    return _in_rows(text, format, SENTENCES, path)


def _read(path: Path) -> tuple[str, Path]:
    """The text of a file, or of standard input, and what that is called in errors."""
    if path != STANDARD_INPUT:
        return read_text(path), path
    name = input_name(path)
    return decoded(b"" if sys.stdin is None else sys.stdin.buffer.read(), name), name


def _up_to_bars(one: Input) -> Input:
    prompt, bars, _ = one.asked.partition("||")
    return one._replace(asked=prompt + bars)


def _in_rows(text: str, format: str, kinds: Kinds, path: Path) -> list[Input]:
    found = records_of(rows_of(text, format, path), kinds, _MAKERS, path)
    return [Input(number, one) for number, one in zip(found.lines, found.found, strict=True)]


def _prompt(fields: Mapping[str, Any], row: Mapping[str, Any], where: str) -> str | Conversation:
    if isinstance(fields["prompt"], list):
        return _asked(fields["prompt"], row, where)
    return text_of(fields["prompt"], "prompt", where)


def _source(fields: Mapping[str, Any], row: Mapping[str, Any], where: str) -> str:
    return text_of(fields["source"], "source", where).strip(BLANK)


def _conversation(fields: Mapping[str, Any], row: Mapping[str, Any], where: str) -> Conversation:
    return _asked(fields["messages"], row, where)


def _asked(messages: Any, row: Mapping[str, Any], where: str) -> Conversation:
    """A conversation up to where the assistant is to go on."""
    messages = messages_of(messages, "messages", where)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise ValueError(f"{where}: messages: expected one that the assistant did not say, got none")
    return Conversation(messages, tools_of(row, where))


def _text(fields: Mapping[str, Any], row: Mapping[str, Any], where: str) -> str:
    return text_of(fields["text"], "text", where)


def _words(fields: Mapping[str, Any], row: Mapping[str, Any], where: str) -> list[str]:
    words = fields["tokens"]
    if not isinstance(words, list) or not words:
        raise ValueError(f"{where}: expected a list of words, got {words!r:.60}")
    return [text_of(word, "word", where) for word in words]


_MAKERS: Mapping[str, Maker] = {
    "conversations": _conversation, "prompts": _prompt, "instructions": instruction_of, "texts": _text,
    "sentences": _words, "sources": _source,
}  # fmt: skip

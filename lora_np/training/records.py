"""Files of examples as records: conversations, prompts with completions, texts with labels, words with tags.

The format is found from what a file holds, not from its name; a file that is nearly of one format is an error that
names the line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ..formats.models.chat_template import Conversation
from .rows import BLANK, DELIMITERS, Row, json_rows, mostly_objects, numbered, past_space, table_rows
from .text import read_text

FORMATS = ("json", "csv", "tsv", "bars", "parallel", "labelled", "conll", "text")
# Kinds of records, with their fields, and under which names files have these. The first kind whose fields are all there
# is a file's.
Kinds: TypeAlias = Mapping[str, Mapping[str, tuple[str, ...]]]
INSTRUCTIONS = {"instruction": ("instruction",), "output": ("output", "response")}
SOURCE = ("source", "prompt", "question")
KINDS: Mapping[str, Kinds] = {
    "lm": {
        "conversations": {"messages": ("messages", "conversations")},
        "pairs": {"prompt": ("prompt", "question"), "completion": ("completion", "response", "answer")},
        "instructions": INSTRUCTIONS,
        "texts": {"text": ("text", "sentence")},
    },
    "translate": {
        "translations": {"source": SOURCE, "target": ("target", "completion", "response", "answer")},
        "instructions": INSTRUCTIONS,
    },
    "classify": {"labelled": {"text": ("text", "sentence"), "label": ("label", "labels")}},
    "tag": {"tagged": {"tokens": ("tokens", "words"), "tags": ("ner_tags", "tags", "labels")}},
}
INPUT = ("input", "context")  # what an instruction is about; it may be missing, or empty
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names, from and value, beside role and content
# Stanford Alpaca's two prompts, which files of instructions are made for.
ALPACA = {
    True: "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n",
    False: "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n",
}


# What makes a record of its fields, of the whole row, and of the place that errors name.
Maker: TypeAlias = "Callable[[Mapping[str, Any], Mapping[str, Any], str], Any]"


class Pair(NamedTuple):
    """A prompt, which is left out of the loss, and what follows it."""

    prompt: str
    completion: str


class Labelled(NamedTuple):
    """A text and its label."""

    text: str
    label: str


class Tagged(NamedTuple):
    """The words of a sentence, and the tag of each."""

    words: list[str]
    tags: list[str]


Record: TypeAlias = "Conversation | Pair | Labelled | Tagged"


class Records(NamedTuple):
    """A file's records, and the line that each begins on. kind: what they are called."""

    kind: str
    lines: list[int]
    found: list[Any]


def read_records(path: Path, task: str, format: str | None = None) -> Records | None:
    """The records of a file for a task, or None where it is plain text. format: one of FORMATS; None: as found.

    A ValueError names the line that is wrong, and what was expected there.
    """
    text = read_text(path)
    format = format or find_format(text, task)
    lines = [(number, line) for number, line in numbered(text) if line.strip(BLANK)]
    if format == "text":
        if task != "lm":
            raise ValueError(f"{path}: expected records for task {task}, got format text")
        return None
    by_lines: dict[str, dict[str, tuple[str, Callable[[str, str], Any]]]] = {
        "bars": {"lm": ("pairs", _bars), "translate": ("translations", _barred)},
        "parallel": {"translate": ("translations", _parallel)},
        "labelled": {"classify": ("labelled", _columns)},
    }
    if format in by_lines:
        _check_task(path, format, by_lines[format], task)
        kind, parse = by_lines[format][task]
        return Records(kind, [n for n, _ in lines], [parse(line, f"{path}:{n}") for n, line in lines])
    if format == "conll":
        _check_task(path, format, ["tag"], task)
        sentences = list(_sentences(text, path))
        return Records("tagged", [n for n, _ in sentences], [one for _, one in sentences])
    return records_of(rows_of(text, format, path), KINDS[task], _MAKERS, path)


def rows_of(text: str, format: str, path: Path) -> Iterator[Row]:
    """The rows of a text in a format whose fields have names: json, csv or tsv."""
    if format != "json":
        return table_rows(text, format, path)
    return json_rows(text, [(number, line) for number, line in numbered(text) if line.strip(BLANK)], path)


def _check_task(path: Path, format: str, of: Iterable[str], task: str) -> None:
    if task not in of:
        raise ValueError(f"{path}: format {format} is for task {' or '.join(of)}, got task {task}")


# --- Which format it is ----------------------------------------------------------------------------------------------


def find_format(text: str, task: str) -> str:
    """The format of a file's text: one of FORMATS.

    Lines of a||b: half of them at least have the bars. So a file with some lines wrong is of the format that the others
    have.
    """
    named = find_named_format(text, KINDS[task])
    if named is not None:
        return named
    if task in ("lm", "translate") and has_bars(text):
        return "bars"
    return {"lm": "text", "translate": "parallel", "classify": "labelled", "tag": "conll"}[task]


def find_named_format(text: str, kinds: Kinds) -> str | None:
    """The format of a text whose fields have names; None if it has none.

    JSON: the text begins with an object, or an array of them, or half of its lines at least begin as objects do. CSV
    and TSV: the first line names the fields of one of the kinds.
    """
    lines = [line for _, line in numbered(text) if line.strip(BLANK)]
    if _is_json(text, lines):
        return "json"
    if lines:
        for format, delimiters in DELIMITERS.items():
            if any(_kind_of(_header(lines[0], delimiter), kinds) for delimiter in delimiters):
                return format
    return None


def has_bars(text: str) -> bool:
    """Whether half of the lines at least, but for empty ones, have the bars of a||b."""
    lines = [line for _, line in numbered(text) if line.strip(BLANK)]
    return bool(lines) and 2 * sum("||" in line for line in lines) >= len(lines)


def _is_json(text: str, lines: Sequence[str]) -> bool:
    start = past_space(text, 0)
    if re.match(r"\[[ \t\r\n]*\{", text[start : start + 2**10]) or (lines and mostly_objects(lines)):
        return True
    if text[start : start + 1] not in ("{", "["):
        return False
    try:
        found, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) or past_space(text, end) == len(text)


def _header(line: str, delimiter: str) -> list[str]:
    """The names in a table's first line."""
    return [name.strip(BLANK + '"').lower() for name in line.split(delimiter)]


def _kind_of(names: Sequence[str], kinds: Kinds) -> tuple[str, dict[str, str]] | None:
    """The kind of records that have fields of these names, and which name each field has; None: it is none."""
    for kind, fields in kinds.items():
        found = {field: next((name for name in known if name in names), "") for field, known in fields.items()}
        if all(found.values()):
            return kind, found
    return None


# --- Records ---------------------------------------------------------------------------------------------------------


def records_of(rows: Iterator[Row], kinds: Kinds, makers: Mapping[str, Maker], path: Path) -> Records:
    """The records that rows are, all of the kind that the first is; makers: what makes a record of its fields."""
    kind: tuple[str, dict[str, str]] | None = None
    lines, found = [], []
    for number, row in rows:
        where = f"{path}:{number}"
        if kind is None:
            kind = _kind_of(list(row), kinds)
            if kind is None:
                raise ValueError(
                    f"{where}: expected an object or a header with {_expected(kinds)}, got {list(row)!r:.80}"
                )
            if kind[0] == "pairs" and isinstance(row[kind[1]["prompt"]], list):
                kind = "turns", kind[1]
        missing = [name for name in kind[1].values() if name not in row]
        if missing:
            raise ValueError(f"{where}: expected {' and '.join(kind[1].values())}, got {list(row)!r:.80}")
        fields = {field: row[name] for field, name in kind[1].items()}
        lines.append(number)
        found.append(makers[kind[0]](fields, row, where))
    name = next(iter(kinds)) if kind is None else kind[0]
    return Records("conversations" if name == "turns" else name, lines, found)


def _expected(kinds: Kinds) -> str:
    return ", or ".join(" and ".join(fields) for fields in kinds.values())


def text_of(value: Any, name: str, where: str) -> str:
    """A field that is a text: a string that UTF-8 can hold."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name}: expected a string, got {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {name}: holds half a surrogate pair") from None
    return value


def _label(value: Any, where: str) -> str:
    """A label: a name, or a number."""
    if isinstance(value, (int, bool)):
        return json.dumps(value)
    name = text_of(value, "label", where).strip(BLANK)
    if not name:
        raise ValueError(f"{where}: expected a label, got none")
    return name


def _pair(fields: Mapping[str, Any], row: Mapping[str, Any], where: str) -> Pair:
    return Pair(*(text_of(fields[name], name, where) for name in ("prompt", "completion")))


def _translation(fields: Mapping[str, Any], row: Mapping[str, Any], where: str) -> Pair:
    source, target = (text_of(fields[name], name, where) for name in ("source", "target"))
    return _translated(source, target, where)


def _translated(source: str, target: str, where: str) -> Pair:
    """A text and its translation, without what is blank around them."""
    if not source.strip(BLANK):
        raise ValueError(f"{where}: expected a text and its translation, got {source!r:.60}")
    return Pair(source.strip(BLANK), target.strip(BLANK))


def _instruction(fields: Mapping[str, Any], row: Mapping[str, Any], where: str) -> Pair:
    return Pair(instruction_of(fields, row, where), text_of(fields["output"], "output", where))


def instruction_of(fields: Mapping[str, Any], row: Mapping[str, Any], where: str) -> str:
    """Stanford Alpaca's prompt of an instruction, with its input if there is one."""
    given = next((row[name] for name in INPUT if row.get(name)), "")
    instruction = text_of(fields["instruction"], "instruction", where)
    return ALPACA[bool(given)].format(instruction=instruction, input=text_of(given, "input", where))


def _alone(fields: Mapping[str, Any], row: Mapping[str, Any], where: str) -> Pair:
    return Pair("", text_of(fields["text"], "text", where))


def _labelled(fields: Mapping[str, Any], row: Mapping[str, Any], where: str) -> Labelled:
    text = text_of(fields["text"], "text", where)
    if not text.strip(BLANK):
        raise ValueError(f"{where}: expected a text, got {text!r:.60}")
    return Labelled(text, _label(fields["label"], where))


def _tagged(fields: Mapping[str, Any], row: Mapping[str, Any], where: str) -> Tagged:
    words, tags = fields["tokens"], fields["tags"]
    if not (isinstance(words, list) and isinstance(tags, list) and len(words) == len(tags) and words):
        raise ValueError(f"{where}: expected lists of as many tags as words, got {words!r:.40} and {tags!r:.40}")
    return Tagged([text_of(word, "word", where) for word in words], [_label(tag, where) for tag in tags])


def _conversation(fields: Mapping[str, Any], row: Mapping[str, Any], where: str) -> Conversation:
    return Conversation(_messages(fields["messages"], "messages", where), tools_of(row, where))


def _turns(fields: Mapping[str, Any], row: Mapping[str, Any], where: str) -> Conversation:
    """A prompt and a completion that are lists of messages: one conversation, of which the completion is scored."""
    prompt = messages_of(fields["prompt"], "prompt", where)
    said = _messages(fields["completion"], "completion", where)
    return Conversation([*prompt, *said], tools_of(row, where), len(prompt))


def tools_of(row: Mapping[str, Any], where: str) -> list[Any] | None:
    """The tools that a conversation may call."""
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"{where}: tools: expected a list, got {tools!r:.60}")
    return tools or None


def _messages(messages: Any, name: str, where: str) -> list[dict[str, Any]]:
    """Messages, of which one at least is the assistant's."""
    found = messages_of(messages, name, where)
    if not any(one["role"] == "assistant" for one in found):
        raise ValueError(f"{where}: {name}: expected one of the assistant at least, got none")
    return found


def messages_of(messages: Any, name: str, where: str) -> list[dict[str, Any]]:
    """Messages, each with its role and content."""
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise ValueError(f"{where}: {name}: expected a list of objects with role and content, got {messages!r:.60}")
    return [_message(one, where) for one in messages]


def _message(one: dict[str, Any], where: str) -> dict[str, Any]:
    """A message with its role and content."""
    if "role" not in one and "from" in one and "value" in one:
        role = text_of(one["from"], "from", where)
        one = {"role": ROLES.get(role, role), "content": one["value"]}
    if not isinstance(one.get("role"), str):
        raise ValueError(f"{where}: messages: expected role and content in each, got {one!r:.80}")
    if one.get("content") is None and not one.get("tool_calls"):
        raise ValueError(f"{where}: messages: expected content, or tool_calls, in each, got {one!r:.80}")
    return one


_MAKERS: Mapping[str, Maker] = {
    "conversations": _conversation, "turns": _turns, "pairs": _pair, "instructions": _instruction, "texts": _alone,
    "labelled": _labelled, "tagged": _tagged, "translations": _translation,
}  # fmt: skip


def _bars(line: str, where: str) -> Pair:
    """`prompt||completion`: the prompt ends with the bars."""
    prompt, bars, completion = line.partition("||")
    if not bars:
        raise ValueError(f"{where}: expected prompt||completion, as other lines have it, got {line!r:.80}")
    return Pair(prompt + bars, completion.rstrip(BLANK))


def _barred(line: str, where: str) -> Pair:
    """`source||target`: the bars belong to neither."""
    source, target = _parted(line, "||", "source||target", where)
    return _translated(source, target, where)


def _parallel(line: str, where: str) -> Pair:
    """`source<TAB>target`, no quoting."""
    source, target = _parted(line, "\t", "a text, a tab and its translation", where)
    return _translated(source, target, where)


def _parted(line: str, by: str, expected: str, where: str) -> list[str]:
    """The two parts of a line."""
    parts = line.split(by)
    if len(parts) != 2:
        raise ValueError(f"{where}: expected {expected}, got {line!r:.80}")
    return parts


def _columns(line: str, where: str) -> Labelled:
    """`text<TAB>label`, no quoting."""
    columns = line.split("\t")
    if len(columns) != 2 or not columns[0].strip(BLANK) or not columns[1].strip(BLANK):
        raise ValueError(f"{where}: expected a text, a tab and a label, got {line!r:.80}")
    return Labelled(columns[0], columns[1].strip(BLANK))


def _sentences(text: str, path: Path) -> Iterator[tuple[int, Tagged]]:
    """The sentences of a CoNLL file: the word in the first column, its tag in the last."""
    for lines in conll_sentences(text):
        for number, columns in lines:
            if len(columns) < 2:
                raise ValueError(
                    f"{path}:{number}: expected a word and, in the last column, its tag, got {' '.join(columns)!r:.80}"
                )
        yield lines[0][0], Tagged([columns[0] for _, columns in lines], [columns[-1] for _, columns in lines])


def conll_sentences(text: str) -> Iterator[list[tuple[int, list[str]]]]:
    """The sentences of a CoNLL file, an empty line behind each: the number of each word's line, and its columns.

    Spaces and tabs part columns. Lines of -DOCSTART- are left out.
    """
    sentence: list[tuple[int, list[str]]] = []
    for number, line in [*numbered(text), (0, "")]:
        columns = [column for column in re.split("[ \t]+", line) if column]
        if columns and columns[0] != "-DOCSTART-":
            sentence.append((number, columns))
        elif not columns and sentence:
            yield sentence
            sentence = []


def label_names(labels: Sequence[str]) -> tuple[str, ...]:
    """The different labels, in order: by size if all are whole numbers, then and else by the alphabet."""
    names = sorted(set(labels))
    return tuple(sorted(names, key=int) if all(name.isdecimal() for name in names) else names)

"""lora-np predict: the labels of texts, or the tags of words, with their probabilities."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..adapter import Adapter
from ..backend import Array
from ..formats.adapters.head import task_for
from ..formats.adapters.task import Task
from ..formats.files.messages import naming
from ..model import Model
from ..training.examples import Example, Tokens
from ..training.inputs import STANDARD_INPUT, Input, input_name, read_sentences, read_texts
from ..training.predict import encode_sentence, encode_text, text_probabilities, word_probabilities
from ..training.rows import BLANK
from .base import AddCommand, adapted, add_base, add_storage, awaited, base_path, tokenizer_of, whole
from .output import Bar, emit

NONE = "-"  # in the place of a word's tag and probability that was cut off, or has no token
Found = TypeVar("Found")


class Used(NamedTuple):
    """What labels are given with; path: the adapter's, or the base's without one."""

    model: Model
    adapter: Adapter | None
    tokenizer: Tokens
    task: Task
    path: Path

    def of(
        self, probabilities: Callable[[Model, Adapter | None, Sequence[Example]], Found], of: list[Example]
    ) -> Found:
        """`text_probabilities` or `word_probabilities`; errors name the path."""
        with naming(self.path):
            return probabilities(self.model, self.adapter, of)

    def named(self, p: Array) -> dict[str, Any]:
        """The likeliest label, and the probability of each. p (labels,)."""
        best = int(p.argmax())
        each = dict(zip(self.task.labels, map(float, p), strict=True))
        return {"label": self.task.labels[best], "probability": float(p[best]), "probabilities": each}


def run_predict(args: argparse.Namespace) -> int:
    with Bar() as bar:
        base = base_path(args, bar)
    model, adapter = adapted(args, base)
    path = base if args.adapter is None else args.adapter
    _check_head(model, path)
    with naming(path):
        task = task_for(base, args.adapter, model.config)
    if args.window is not None:
        task = replace(task, longest=min(args.window, model.config.longest))
    with Bar() as bar:
        awaited(args.data, bar)
    used = Used(model, adapter, tokenizer_of(base, model.config), task, path)
    result, lines, notes = (_tags if task.name == "tag" else _labels)(args, used)
    with Bar() as bar:
        bar.note(f"{input_name(args.data)}: {'; '.join(notes)}")
    emit(args, result, lines, longest=sys.maxsize)  # a line of the input is one of the output, to its end
    return 0


def _check_head(model: Model, path: Path) -> None:
    """A ValueError unless the model has labels; it says what to do instead."""
    if model.config.head == "lm":
        raise ValueError(f"{path}: a language model, which gives no labels: lora-np generate writes text with it")
    if model.config.head == "none":
        raise ValueError(
            f"{path}: a model without a head, which gives no labels: name an --adapter that learned some, as of "
            "lora-np finetune --task classify, or tag"
        )


def _encoded(
    data: Path, found: Sequence[Input], encode: Callable[[Any], tuple[Example, bool]]
) -> tuple[list[Example], int]:
    """The tokens of each, and how many were cut; a ValueError names the line that has none."""
    examples, cut = [], 0
    for one in found:
        try:
            example, is_cut = encode(one.asked)
        except ValueError as error:
            raise ValueError(f"{input_name(data)}:{one.line}: {error}") from None
        examples.append(example)
        cut += is_cut
    return examples, cut


def _labels(args: argparse.Namespace, used: Used) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """A label for each text that has a character. -> for JSON; lines, an empty one for an empty text; what was read."""
    longest = used.task.longest
    found, behind_tab = read_texts(args.data, args.format)
    texts = [one for one in found if one.asked.strip(BLANK)]
    examples, cut = _encoded(args.data, texts, lambda text: encode_text(used.tokenizer, text, longest))
    named = [used.named(p) for p in used.of(text_probabilities, examples)]
    result = [{"line": one.line, "text": one.asked, **label} for one, label in zip(texts, named, strict=True)]
    said = iter([f"{one['label']}\t{one['probability']:.4f}\t{one['text']}" for one in result])
    lines = [next(said) if one.asked.strip(BLANK) else "" for one in found]
    counts = [
        (cut, f"{cut:,} longer than {longest} tokens cut"),
        (behind_tab, f"{behind_tab:,} with a tab: what is behind it, a label, is left out"),
        (len(found) - len(texts), f"{len(found) - len(texts):,} empty, which stay so"),
    ]
    return result, lines, [f"{len(texts):,} text{'s' * (len(texts) != 1)}", *(note for count, note in counts if count)]


def _tags(args: argparse.Namespace, used: Used) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """A tag for each word. -> for JSON; lines of words, an empty one between sentences; what was read."""
    longest = used.task.longest
    found = read_sentences(args.data, used.task.labels, args.format)
    examples, cut = _encoded(args.data, found, lambda words: encode_sentence(used.tokenizer, words, longest))
    result, lines, without = [], list[str](), 0
    for one, tags in zip(found, used.of(word_probabilities, examples), strict=True):
        without += len(one.asked) - len(tags)
        words = []
        lines += [""] if lines else []
        for n, word in enumerate(one.asked):
            named = used.named(tags[n]) if n in tags else {"label": None, "probability": None, "probabilities": None}
            words.append({"word": word, "tag": named.pop("label"), **named})
            shown = f"{named['probability']:.4f}" if n in tags else NONE
            lines.append(f"{word}\t{words[-1]['tag'] if n in tags else NONE}\t{shown}")
        result.append({"line": one.line, "words": words})
    counts = [
        (cut, f"{cut:,} longer than {longest} tokens cut"),
        (without, f"words without a tag, for which {NONE} stands: {without:,}"),
    ]
    return (
        result,
        lines,
        [f"{len(found):,} sentence{'s' * (len(found) != 1)}", *(note for count, note in counts if count)],
    )


def add_commands(command: AddCommand) -> None:
    """The command of this file, and its arguments."""
    p = command("predict", run_predict, "the labels of texts, or the tags of words, with their probabilities")
    add_base(p)
    add_storage(p)
    p.add_argument("--adapter", type=Path, metavar="DIR", help="the adapter's folder; without, the base has the labels")
    p.add_argument(
        "--data", type=Path, default=STANDARD_INPUT, metavar="FILE",
        help="a text, or the words of a sentence, in each line; JSON, CSV, TSV and CoNLL as for finetune, whose labels "
        "are left out (default: standard input)",
    )  # fmt: skip
    p.add_argument(
        "--format",
        choices=("json", "csv", "tsv", "conll", "text"),
        help="what is in the file (default: as it is found)",
    )
    p.add_argument(
        "--window", type=whole, metavar="T",
        help="the most tokens of a text, or sentence (default: as in training, or what the model takes)",
    )  # fmt: skip

"""The probabilities of labels: of texts, or of the words of sentences."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import numpy as np

from ..adapter import Adapter
from ..backend import Array, asnumpy
from ..batch import IGNORED, BatchDict
from ..loss import forward
from ..model import Model
from ..ops import softmax
from ..threads import in_threads, map_parts
from .examples import Example, Tokens, by_length, encode_labelled, encode_tagged, in_order

BATCH = 32  # texts in a batch


def encode_text(tokenizer: Tokens, text: str, longest: int) -> tuple[Example, bool]:
    """A text's tokens as those of training, and whether it was cut; its target has no meaning."""
    example = encode_labelled(tokenizer, text, 0, longest)
    return example, len(example.tokens) == longest < len(encode_labelled(tokenizer, text, 0, sys.maxsize).tokens)


def encode_sentence(tokenizer: Tokens, words: Sequence[str], longest: int) -> tuple[Example, bool]:
    """The tokens of words as those of training, and whether they were cut; a target is the number of a word."""
    numbers = range(len(words))
    example = encode_tagged(tokenizer, words, numbers, longest)
    return example, len(example.tokens) == longest < len(encode_tagged(tokenizer, words, numbers, sys.maxsize).tokens)


def text_probabilities(model: Model, adapter: Adapter | None, examples: Sequence[Example]) -> list[Array]:
    """T8, T14: the probabilities of the labels of each text. -> (labels,) of each, on the host."""
    return _in_turn(examples, (row for rows in _probabilities(model, adapter, examples) for row in rows))


def word_probabilities(model: Model, adapter: Adapter | None, examples: Sequence[Example]) -> list[dict[int, Array]]:
    """T8, T14: the probabilities of the tags of each word, by its number, whose first token was not cut off.

    -> {word: (labels,)} of each sentence, on the host.
    """
    rows = (row for rows in _probabilities(model, adapter, examples) for row in rows)
    found = zip(examples, _in_turn(examples, rows), strict=True)
    return [{int(example.targets[t]): p[t] for t in np.flatnonzero(example.targets != IGNORED)} for example, p in found]


def _in_turn(examples: Sequence[Example], rows: Iterator[Array]) -> list[Array]:
    """What was computed of the examples by their lengths, in their own order."""
    found = dict(zip(by_length(examples), rows, strict=True))
    return [found[n] for n in range(len(examples))]


def _probabilities(model: Model, adapter: Adapter | None, examples: Sequence[Example]) -> list[Array]:
    """The probabilities of batches of examples, the shortest first, each batch in a thread.

    -> (N,labels) of a classifier's, (N,T,labels) of a tagger's. A ValueError if one is no number.
    """

    def one(batch: BatchDict) -> Array:
        logits = forward(model, batch["tokens"], adapter, mask=batch["mask"])
        p = asnumpy(softmax(logits)[0])
        if not np.isfinite(p[batch["mask"]] if p.ndim > 2 else p).all():
            raise ValueError(f"probabilities are NaN: the weights, or the adapter's, overflow in {model.dtype}")
        return p

    with in_threads():
        return list(map_parts(one, in_order(examples, N=BATCH)))

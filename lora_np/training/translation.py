"""Texts and their translations, as a base reads them: an encoder-decoder, or a decoder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..backend import Array
from ..batch import IGNORED
from ..formats.models.folder import CONFIG, MODEL_TYPE, read_any_header
from ..model import Config
from .examples import Encoded, Example, Tokens, encode_labelled, encode_pair, prompt_ids
from .records import Pair
from .text import ByteTokenizer

BETWEEN = "\n"  # a decoder's source and its target
START = "decoder_start_token_id"


class EndedByteTokenizer(ByteTokenizer):
    """The byte tokenizer, with 0, which no text has, behind a target: or nothing would say where it ends."""

    eos = 0


def ended(tokenizer: Tokens) -> Tokens:
    """A tokenizer that ends targets: the base's own, or of bytes with an end."""
    return EndedByteTokenizer() if isinstance(tokenizer, ByteTokenizer) else tokenizer


def decoder_start(base: Path, config: Config, tokenizer: Tokens) -> int | None:
    """T20: the token that an encoder-decoder's decoder begins with; None: the base has no encoder.

    config.json says it (T5: the padding token, BART: the end token). In a folder of this package it is the tokenizer's
    padding token, or else its first or its end token. A ValueError if there is none, or the model has no such token.
    """
    if not config.n_encoder:
        return None
    header = read_any_header(base)
    if header["model_type"] == MODEL_TYPE:
        kinds = (getattr(tokenizer, kind, None) for kind in ("pad", "bos", "eos"))
        where, start = f"{base}: the tokenizer", next((i for i in kinds if i is not None), None)
    else:
        where, start = f"{base / CONFIG}: {START}", header.get(START)
    if type(start) is not int or not 0 <= start < config.vocab_size:
        raise ValueError(
            f"{where}: expected a token below {config.vocab_size} with which the decoder begins, got {start!r:.60}"
        )
    return start


def encode_translation(tokenizer: Tokens, pair: Pair, longest: int, start: int | None) -> Encoded | None:
    """A source and its target, which alone is scored; None where nothing is left of it.

    start: with which an encoder-decoder's decoder begins: the encoder reads the source, and the decoder the target one
    place to the right. None: a decoder, which reads the source, a line end, and the target. Either way the target is
    cut after `longest` with its end token: with the source before it, or alone beside a source cut to `longest`.
    """
    if start is None:
        return encode_pair(tokenizer, Pair(pair.prompt + BETWEEN, pair.completion), longest)
    read = encode_source(tokenizer, pair.prompt, longest)
    ids = tokenizer.encode(pair.completion)
    if tokenizer.eos is not None and ids[-1:] != [tokenizer.eos]:
        ids = [*ids, tokenizer.eos]
    if not ids:
        return None
    targets = np.array(ids[:longest])
    tokens = np.array([start, *targets[:-1]])
    return Encoded(Example(tokens, targets, read.tokens), len(ids) > longest, read.cut)


class Source(NamedTuple):
    """What an encoder reads (S,), and whether it was cut."""

    tokens: Array
    cut: bool


def encode_source(tokenizer: Tokens, text: str, longest: int) -> Source:
    """A text as an encoder reads it; of a cut one, its last token, which ends it, stays."""
    whole = len(tokenizer.encode(text))
    return Source(encode_labelled(tokenizer, text, IGNORED, longest).tokens, whole > longest)


def source_prompt(tokenizer: Tokens, text: str) -> list[int]:
    """What a decoder goes on from with the translation of a text."""
    return prompt_ids(tokenizer, text + BETWEEN)

"""Text into token ids and back, as a model's own tokenizer does it: a Hugging Face folder's, or a GGUF file's."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..files.extras import missing
from ..files.json_file import read_json
from ..files.messages import named, shown
from ..files.regular import expect_file
from .gguf_file import GGUFFile, open_gguf
from .tokenizer_json import Limits, check_merges, check_tokenizer

TOKENIZER, TOKENIZER_CONFIG, SPECIAL_MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
MAX_TOKENIZER_BYTES = 64 * 2**20
MAX_TOKENS, MAX_MERGES, MAX_WHOLE, MAX_TOKEN_BYTES = 2**19, 2**20, 2**14, 1024
PIECE, SLACK = 256, 2**16  # characters whose normal form is measured at once; bytes that any text may have in it
CONTROL, USER_DEFINED = 3, 4  # GGUF's types of tokens that are found in a text as they stand
# How a text is cut into words, by GGUF's name: whether each digit is a word of its own. The rest is GPT-2's rule.
PRE_TOKENIZERS = {"gpt-2": False, "default": False, "smollm": True, "starcoder": True}


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer: its number of ids, used or not, and those of special tokens; None: there is none.

    bos, eos   the first and the last token of a text
    pad        what fills short texts up
    cls, sep   what BERT puts before a text, and behind it
    limits     what a text may be, so that it is encoded in good time
    path       its file, which errors name
    """

    vocab_size: int
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    cls: int | None = None
    sep: int | None = None
    backend: Any = field(default=None, repr=False)  # a tokenizers.Tokenizer
    limits: Limits = field(default=Limits(), repr=False)
    path: Path = field(default=Path(), repr=False)

    def special(self) -> dict[str, str]:
        """The special tokens as a chat template reads them: bos_token, eos_token and so on, as far as there are."""
        ids = {kind: getattr(self, kind) for kind in ("bos", "eos", "pad", "cls", "sep")}
        return {f"{kind}_token": self.backend.id_to_token(i) for kind, i in ids.items() if i is not None}

    def whole(self) -> list[str]:
        """The special tokens that are found in a text as they stand."""
        return [token.content for token in self.backend.get_added_tokens_decoder().values() if token.special]

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a text. special: with the tokens around it that the model was trained with (BERT: cls, sep).

        What reads like a special token in the text becomes one; bytes that there is no token for are left out (SmolLM2
        lacks a few). A TypeError if text is no str; a ValueError if it holds half a surrogate pair, if the tokenizer
        has no id for a part of it, or would take too long over it.
        """
        return list(self._encoded(text, special).ids)

    def _encoded(self, text: str, special: bool) -> Any:
        """A tokenizers.Encoding. Errors as of `encode`."""
        if not isinstance(text, str):
            raise TypeError(f"encode: expected a str, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"encode: character {error.start} is half a surrogate pair") from None
        with _refused(f"{self.path}: encode: the tokenizer cannot encode this text"):
            self._check_growth(text)
            self._check_rows(text)
            encoded = self.backend.encode(text, add_special_tokens=special)
        largest = max(encoded.ids, default=0)
        if largest >= self.vocab_size:
            raise ValueError(
                f"{self.path}: encode: expected ids below {self.vocab_size} around the text, got {largest}"
            )
        return encoded

    def _check_growth(self, text: str) -> None:
        """A ValueError if the text's normal form is much longer, measured in pieces."""
        if self.limits.growth is None:
            return
        left = self.limits.growth * len(text.encode()) + SLACK
        for at in range(0, len(text), PIECE):
            left -= len(self.backend.normalizer.normalize_str(text[at : at + PIECE]).encode())
            if left < 0:
                raise ValueError("the text grows beyond all measure")

    def _check_rows(self, text: str) -> None:
        """A ValueError if a row of characters on which the tokenizer is slow is long, in the text's normal form."""
        if not self.limits.rows:
            return
        tokenizers, normalizer = import_tokenizers(), self.backend.normalizer
        text = normalizer.normalize_str(text) if normalizer else text
        for chars in self.limits.rows:
            row = tokenizers.Regex(f"(?:{chars}|(?im:{chars}))+")  # either case, as a flag may stand around them
            found = tokenizers.pre_tokenizers.Split(row, "removed", invert=True).pre_tokenize_str(text)
            longest = max((len(piece) for piece, _ in found), default=0)
            if longest > self.limits.longest:
                raise ValueError(
                    f"expected at most {self.limits.longest} characters in a row that fit {shown(chars)}, got {longest}"
                )

    def encode_words(self, words: Sequence[str]) -> tuple[list[int], list[int | None]]:
        """The ids of words, a space between them, and of which word each is, None: of none. Errors as of `encode`."""
        encoded = self._encoded(" ".join(words), True)
        spans = encoded.offsets  # of characters
        ends = np.cumsum([len(word) + 1 for word in words])  # a word's characters, and the space behind it
        # A token may begin with the space before it, so its last character says where it belongs.
        at = np.searchsorted(ends, [end - 1 for _, end in spans], side="right")
        return list(encoded.ids), [int(n) if end > start else None for n, (start, end) in zip(at, spans, strict=True)]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of ids (length,); special: with the special tokens among them. A ValueError names a negative id.

        Ids beyond the tokenizer's are left out: a model may have more rows than its tokenizer has tokens.
        """
        ids = [int(i) for i in ids]
        if min(ids, default=0) < 0:
            raise ValueError(f"{self.path}: decode: expected ids of at least 0, got {min(ids)}")
        ids = [i for i in ids if i < self.vocab_size]
        with _refused(f"{self.path}: decode: the tokenizer cannot decode these ids"):
            text: str = self.backend.decode(ids, skip_special_tokens=not special)
        return text


def import_tokenizers() -> Any:
    """The tokenizers package; an ImportError says how to get it."""
    try:
        import tokenizers
    except ImportError as error:
        raise missing("a model's own tokenizer", "tokenizers", "models") from error
    return tokenizers


@named
def load_tokenizer(path: str | os.PathLike[str], *, pre: str | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face folder (its tokenizer.json), or of a .gguf file (its metadata).

    pre: for a GGUF file, how texts are cut into words, if not as the file says: one of PRE_TOKENIZERS. Files whose
    converter did not know their tokenizer say something wrong, or nothing.
    A FileNotFoundError or ValueError, in one line, says which file is missing, damaged or not supported.
    """
    path = Path(path)
    if path.suffix.lower() == ".gguf":
        with open_gguf(path) as file:
            return _from_gguf(file, pre)
    if pre is not None:
        raise ValueError(f"load_tokenizer: pre is for GGUF files; {path / TOKENIZER} says itself how texts are cut")
    return _from_folder(path)


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def _from_folder(folder: Path) -> Tokenizer:
    path = folder / TOKENIZER
    expect_file(path)
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise ValueError(f"{path}: expected at most {MAX_TOKENIZER_BYTES} bytes, got {path.stat().st_size}")
    tokenizers = import_tokenizers()
    with _refused(f"{path}: not a tokenizer"):
        raw = json.loads(path.read_bytes())
        limits = check_tokenizer(raw, tokenizers)
    raw |= {"padding": None, "truncation": None}  # texts are cut and filled up in batches, not here
    if raw["model"].get("dropout"):
        warnings.warn(
            f"{path}: model.dropout is {raw['model']['dropout']!r:.20}: switched off, as encoding would be random",
            stacklevel=3,
        )
        raw["model"]["dropout"] = None
    # What was checked is what is read.
    backend, ids = _built(str(path), lambda tokenizers: tokenizers.Tokenizer.from_str(json.dumps(raw)))
    for token in backend.get_added_tokens_decoder().values():
        if token.normalized and backend.normalizer and not backend.normalizer.normalize_str(token.content):
            raise ValueError(f"{path}: added_tokens: nothing is left of {shown(repr(token.content))} when normalized")
    names: dict[str, Any] = {}
    for where in (folder / SPECIAL_MAP, folder / TOKENIZER_CONFIG):
        names |= read_json(where) if where.is_file() else {}
    special = {kind: _special_id(backend, names.get(f"{kind}_token")) for kind in ("bos", "eos", "pad", "cls", "sep")}
    largest = max(ids, default=-1)
    if largest >= MAX_TOKENS:
        raise ValueError(f"{path}: expected ids below {MAX_TOKENS}, got {largest}")
    return Tokenizer(largest + 1, **special, backend=backend, limits=limits, path=path)


def _special_id(backend: Any, name: Any) -> int | None:
    """The id of a special token: named as a string, or as an object with its content."""
    name = name.get("content") if isinstance(name, Mapping) else name
    found: int | None = backend.token_to_id(name) if isinstance(name, str) else None
    return found


# --- GGUF ------------------------------------------------------------------------------------------------------------


def _from_gguf(file: GGUFFile, pre: str | None) -> Tokenizer:
    model = file.get("tokenizer.ggml.model", str)
    if model != "gpt2":
        raise ValueError(f"{file.path}: tokenizer {model!r:.60} is not supported; gpt2 (byte-level BPE) is")
    name = file.get("tokenizer.ggml.pre", str, "default") if pre is None else pre
    if name not in PRE_TOKENIZERS:
        supported = " ".join(PRE_TOKENIZERS)
        raise ValueError(f"{file.path}: pre-tokenizer {name!r:.60} is not supported; {supported} are")
    tokens = file.array("tokenizer.ggml.tokens", str, MAX_TOKENS)
    types = file.array("tokenizer.ggml.token_type", int, len(tokens))
    merges = [tuple(merge.split(" ")) for merge in file.array("tokenizer.ggml.merges", str, MAX_MERGES)]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(types) != len(tokens):
        raise ValueError(f"{file.path}: tokenizer.ggml.token_type: expected {len(tokens)} values, got {len(types)}")
    if len(vocab) != len(tokens):
        raise ValueError(f"{file.path}: tokenizer.ggml.tokens: {len(tokens)} tokens, {len(vocab)} of them different")
    whole = sum(kind in (CONTROL, USER_DEFINED) for kind in types)
    if whole > MAX_WHOLE:
        raise ValueError(f"{file.path}: tokenizer.ggml.token_type: expected at most {MAX_WHOLE} special, got {whole}")
    try:
        check_merges(merges, vocab)
    except ValueError as error:
        raise ValueError(f"{file.path}: tokenizer.ggml.{error}") from None
    special: dict[str, Any] = {
        kind: _gguf_id(file, f"tokenizer.ggml.{key}_token_id", len(tokens))
        for kind, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    ends = [
        special[kind] if file.get(f"tokenizer.ggml.add_{kind}_token", bool, False) else None for kind in ("bos", "eos")
    ]

    def build(tokenizers: Any) -> Any:
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
        words = [tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
        digits = [tokenizers.pre_tokenizers.Digits(individual_digits=True)] if PRE_TOKENIZERS[name] else []
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(digits + words)
        backend.decoder = tokenizers.decoders.ByteLevel()
        for kind, add in ((CONTROL, backend.add_special_tokens), (USER_DEFINED, backend.add_tokens)):
            found = [token for token, its_kind in zip(tokens, types, strict=True) if its_kind == kind and token]
            add([tokenizers.AddedToken(token, normalized=False, special=kind == CONTROL) for token in found])
        if ends != [None, None]:
            backend.post_processor = _around(tokenizers, tokens, *ends)
        return backend

    return Tokenizer(len(tokens), **special, backend=_built(str(file.path), build)[0], path=Path(file.path))


def _gguf_id(file: GGUFFile, key: str, n: int) -> int | None:
    """A token's id in the metadata, if it is there."""
    if key not in file.metadata:
        return None
    value: int = file.get(key, int)
    if not 0 <= value < n:
        raise ValueError(f"{file.path}: {key}: expected a token's id below {n}, got {value}")
    return value


def _around(tokenizers: Any, tokens: list[str], bos: int | None, eos: int | None) -> Any:
    """What puts the first and the last token around a text."""
    found = {name: i for name, i in (("bos", bos), ("eos", eos)) if i is not None}
    return tokenizers.processors.TemplateProcessing(
        single=[name for name in ("bos", "$A", "eos") if name == "$A" or name in found],
        special_tokens=[{"id": name, "ids": [i], "tokens": [tokens[i]]} for name, i in found.items()],
    )


def _built(where: str, build: Callable[[Any], Any]) -> tuple[Any, Collection[int]]:
    """What `build` makes with the tokenizers package, and its ids; a ValueError if it cannot, or a token is long."""
    tokenizers = import_tokenizers()
    with _refused(f"{where}: not a tokenizer"):
        backend = build(tokenizers)
        vocab = backend.get_vocab()
        longest = max((len(token.encode()) for token in vocab), default=0)
    if longest > MAX_TOKEN_BYTES:
        raise ValueError(f"{where}: expected tokens of at most {MAX_TOKEN_BYTES} bytes, got one of {longest}")
    return backend, vocab.values()


@contextmanager
def _refused(why: str) -> Iterator[None]:
    """Errors of the tokenizers package, which have no type of their own, as a ValueError in one line."""
    try:
        yield
    except BaseException as error:
        # Where Rust panics, that is no Exception, of a type that cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{why}: {shown(str(error))}") from None

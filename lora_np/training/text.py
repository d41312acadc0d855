"""Text into batches of tokens: the byte tokenizer, windows, and the text that comes with Python itself."""

from __future__ import annotations

import codecs
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..backend import Array
from ..formats.files.regular import expect_file

BYTES = 256  # the byte tokenizer's vocabulary


class Windows(NamedTuple):
    """Stretches of a text: targets[n,t] is the token after tokens[n,t]. Both (N,T)."""

    tokens: Array
    targets: Array


def encode(text: str) -> Array:
    """The byte tokenizer: a text's UTF-8 bytes. -> (length,) uint8."""
    return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)


def decode(tokens: Array) -> str:
    """The text of byte tokens (length,); bytes that are no UTF-8 become the replacement character."""
    return np.asarray(tokens, dtype=np.uint8).tobytes().decode("utf-8", errors="replace")


class ByteTokenizer:
    """The byte tokenizer as the models' own are: a text's UTF-8 bytes, and no special tokens."""

    vocab_size = BYTES
    eos: int | None = None

    def special(self) -> dict[str, str]:
        """The special tokens by name: none."""
        return {}

    def whole(self) -> list[str]:
        """The tokens that are found in a text as they stand: none."""
        return []

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The bytes of a text; there is nothing special about them."""
        return encode(text).tolist()

    def encode_words(self, words: Sequence[str]) -> tuple[list[int], list[int | None]]:
        """The bytes of words with a space between them, and of which word each is; None: a space."""
        of = [n if i else None for n, word in enumerate(words) for i in [0, *[1] * len(encode(word))]]
        return self.encode(" ".join(words)), of[1:]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of bytes; those that are no UTF-8 become the replacement character."""
        return decode(np.array(list(ids), dtype=np.uint8))


def read_text(path: str | Path) -> str:
    """A file's text, without a byte order mark. Errors say if there is none, it is empty, or is not UTF-8."""
    path = Path(path)
    expect_file(path)
    return decoded(path.read_bytes(), path)


def decoded(raw: bytes, path: Path) -> str:
    """The text of a file's bytes; errors, which name it, as of `read_text`."""
    try:
        text = raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text; byte {error.start} is not") from error
    if not text:
        raise ValueError(f"{path}: the file is empty")
    return text


def split(tokens: Array, held_out: float) -> tuple[Array, Array]:
    """The text but its last part, and that part, held out. -> (train, held out)."""
    at = len(tokens) - round(len(tokens) * held_out)
    return tokens[:at], tokens[at:]


def random_windows(tokens: Array, *, N: int, T: int, seed: int, step: int) -> Windows:
    """N windows of a text for one step of training: the same seed and step give the same windows."""
    _check_length(tokens, T)
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - T, N)
    return _windows(tokens, starts, T)


def all_windows(tokens: Array, *, N: int, T: int, most: int) -> Iterator[Windows]:
    """A text's windows, one behind the other, at most `most` of them spread evenly, N at a time: for evaluation."""
    _check_length(tokens, T)
    n = (len(tokens) - 1) // T
    starts = T * np.unique(np.linspace(0, n - 1, min(n, most)).astype(np.int64))
    for first in range(0, len(starts), N):
        yield _windows(tokens, starts[first : first + N], T)


def _check_length(tokens: Array, T: int) -> None:
    if len(tokens) <= T:
        raise ValueError(f"text: expected more than one window of {T} tokens, got {len(tokens)} tokens")


def _windows(tokens: Array, starts: Array, T: int) -> Windows:
    at = starts[:, None] + np.arange(T)  # (N,T)
    return Windows(tokens[at].astype(np.int64), tokens[at + 1].astype(np.int64))


def language_reference() -> str:
    """Python's language reference, as pydoc_data carries it: English prose of about 700 kB."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def standard_library(most: int = 2_000_000) -> str:
    """The source of Python's standard library, its top-level modules by name: about `most` characters of it."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = ""
    for path in sorted(folder.glob("*.py")):
        text += path.read_text(encoding="utf-8", errors="replace")
        if len(text) >= most:
            return text
    if not text:
        raise FileNotFoundError(f"{folder}: this Python comes without the source of its standard library")
    return text

"""tokenizer.json: what may stand in it, before the tokenizers package reads it.

That package trusts its files: in a few lines a text grows until the memory is full, or an array is read beyond its end.
So each step is known here by its name, with the most that it makes of a byte.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from ..files.messages import shown
from .splits import UnsafeError, check_split

MAX_STEPS = 100
MAX_GROWTH = 32  # times as many bytes as a text has, in all
MAX_NORMAL = 10_000  # the same of the normalizer alone, which is measured on each text if it may exceed MAX_GROWTH
MAX_AFFIX = 100  # bytes of what is put to each piece of a text, or in its place
MAX_ROW = 4096  # characters in a row, where an expression takes the square of their number
MAX_WORD = 1000  # characters of a word, which WordPiece searches in the square of its length
# The most bytes that a step makes of one, on any text; None: its fields say it.
STEPS: dict[str, dict[str, float | None]] = {
    "normalizer": {
        "BertNormalizer": 8, "ByteLevel": 2, "Lowercase": 1.5, "NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Nmt": 3,
        "Precompiled": None, "Prepend": None, "Replace": None, "Strip": 1, "StripAccents": 1,
    },
    "pre_tokenizer": {
        "BertPreTokenizer": 1, "ByteLevel": 4, "CharDelimiterSplit": 1, "Digits": 1, "FixedLength": 1, "Metaspace": 6,
        "Punctuation": 1, "Split": 1, "UnicodeScripts": 1, "Whitespace": 1, "WhitespaceSplit": 1,
    },
    "post_processor": {"BertProcessing": 1, "ByteLevel": 1, "RobertaProcessing": 1, "TemplateProcessing": 1},
    "decoder": {
        "BPEDecoder": 2, "ByteFallback": 1, "ByteLevel": 1.5, "CTC": 2, "Fuse": 1, "Metaspace": 1, "Replace": None,
        "Strip": 1, "WordPiece": 2,
    },
}  # fmt: skip
LISTS = ("normalizers", "pretokenizers", "processors", "decoders")


class Limits(NamedTuple):
    """What a text may be.

    growth     how many times as long as a text its normal form may be; None: it never is
    rows       expressions of characters of which only so many may stand in a row, in the normal form
    longest    how many
    """

    growth: float | None = None
    rows: tuple[str, ...] = ()
    longest: int = MAX_ROW


def check_tokenizer(raw: Any, tokenizers: Any) -> Limits:
    """What a text may be. A ValueError says what a tokenizer.json may not hold."""
    if not isinstance(raw, dict):
        raise ValueError(f"expected an object, got {type(raw).__name__}")
    found = {}
    for section in STEPS:
        with _typed(section):
            found[section] = _growth(section, raw.get(section), tokenizers)
    growth = {section: most for section, (most, _) in found.items()}
    normal = growth.pop("normalizer")
    for section, most in [("normalizer", normal / MAX_NORMAL), *((s, g / MAX_GROWTH) for s, g in growth.items())]:
        if most > 1:
            raise ValueError(f"{section}: a text might grow beyond all measure")
    with _typed("model"):
        _check_model(raw.get("model"))
    allowed = MAX_GROWTH / growth["pre_tokenizer"]
    rows = found["pre_tokenizer"][1]
    longest = MAX_ROW // max(1, sum(ways for _, ways in rows))
    return Limits(None if normal <= allowed else allowed, tuple(dict.fromkeys(chars for chars, _ in rows)), longest)


@contextmanager
def _typed(section: str) -> Iterator[None]:
    """A ValueError in the place of what Python says of a value that has another type than what is read of it."""
    try:
        yield
    except (AttributeError, LookupError, TypeError):
        raise ValueError(
            f"{section}: expected each field of its own type, got one that is missing or of another"
        ) from None


def check_merges(merges: Iterable[Any], vocab: Any, prefix: str = "") -> None:
    """A ValueError unless the two parts of each merge join to a token. prefix: what the second part begins with."""
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if len(parts) != 2 or not parts[1].startswith(prefix) or parts[0] + parts[1][len(prefix) :] not in vocab:
            raise ValueError(f"merges: expected two parts that join to a token, got {shown(repr(merge))}")


def _growth(section: str, step: Any, tokenizers: Any) -> tuple[float, list[tuple[str, int]]]:
    """The most bytes that the steps of a section make of one; and the rows that its expressions are slow on."""
    growth, rows, known = 1.0, [], STEPS[section]
    for n, fields in enumerate(_steps(step)):
        kind = fields.get("type")
        if kind not in known:
            raise ValueError(f"{section}: {shown(repr(kind))} is not supported; {' '.join(known)} are")
        if n == MAX_STEPS:
            raise ValueError(f"{section}: expected at most {MAX_STEPS} steps")
        try:
            slow = _check_fields(fields, tokenizers)
            if slow and (section != "pre_tokenizer" or growth > 1):
                raise UnsafeError("it takes the square of a word's length, and may cut only a text in its normal form")
        except UnsafeError as error:
            text = shown(repr(fields["pattern"]["Regex"])[:60])
            raise ValueError(f"{section}: the expression {text} is not supported: {error}") from None
        rows += slow
        growth *= known[kind] or _grown(fields)
    return growth, rows


def _steps(step: Any) -> Iterator[dict[str, Any]]:
    """The single steps of a section, in order."""
    if step is None:
        return
    if not isinstance(step, dict):
        raise ValueError(f"expected a step as an object, got {type(step).__name__}")
    parts = [part for key in LISTS for part in step.get(key, ())]  # some are read by their fields, whatever the type
    for part in parts:
        yield from _steps(part)
    if step.get("type") != "Sequence":
        yield step


def _check_fields(fields: dict[str, Any], tokenizers: Any) -> list[tuple[str, int]]:
    """The rows that its expression is slow on. A ValueError names what the package would panic at, or take for ever."""
    if fields.get("length") == 0 or fields.get("stop", 0) != 0:
        raise ValueError("expected a FixedLength of at least 1, and a Strip whose stop is 0")
    if "single" in fields:
        _check_template(fields["single"], fields["special_tokens"])
    pattern = fields.get("pattern") or {}
    empty, rows = pattern.get("String") == "", list[tuple[str, int]]()
    if "Regex" in pattern:
        empty, rows = check_split(pattern["Regex"], tokenizers)
    if empty and fields["type"] == "Replace":
        raise ValueError("Replace: expected a pattern that does not fit an empty text")
    return rows


def _check_template(pieces: list[Any], special: dict[str, Any]) -> None:
    """What is put around a text: the text once, and tokens that are known."""
    texts = [piece["Sequence"]["id"] for piece in pieces if "Sequence" in piece]
    unknown = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
    unknown = [name for name in unknown if name not in special or len(special[name]["ids"]) > MAX_STEPS]
    if texts != ["A"] or unknown or len(pieces) > MAX_STEPS:
        raise ValueError("TemplateProcessing: expected the text once, and known tokens around it")


def _grown(fields: dict[str, Any]) -> float:
    """The most bytes that a step makes of one, by its fields."""
    if fields["type"] == "Prepend":
        return 1 + len(fields["prepend"].encode())
    if fields["type"] == "Replace":
        return max(1.0, len(fields["content"].encode()) / len(fields["pattern"].get("String", "1").encode()))
    return _longest(base64.b64decode(fields["precompiled_charsmap"], validate=True))


def _longest(table: bytes) -> int:
    """The longest text in SentencePiece's table of texts in place of others. A ValueError if a step leads out of it.

    The table: the size of an index, the index, and the texts, each up to a zero. The index: the bytes of a text lead
    from unit to unit, each at the one before XOR that one's offset XOR the byte; a leaf, at byte 0, says which text.
    """
    size = int.from_bytes(table[:4], "little")
    if not 0 < size <= len(table) - 5 or size % 4:
        raise ValueError("Precompiled: the table is damaged")
    units, texts = np.frombuffer(table[4 : 4 + size], "<u4").astype(np.int64), table[4 + size :]
    nodes = np.flatnonzero(units < 1 << 31)
    first = nodes ^ (units[nodes] >> 10 << ((units[nodes] & 1 << 9) >> 6))
    inside = units[0] < 1 << 31 and ((first | 255) < len(units)).all()
    leaves = units[first[units[nodes] & 1 << 8 != 0]] & ~(1 << 31) if inside else np.array([len(texts)])
    begins = np.frombuffer(texts, np.uint8) & 0xC0 != 0x80
    if not (leaves < len(texts)).all() or not begins[leaves].all():
        raise ValueError("Precompiled: the table is damaged")
    return max(len(text.encode()) for text in texts.decode().split("\0")) or 1


def _check_model(model: Any) -> None:
    """What the model puts to each piece of a text, or in its place, is short; and its merges join."""
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        if len((model.get(key) or "").encode()) > MAX_AFFIX:
            raise ValueError(f"model.{key}: expected at most {MAX_AFFIX} bytes")
    if model.get("max_input_chars_per_word", 0) > MAX_WORD:
        raise ValueError(f"model.max_input_chars_per_word: expected at most {MAX_WORD}")
    check_merges(model.get("merges", ()), model["vocab"], model.get("continuing_subword_prefix") or "")

"""Expressions that cut a text: those that real tokenizers have are taken, those that may try for ever are not."""

import pytest

from lora_np.formats.models.splits import UnsafeError, check_split

tokenizers = pytest.importorskip("tokenizers", reason="models' own tokenizers: the extra models")

CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
ENDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REAL = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": rf"{CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{ENDS}",
    "qwen2": rf"{CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{ENDS}",
    "o200k": rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTED}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTED}?"
    rf"|\p{{N}}{{1,3}}|{ENDS}",
    "tekken": rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}|{ENDS}",
    "kimi": r"[\p{Han}]+|[\p{Lu}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{M}&&[^\p{Han}]]+",
    "deepseek": r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "chinese": "[一-龥぀-ゟ゠-ヿ]+",
    "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "clip": r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    "falcon": "[0-9][0-9][0-9]",
    "digits from the right": r"(?=(\d{3})+(?!\d))",
    "digits of a number": r"\d{1,3}(?=(?:\d{3})*\b)",
    "possessive": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "t5": " {2,}",
    "siglip": r"""[!"\#\$%\&'\(\)\*\+,\-\.:;=\?@\[\\\]\^_`\{\|\}\~]""",
    "words": r"(?i)\w+|[^\w\s]",
    "any": r"[\s\S]",
}
SLOW_REAL = {
    "kimi": (r"[\p{Lu}\p{M}&&[^\p{Han}]]", 1), "digits from the right": (r"\d", 1), "digits of a number": (r"\d", 3),
}  # fmt: skip


@pytest.mark.parametrize("text", REAL.values(), ids=REAL)
def test_what_real_tokenizers_have(text):
    tokenizers.Regex(text)
    rows = [row for name, row in SLOW_REAL.items() if REAL[name] == text]
    assert check_split(text, tokenizers) == (text == REAL["digits from the right"], rows)


@pytest.mark.parametrize("text", ["", "a*", "a|", "(?:a|b?)", r"\b", "^", "$", "(?=a)", "(?i)", "a{0,3}b?"])
def test_what_fits_an_empty_text(text):
    assert check_split(text, tokenizers)[0]


@pytest.mark.parametrize(
    ("text", "rows"),
    {
        r"\s+!|\s+": [], r"\s*x|\s+y|z?\s+a?": [], "(?i)[a-z]+!|[a-z]+": [], r"\s+(?!\S)": [],
        "[a-z]+!": [("[a-z]", 1)], r"\s+$": [(r"\s", 1)], "b?c{1,2}(?:[ab]c)+d": [("[ab]|c", 4)],
        r"a(?=a*)": [("a", 1)], "(?:a*|b*)c": [("a", 2), ("b", 2)],
        # what looks as if it took the row
        r"\s+!|\s|\s+": [(r"\s", 1)], r"\s+!|\s+?|\s+": [(r"\s", 1)], r"\s+!|\s+?\s|\s+": [(r"\s", 1)],
        "a+!|[ab]+": [("a", 1)], "a+!|ba+": [("a", 1)], "a+!|a+b": [("a", 1)] * 2, "a+!|(?:a|b)": [("a", 1)],
        "(?i:k+!)k*|k+": [("k", 1)], "a+!|a*+a+": [("a", 1)] * 2, r"\s++(?!\S)": [(r"\s", 1)],
        r"\s+?(?!\S)": [(r"\s", 1)], r"\d+(?!\S)": [(r"\d", 1)],
    }.items(),
)  # fmt: skip
def test_rows_that_are_slow(text, rows):
    """An alternative right behind, which takes the whole row, makes up for one that is taken back."""
    assert check_split(text, tokenizers)[1] == rows


UNSAFE = {
    "a repeat of a group": ["(a+)+$", "(?:a|a){20}b", "(?:a|ab)*c", "(?:[ab]a?)*b", "(?:(?:a{3}){3}){3}"],
    "a repeat of both letters and spaces": [
        ".*x", ".*.*x", "[^x]*x", "[^x]++x", "(?=.*)", "(?!.*x)", "(?<=.*)a", r"[\s\S]*?x", r"(?:[\w\s])*x", r"\s?.*$",
    ],
    "too many ways": [r"\s*\s*x", r"\s+\s+(?!\S)", "a?" * 12 + "b", "(?:.|.)" * 12 + "q", "(?:a*|b)c*d"],
    "a count": ["a{1,3}+b", "a{1000}", "a{,}", "a{3,1}", "a{2}?", "a{99999999999999999999}"],
    "not understood": [
        r"(\w)\1", "(?R)", "a)", "(a", "[a", "a**", r"(?<n>a)\g<n>", "x(?i)a|b", r"\X", "(?x)a b", "(*F)", "{",
        "(?~ab)", "(?>a)", "(?:" * 300 + ")" * 300, "(" * 100_000, "\\",
    ],
    "at most": ["a" * 10_001],
}  # fmt: skip


@pytest.mark.parametrize(("why", "text"), [(why, text) for why in UNSAFE for text in UNSAFE[why]], ids=lambda t: t[:30])
def test_what_may_try_for_ever(why, text):
    if why == "at most" or len(text) > 10_000:
        why = "at most 10000"
    with pytest.raises(UnsafeError, match=why):
        check_split(text, tokenizers)

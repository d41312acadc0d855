"""tokenizer.json from others: what real ones hold is taken, what makes too much of a text or ends in a panic is not."""

import base64
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_np.formats.models.tokenizer import load_tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="models' own tokenizers: the extra models")


def charsmap(text, *, offset=256, units=512, value=0):
    """SentencePiece's table by hand: a is replaced by a text."""
    index = np.zeros(units, "<u4")
    index[0] = offset << 10  # from the root to the block at 256
    if units > 256:
        index[256 ^ ord("a")] = ord("a") | 1 << 8 | ord("a") << 10  # an end, whose leaf is at 256
        index[256] = 1 << 31 | value
    table = index.nbytes.to_bytes(4, "little") + index.tobytes() + text.encode() + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


def replace(pattern, content, kind="String"):
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def steps(*parts, key="normalizers"):
    return {"type": "Sequence", key: list(parts)}


def step(kind, **fields):
    return {"type": kind, **fields}


A, B = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
SPECIAL = {"SpecialToken": {"id": "b", "type_id": 0}}


def template(*single, special=("b",)):
    tokens = {name: {"id": name, "ids": [1], "tokens": ["b"]} for name in special}
    return step("TemplateProcessing", single=list(single), pair=[A, B], special_tokens=tokens)


WORDS = step("WordLevel", vocab={"a": 0, "b": 1, "?": 2}, unk_token="?")
BYTES = step("ByteLevel", add_prefix_space=True, trim_offsets=True, use_regex=True)
METASPACE = step("Metaspace", replacement="▁", prepend_scheme="always", split=True)
BERT = step("BertNormalizer", clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True)


@pytest.fixture
def load(tmp_path):
    """A function that writes a tokenizer.json with these sections, and loads it."""

    def load(**sections):
        raw = {"version": "1.0", "added_tokens": [], "model": WORDS, **sections}
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        return load_tokenizer(tmp_path)

    return load


REAL = {
    "bert": {"normalizer": BERT, "pre_tokenizer": step("BertPreTokenizer"), "post_processor": template(A, SPECIAL)},
    "roberta": {
        "pre_tokenizer": BYTES, "decoder": BYTES,
        "post_processor": step(
            "RobertaProcessing", sep=["b", 1], cls=["a", 0], trim_offsets=True, add_prefix_space=True
        ),
    },
    "llama2": {
        "normalizer": steps(step("Prepend", prepend="▁"), replace(" ", "▁")), "post_processor": template(SPECIAL, A),
        "decoder": steps(
            replace("▁", " "), step("ByteFallback"), step("Fuse"), step("Strip", content=" ", start=1, stop=0),
            key="decoders",
        ),
    },
    "llama3": {
        "pre_tokenizer": steps(
            step("Split", pattern={"Regex": r"\p{N}{1,3}|\s+(?!\S)|\s+"}, behavior="Isolated", invert=False), BYTES,
            key="pretokenizers",
        ),
        "post_processor": steps(BYTES, template(SPECIAL, A), key="processors"),
    },
    "qwen": {"normalizer": step("NFC"), "pre_tokenizer": BYTES},
    "gemma": {
        "normalizer": replace(" ", "▁"),
        "pre_tokenizer": step("Split", pattern={"String": " "}, behavior="MergedWithPrevious", invert=False),
    },
    "t5": {
        "normalizer": charsmap("ﷺ" * 11),
        "pre_tokenizer": steps(step("WhitespaceSplit"), METASPACE, key="pretokenizers"), "decoder": METASPACE,
    },
    "albert": {
        "normalizer": steps(
            replace("``", '"'), replace("''", '"'), step("NFKD"), step("StripAccents"), step("Lowercase"),
            charsmap("ﷺ" * 11), replace(" {2,}", " ", "Regex"),
        ),
        "pre_tokenizer": METASPACE,
    },
    "falcon": {
        "pre_tokenizer": steps(
            step("Punctuation", behavior="Contiguous"), BYTES, step("Digits", individual_digits=False),
            step("Split", pattern={"Regex": "[0-9][0-9][0-9]"}, behavior="Isolated", invert=False), key="pretokenizers",
        )
    },
    "metaspace and bytes": {"pre_tokenizer": steps(METASPACE, BYTES, key="pretokenizers")},
}  # fmt: skip


@pytest.mark.parametrize("sections", REAL.values(), ids=REAL)
def test_what_real_tokenizers_hold(load, sections):
    ours = load(**sections)
    plain = {"version": "1.0", "added_tokens": [], "model": WORDS, **sections}
    peer = tokenizers.Tokenizer.from_str(json.dumps(plain))
    for text in ("", "a b", "  Ab, 1234 é\n", "ﷺ" * 100):
        assert ours.encode(text) == peer.encode(text).ids
    assert ours.decode([0, 1, 2]) == peer.decode([0, 1, 2])


def test_a_models_type_may_be_missing(load):
    """As in old files."""
    model = {"dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": ""}
    assert load(model=model | {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}).encode("aba") == [2, 0]


def bpe(**fields):
    return {"model": step("BPE", vocab={"a": 0, "b": 1, "##b": 2}, merges=[["a", "b"]], **fields)}


def pre(*parts):
    return {"pre_tokenizer": steps(*parts, key="pretokenizers")}


def split(text):
    return step("Split", pattern={"Regex": text}, behavior="Isolated", invert=False)


def post(step):
    return {"post_processor": step}


REFUSED = [
    # what makes too much of a text
    ({"normalizer": steps(*[replace("a", "a" * 10)] * 10)}, "normalizer: a text might grow"),
    ({"normalizer": steps(*[replace("a|b+", "aa", "Regex")] * 14)}, "normalizer: a text might grow"),
    ({"normalizer": steps(*[steps(step("ByteLevel"))] * 34)}, "normalizer: a text might grow"),
    ({"normalizer": steps(*[step("Prepend", prepend="a" * 200)] * 2)}, "normalizer: a text might grow"),
    ({"normalizer": step("Lowercase") | steps(*[replace("a", "a" * 10)] * 10)}, "'Lowercase'|normalizer: a text"),
    ({"normalizer": charsmap("b" * 20_000)}, "normalizer: a text might grow"),
    (pre(*[BYTES] * 34), "pre_tokenizer: a text might grow"),
    (pre(*[METASPACE] * 9), "pre_tokenizer: a text might grow"),
    ({"decoder": steps(*[replace("a", "a" * 10)] * 10, key="decoders")}, "decoder: a text might grow"),
    ({"decoder": steps(*[step("WordPiece", prefix="", cleanup=True)] * 9, key="decoders")}, "decoder: a text might"),
    (post(template(A, A)), "the text once"),
    (post(template(A, A) | {"type": "ByteLevel"}), "the text once"),  # is read by its fields
    (post(steps(template(A, A), key="processors") | {"type": "ByteLevel"}), "the text once"),
    (post(template(*[SPECIAL] * 1000, A)), "the text once"),
    ({"model": WORDS | {"unk_token": "?" * 101}}, "model.unk_token: expected at most 100 bytes"),
    ({"model": WORDS | {"vocab": {"a" * 1025: 0}}}, "expected tokens of at most 1024 bytes, got one of 1025"),
    ({"added_tokens": [step("", id=1, content="a" * 1025, single_word=False, lstrip=False, rstrip=False,
      normalized=False, special=True)]}, "expected tokens of at most 1024 bytes, got one of 1025"),
    # what takes too long
    ({"normalizer": steps(*[step("NFC")] * 200)}, "normalizer: "),
    (pre(*[step("Whitespace")] * 101), "pre_tokenizer: expected at most 100 steps"),
    (pre(step("Split", pattern={"Regex": "(a+)+$"}, behavior="Isolated", invert=False)), "'(a+)+$' is not supported"),
    ({"normalizer": replace("(a+)+$", "", "Regex")}, "'(a+)+$' is not supported"),
    ({"decoder": replace("(a+)+$", "", "Regex")}, "'(a+)+$' is not supported"),
    ({"decoder": replace(r"(?>\s)", "", "Regex")}, r"'(?>\\s)' is not supported"),
    ({"normalizer": replace("[a-z]+!", "z", "Regex")}, "normalizer: the expression '[a-z]+!' is not supported: it"),
    ({"decoder": replace(r"\s+$", "", "Regex")}, r"decoder: the expression '\\s+$' is not supported: it takes"),
    (pre(METASPACE, split(r"\S+!")), r"pre_tokenizer: the expression '\\S+!' is not supported: it takes"),
    ({"model": step("WordPiece", vocab={"a": 0}, unk_token="a", continuing_subword_prefix="##",
      max_input_chars_per_word=10**6)}, "max_input_chars_per_word: expected at most 1000"),
    # what ends in a panic
    ({"normalizer": step("Precompiled", precompiled_charsmap="")}, "Precompiled: the table is damaged"),
    ({"normalizer": charsmap("b", offset=512)}, "Precompiled: the table is damaged"),
    ({"normalizer": charsmap("b", units=256)}, "Precompiled: the table is damaged"),
    ({"normalizer": charsmap("b", value=9)}, "Precompiled: the table is damaged"),
    ({"normalizer": charsmap("é", value=1)}, "Precompiled: the table is damaged"),
    ({"normalizer": replace("", "a")}, "Replace: expected a pattern that does not fit an empty text"),
    ({"normalizer": replace("a*", "é", "Regex")}, "Replace: expected a pattern that does not fit an empty text"),
    ({"normalizer": replace("(?=a)", "", "Regex")}, "Replace: expected a pattern that does not fit an empty text"),
    (pre(step("FixedLength", length=0)), "a FixedLength of at least 1"),
    ({"decoder": step("Strip", content="a", start=0, stop=1)}, "a Strip whose stop is 0"),
    (post(template(B)), "the text once"),
    (post(template()), "the text once"),
    (post(template(A, SPECIAL, special=())), "known tokens around it"),
    (bpe(), "merges: expected two parts that join to a token, got ['a', 'b']"),
    (bpe(continuing_subword_prefix="####"), "merges: expected two parts that join to a token"),
    ({"normalizer": step("Strip", strip_left=True, strip_right=True), "added_tokens": [step("", id=1, content=" ",
      single_word=False, lstrip=True, rstrip=False, normalized=True, special=True)]}, "nothing is left of ' '"),
    # what is not known
    ({"normalizer": step("Zzz", pattern={"String": "a"}, content="b")}, "normalizer: 'Zzz' is not supported"),
    ({"normalizer": {"pattern": {"String": "a"}, "content": "b"}}, "normalizer: None is not supported"),
    ({"decoder": [{"String": "a"}, "b"]}, "expected a step as an object, got list"),
    # what has another type
    ({"normalizer": step("Replace")}, "normalizer: expected each field of its own type"),
    ({"normalizer": step([])}, "normalizer: expected each field of its own type"),
    ({"post_processor": template(None)}, "post_processor: expected each field of its own type"),
    ({"model": []}, "model: expected each field of its own type"),
    ({"model": None}, "model: expected each field of its own type"),
    ({"model": step("BPE", vocab={}, merges=None)}, "model: expected each field of its own type"),
    ({"model": step("BPE", vocab={}, merges=[1])}, "model: expected each field of its own type"),
    ({"model": WORDS | {"unk_token": 1}}, "model: expected each field of its own type"),
]  # fmt: skip


@pytest.mark.parametrize(("sections", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_is_refused(load, sections, message, capfd):
    with pytest.raises(ValueError, match=r"^\S*tokenizer\.json: ") as caught:
        load(**sections)
    assert any(part in str(caught.value) for part in message.split("|"))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_text_that_grows_is_measured(load):
    """The table may make 1,000 bytes of an a: of one in a text it does, of a long text of them it does not."""
    ours = load(normalizer=charsmap("b" * 1000), model=WORDS | {"vocab": {"?": 0}})
    assert ours.encode("a" + "c" * 1000) == [0]
    assert ours.encode("c" * 100_000) == [0]
    measured = []
    normalizer = ours.backend.normalizer

    class Backend:
        class normalizer:
            @staticmethod
            def normalize_str(text):
                measured.append(normalizer.normalize_str(text))
                return measured[-1]

    object.__setattr__(ours, "backend", Backend)
    with pytest.raises(ValueError, match=r"tokenizer\.json: encode: .*the text grows beyond all measure"):
        ours.encode("a" * 100_000)
    assert sum(map(len, measured)) < 32 * 100_000 + 2**16 + 256_000 + 1  # no more than allowed, and a piece


@pytest.mark.parametrize(
    ("sections", "row", "most"),
    [
        (pre(split("[a-z]+!"), BYTES), "a", 4096),
        (pre(split("(?i:[a-z]+!)")), "aA", 2048),
        (pre(step("Punctuation", behavior="Isolated"), split(r"\s+$")), " ", 4096),
        (pre(split("a+!"), split(r"\d{1,3}(?=(?:\d{3})*\b)")), "1", 1024),
        ({"normalizer": replace("a", "b" * 30), **pre(split("b+!"))}, "a", 136),
        ({"normalizer": replace("1", "b"), **pre(split("b+!"))}, "1b", 2048),
    ],
)  # fmt: skip
def test_a_row_that_takes_the_square_of_its_length(load, sections, row, most):
    """A word of so many characters is encoded, and any number of words; a longer one is not."""
    ours = load(**sections)
    for text in (row * most, f"{row}.\n" * 20_000):
        assert ours.encode(text) == ours.backend.encode(text).ids
    with pytest.raises(ValueError, match=r"tokenizer\.json: encode: .*expected at most \d+ .* in a row") as caught:
        ours.encode("." + row * (most + 1))
    assert "\n" not in str(caught.value)


def test_a_rule_without_such_rows_cuts_any_text(load):
    ours = load(**pre(split(r" ?\p{L}+|\s*[\r\n]+|\s+(?!\S)|\s+"), BYTES | {"use_regex": False}))
    for text in ("a" * 50_000, " " * 50_000 + "b", " \n" * 50_000 + " b"):
        assert ours.encode(text) == ours.backend.encode(text).ids


# --- Any steps -------------------------------------------------------------------------------------------------------

SHORT = st.sampled_from(["", "a", "b", " ", "▁", "aaaa", "é", "?"])
PATTERNS = st.one_of(
    st.builds(lambda text: {"String": text}, SHORT),
    st.sampled_from(["a*", "(a+)+$", "a|b", "", r"\b", "(?=a)", "[", " {2,}", "(?:.|.){9}q", ".", "[^a]+"]).map(
        lambda text: {"Regex": text}
    ),
)
BEHAVIORS = st.sampled_from(["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"])
REPLACES = st.builds(lambda pattern, content: step("Replace", pattern=pattern, content=content), PATTERNS, SHORT)
TABLES = st.builds(charsmap, SHORT, offset=st.sampled_from([0, 256, 512]), value=st.integers(0, 3))
KINDS = ["ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "StripAccents"]


def nested(single, key):
    return st.recursive(single, lambda part: st.lists(part, max_size=3).map(lambda s: steps(*s, key=key)), max_leaves=5)


NORMALIZERS = nested(st.one_of(REPLACES, TABLES, st.just(BERT), st.sampled_from(KINDS).map(step)), "normalizers")
PRE_TOKENIZERS = nested(
    st.one_of(
        st.sampled_from([BYTES, METASPACE, step("Whitespace"), step("UnicodeScripts")]),
        st.integers(0, 2).map(lambda n: step("FixedLength", length=n)),
        st.builds(lambda p, b, i: step("Split", pattern=p, behavior=b, invert=i), PATTERNS, BEHAVIORS, st.booleans()),
    ),
    "pretokenizers",
)
PROCESSORS = nested(
    st.one_of(st.just(BYTES), st.lists(st.sampled_from([A, B, SPECIAL]), max_size=3).map(lambda p: template(*p))),
    "processors",
)
DECODERS = nested(
    st.one_of(
        REPLACES,
        st.sampled_from([BYTES, METASPACE, step("Fuse"), step("ByteFallback"), step("BPEDecoder", suffix="")]),
        st.integers(0, 1).map(lambda n: step("Strip", content="a", start=n, stop=n)),
    ),
    "decoders",
)
VOCABS = st.lists(st.sampled_from(["a", "b", "ab", "##b", "Ġ", "?", ""]), unique=True, max_size=6).map(
    lambda tokens: {token: i for i, token in enumerate(tokens)}
)
MODELS = st.one_of(
    st.builds(lambda vocab: WORDS | {"vocab": vocab}, VOCABS),
    st.builds(
        lambda vocab, merges, prefix: step("BPE", vocab=vocab, merges=merges, continuing_subword_prefix=prefix),
        VOCABS, st.sampled_from([[], ["a b"], [["a", "##b"]], [["b", "a"]]]), st.sampled_from([None, "##", "####"]),
    ),
)  # fmt: skip


def test_any_steps_give_ids_or_one_line(load, capfd):
    @given(st.builds(dict, normalizer=NORMALIZERS, pre_tokenizer=PRE_TOKENIZERS, post_processor=PROCESSORS,
                     decoder=DECODERS, model=MODELS), st.text("ab é▁", max_size=30))  # fmt: skip
    def check(sections, text):
        try:
            ours = load(**sections)
            ids = ours.encode(text)
            encoding = ours.backend.encode(text)
            assert sum(map(len, encoding.tokens)) <= 32 * len(text.encode()) + 2**16
            back = ours.decode(ids)
            assert len(back) <= 32 * (sum(map(len, encoding.tokens)) + len(encoding.ids))
        except ValueError as error:
            refused.append(str(error))

    refused = []
    check()
    for message in refused:
        assert "\n" not in message
        assert "tokenizer.json: " in message
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize("depth", [1, 30, 120, 100_000])
@pytest.mark.parametrize("key", ["normalizers", "pretokenizers", "processors", "decoders"])
def test_steps_within_steps(tmp_path, depth, key):
    section = {"normalizers": "normalizer", "pretokenizers": "pre_tokenizer", "processors": "post_processor"}
    plain = {"version": "1.0", "added_tokens": [], "model": WORDS}
    opened = f'{{"type": "Sequence", "{key}": ['
    text = json.dumps(plain)[:-1] + f', "{section.get(key, "decoder")}": ' + opened * depth + "]}" * depth + "}"
    (tmp_path / "tokenizer.json").write_text(text)
    if depth > 100:
        with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer: .*recursion"):
            load_tokenizer(tmp_path)
    else:
        assert load_tokenizer(tmp_path).encode("a") == [0]

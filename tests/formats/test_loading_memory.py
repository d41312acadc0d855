"""Loading a base holds at most a tenth more than what it keeps, whatever the files and however matrices are held."""

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

import lora_np as ln
from lora_np.formats.models.huggingface import places

pytest.importorskip("gguf", reason="reads GGUF files: the extra models")
ml_dtypes = pytest.importorskip("ml_dtypes", reason="reads bfloat16: the extra models")
from gguf_files import write  # noqa: E402

pytestmark = pytest.mark.skipif(ln.backend_name != "numpy", reason="it measures the host's memory")

# The table, and a head that is not tied, are much more than a tenth; a layer's matrix much less.
GPT2 = replace(ln.PRESETS["gpt2"], vocab_size=32000, n_positions=64, n_layer=6, n_head=6, d_model=384, d_ff=1536)
LLAMA = replace(
    ln.PRESETS["smollm2-135m"],
    vocab_size=32000, n_positions=64, n_layer=6, n_head=6, n_kv_head=2, d_model=384, d_ff=1024, tie_head=False,
)  # fmt: skip
CONFIGS = {
    "gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 32000, "n_positions": 64,
        "n_layer": 6, "n_head": 6, "n_embd": 384,
    },
    "llama": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000,
        "max_position_embeddings": 64, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2,
        "hidden_size": 384, "intermediate_size": 1024,
    },
}  # fmt: skip


def kept_within_bound(path, *, at_least, **options):
    """Loads it; the peak of what was allocated meanwhile is at most 1.1 times the weights' bytes."""
    ln.load_model(path, **options)  # imports
    tracemalloc.start()
    try:
        model = ln.load_model(path, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    kept = sum(value.nbytes for value in model.weights.values())
    assert kept > at_least, "too small a model for the bound to say anything"
    assert kept < peak <= 1.1 * kept, f"{peak / 1e6:.1f} MB at the peak for {kept / 1e6:.1f} MB, {peak / kept:.2f}"


def write_hugging_face(folder, family, dtype, *, shards=False, head=False):
    """A random model. head: the tied head is written out too."""
    config = {"gpt2": GPT2, "llama": LLAMA}[family]
    rng = np.random.default_rng(0)
    tensors = {
        key: rng.standard_normal(place.shape, "float32").astype(dtype)
        for key, place in places(config, in_trunk=True).items()
    }
    if head:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[family]))
    if not shards:
        save_file(tensors, folder / "model.safetensors")
        return
    files = {key: f"model-{1 + (i % 2)}.safetensors" for i, key in enumerate(tensors)}
    for name in set(files.values()):
        save_file({key: value for key, value in tensors.items() if files[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


HALF = ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("family", "dtype", "written", "options", "at_least"),
    [
        ("gpt2", "float32", {}, {}, 90e6),
        ("gpt2", "float32", {"head": True}, {}, 90e6),
        ("gpt2", "float32", {"head": True}, {"storage": "nf4"}, 50e6),
        ("gpt2", HALF, {}, {"storage": "bfloat16"}, 45e6),
        ("llama", "float32", {"shards": True}, {}, 130e6),
        ("llama", "float16", {}, {}, 130e6),
        ("llama", HALF, {}, {}, 130e6),
        ("llama", HALF, {"shards": True}, {"storage": "bfloat16"}, 65e6),
        ("llama", HALF, {}, {"storage": "nf4"}, 95e6),
        ("llama", HALF, {}, {"dtype": "float64"}, 270e6),
        ("llama", HALF, {}, {"head": "classify", "n_labels": 3, "seed": 0}, 85e6),
    ],
)
def test_hugging_faces_folders(tmp_path, family, dtype, written, options, at_least):
    write_hugging_face(tmp_path / "m", family, dtype, **written)
    kept_within_bound(tmp_path / "m", at_least=at_least, **options)


@pytest.mark.parametrize(
    ("options", "at_least"),
    [({}, 90e6), ({"storage": "bfloat16"}, 45e6), ({"storage": "nf4"}, 50e6), ({"dtype": "float64"}, 180e6)],
    ids=str,
)
def test_the_packages_own_folder(tmp_path, options, at_least):
    weights = ln.init_weights(GPT2, seed=0)
    for value in weights.values():
        value.view("uint32")[...] &= 0xFFFF0000  # numbers that bfloat16 holds
    ln.save_model(tmp_path / "m", ln.Model(GPT2, weights))
    kept_within_bound(tmp_path / "m", at_least=at_least, **options)


@pytest.mark.parametrize(
    ("kind", "storage", "at_least"),
    [("F32", None, 130e6), ("F16", None, 130e6), ("BF16", "bfloat16", 65e6), ("Q8_0", None, 130e6),
     ("Q8_0", "gguf", 35e6), ("F16", "nf4", 95e6)],
)  # fmt: skip
def test_gguf_files(tmp_path, kind, storage, at_least):
    write(tmp_path / "m.gguf", LLAMA, kind)
    kept_within_bound(tmp_path / "m.gguf", storage=storage, at_least=at_least)


def test_a_model_of_arrays_copies_none():
    weights = ln.init_weights(replace(GPT2, vocab_size=64, n_layer=1), seed=0)
    model = ln.Model(replace(GPT2, vocab_size=64, n_layer=1), weights)
    assert all(np.shares_memory(model.weights[name], value) for name, value in weights.items())

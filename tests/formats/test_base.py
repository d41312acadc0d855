"""Models and adapters of many layers: what a file costs to read, or to refuse, grows as the file does."""

import json
import struct
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hostile import GPT2, LLAMA, OWN, many_tensors, raw_safetensors, steps_of, write_peft

import lora_np as ln

# Each one's own keys for the number of layers; heads and widths of 1.
CONFIGS = {
    "gpt2": ("n_layer", {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 9, "n_positions": 9,
                         "n_head": 1, "n_embd": 1}),
    "bert": ("num_hidden_layers", {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 9, "max_position_embeddings": 9,
        "num_attention_heads": 1, "hidden_size": 1, "intermediate_size": 1}),
    "llama": ("num_hidden_layers", {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 9, "max_position_embeddings": 9,
        "num_attention_heads": 1, "hidden_size": 2, "intermediate_size": 1}),
    "own": ("n_layer", {"vocab_size": 9, "n_positions": 9, "n_head": 1, "d_model": 1, "d_ff": 1}),
}  # fmt: skip


def write(folder, kind, n_layer, n_tensors):
    """A model that claims layers, with as many tensors, none of them its own. -> the path"""
    folder.mkdir(exist_ok=True)
    if kind == "gguf":
        return gguf(folder / "x.gguf", n_layer, n_tensors)
    key, config = CONFIGS[kind]
    config = {**config, key: n_layer}
    if kind == "own":
        config = {"model_type": "lora_np", "format": 1, "base_sha256": "", "config": config}
    (folder / "config.json").write_text(json.dumps(config))
    raw_safetensors(folder / "model.safetensors", many_tensors(n_tensors))
    return folder


def gguf(path, n_layer, n_tensors):
    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    keys = {"block_count": n_layer, "context_length": 9, "embedding_length": 2, "feed_forward_length": 1,
            "attention.head_count": 1}  # fmt: skip
    parts = [text(f"llama.{key}") + struct.pack("<II", 4, value) for key, value in keys.items()]
    parts.append(text("general.architecture") + struct.pack("<I", 8) + text("llama"))
    parts.append(text("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5))
    names = ["token_embd.weight", *map(str, range(n_tensors - 1))]
    tensors = [text(name) + struct.pack("<IQQIQ", 2, 2, 9, 0, 0) for name in names]
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, n_tensors, len(parts)) + b"".join(parts + tensors) + bytes(64))
    return path


@pytest.mark.parametrize("kind", [*CONFIGS, "gguf"])
def test_layers_that_the_file_cannot_have_are_refused_before_their_names_are_made(tmp_path, kind):
    most = 10**9 if kind != "gguf" else 2**32 - 1
    path = write(tmp_path / "x", kind, most, 20)

    def load():
        with pytest.raises(ValueError, match=rf"x.*: expected 6 tensors at least of each of {most} layers, got 20"):
            ln.load_model(path)

    assert steps_of(load) < 5000


@pytest.mark.parametrize("kind", [*CONFIGS, "gguf"])
def test_refusing_many_layers_takes_as_long_as_the_file_is(tmp_path, kind):
    """Eight tensors a layer, so that the names have to be looked at."""

    def steps(n):
        path = write(tmp_path / str(n), kind, n, 8 * n)
        with pytest.raises(ValueError, match="is missing"):
            ln.load_model(path)
        return steps_of(lambda: ln.load_model(path))

    few, many = steps(40), steps(160)
    assert few > 40
    assert many < 4.5 * few


@pytest.mark.parametrize("form", ["folder", "a.safetensors", "a.npz"])
@pytest.mark.parametrize("config", [GPT2, LLAMA, OWN], ids=["gpt2", "llama", "own"])
def test_an_adapter_of_many_layers_takes_as_long_as_its_file_is(tmp_path, config, form):
    """With every target, and all biases where there are some."""
    targets = ("qkv", "o", "up", "down") if config is GPT2 else ("q", "k", "v", "o", "up", "gate", "down")
    bias = "all" if config.bias else "none"

    def steps(n):
        small = replace(config, n_layer=n, n_head=1, n_kv_head=1, d_model=2, d_ff=2)
        model = ln.Model(small, ln.init_weights(small, seed=0))
        path = tmp_path / f"{n}-{form}"
        ln.save_adapter(path, ln.init_adapter(model, ln.LoRAConfig(r=1, targets=targets, bias=bias), seed=0), model)
        return steps_of(lambda: ln.load_adapter(path, model))

    few, many = steps(10), steps(40)
    assert few > 100
    assert many < 4.5 * few


def test_a_configuration_of_many_names_takes_as_long_as_it_is(tmp_path):
    """PEFT's: every module as a target and under patterns of its own, every layer by its number."""

    def steps(n):
        config = replace(LLAMA, n_layer=n)
        names = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(n) for part in "qv"]
        patterns = {name: 1 + i % 3 for i, name in enumerate(names)}
        settings = {
            "target_modules": names, "layers_to_transform": list(range(n)), "rank_pattern": patterns,
            "alpha_pattern": {f"^{name}": value for name, value in patterns.items()},
            "layers_pattern": ["layers", *map(str, range(n))], "exclude_modules": [f"layers.{i}.mlp" for i in range(n)],
        }  # fmt: skip
        factors = {name: (np.ones((r, 8)), np.ones((8 if "q_" in name else 4, r))) for name, r in patterns.items()}
        write_peft(tmp_path / str(n), factors, r=1, alpha=8, **settings)
        model = SimpleNamespace(config=config, weights={}, dtype=np.dtype("float64"))
        adapter = ln.load_adapter(tmp_path / str(n), model)
        assert [adapter.config.rank(name) for name in adapter.matrices] == list(patterns.values())
        assert [adapter.config.scale(name) for name in adapter.matrices] == [1.0] * (2 * n)
        return steps_of(lambda: ln.load_adapter(tmp_path / str(n), model))

    few, many = steps(20), steps(80)
    assert few > 20
    assert many < 4.5 * few

"""The package's own model folder: bit for bit, whole or not at all, and never what its files do not say."""

import os
from dataclasses import replace

import numpy as np
import pytest
from hostile import GPT2, LLAMA, contents, edit_json, edit_tensors
from hypothesis import given
from hypothesis import strategies as st
from strategies import bits, configs, device, dtypes, random_model, same_bits, seeds

import lora_np as ln
from lora_np.formats.files import atomic
from lora_np.formats.models.folder import model_hash


@pytest.fixture
def model():
    return random_model(GPT2, seed=1, dtype="float32")


@pytest.fixture
def folder(tmp_path, model):
    ln.save_model(tmp_path / "model", model)
    return tmp_path / "model"


def refusal(path, **options):
    """The message of the ValueError: one line that names the file or folder."""
    with pytest.raises(ValueError, match=str(path.name)) as caught:
        ln.load_model(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@given(config=configs(), dtype=dtypes, seed=seeds)
def test_save_and_load_are_the_identity(tmp_path_factory, config, dtype, seed):
    path = tmp_path_factory.mktemp("model") / "new"
    model = random_model(config, seed=seed, dtype=dtype)
    ln.save_model(path, model)
    loaded = ln.load_model(path)
    assert loaded.config == config
    assert list(loaded.weights) == list(model.weights)
    assert same_bits(dict(loaded.weights), dict(model.weights))
    ln.save_model(path.with_name("again"), loaded)
    assert contents(path) == contents(path.with_name("again"))


def test_a_merged_model_is_saved_too(tmp_path, model):
    """Its token table is a transposed view, and its head untied."""
    adapter = ln.init_adapter(model, ln.LoRAConfig(r=2, targets=("embed", "q")), seed=0)
    merged = ln.merge(model, adapter)
    ln.save_model(tmp_path / "merged", merged)
    loaded = ln.load_model(tmp_path / "merged")
    assert loaded.config == merged.config
    assert same_bits(dict(loaded.weights), dict(merged.weights))
    assert model_hash(loaded) == model_hash(merged)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_dtype_asked_for(folder, model, dtype):
    loaded = ln.load_model(folder, dtype=dtype)
    assert loaded.dtype == dtype
    assert np.array_equal(ln.asnumpy(loaded.weights["norm.weight"]), ln.asnumpy(model.weights["norm.weight"]))
    with pytest.raises(ValueError, match="expected float32 or float64, got 'float16'"):
        ln.load_model(folder, dtype="float16")


# --- The hash --------------------------------------------------------------------------------------------------------


@given(config=configs(), seed=seeds, data=st.data())
def test_the_hash_changes_with_any_bit(config, seed, data):
    model = random_model(config, seed=seed, dtype="float32")
    name = data.draw(st.sampled_from(sorted(model.weights)))
    changed = ln.asnumpy(model.weights[name]).copy()
    flat = changed.reshape(-1).view(np.uint32)
    flat[data.draw(st.integers(0, len(flat) - 1))] ^= np.uint32(1 << data.draw(st.integers(0, 31)))
    other = ln.Model(config, {**model.weights, name: device(changed)})
    assert model_hash(model) == model_hash(ln.Model(config, dict(reversed(model.weights.items()))))
    assert model_hash(model) != model_hash(other)


def test_the_hash_knows_names_shapes_and_dtypes_but_no_configuration(model):
    weights = dict(model.weights)
    swapped = weights | {
        "layers.0.attn.q.weight": weights["layers.0.attn.k.weight"],
        "layers.0.attn.k.weight": weights["layers.0.attn.q.weight"],
    }
    assert model_hash(ln.Model(GPT2, swapped)) != model_hash(model)
    zeros = [ln.Model(GPT2, {n: np.zeros(w.shape, t) for n, w in weights.items()}) for t in ("float32", "float64")]
    assert model_hash(zeros[0]) != model_hash(zeros[1])
    assert model_hash(ln.Model(replace(GPT2, eps=1e-3), weights)) == model_hash(model)


# --- Another head ----------------------------------------------------------------------------------------------------


@given(
    config=configs(),
    head=st.sampled_from(["lm", "classify", "tag", "none"]),
    labels=st.integers(2, 4),
    dtype=dtypes,
    seed=seeds,
)
def test_another_head_takes_what_the_file_has_and_makes_the_rest(tmp_path_factory, config, head, labels, dtype, seed):
    path = tmp_path_factory.mktemp("model") / "new"
    model = random_model(config, seed=seed, dtype=dtype)
    ln.save_model(path, model)
    n_labels = labels if head in ("classify", "tag") else None
    if config.n_encoder and n_labels is not None:
        with pytest.raises(ValueError, match="n_encoder: expected a causal decoder with head lm or none"):
            ln.load_model(path, head=head, n_labels=n_labels, seed=7)
        return
    loaded = ln.load_model(path, head=head, n_labels=n_labels, seed=7)
    assert loaded.config == replace(config, head=head, n_labels=n_labels)
    made = ln.init_weights(loaded.config, seed=7, dtype=dtype)
    same_head = (config.head, config.n_labels) == (head, n_labels)
    for name, value in loaded.weights.items():
        from_file = name in model.weights and (same_head or not name.startswith("head."))
        assert bits(value) == bits(model.weights[name] if from_file else made[name])
    if all(name in model.weights and (same_head or not name.startswith("head.")) for name in loaded.weights):
        ln.load_model(path, head=head, n_labels=n_labels)  # nothing is made, so no seed is needed
    else:
        assert "expected a seed" in refusal(path, head=head, n_labels=n_labels)


def test_labels_without_a_use_or_a_number(folder):
    for options, message in [
        ({"n_labels": 3}, "n_labels is for head classify or tag"),
        ({"head": "tag", "seed": 0}, "head='tag' needs n_labels"),
        ({"head": "tag", "n_labels": 0, "seed": 0}, "at least 1"),
        ({"head": "regress", "seed": 0}, "expected one of lm classify tag none"),
    ]:
        with pytest.raises(ValueError, match=message):
            ln.load_model(folder, **options)


# --- Whole or not at all ---------------------------------------------------------------------------------------------


def test_nothing_is_written_over(folder, model):
    before = contents(folder)
    with pytest.raises(FileExistsError, match="exists already"):
        ln.save_model(folder, model)
    assert contents(folder) == before
    (folder.parent / "file").touch()
    with pytest.raises(FileExistsError, match="exists already"):
        ln.save_model(folder.parent / "file", model)


@pytest.mark.parametrize("step", ["write_tensors", "_sync", "rename"])
def test_a_write_that_fails_leaves_nothing(tmp_path, model, monkeypatch, step):
    def fail(*args, **kwargs):
        raise OSError("no space left")

    import lora_np.formats.models.folder as module

    where = {"write_tensors": module, "_sync": atomic, "rename": atomic.os}[step]
    monkeypatch.setattr(where, step, fail)
    with pytest.raises(OSError, match="no space left"):
        ln.save_model(tmp_path / "model", model)
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    ln.save_model(tmp_path / "model", model)
    assert os.listdir(tmp_path) == ["model"]


def test_complex_weights_are_not_saved(tmp_path, model):
    weights = {name: w.astype("complex128") for name, w in model.weights.items()}
    with pytest.raises(TypeError, match="complex128"):
        ln.save_model(tmp_path / "model", ln.Model(GPT2, weights))


# --- Files of others -------------------------------------------------------------------------------------------------


def test_what_is_no_folder_of_ours(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ln.load_model(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        ln.load_model(tmp_path / "empty")
    (tmp_path / "m.txt").touch()
    assert "got a file" in refusal(tmp_path / "m.txt")
    for value in ("mamba", None, ["gpt2"], {}):
        edit_json(folder / "config.json", model_type=value)
        assert "is not supported; supported: lora_np gpt2 bert roberta llama" in refusal(folder)


def test_a_pickle_in_the_place_of_the_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "any code" in refusal(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        ln.load_model(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": 2}, "config.json: format: expected 1, got 2"),
        ({"base_sha256": None}, "config.json: base_sha256: expected the weights' hash, got None"),
        ({"base_sha256": "0" * 64}, "model.safetensors: damaged: the weights are not those that were saved"),
        ({"config": None}, "config.json: expected an object with Config's fields, got NoneType"),
        ({"config": [1]}, "config.json: expected an object with Config's fields, got list"),
        ({"config": {"vocab_size": 11}}, "config.json: Config.n_positions is missing"),
    ],
    ids=repr,
)
def test_a_header_that_is_not_ours(folder, values, message):
    edit_json(folder / "config.json", **values)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"n_layer": 10**12}, "model.safetensors: expected 6 tensors at least of each of 1000000000000 layers, got 36"),
        ({"n_layer": 3}, "model.safetensors: the tensor layers.2.attn.k.bias is missing"),
        ({"n_layer": 1}, "model.safetensors: the tensor layers.1.attn.k.bias has no place in this model"),
        ({"d_model": 10**12}, "embed.tokens: expected shape (11, 1000000000000), got (11, 8)"),
        ({"d_model": 16}, "embed.tokens: expected shape (11, 16), got (11, 8)"),
        ({"d_ff": 12.5}, "Config.d_ff: a value of the wrong type: 12.5"),
        ({"vocab_size": True}, "Config.vocab_size: a value of the wrong type: True"),
        ({"n_head": 0}, "Config.n_head: expected an integer of at least 1, got 0"),
        ({"n_head": 3}, "Config: d_model = 8 is not a multiple of n_head = 3"),
        ({"n_kv_head": {}}, "Config.n_kv_head: a value of the wrong type: {}"),
        ({"norm": ["layer"]}, "Config.norm: a value of the wrong type: ['layer']"),
        ({"eps": "x"}, "Config.eps: a value of the wrong type: 'x'"),
        ({"eps": -1}, "Config.eps: expected a number above 0, got -1"),
        ({"norm_first": "yes"}, "Config.norm_first: a value of the wrong type: 'yes'"),
        ({"activation": "swish"}, "Config.activation: expected one of gelu gelu_tanh silu relu gelu_gated"),
        ({"surplus": 1}, "config.json: Config has no field 'surplus'"),
        ({"head": "classify"}, "Config: head='classify' needs n_labels"),
        ({"head": "tag", "n_labels": 2**70}, "model.safetensors: the tensor head.bias is missing"),
    ],
    ids=repr,
)
def test_a_configuration_that_does_not_fit_the_weights(folder, model, field, message):
    config = {f: getattr(GPT2, f) for f in GPT2.__dataclass_fields__}
    edit_json(folder / "config.json", config=config | field)
    assert message in refusal(folder)


def test_weights_that_were_changed(folder):
    def replaced(**changes):
        return lambda tensors: tensors.update(changes)

    path = folder / "model.safetensors"
    before = path.read_bytes()
    flipped = bytearray(before)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    assert "SHA-256" in refusal(folder)
    for change, message in [
        (lambda t: t.pop("norm.weight"), "norm.weight is missing"),
        (replaced(extra=np.ones(2, "float32")), "extra has no place"),
        (replaced(**{"norm.weight": np.ones(9, "float32")}), "norm.weight: expected shape (8,), got (9,)"),
        (replaced(**{"norm.weight": np.ones(8, "float64")}), "one dtype"),
        (replaced(**{"norm.weight": np.ones(8, "float16")}), "norm.weight: expected float32 or float64, got F16"),
    ]:
        path.write_bytes(before)
        edit_tensors(path, change)
        assert message in refusal(folder)
    path.write_bytes(before[:-1])
    assert "truncated" in refusal(folder)


def test_a_llama_folder(tmp_path):
    model = random_model(LLAMA, seed=2)
    ln.save_model(str(tmp_path / "llama"), model)
    assert ln.load_model(str(tmp_path / "llama")).config == LLAMA

"""A base gets the head that its adapter brings."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hostile import GPT2, edit_json, edit_tensors, tensors_and_metadata
from safetensors.numpy import save_file
from strategies import random_model, same_bits, trained_adapter

import lora_np as ln
from lora_np.formats.adapters.base import load_base_for

BERT = replace(ln.PRESETS["bert-base"], vocab_size=11, n_positions=10, n_layer=2, n_head=2, d_model=8, d_ff=12)
ROBERTA = replace(BERT, position_offset=2, pooler_in_head=True, n_positions=12)
LLAMA = replace(
    ln.PRESETS["smollm2-135m"], vocab_size=11, n_positions=10, n_layer=2, n_head=2, n_kv_head=1, d_model=8, d_ff=12
)
TOKENS = np.arange(10).reshape(2, 5)


def trunk_of(model, config):
    """The same model without its head, or with another."""
    other = random_model(config, seed=9)
    return ln.Model(
        config, {n: w if n.startswith(("head.", "pooler.")) else model.weights[n] for n, w in other.weights.items()}
    )


def as_peft_writes(path):
    tensors, _ = tensors_and_metadata(path / "adapter_model.safetensors")
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("kind", ["folder", "peft", ".npz"])
@pytest.mark.parametrize("head", ["classify", "tag"])
@pytest.mark.parametrize(
    ("trained", "has"),
    [(GPT2, "lm"), (LLAMA, "lm"), (ROBERTA, "none"), (BERT, "none"), (GPT2, "same"), (GPT2, "fewer")],
    ids=["gpt2", "llama", "roberta", "bert", "same", "fewer-labels"],
)
def test_the_head_that_the_adapter_brings(tmp_path, kind, head, trained, has):
    if (trained, head) == (BERT, "classify"):
        pytest.skip("BERT's pooler is no part of its head")
    model = random_model(replace(trained, head=head, n_labels=3), seed=1)
    config = {"same": model.config, "fewer": replace(model.config, n_labels=2)}.get(has) or replace(trained, head=has)
    base = tmp_path / "base"
    ln.save_model(base, trunk_of(model, config))
    adapter = trained_adapter(model, ln.LoRAConfig(r=2, targets=("o", "up"), train_head=True), seed=2)
    path = tmp_path / ("a.npz" if kind == ".npz" else "a")
    ln.save_adapter(path, adapter, model)
    if kind == "peft":
        as_peft_writes(path)
    found = load_base_for(path, base)
    assert found.config == model.config
    loaded = ln.load_adapter(path, found)
    assert same_bits(dict(loaded.params), dict(adapter.params))
    assert same_bits(ln.forward(found, TOKENS, loaded), ln.forward(model, TOKENS, adapter))
    assert load_base_for(path, base, "float64").dtype == "float64"


def test_a_pooler_that_neither_has(tmp_path):
    model = random_model(replace(BERT, head="classify", n_labels=3), seed=1)
    ln.save_model(tmp_path / "base", trunk_of(model, BERT))
    adapter = trained_adapter(model, ln.LoRAConfig(r=2, train_head=True), seed=2)
    ln.save_adapter(tmp_path / "a.npz", adapter, model)
    with pytest.raises(ValueError, match=r"base: lacks pooler\.weight \(8, 8\), and .*a\.npz lacks it too"):
        load_base_for(tmp_path / "a.npz", tmp_path / "base")


@pytest.mark.parametrize("ending", ["", ".npz", ".safetensors"])
def test_an_adapter_that_brings_no_head(tmp_path, ending):
    """The base is read as it is; but without a head, if the adapter was trained so."""
    for head in ("lm", "classify", "none"):
        model = random_model(replace(GPT2, head=head, n_labels=3 if head == "classify" else None), seed=1)
        ln.save_model(tmp_path / head, model)
        path = tmp_path / f"a-{head}{ending}"
        ln.save_adapter(path, trained_adapter(model, ln.LoRAConfig(r=2), seed=2), model)
        assert load_base_for(path, tmp_path / head).config == model.config
    assert load_base_for(path, tmp_path / "lm").config == model.config


def test_what_an_untrusted_adapter_says(tmp_path):
    model = random_model(replace(GPT2, head="tag", n_labels=3), seed=1)
    ln.save_model(tmp_path / "base", model)
    path = tmp_path / "a"
    ln.save_adapter(path, trained_adapter(model, ln.LoRAConfig(r=2, train_head=True), seed=2), model)
    for task in (3, ["SEQ_CLS"], {}, "x"):
        edit_json(path / "adapter_config.json", task_type=task)
        assert load_base_for(path, tmp_path / "base").config == model.config  # the metadata says it
    tensors, metadata = tensors_and_metadata(path / "adapter_model.safetensors")
    about = json.loads(metadata["lora_np"])
    for head in (3, ["tag"], {"tag": 1}, "x", None):
        save_file(tensors, path / "adapter_model.safetensors", {"lora_np": json.dumps({**about, "head": head})})
        assert load_base_for(path, tmp_path / "base").config == model.config  # read as it is
    for name in ("none", "none.npz", "none.safetensors"):
        with pytest.raises(FileNotFoundError, match=rf"{name}.*: no such f"):
            load_base_for(tmp_path / name, tmp_path / "base")
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="any code"):
        load_base_for(tmp_path / "a.pt", tmp_path / "base")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((), "expected a matrix"),
        ((0, 8), r"score\.weight: expected a tensor with elements, got shape \(0, 8\)"),
        ((3, 0), r"score\.weight: expected a tensor with elements, got shape \(3, 0\)"),
        ((10**9, 0), "expected a tensor with elements"),  # which no memory holds
        ((10**5, 1), r"lacks head\.weight \(100000, 8\), and .*has it as \(100000, 1\)"),
    ],
)
def test_the_shape_of_a_head_that_the_adapter_brings(tmp_path, shape, message):
    model = random_model(replace(GPT2, head="classify", n_labels=3), seed=1)
    ln.save_model(tmp_path / "base", trunk_of(model, GPT2))
    path = tmp_path / "a"
    ln.save_adapter(path, trained_adapter(model, ln.LoRAConfig(r=2, train_head=True), seed=2), model)
    edit_tensors(
        path / "adapter_model.safetensors", lambda t: t.update({"base_model.model.score.weight": np.zeros(shape)})
    )
    with pytest.raises(ValueError, match=message):
        load_base_for(path, tmp_path / "base")


@pytest.mark.parametrize("name", ["a", "a.npz", "a.safetensors"])
def test_an_adapter_made_in_float64_gets_its_base_so(tmp_path, name):
    """The base's file is float32: widened, it is what the adapter was made for."""
    ln.save_model(tmp_path / "base", random_model(GPT2, seed=1, dtype="float32"))
    model = ln.load_model(tmp_path / "base", dtype="float64")
    adapter = trained_adapter(model, ln.LoRAConfig(r=2), seed=2)
    ln.save_adapter(tmp_path / name, adapter, model)
    found = load_base_for(tmp_path / name, tmp_path / "base")
    assert found.dtype == "float64"
    assert same_bits(dict(ln.load_adapter(tmp_path / name, found).params), dict(adapter.params))

"""loralib itself reads what we write, and we read what it writes: the same logits within 1e-10, in float64."""

import copy
from dataclasses import replace

import numpy as np
import peers  # skips this file where torch, transformers or peft is missing
import pytest
from peers import torch
from safetensors.torch import load_file, save_file
from strategies import same_bits, trained_adapter

import lora_np as ln

lora = pytest.importorskip("loralib", reason=peers.REASON)
pytestmark = peers.FILTERS
SETTINGS = {"r": 3, "lora_alpha": 5, "merge_weights": False}
SUBSETS = ["q", "k", "v", "qk", "qv", "kv", "qkv"]


def put(module, name, new):
    """Puts a layer of loralib's in the place of a module, with its weights."""
    parent, _, last = name.rpartition(".")
    old = module.get_submodule(name)
    with torch.no_grad():
        new.weight.copy_(old.weight if new.weight.shape == old.weight.shape else old.weight.T)
        if getattr(old, "bias", None) is not None:
            new.bias.copy_(old.bias)
    setattr(module.get_submodule(parent), last, new)


def merged(old, enabled, *, fan_in_fan_out=True, **settings):
    n_in, n_out = old.weight.shape  # Conv1D's
    layer = lora.MergedLinear(
        n_in, n_out, enable_lora=[part in enabled for part in "qkv"], fan_in_fan_out=fan_in_fan_out,
        **{**SETTINGS, **settings},
    ).double()  # fmt: skip
    if not fan_in_fan_out:
        assert layer.weight.shape == (n_out, n_in)
    return layer


def gpt2(enabled, *, config=peers.GPT2, others=False, **settings):
    """A GPT-2 whose c_attn are MergedLinears; others: also a Linear and an Embedding."""
    pair = peers.make("gpt2", config, seed=1)
    module = copy.deepcopy(pair.module)
    for i in range(config.n_layer):
        name = f"transformer.h.{i}.attn.c_attn"
        put(module, name, merged(module.get_submodule(name), enabled, **settings))
    if others:
        D, F = config.d_model, config.d_ff
        put(module, "transformer.h.1.mlp.c_fc", lora.Linear(D, F, fan_in_fan_out=True, **SETTINGS).double())
        put(module, "transformer.wte", lora.Embedding(config.vocab_size, D, **SETTINGS).double())
    return replace(pair, module=module.eval())


def train(pair, *, bias="none"):
    """Another value for everything that loralib would train."""
    lora.mark_only_lora_as_trainable(pair.module, bias)
    peers._shake(pair.module, 3)
    return pair.module


def saved(path, pair, *, bias="none"):
    """As loralib's users are told to save it."""
    save_file({key: t.contiguous() for key, t in lora.lora_state_dict(pair.module, bias).items()}, path)
    return load_file(path)


def batch_of(pair):
    return peers.make_batch(pair.model.config, seed=1, padding=None if pair.family == "gpt2" else "right")


@pytest.mark.proves("L1", "L2")
@pytest.mark.parametrize("enabled", SUBSETS)
@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_we_read_a_merged_linear(tmp_path, enabled, fan_in_fan_out):
    pair = gpt2(enabled, fan_in_fan_out=fan_in_fan_out)
    train(pair)
    tensors = saved(tmp_path / "a.safetensors", pair)
    adapter = ln.load_adapter(tmp_path / "a.safetensors", pair.model, alpha=5, enabled=enabled)
    assert adapter.config == ln.LoRAConfig(r=3, alpha=5, targets=tuple(enabled))
    assert sum(p.size for p in adapter.params.values()) == sum(t.numel() for t in tensors.values())
    peers.compare_logits(replace(pair, adapter=adapter), batch_of(pair))


@pytest.mark.parametrize(("enabled", "said"), [("qv", None), ("qkv", None), ("qv", ("v", "q")), ("kv", "kv")])
def test_which_parts_are_enabled_by_default(tmp_path, enabled, said):
    pair = gpt2(enabled)
    train(pair)
    saved(tmp_path / "a.safetensors", pair)
    adapter = ln.load_adapter(tmp_path / "a.safetensors", pair.model, alpha=5, enabled=said)
    assert adapter.config.targets == tuple(enabled)
    peers.compare_logits(replace(pair, adapter=adapter), batch_of(pair))


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("head", ["lm", "classify", "tag"])
def test_a_linear_an_embedding_and_biases(tmp_path, bias, head):
    pair = gpt2("qkv", config=replace(peers.GPT2, head=head), others=True)
    train(pair, bias=bias)
    saved(tmp_path / "a.safetensors", pair, bias=bias)
    adapter = ln.load_adapter(tmp_path / "a.safetensors", pair.model, alpha=5)
    assert set(adapter.config.targets) == {"q", "k", "v", "up", "embed"}
    assert adapter.config.bias == bias
    peers.compare_logits(replace(pair, adapter=adapter), batch_of(pair))


def test_a_bias_of_c_attn_that_no_update_goes_with(tmp_path):
    """A MergedLinear of q and v trains k's bias too; LoRAConfig has that among all biases alone."""
    pair = gpt2("qv")
    train(pair, bias="lora_only")
    saved(tmp_path / "a.safetensors", pair, bias="lora_only")
    adapter = ln.load_adapter(tmp_path / "a.safetensors", pair.model, alpha=5)
    assert adapter.config.bias == "all"
    peers.compare_logits(replace(pair, adapter=adapter), batch_of(pair))
    # Left alone, it is the base's.
    with torch.no_grad():
        for i, block in enumerate(pair.module.transformer.h):
            D = pair.model.config.d_model
            k = ln.asnumpy(pair.model.weights[f"layers.{i}.attn.k.bias"])
            block.attn.c_attn.bias[D : 2 * D] = torch.tensor(k)
    saved(tmp_path / "b.safetensors", pair, bias="lora_only")
    adapter = ln.load_adapter(tmp_path / "b.safetensors", pair.model, alpha=5)
    assert adapter.config.bias == "lora_only"
    assert "layers.0.attn.k.bias" not in adapter.params
    peers.compare_logits(replace(pair, adapter=adapter), batch_of(pair))


@pytest.mark.parametrize(
    ("family", "config", "names"),
    [
        ("bert", replace(peers.BERT, head="tag"), ("attention.self.query", "attention.self.value")),
        ("roberta", peers.ROBERTA, ("attention.output.dense", "intermediate.dense")),
        ("llama", peers.LLAMA, ("self_attn.k_proj", "mlp.gate_proj")),
    ],
)
@pytest.mark.parametrize("in_trunk", [True, False])
def test_the_other_families(tmp_path, family, config, names, in_trunk):
    pair = peers.make(family, config, seed=1)
    module = copy.deepcopy(pair.module)
    for name, old in list(module.named_modules()):
        if name.endswith(names):
            n_out, n_in = old.weight.shape
            put(module, name, lora.Linear(n_in, n_out, bias=old.bias is not None, **SETTINGS).double())
    pair = replace(pair, module=module.eval())
    train(pair)
    tensors = saved(tmp_path / "a.safetensors", pair)
    if not in_trunk:
        save_file({key.split(".", 1)[1]: t for key, t in tensors.items()}, tmp_path / "a.safetensors")
    adapter = ln.load_adapter(tmp_path / "a.safetensors", pair.model, alpha=5)
    peers.compare_logits(replace(pair, adapter=adapter), batch_of(pair))
    ln.save_adapter(tmp_path / "ours.safetensors", adapter, pair.model)
    assert all(torch.equal(t, tensors[key]) for key, t in load_file(tmp_path / "ours.safetensors").items())


@pytest.mark.proves("L1", "L2")
@pytest.mark.parametrize("enabled", SUBSETS)
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_loralib_reads_ours(tmp_path, enabled, bias):
    pair = gpt2(enabled, others=True, lora_alpha=5)
    config = ln.LoRAConfig(r=3, alpha=5, targets=(*enabled, "embed"), bias=bias)
    adapter = trained_adapter(pair.model, config, seed=2)
    up = trained_adapter(pair.model, ln.LoRAConfig(r=3, alpha=5, targets=("up",), layers=(1,)), seed=3)
    adapter = ln.Adapter(
        replace(config, targets=(*config.targets, "up")), {**adapter.params, **(up.params if bias == "none" else {})}
    )
    ln.save_adapter(tmp_path / "a.safetensors", adapter, pair.model)
    assert same_bits(dict(ln.load_adapter(tmp_path / "a.safetensors", pair.model).params), dict(adapter.params))
    assert not pair.module.load_state_dict(load_file(tmp_path / "a.safetensors"), strict=False).unexpected_keys
    if bias != "none":  # the Linear's B is zero: it adapts nothing
        assert not np.any(pair.module.transformer.h[1].mlp.c_fc.lora_B.detach().numpy())
    peers.compare_logits(replace(pair, adapter=adapter), batch_of(pair))

"""GPT-2, BERT, RoBERTa and Llama of random weights against transformers and PEFT, in float64, within 1e-10.

The peers' float32 is theirs alone: see `peers._in_float64` and `peers.their_loss` for what is replaced there.
"""

from dataclasses import replace

import numpy as np
import peers
import pytest
import weights
from peers import BERT, GPT2, LLAMA, ROBERTA, torch

import lora_np as ln
from lora_np.backend import xp
from lora_np.binding import bind
from lora_np.decode import new_cache, next_logits

pytestmark = peers.FILTERS

CLASSIFY, TAG = {"head": "classify"}, {"head": "tag"}
UNTIED = {"tie_head": False}
GROUPED = {"n_head": 6, "n_kv_head": 3}  # heads of width 4, two to a key
WIDE = {"n_head": 1, "d_model": 40, "d_ff": 160, "n_layer": 1}
DEEP = {"n_head": 4, "d_model": 16, "d_ff": 8, "n_layer": 4}

# family, configuration, padding
MODELS = {
    "gpt2": ("gpt2", GPT2, None),
    "gpt2-right": ("gpt2", GPT2, "right"),
    "gpt2-left": ("gpt2", GPT2, "left"),
    "gpt2-untied": ("gpt2", replace(GPT2, **UNTIED), None),
    "gpt2-wide": ("gpt2", replace(GPT2, **WIDE), None),
    "gpt2-deep": ("gpt2", replace(GPT2, **DEEP), "left"),
    "gpt2-erf": ("gpt2", replace(GPT2, activation="gelu"), None),
    "gpt2-classify-right": ("gpt2", replace(GPT2, **CLASSIFY), "right"),
    "gpt2-classify-left": ("gpt2", replace(GPT2, **CLASSIFY), "left"),
    "gpt2-tag": ("gpt2", replace(GPT2, **TAG), "right"),
    "bert-classify": ("bert", replace(BERT, **CLASSIFY), None),
    "bert-classify-right": ("bert", replace(BERT, **CLASSIFY), "right"),
    "bert-classify-deep": ("bert", replace(BERT, **CLASSIFY, **DEEP), "right"),
    "bert-tag-right": ("bert", replace(BERT, **TAG), "right"),
    "bert-tag-left": ("bert", replace(BERT, **TAG), "left"),
    "bert-tag-wide": ("bert", replace(BERT, **TAG, **WIDE), None),
    "roberta": ("roberta", ROBERTA, None),
    "roberta-right": ("roberta", ROBERTA, "right"),
    "roberta-deep": ("roberta", replace(ROBERTA, **DEEP), "right"),
    "llama": ("llama", LLAMA, None),
    "llama-right": ("llama", LLAMA, "right"),
    "llama-left": ("llama", LLAMA, "left"),
    "llama-untied": ("llama", replace(LLAMA, **UNTIED), None),
    "llama-grouped": ("llama", replace(LLAMA, **GROUPED), "left"),
    "llama-no-groups": ("llama", replace(LLAMA, n_kv_head=None), None),
    "llama-classify-right": ("llama", replace(LLAMA, **CLASSIFY, **GROUPED), "right"),
    "llama-classify-left": ("llama", replace(LLAMA, **CLASSIFY), "left"),
}


def lora(*targets, **fields):
    """A LoRAConfig of small rank and a scale that is no power of two."""
    return ln.LoRAConfig(**{"r": 3, "alpha": 7, "targets": targets, **fields})


DROPOUT = {"dropout": 0.3}
ALL = ("q", "k", "v", "o", "up", "down")

# model, adapter
ADAPTERS = {
    "gpt2-qkv": ("gpt2", lora("qkv")),
    "gpt2-qkv-dropout": ("gpt2-left", lora("qkv", **DROPOUT)),
    "gpt2-mlp": ("gpt2-right", lora("o", "up", "down", **DROPOUT)),
    "gpt2-patterns": (
        "gpt2-deep",
        lora("qkv", "up", rank_pattern={"qkv": 5, "layers.1.mlp.up": 1, "up": 2}, alpha_pattern={"up": 2}, rslora=True),
    ),
    "gpt2-layers": ("gpt2-deep", lora("qkv", "o", layers=(1, 3))),
    "gpt2-bias-lora": ("gpt2", lora("qkv", "down", bias="lora_only", **DROPOUT)),
    "gpt2-bias-all": ("gpt2-left", lora("qkv", bias="all")),
    "gpt2-embed": ("gpt2-left", lora("embed")),
    "gpt2-tied-ends": ("gpt2", lora("embed", "head", "qkv", **DROPOUT)),
    "gpt2-head-copied": ("gpt2", lora("qkv", train_head=True)),
    "gpt2-classify": ("gpt2-classify-right", lora("qkv", train_head=True, **DROPOUT)),
    "gpt2-classify-head": ("gpt2-classify-left", lora("head", "o", **DROPOUT)),
    "gpt2-tag": ("gpt2-tag", lora("qkv", "o", bias="all", train_head=True)),
    "gpt2-dora": ("gpt2-left", lora("qkv", "down", dora=True)),
    "gpt2-dora-dropout": ("gpt2", lora("qkv", "o", dora=True, **DROPOUT)),
    "gpt2-dora-tied-ends": ("gpt2", lora("embed", "head", dora=True)),
    "bert-qv": ("bert-classify", lora("q", "v")),
    "bert-qv-dropout": ("bert-classify-right", lora("q", "v", **DROPOUT)),
    "bert-all": ("bert-tag-left", lora(*ALL, rslora=True, **DROPOUT)),
    "bert-patterns": ("bert-classify-deep", lora("q", "down", rank_pattern={"q": 1, "layers.2.mlp.down": 4})),
    "bert-bias-lora": ("bert-tag-right", lora("k", "v", bias="lora_only")),
    "bert-bias-all": ("bert-classify-right", lora("q", bias="all", train_head=True)),
    "bert-embed": ("bert-tag-right", lora("embed", "o")),
    "bert-head": ("bert-tag-wide", lora("head", "up", **DROPOUT)),
    "bert-dora": ("bert-classify-right", lora("q", "v", "up", dora=True, bias="lora_only", train_head=True)),
    "bert-dora-dropout": ("bert-classify", lora("q", "down", dora=True, rslora=True, **DROPOUT)),
    "roberta-qv": ("roberta-right", lora("q", "v", train_head=True, **DROPOUT)),
    "roberta-bias-all": ("roberta", lora("q", "v", bias="all")),
    "roberta-embed": ("roberta-deep", lora("embed", "down", rslora=True, train_head=True)),
    "llama-qv": ("llama", lora("q", "v")),
    "llama-qv-dropout": ("llama-grouped", lora("q", "v", **DROPOUT)),
    "llama-all": ("llama-left", lora(*ALL, "gate", rslora=True, **DROPOUT)),
    "llama-gate": ("llama-no-groups", lora("gate", rank_pattern={"layers.0.mlp.gate": 2})),
    "llama-ends": ("llama-untied", lora("embed", "head", **DROPOUT)),
    "llama-tied-ends": ("llama-right", lora("embed", "head", "k")),
    "llama-dora": ("llama-left", lora(*ALL, "gate", dora=True)),
    "llama-dora-dropout": ("llama-grouped", lora("q", "v", "gate", dora=True, **DROPOUT)),
    "llama-dora-ends": ("llama-untied", lora("embed", "head", dora=True)),
    "llama-classify": ("llama-classify-right", lora("q", "v", train_head=True, **DROPOUT)),
    "llama-classify-left": ("llama-classify-left", lora("k", "down", train_head=True)),
}
ROWS_PAST_A_CHUNK = {"N": 9, "T": 33}  # more rows of logits than are made at a time
SEEDS = range(3)


def model_case(name, seed=0, **sizes):
    """A pair of models and a batch for it."""
    family, config, padding = MODELS[name]
    return peers.make(family, config, seed=seed), peers.make_batch(config, seed=seed, padding=padding, **sizes)


def adapter_case(name, seed=0, **options):
    """A pair of adapted models and a batch for it."""
    model, config = ADAPTERS[name]
    pair, batch = model_case(model, seed)
    return peers.adapt(pair, config, seed=seed + 10, **options), batch


@pytest.mark.proves("T1", "T2", "T3", "T4", "T5", "T6", "T7", "T8", "T9", "T10", "T11", "T13", "T14", "T15")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", MODELS)
def test_model(name, seed):
    """Logits, loss, and the gradient of every weight."""
    pair, batch = model_case(name, seed)
    peers.compare_logits(pair, batch)
    peers.compare_gradients(pair, batch)


@pytest.mark.proves("T13", "T14", "T15")
@pytest.mark.parametrize("name", ["gpt2-left", "bert-tag-right", "llama-grouped"])
def test_many_rows(name):
    """The same where logits are made in several chunks of rows."""
    pair, batch = model_case(name, **ROWS_PAST_A_CHUNK)
    peers.compare_logits(pair, batch)
    peers.compare_gradients(pair, batch)


@pytest.mark.proves("T1", "T3", "T13", "T14")
@pytest.mark.parametrize("padding", [None, "right", "left"])
def test_bert_without_a_head(padding):
    """BertModel: the last states."""
    peers.compare_logits(peers.make("bert", BERT, seed=1), peers.make_batch(BERT, seed=1, padding=padding))


@pytest.mark.proves("L1", "L2", "L4", "L10", "T12")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter(name, seed):
    """Logits, loss, and the gradients of A, B, DoRA's m and what is trained whole, under the same masks if any."""
    pair, batch = adapter_case(name, seed)
    peers.compare_logits(pair, batch)
    peers.compare_gradients(pair, batch, dropout_seed=seed if pair.adapter.config.dropout else None)


@pytest.mark.proves("L8")
@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_trained(name):
    """What PEFT trains, and as many numbers."""
    pair, _ = adapter_case(name)
    config = pair.adapter.config
    assert ln.init_adapter(pair.model, config, seed=0).params.keys() == pair.adapter.params.keys()
    assert ln.count_parameters(pair.model.config, config) == sum(p.numel() for p in peers.trained(pair).values())


@pytest.mark.proves("L3", "L4")
@pytest.mark.parametrize("name", ["gpt2-qkv", "bert-qv", "llama-gate"])
def test_start(name):
    """PEFT's start: A within +-1/sqrt(in) and B zero, as ours is; the base's logits to the bit; dA zero, dB not."""
    pair, batch = adapter_case(name, start=True)
    for params in (pair.adapter.params, ln.init_adapter(pair.model, pair.adapter.config, seed=5).params):
        for matrix in pair.adapter.matrices:
            A, B = ln.asnumpy(params[f"{matrix}.A"]), ln.asnumpy(params[f"{matrix}.B"])
            assert 0.8 < abs(A).max() * A.shape[1] ** 0.5 <= 1
            assert not B.any()
    base = ln.forward(pair.model, batch.tokens, **batch.inputs)
    ours = ln.forward(pair.model, batch.tokens, pair.adapter, **batch.inputs)
    np.testing.assert_array_equal(ln.asnumpy(ours), ln.asnumpy(base))
    peers.compare_gradients(pair, batch)
    for parameter, p in peers.trained(pair).items():
        assert p.grad.numpy().any() == ("lora_B" in parameter)


@pytest.mark.proves("L5")
@pytest.mark.parametrize("name", ["gpt2-qkv", "gpt2-patterns", "bert-all", "roberta-embed", "llama-ends", "llama-all"])
def test_merge(name):
    """The merged weights are PEFT's, to a few roundings."""
    pair, _ = adapter_case(name)
    merged = ln.merge(pair.model, pair.adapter)
    theirs = pair.module.merge_and_unload().named_parameters()
    peers.assert_close(
        dict(merged.weights), weights.flat(pair.family, {n: p.detach().numpy() for n, p in theirs}), tolerance=1e-15
    )


@pytest.mark.proves("L7")
@pytest.mark.parametrize("model", ["gpt2-classify-right", "bert-tag-right", "llama-grouped"])
def test_an_adapter_for_each_row(model):
    """One batch with two adapters of different rank, targets and heads, and a row of the base."""
    pair, batch = model_case(model)
    q = "qkv" if pair.family == "gpt2" else "q"
    own_head = {"train_head": pair.model.config.head != "lm"}
    one = peers.adapt(pair, lora(q, "o", **own_head), seed=3)
    other = peers.adapt(one, lora(q, "up", r=5, **own_head), seed=4, name="other")
    ours = ln.forward(pair.model, batch.tokens, [other.adapter, None, one.adapter, other.adapter], **batch.inputs)
    with torch.no_grad():
        theirs = peers.their_logits(other, batch, adapter_names=["other", "__base__", "default", "other"])
    peers.assert_close({"logits": peers.real(pair, batch, ours)}, {"logits": peers.real(pair, batch, theirs)})


@pytest.mark.proves("L9")
@pytest.mark.parametrize("model", ["gpt2", "bert-tag-right", "llama-grouped"])
def test_combine(model):
    """A weighted sum of two adapters is PEFT's of combination type "cat"."""
    pair, batch = model_case(model)
    q = "qkv" if pair.family == "gpt2" else "q"
    one = peers.adapt(pair, lora(q, "o"), seed=3)
    other = peers.adapt(one, lora(q, "o", r=5, rslora=True), seed=4, name="other")
    other.module.base_model.add_weighted_adapter(["default", "other"], [0.7, 1.9], "both", combination_type="cat")
    other.module.set_adapter("both")
    combined = ln.combine([one.adapter, other.adapter], [0.7, 1.9])
    peers.compare_logits(replace(other, adapter=combined), batch)


@pytest.mark.proves("T15")
@pytest.mark.parametrize("model", ["gpt2-right", "llama-untied"])
def test_their_labels_are_shifted(model):
    """Their own loss of a language model: labels[n, t + 1] is our targets[n, t]. They compute it in float32."""
    pair, batch = model_case(model)
    targets = batch.targets.copy()
    targets[:, -1] = peers.IGNORED
    labels = torch.tensor(np.roll(targets, 1, axis=1))
    theirs = pair.module(**peers.their_inputs(pair, batch), labels=labels).loss.item()
    assert ln.loss(pair.model, batch.tokens, targets, **batch.inputs) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.proves("T16")
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", ["gpt2-qkv", "gpt2-tied-ends", "llama-qv", "llama-ends", "llama-qv-dropout"])
def test_generate(name, padding):
    """20 greedy tokens, one by one the same; and their cached logits are our cached and our uncached ones."""
    pair, _ = adapter_case(name)
    batch = peers.make_batch(pair.model.config, seed=5, padding=padding)
    (N, T), n = batch.tokens.shape, 20
    their_inputs = peers.their_inputs(pair, batch)
    their_inputs.pop("position_ids", None)  # counted from the mask
    steps = []  # their logits at each step, as the model gives them: generate itself would make them float32
    pair.module.get_base_model().register_forward_hook(lambda *call: steps.append(call[-1].logits[:, -1]))
    theirs = pair.module.generate(**their_inputs, do_sample=False, max_new_tokens=n)
    ours = ln.generate(pair.model, batch.tokens, pair.adapter, n=n, mask=batch.mask)
    np.testing.assert_array_equal(ours, theirs.numpy())

    their_logits = torch.stack(steps, dim=1).numpy()  # (N,n,V)
    mask = None if batch.mask is None else np.hstack([batch.mask, np.ones((N, n), dtype=bool)])
    uncached = ln.forward(pair.model, ours, pair.adapter, mask=mask)[:, T - 1 : -1]
    run, cache = bind(pair.model, pair.adapter, rows=N), new_cache(pair.model.config, N=N, longest=T + n, dtype="f8")
    cached = [
        next_logits(run, cache, ours[:, start:stop], None if mask is None else mask[:, :stop])
        for start, stop in [(0, T), *((t, t + 1) for t in range(T, T + n - 1))]
    ]
    peers.assert_close(
        {"uncached": uncached, "cached": xp.stack(cached, axis=1)}, {"uncached": their_logits, "cached": their_logits}
    )

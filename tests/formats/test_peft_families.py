"""PEFT's adapters of BERT, RoBERTa and Llama, both ways: the same tensors to the bit, the same logits within 1e-10.

As test_peft_interop does for GPT-2. The peer's weights come to ours by the mapping in tests/parity, made by hand.
"""

from dataclasses import replace

import numpy as np
import peers  # skips this file where torch, transformers or peft is missing
import pytest
from hostile import edit_tensors
from peers import peft, torch
from safetensors.torch import load_file
from strategies import random_model, same_bits, trained_adapter

import lora_np as ln

pytestmark = [*peers.FILTERS, pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")]

TENSORS = "adapter_model.safetensors"
BERT, ROBERTA, LLAMA = peers.BERT, peers.ROBERTA, peers.LLAMA
BERT_CLASSIFY, BERT_TAG = (replace(BERT, head=head) for head in ("classify", "tag"))
LLAMA_CLASSIFY = replace(LLAMA, head="classify")


def lora(*targets, **fields):
    return ln.LoRAConfig(**{"r": 3, "alpha": 5, "targets": targets or ("q", "v"), **fields})


OURS = {
    "bert": ("bert", BERT, lora("q", "v", "down")),
    "bert-o": ("bert", BERT, lora("o")),
    "bert-down": ("bert", BERT, lora("down")),
    "bert-down-one-layer": ("bert", BERT, lora("down", "q", layers=(1,))),
    "bert-classify": ("bert", BERT_CLASSIFY, lora(train_head=True)),
    "bert-classify-bias-all": ("bert", BERT_CLASSIFY, lora(train_head=True, bias="all")),
    "bert-classify-all": ("bert", BERT_CLASSIFY, lora("q", "k", "v", "o", "up", "down", "embed")),
    "bert-classify-head": ("bert", BERT_CLASSIFY, lora("head", "o", bias="lora_only")),
    "bert-tag": ("bert", BERT_TAG, lora(train_head=True, bias="lora_only")),
    "bert-patterns": (
        "bert",
        BERT_TAG,
        lora("o", "down", "up", rank_pattern={"down": 2, "layers.1.attn.o": 4}, alpha_pattern={"up": 2.5, "down": 7}),
    ),
    "bert-qkv": ("bert", BERT, lora("qkv", "up", rank_pattern={"qkv": 2}, alpha_pattern={"layers.1.attn.qkv": 7})),
    "roberta": ("roberta", ROBERTA, lora()),
    "roberta-qkv": ("roberta", ROBERTA, lora("qkv", bias="lora_only", train_head=True)),
    "roberta-whole": ("roberta", ROBERTA, lora(train_head=True)),
    "roberta-whole-bias-all": ("roberta", ROBERTA, lora("q", "o", "down", train_head=True, bias="all")),
    "roberta-bias-all": ("roberta", ROBERTA, lora(bias="all")),
    "roberta-head": ("roberta", ROBERTA, lora("head", "k", rslora=True)),
    "llama": ("llama", LLAMA, lora()),
    "llama-qkv": ("llama", LLAMA, lora("qkv", "o", layers=(1,), rslora=True)),
    "llama-all": ("llama", LLAMA, lora("q", "k", "v", "o", "up", "gate", "down")),
    "llama-embed-head": ("llama", replace(LLAMA, tie_head=False), lora("embed", "head")),
    "llama-one-layer": ("llama", LLAMA, lora("q", "gate", layers=(1,))),
    "llama-patterns": ("llama", LLAMA, lora("q", "v", rank_pattern={"q": 2}, alpha_pattern={"v": 2.5}, rslora=True)),
    "llama-classify": ("llama", LLAMA_CLASSIFY, lora(train_head=True)),
    "llama-head": ("llama", LLAMA, lora("up", train_head=True)),
}


def make(family, config, *, seed=1):
    """A pair of peers' models, and a batch for it."""
    return peers.make(family, config, seed=seed), peers.make_batch(config, seed=seed, padding="right")


@pytest.mark.proves("L1", "L2")
@pytest.mark.parametrize(("family", "config", "lora_config"), OURS.values(), ids=OURS)
def test_peft_reads_ours(tmp_path, family, config, lora_config):
    pair, batch = make(family, config)
    pair = replace(pair, adapter=trained_adapter(pair.model, lora_config, seed=2))
    base = ln.forward(pair.model, batch.tokens, **batch.inputs)
    ln.save_adapter(tmp_path, pair.adapter, pair.model)
    loaded = ln.load_adapter(tmp_path, pair.model)
    assert loaded.config == pair.adapter.config
    assert same_bits(dict(loaded.params), dict(pair.adapter.params))
    module = peft.PeftModel.from_pretrained(pair.module, str(tmp_path)).eval()  # what it misses it warns of: an error
    assert not peft.set_peft_model_state_dict(module, load_file(tmp_path / TENSORS)).unexpected_keys
    pair = replace(pair, module=module)
    peers.compare_logits(pair, batch)
    with torch.no_grad():
        adapted = peers.their_logits(pair, batch).numpy()
    assert np.abs(adapted - ln.asnumpy(base)).max() > 1e-3  # it is not the base that both computed


THEIRS = {
    "bert": ("bert", BERT, {"target_modules": ["query", "value"]}, ("q", "v")),
    "bert-dense": ("bert", BERT, {"target_modules": ["key", "dense"]}, ("k", "o", "up", "down")),
    "bert-output": (
        "bert",
        BERT_TAG,
        {
            "target_modules": ["output.dense"],
            "rank_pattern": {"attention.output.dense": 2},
            "alpha_pattern": {"dense": 4},
        },
        ("o", "down"),
    ),
    "bert-classify": ("bert", BERT_CLASSIFY, {"target_modules": ["query"], "task_type": "SEQ_CLS"}, ("q",)),
    "bert-classify-bias": (
        "bert",
        BERT_CLASSIFY,
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "bias": "all"},
        ("q", "v"),
    ),
    "bert-tag": ("bert", BERT_TAG, {"target_modules": ["value"], "task_type": "TOKEN_CLS"}, ("v",)),
    "bert-one-layer": ("bert", BERT, {"target_modules": ["query"], "layers_to_transform": [1]}, ("q",)),
    "bert-embeddings": ("bert", BERT, {"target_modules": ["word_embeddings", "query"]}, ("q", "embed")),
    "roberta": ("roberta", ROBERTA, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}, ("q", "v")),
    "roberta-bias": (
        "roberta",
        ROBERTA,
        {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"},
        ("q",),
    ),
    "roberta-whole": (
        "roberta",
        ROBERTA,
        {"target_modules": ["key", "intermediate.dense"], "modules_to_save": ["classifier"]},
        ("k", "up"),
    ),
    "roberta-head": ("roberta", ROBERTA, {"target_modules": ["query", "out_proj"]}, ("q", "head")),
    "llama": ("llama", LLAMA, {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}, ("q", "v")),
    "llama-all": (
        "llama",
        LLAMA,
        {"target_modules": "all-linear", "use_rslora": True},
        ("q", "k", "v", "o", "up", "gate", "down"),
    ),
    "llama-patterns": (
        "llama",
        LLAMA,
        {
            "target_modules": ["q_proj", "mlp.up_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 5, "down_proj": 2},
            "alpha_pattern": {"up_proj": 9},
        },
        ("q", "up", "down"),
    ),
    "llama-one-layer": ("llama", LLAMA, {"target_modules": ["o_proj"], "layers_to_transform": 0}, ("o",)),
    "llama-classify": ("llama", LLAMA_CLASSIFY, {"target_modules": ["gate_proj"], "task_type": "SEQ_CLS"}, ("gate",)),
    "llama-embed": (
        "llama",
        replace(LLAMA, tie_head=False),
        {"target_modules": ["embed_tokens", "lm_head"]},
        ("embed", "head"),
    ),
}


@pytest.mark.proves("L1", "L2")
@pytest.mark.parametrize(("family", "config", "settings", "targets"), THEIRS.values(), ids=THEIRS)
def test_we_read_pefts(tmp_path, family, config, settings, targets):
    pair, batch = make(family, config)
    pair = peers.saved_by_peft(pair, settings, tmp_path / "theirs")
    adapter = ln.load_adapter(tmp_path / "theirs", pair.model)
    assert set(adapter.config.targets) == set(targets)
    theirs = {name: p.tobytes() for name, p in peers.parameters(pair).items()}
    assert theirs == {name: ln.asnumpy(p).tobytes() for name, p in adapter.params.items()}
    peers.compare_logits(replace(pair, adapter=adapter), batch)
    # And back: file to adapter to file, read by us and by PEFT.
    ln.save_adapter(tmp_path / "ours", adapter, pair.model)
    again = ln.load_adapter(tmp_path / "ours", pair.model)
    assert again.config == adapter.config
    assert same_bits(dict(again.params), dict(adapter.params))
    before, after = (load_file(tmp_path / name / TENSORS) for name in ("theirs", "ours"))
    assert after.keys() <= before.keys()  # PEFT writes copies of some that it did not train
    assert all(torch.equal(before[name], value) for name, value in after.items())
    fresh = make(family, config)[0].module
    module = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "ours")).eval()
    peers.compare_logits(replace(pair, module=module, adapter=again), batch)


def test_an_adapted_pooler_is_refused_by_name(tmp_path):
    """PEFT's "dense" takes BERT's pooler along, which is no target of ours."""
    pair, _ = make("bert", BERT_CLASSIFY)
    module = peft.get_peft_model(pair.module, peft.LoraConfig(target_modules=["dense"]))
    module.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"bert\.pooler\.dense: not adapted where the model is run; lora-np merge"):
        ln.load_adapter(tmp_path, pair.model)


@pytest.mark.parametrize("config", [BERT, ROBERTA, LLAMA], ids=["bert", "roberta", "llama"])
def test_the_three_a_of_one_update_are_one(tmp_path, config):
    model = random_model(config, seed=1)
    ln.save_adapter(tmp_path / "a", trained_adapter(model, lora("qkv"), seed=1), model)
    keys = load_file(tmp_path / "a" / TENSORS)
    (key,) = [name for name in keys if ".0." in name and name.endswith(("key.lora_A.weight", "k_proj.lora_A.weight"))]
    edit_tensors(tmp_path / "a" / TENSORS, lambda t: t.update({key: t[key] + 1}))
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.qkv\.A: expected the same A"):
        ln.load_adapter(tmp_path / "a", model)

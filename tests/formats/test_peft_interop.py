"""PEFT itself reads what we write, and we read what it writes: the same logits within 1e-10, in float64.

GPT-2s of random weights. The peer's weights come to ours by the mapping in tests/parity, which is made by hand and
knows nothing of lora_np.formats.
"""

from dataclasses import replace

import numpy as np
import peers  # skips this file where torch, transformers or peft is missing
import pytest
from peers import peft, torch
from safetensors.torch import load_file
from strategies import same_bits, trained_adapter

import lora_np as ln

IGNORED = [
    "ignore:Setting `save_embedding_layers`",
    "ignore:Could not find a config file",
]
pytestmark = [*peers.FILTERS, *map(pytest.mark.filterwarnings, IGNORED)]

CLASSIFY, TAG, HEADLESS = (replace(peers.GPT2, head=head) for head in ("classify", "tag", "none"))


def lora(*targets, **fields):
    return ln.LoRAConfig(**{"r": 3, "alpha": 5, "targets": targets or ("q", "v"), **fields})


OURS = {
    "q-v": (peers.GPT2, lora()),
    "qkv": (peers.GPT2, lora("qkv")),
    "k": (peers.GPT2, lora("k")),
    "all": (peers.GPT2, lora("q", "k", "v", "o", "up", "down")),
    "embed": (peers.GPT2, lora("embed")),
    "head": (peers.GPT2, lora("head", "q")),
    "embed-head-untied": (replace(peers.GPT2, tie_head=False), lora("embed", "head")),
    "rslora-fused": (peers.GPT2, lora("q", "v", "o", rslora=True)),
    "rslora": (peers.GPT2, lora("qkv", "down", rslora=True)),
    "rank-pattern": (peers.GPT2, lora("qkv", "o", "up", rank_pattern={"o": 2, "layers.1.mlp.up": 7})),
    "rank-pattern-fused": (
        peers.GPT2,
        lora("q", "v", rank_pattern={"q": 6, "layers.1.attn.v": 1}, alpha_pattern={"q": 10, "layers.1.attn.v": 5 / 3}),
    ),
    "alpha-pattern": (peers.GPT2, lora("qkv", "down", alpha_pattern={"down": 2.5, "layers.0.attn.qkv": 7})),
    "bias-lora-only": (peers.GPT2, lora("q", "v", "up", bias="lora_only")),
    "bias-all": (peers.GPT2, lora("q", "v", bias="all")),
    "one-layer": (peers.GPT2, lora("q", "down", layers=(1,))),
    "one-layer-and-embed": (peers.GPT2, lora("q", "embed", layers=(1,))),
    "train-head": (peers.GPT2, lora(train_head=True)),
    "classify": (CLASSIFY, lora("q", "v", train_head=True)),
    "classify-head": (CLASSIFY, lora("head")),
    "classify-frozen-head": (CLASSIFY, lora("q", "v")),
    "dora": (peers.GPT2, lora("qkv", "o", "up", dora=True)),
    "dora-apart": (peers.GPT2, lora("q", "k", "v", "down", dora=True, rslora=True)),
    "dora-embed": (peers.GPT2, lora("embed", "head", dora=True)),
    "tag": (TAG, lora("q", "v", train_head=True, bias="all")),
    "tag-head": (TAG, lora("head", "o", bias="lora_only")),
}


def make(config, *, seed=1):
    """A pair of peers' models, and a batch for it."""
    return peers.make("gpt2", config, seed=seed), peers.make_batch(config, seed=seed)


@pytest.mark.parametrize(("config", "lora_config"), OURS.values(), ids=OURS)
def test_peft_reads_ours(tmp_path, config, lora_config):
    pair, batch = make(config)
    pair = replace(pair, adapter=trained_adapter(pair.model, lora_config, seed=2))
    base = ln.forward(pair.model, batch.tokens, **batch.inputs)
    ln.save_adapter(tmp_path, pair.adapter, pair.model)
    module = peft.PeftModel.from_pretrained(pair.module, str(tmp_path)).eval()  # what it misses it warns of: an error
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert not peft.set_peft_model_state_dict(module, tensors).unexpected_keys
    pair = replace(pair, module=module)
    peers.compare_logits(pair, batch)
    with torch.no_grad():
        adapted = peers.their_logits(pair, batch).numpy()
    assert np.abs(adapted - ln.asnumpy(base)).max() > 1e-3  # it is not the base that both computed


def test_peft_reads_ours_without_a_head(tmp_path):
    """transformers' GPT2Model, whose names have no `transformer.` in front; peers has none, so it is cut out of one."""
    pair, batch = make(peers.GPT2)
    config = replace(pair.model.config, head="none")
    model = ln.Model(config, pair.model.weights)
    adapter = trained_adapter(model, lora("q", "v", "down", "embed"), seed=2)
    ln.save_adapter(tmp_path, adapter, model)
    module = peft.PeftModel.from_pretrained(pair.module.transformer, str(tmp_path)).eval()
    peers.compare_logits(replace(pair, module=module, model=model, adapter=adapter), batch)


THEIRS = {
    "c_attn": (peers.GPT2, {"target_modules": ["c_attn"]}, ("qkv",)),
    "c_proj": (peers.GPT2, {"target_modules": ["c_proj"]}, ("o", "down")),
    "c_fc": (peers.GPT2, {"target_modules": ["c_fc"]}, ("up",)),
    "some": (peers.GPT2, {"target_modules": ["c_attn", "attn.c_proj"], "use_rslora": True}, ("o", "qkv")),
    "all-linear": (peers.GPT2, {"target_modules": "all-linear"}, ("o", "up", "down", "qkv")),
    "embeddings": (peers.GPT2, {"target_modules": ["wte", "lm_head"]}, ("embed", "head")),
    "patterns": (
        peers.GPT2,
        {
            "target_modules": ["c_attn", "c_fc"],
            "rank_pattern": {"c_fc": 2, "h.1.attn.c_attn": 5},
            "alpha_pattern": {"^transformer.h.0.mlp.c_fc": 9, "c_attn": 4},
        },
        ("up", "qkv"),
    ),
    "one-layer": (peers.GPT2, {"target_modules": ["c_attn", "c_proj"], "layers_to_transform": 1}, ("o", "down", "qkv")),
    "excluded": (peers.GPT2, {"target_modules": ["c_attn"], "exclude_modules": ["h.0.attn.c_attn"]}, ("qkv",)),
    "bias-all": (peers.GPT2, {"target_modules": ["c_attn"], "bias": "all"}, ("qkv",)),
    "bias-lora-only": (peers.GPT2, {"target_modules": ["c_attn", "mlp.c_proj"], "bias": "lora_only"}, ("down", "qkv")),
    "lm-head-whole": (peers.GPT2, {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}, ("qkv",)),
    "causal-lm": (peers.GPT2, {"target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}, ("qkv",)),
    "classify": (CLASSIFY, {"target_modules": ["c_attn"], "task_type": "SEQ_CLS"}, ("qkv",)),
    "tag": (TAG, {"target_modules": ["c_fc"], "task_type": "TOKEN_CLS", "bias": "all"}, ("up",)),
    "dora": (peers.GPT2, {"target_modules": ["c_attn", "mlp.c_proj"], "use_dora": True}, ("down", "qkv")),
    "dora-embeddings": (peers.GPT2, {"target_modules": ["wte", "lm_head"], "use_dora": True}, ("embed", "head")),
    "gaussian": (peers.GPT2, {"target_modules": ["c_attn"], "init_lora_weights": "gaussian"}, ("qkv",)),
}


@pytest.mark.parametrize(("config", "settings", "targets"), THEIRS.values(), ids=THEIRS)
def test_we_read_pefts(tmp_path, config, settings, targets):
    pair, batch = make(config)
    pair = peers.saved_by_peft(pair, settings, tmp_path / "theirs")
    adapter = ln.load_adapter(tmp_path / "theirs", pair.model)
    assert adapter.config.targets == targets
    assert {name: p.tobytes() for name, p in peers.parameters(pair).items()} == {
        name: ln.asnumpy(p).tobytes() for name, p in adapter.params.items()
    }
    peers.compare_logits(replace(pair, adapter=adapter), batch)
    # And back: file to adapter to file, read by us and by PEFT.
    ln.save_adapter(tmp_path / "ours", adapter, pair.model)
    again = ln.load_adapter(tmp_path / "ours", pair.model)
    assert again.config == adapter.config
    assert same_bits(dict(again.params), dict(adapter.params))
    fresh = make(config)[0].module
    module = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "ours")).eval()
    peers.compare_logits(replace(pair, module=module, adapter=again), batch)

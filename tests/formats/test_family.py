"""Families of models: which one a configuration is of, and what is fused in its files."""

from dataclasses import replace

import pytest
from hostile import GPT2, LLAMA, OWN

import lora_np as ln
from lora_np.formats.models.families import FAMILIES
from lora_np.formats.models.families import OWN as OWN_NAMES
from lora_np.formats.models.family import Family
from lora_np.formats.models.names import family_of, module_of, module_parts, module_shapes

PRESETS = {"gpt2": "gpt2", "gpt2-xl": "gpt2", "bert-base": "bert", "roberta-large": "roberta", "smollm2-135m": "llama"}
FUSED: Family = replace(
    FAMILIES["llama"],
    name="fused",
    modules={
        "layers.{i}.attn.qkv": "h.{i}.qkv", "layers.{i}.attn.o": "h.{i}.o", "layers.{i}.mlp.gate_up": "h.{i}.gate_up",
        "layers.{i}.mlp.down": "h.{i}.down",
    },
)  # fmt: skip


@pytest.mark.parametrize(("preset", "family"), PRESETS.items())
def test_a_preset_is_of_its_family(preset, family):
    config = ln.PRESETS[preset]
    assert family_of(config) is FAMILIES[family]
    assert family_of(replace(config, family=family)) is FAMILIES[family]


@pytest.mark.parametrize(
    "fields", [{"activation": "relu"}, {"norm_outputs": True}, {"window": 3}, {"embed_scale": 2.0}]
)
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_what_its_config_json_cannot_say_is_not_of_a_family(config, fields):
    assert family_of(replace(config, **fields)) is not family_of(config)


@pytest.mark.parametrize("family", [None, "gpt2", "no such family"])
def test_a_family_that_does_not_fit_is_not_asked(family):
    assert family_of(replace(OWN, family=family)) is OWN_NAMES
    assert family_of(replace(LLAMA, family=family)) is FAMILIES["llama"]


def test_fused_modules_hold_the_rows_of_their_parts(monkeypatch):
    monkeypatch.setitem(FAMILIES, "fused", FUSED)
    config = replace(LLAMA, family="fused")  # D = 8, two heads of width 4, one of keys; F = 12
    assert family_of(config) is FUSED
    assert module_of("layers.1.attn.k", FUSED) == module_of("layers.1.attn.qkv", FUSED) == "layers.1.attn.qkv"
    assert module_of("layers.1.mlp.up", FUSED) == "layers.1.mlp.gate_up"
    assert module_of("layers.1.attn.o", FUSED) == "layers.1.attn.o"
    parts = {"layers.1.attn.q": slice(0, 8), "layers.1.attn.k": slice(8, 12), "layers.1.attn.v": slice(12, 16)}
    assert module_parts(config, "layers.1.attn.qkv") == parts
    parts = {"layers.1.mlp.gate": slice(0, 12), "layers.1.mlp.up": slice(12, 24)}
    assert module_parts(config, "layers.1.mlp.gate_up") == parts
    assert module_parts(config, "layers.1.attn.o") == {"layers.1.attn.o": slice(None)}
    shapes = module_shapes(config)
    assert shapes["layers.0.mlp.gate_up"] == (24, 8)
    assert shapes["layers.0.attn.qkv"] == (16, 8)

"""Targets as people name them: by commas, all at once, or as a model's own family does; else the nearest names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import configs

import lora_np as ln
from lora_np.adapter import TARGETS, target_of
from lora_np.cli.targets import targets_of
from lora_np.formats.models.names import module_names

GPT2, BERT, LLAMA = (ln.PRESETS[name] for name in ("gpt2", "bert-base", "smollm2-135m"))


@pytest.mark.parametrize(
    ("config", "words", "targets"),
    [
        (GPT2, ["q", "v"], "q v"),
        (GPT2, ["q,v"], "q v"),
        (GPT2, ["q,", "v", "q"], "q v"),
        (GPT2, ["all"], "q k v o up down"),
        (LLAMA, ["all-linear"], "q k v o up gate down"),
        (LLAMA, ["q_proj,v_proj", "gate_proj"], "q v gate"),
        (LLAMA, ["lm_head", "embed_tokens"], "head embed"),
        (GPT2, ["q_proj"], "q"),
        (GPT2, ["c_attn"], "qkv"),
        (GPT2, ["c_proj"], "o down"),
        (GPT2, ["attn.c_proj"], "o"),
        (BERT, ["query", "value"], "q v"),
        (BERT, ["dense"], "o up down"),
        (LLAMA, ["fc1", "fc2", "out_proj"], "up down o"),
    ],
)
def test_names_are_understood(config, words, targets):
    assert set(targets_of(words, config)) == set(targets.split())
    assert len(targets_of(words, config)) == len(targets.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["q_poj"], r"--targets: 'q_poj': expected names of q k v .* or all, .*; nearest are q_proj"),
        (["dense"], "--targets: 'dense': expected names of"),  # means several things, none of them Llama's
        (["norm"], "--targets: 'norm': expected names of"),
        ([","], "--targets: expected names of .*, or all, got none"),
    ],
)
def test_what_is_no_name_is_answered_with_the_nearest(words, message):
    with pytest.raises(ValueError, match=message):
        targets_of(words, LLAMA)


@given(configs(), st.data())
def test_a_family_s_own_name_means_the_modules_that_it_names(config, data):
    """And all means every matrix of the layers; each can be adapted."""
    named = {ours: theirs for ours, theirs in module_names(config).items() if target_of(ours) in TARGETS}
    ours, theirs = data.draw(st.sampled_from(sorted(named.items())))
    end = ".".join(theirs.split(".")[-data.draw(st.integers(1, 2)) :])
    assert target_of(ours) in targets_of([end], config) or end in TARGETS
    layers = {target_of(name) for name in config.matrix_shapes() if name.startswith("layers.")}
    assert set(targets_of(["all"], config)) == layers
    assert ln.count_parameters(config, ln.LoRAConfig(r=1, targets=targets_of(["all"], config))) > 0

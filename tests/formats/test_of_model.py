"""An adapter's file on a model that is run: every layout by which it is known by name loads, to the same bits."""

import numpy as np
import pytest
from hostile import LLAMA, edit_json, edit_tensors, write_peft
from hypothesis import given
from hypothesis import strategies as st
from strategies import random_model, same_bits, seeds
from test_contents import BEFORE, CONFIG, NAMES, PREFIX, WEIGHTS, home_of, on_host, write_layout, write_mlx

import lora_np as ln

MODEL = random_model(LLAMA, seed=1)
D, F, KV = LLAMA.d_model, LLAMA.d_ff, LLAMA.kv_heads * LLAMA.head_width
# Ours, Llama's, and the matrix's shape.
MODULES = {
    "layers.0.attn.q": ("model.layers.0.self_attn.q_proj", (D, D)),
    "layers.1.attn.v": ("model.layers.1.self_attn.v_proj", (KV, D)),
    "layers.1.mlp.down": ("model.layers.1.mlp.down_proj", (D, F)),
    "head": ("lm_head", (LLAMA.vocab_size, D)),
}
Q = MODULES["layers.0.attn.q"][0]
# What may stand in the place of Llama's `model`.
TRUNKS = ["model", "", "model.model", "language_model.model", "model.language_model"]


def some_pairs(rng, names):
    """A and B of each, of whole numbers and a rank of its own."""
    ranks = {name: int(rng.integers(1, 5)) for name in names}
    return {
        name: (on_host(rng, r, MODULES[name][1][1], limit=3), on_host(rng, MODULES[name][1][0], r, limit=3))
        for name, r in ranks.items()
    }


def check_loaded(folder, pairs, scales):
    """The adapter that is loaded has these A, B and s, in the model's dtype."""
    adapter = ln.load_adapter(folder, MODEL)
    assert set(adapter.matrices) == set(pairs)
    assert {name: adapter.config.scale(name) for name in pairs} == scales
    given = {f"{name}.{f}": v for name, both in pairs.items() for f, v in zip("AB", both, strict=True)}
    assert same_bits(dict(adapter.params), {name: value.astype(MODEL.dtype) for name, value in given.items()})
    return adapter


@pytest.mark.proves("L1")
@given(
    seed=seeds, names=st.sets(st.sampled_from(sorted(MODULES)), min_size=1), before=st.sampled_from(BEFORE),
    after=st.sampled_from(NAMES), base_layer=st.booleans(), in_shards=st.booleans(), trunk=st.sampled_from(TRUNKS),
    in_full=st.booleans(),
)  # fmt: skip
def test_a_layout_that_can_be_mended_loads(
    tmp_path_factory, seed, names, before, after, base_layer, in_shards, trunk, in_full
):
    """in_full: whether the configuration has Llama's own full names, or the file's."""
    rng, home = np.random.default_rng(seed), home_of(tmp_path_factory)
    pairs = some_pairs(rng, sorted(names))

    def there(name):
        theirs = MODULES[name][0]
        return ".".join(filter(None, [trunk, theirs.removeprefix("model.")])) if theirs != "lm_head" else theirs

    said = {name: MODULES[name][0] if in_full else there(name) for name in pairs}
    config = {
        "peft_type": "LORA", "r": 9, "lora_alpha": 4, "target_modules": list(said.values()),
        "rank_pattern": {f"^{said[name]}": len(A) for name, (A, _) in pairs.items()},
        "alpha_pattern": {said[name]: 3 + i for i, name in enumerate(pairs)},
    }  # fmt: skip
    layout = {"before": before, "after": after, "base_layer": base_layer, "in_shards": in_shards}
    write_layout(home / "ad", {there(name): pair for name, pair in pairs.items()}, config, rng, **layout)
    check_loaded(home / "ad", pairs, {name: (3 + i) / len(A) for i, (name, (A, _)) in enumerate(pairs.items())})


@pytest.mark.proves("L1")
@given(seed=seeds, s=st.sampled_from([0.5, 2.0, 10.0, 20]))
def test_mlx_lms_adapter_loads(tmp_path_factory, seed, s):
    rng, home = np.random.default_rng(seed), home_of(tmp_path_factory)
    pairs = some_pairs(rng, ["layers.0.attn.q", "layers.1.mlp.down"])
    tensors = {
        f"{MODULES[name][0]}.lora_{letter}": np.ascontiguousarray(values.T)
        for name, both in pairs.items()
        for letter, values in zip("ab", both, strict=True)
    }
    write_mlx(home / "ad", tensors, s)
    ours = ln.load_adapter(home / "ad", MODEL)
    check_loaded(home / "ad", pairs, {name: ours.config.scale(name) for name in pairs})
    for name in pairs:
        assert ours.config.scale(name) == pytest.approx(s, rel=2**-50)


# --- What no Adapter holds, or does not fit --------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    write_peft(tmp_path / "ad", {Q: (np.ones((2, D)), np.ones((D, 2)))}, r=2, alpha=4)
    return tmp_path / "ad"


def add(**tensors):
    """A change of a file: further tensors, whose dots are written __."""
    return lambda found: found.update({PREFIX + key.replace("__", "."): value for key, value in tensors.items()})


STEM = "model__layers__0__self_attn__q_proj"
NORM, BIAS = {"model__norm__weight": np.ones(D) * 9}, {f"{STEM}__lora_B__bias": np.ones(D)}
FACTORS = {"A": np.ones((2, D)), "B": np.ones((D, 2))}


@pytest.mark.parametrize(
    ("settings", "change", "said"),
    [
        ({"lora_bias": True}, add(**BIAS), "lora_bias: not supported .*merge takes it"),
        ({}, add(**BIAS), "lora_bias is not true, so 1 tensors are left out"),
        (
            {"trainable_token_indices": [1]},
            add(model__embed_tokens__token_adapter__trainable_tokens_delta=np.ones((1, D))),
            "trainable_token_indices: not supported .*merge takes it",
        ),
        ({"target_parameters": ["mlp.experts.up"]}, add(), "target_parameters: not supported .*merge takes it"),
        ({"modules_to_save": ["norm"]}, add(**NORM), "'norm': only the head, lm_head, can be.*merge takes it"),
        ({}, add(**NORM), r"model\.norm\.weight: expected a copy of norm\.weight, got other values.*merge takes it"),
        ({}, add(model__nrm__weight=np.ones(D)), r"the tensor model\.nrm\.weight has no place in this model"),
        (
            {},
            add(**{f"{STEM}__base_layer__lora_{x}__weight": value for x, value in FACTORS.items()}),
            "expected one A and B of a module, got 2; lora-np merge takes it",
        ),
        ({}, add(**{f"{STEM}__lora_A__weight": np.ones((2, D + 1))}), rf"expected A \(r, {D}\) and B \({D}, r\), got"),
        (
            {"target_modules": ["q_proj", "layers.0.self_attn.q_prj"], "layers_to_transform": [0]},
            add(),
            "target_modules: 'layers.0.self_attn.q_prj': no module fits",
        ),
    ],
)  # fmt: skip
def test_what_no_adapter_holds_is_refused(folder, settings, change, said):
    edit_json(folder / CONFIG, **settings)
    edit_tensors(folder / WEIGHTS, change)
    with pytest.raises(ValueError, match=said) as caught:
        ln.load_adapter(folder, MODEL)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_module_that_is_there_twice_is_refused(folder):
    """Under its own name, and under one that is mended to it: nothing says which is meant."""
    more = {f"{STEM.removeprefix('model__')}__lora_{x}__weight": value for x, value in FACTORS.items()}
    edit_tensors(folder / WEIGHTS, add(**more))
    with pytest.raises(ValueError, match="a module is there twice, under names that differ in a prefix"):
        ln.load_adapter(folder, MODEL)


def test_a_module_of_another_architecture_is_named_with_the_nearest(folder):
    write_peft(
        folder.parent / "other", {"model.layers.0.self_attn.qq_proj": (np.ones((2, D)), np.ones((D, 2)))}, r=2, alpha=4
    )
    with pytest.raises(ValueError, match=r"qq_proj: this model has no such module to adapt; nearest are model\.layers"):
        ln.load_adapter(folder.parent / "other", MODEL)


def test_a_name_that_two_prefixes_would_mend_is_refused(folder):
    """Each layer has a module of this end: nothing says which is meant."""
    write_peft(folder.parent / "other", {"self_attn.q_proj": (np.ones((2, D)), np.ones((D, 2)))}, r=2, alpha=4)
    with pytest.raises(ValueError, match=r"self_attn\.q_proj: this model has no such module to adapt"):
        ln.load_adapter(folder.parent / "other", MODEL)

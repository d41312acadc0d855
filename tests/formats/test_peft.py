"""Adapters in PEFT's format: nothing is lost on the way out and back, and nothing in a file is passed over."""

import json
import os
import re
from dataclasses import replace

import hostile
import numpy as np
import pytest
from hostile import GPT2, GPT2_FIELDS, LLAMA, OWN, contents, edit_json, edit_tensors, tensors_and_metadata
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from strategies import bits, configs, dtypes, lora_configs, random_model, same_bits, seeds, trained_adapter

import lora_np as ln
from lora_np.formats.adapters import peft
from lora_np.formats.adapters.contents import read_contents
from lora_np.formats.adapters.peft_config import OFF
from lora_np.formats.files import atomic
from lora_np.formats.models.families.gpt2 import GPT2 as GPT2_FAMILY
from lora_np.formats.models.folder import model_hash
from lora_np.formats.models.names import family_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYER = "base_model.model.transformer.h.0."
ATTN = f"{LAYER}attn.c_attn"


@pytest.fixture
def model():
    return random_model(GPT2, seed=1)


def adapter_of(model, *targets, seed=3, **fields):
    fields = {"r": 2, "alpha": 3, "targets": targets or ("q", "v"), **fields}
    return trained_adapter(model, ln.LoRAConfig(**fields), seed=seed)


@pytest.fixture
def folder(tmp_path, model):
    ln.save_adapter(tmp_path / "adapter", adapter_of(model), model)
    return tmp_path / "adapter"


def saved(path, model, *targets, **fields):
    """Saves an adapter. -> its adapter_config.json and its tensors."""
    ln.save_adapter(path, adapter_of(model, *targets, **fields), model)
    return json.loads((path / CONFIG).read_text()), tensors_and_metadata(path / WEIGHTS)[0]


def as_peft_writes(folder, **values):
    """Takes our metadata off a folder's tensors, and sets keys of its configuration."""
    tensors, _ = tensors_and_metadata(folder / WEIGHTS)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    edit_json(folder / CONFIG, **values)


def refusal(folder, model):
    """The message of the ValueError: one line that names the file."""
    with pytest.raises(ValueError, match="adapter") as caught:
        ln.load_adapter(folder, model)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def assert_same(loaded, adapter):
    assert loaded.config == adapter.config
    assert list(loaded.params) == list(adapter.params)
    assert same_bits(dict(loaded.params), dict(adapter.params))


def scales_differ(adapter):
    """Whether q, k, v of one layer have different scales."""
    layers = {}
    for name in adapter.matrices:
        if name[-1] in "qkv" and name[-2] == ".":
            layers.setdefault(name[:-2], set()).add(adapter.config.scale(name))
    return any(len(scales) > 1 for scales in layers.values())


def refused(adapter, config):
    """What is refused of an adapter of separate q, k, v where they are one matrix of the file; None: nothing."""
    if family_of(config) is not GPT2_FAMILY:
        return None
    layers = {}
    for name in adapter.matrices:
        if name.endswith((".q", ".k", ".v")):
            layers.setdefault(name[:-2], set()).add(name[-1])
    if adapter.config.dora and any(len(parts) < 3 for parts in layers.values()):
        return "each of whose rows DoRA scales|one scale"
    return "one scale" if scales_differ(adapter) else None


# --- Out and back ----------------------------------------------------------------------------------------------------


def check_round_trip(tmp_path, model, adapter):
    ln.save_adapter(tmp_path / "a", adapter, model)
    loaded = ln.load_adapter(tmp_path / "a", model)
    assert_same(loaded, adapter)
    ln.save_adapter(tmp_path / "b", loaded, model)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@given(data=st.data(), config=configs(), dtype=dtypes, seed=seeds)
def test_adapter_to_file_to_adapter_to_file_is_the_identity(tmp_path_factory, data, config, dtype, seed):
    model = random_model(config, seed=seed, dtype=dtype)
    adapter = trained_adapter(model, data.draw(lora_configs(config)), seed=seed)
    path = tmp_path_factory.mktemp("adapter")
    if refused(adapter, config):
        return
    check_round_trip(path, model, adapter)


@given(data=st.data(), config=configs(**GPT2_FIELDS), dtype=dtypes, seed=seeds)
def test_the_same_with_gpt2s_names(tmp_path_factory, data, config, dtype, seed):
    path = tmp_path_factory.mktemp("adapter")
    model = random_model(config, seed=seed, dtype=dtype)
    adapter = trained_adapter(model, data.draw(lora_configs(config)), seed=seed)
    if reason := refused(adapter, config):
        with pytest.raises(ValueError, match=reason):
            ln.save_adapter(path / "a", adapter, model)
        assert os.listdir(path) == []
        return
    check_round_trip(path, model, adapter)
    assert not any(".attn.q." in key for key in tensors_and_metadata(path / "a" / WEIGHTS)[0])


@pytest.mark.parametrize(("n", "layers"), [(2, (0, 1)), (1, (1,))])
@pytest.mark.parametrize("targets", ["qv", "k"])
def test_dora_on_some_rows_of_one_matrix_is_refused(tmp_path, model, targets, n, layers):
    """The rows between would need m = c to the bit; all three, or qkv, are exact."""
    said = r"layers\.\d\.attn\.qkv is one matrix in PEFT, each of whose rows DoRA scales: expected all of .*, or .*qkv"
    with pytest.raises(ValueError, match=said):
        ln.save_adapter(tmp_path / "a", adapter_of(model, *targets, layers=layers, dora=True), model)
    assert os.listdir(tmp_path) == []
    check_round_trip(tmp_path, model, adapter_of(model, *"qkv", layers=layers, dora=True))


MAGNITUDE = f"{ATTN}.lora_magnitude_vector"


def test_dora_as_peft_has_it(tmp_path, model):
    config, tensors = saved(tmp_path / "a", model, "embed", "qkv", dora=True)
    assert config["use_dora"] is True
    assert tensors[MAGNITUDE].shape == (24,)
    assert tensors["base_model.model.transformer.wte.lora_magnitude_vector"].shape == (8,)
    as_peft_writes(tmp_path / "a")
    adapter = adapter_of(model, "embed", "qkv", dora=True)
    assert_same(ln.load_adapter(tmp_path / "a", model), adapter)
    edit_tensors(tmp_path / "a" / WEIGHTS, lambda t: t.update({f"{MAGNITUDE}.weight": t.pop(MAGNITUDE)}))
    assert_same(ln.load_adapter(tmp_path / "a", model), adapter)  # as the module names it in memory


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop(MAGNITUDE), "c_attn: use_dora is true, and lora_magnitude_vector is missing"),
        (
            lambda t: t.update({MAGNITUDE: t[MAGNITUDE][:-1]}),
            r"of each row of B \(24, 2\), \(24,\), got \(23,\)",
        ),
        (lambda t: t.update({MAGNITUDE: t[MAGNITUDE][None]}), r"\(24,\), got \(1, 24\)"),
        (lambda t: t[MAGNITUDE].__setitem__(5, 0), "expected magnitudes other than 0, got 1 of 0"),
        (lambda t: t[MAGNITUDE].__setitem__(5, np.nan), "lora_magnitude_vector.*NaN"),
        (lambda t: t[MAGNITUDE].__setitem__(5, np.inf), "lora_magnitude_vector.*infinite"),
        (lambda t: t.update({f"{MAGNITUDE}.weight": t[MAGNITUDE]}), "has another m in this file"),
        (lambda t: t.update({f"{ATTN}.lora_B.bias": t[MAGNITUDE]}), "DoRA with lora_bias is not supported"),
    ],
    ids=["missing", "short", "matrix", "zero", "NaN", "infinite", "twice", "bias"],
)
def test_magnitudes_that_are_none(tmp_path, model, edit, said):
    saved(tmp_path / "a", model, "qkv", dora=True)
    as_peft_writes(tmp_path / "a", lora_bias="bias" in said)
    edit_tensors(tmp_path / "a" / WEIGHTS, edit)
    with pytest.raises(ValueError, match=said):
        read_contents(tmp_path / "a")


def test_magnitudes_without_the_flag(tmp_path, model):
    """PEFT would pass them over, and run another adapter."""
    saved(tmp_path / "a", model, "qkv", dora=True)
    as_peft_writes(tmp_path / "a", use_dora=False)
    assert re.search("a magnitude of DoRA's, and use_dora is not true", refusal(tmp_path / "a", model))


@pytest.mark.parametrize(
    "config", [GPT2, OWN, LLAMA, replace(GPT2, head="none")], ids=["gpt2", "own", "llama", "headless"]
)
@pytest.mark.parametrize("targets", [("q", "v"), ("qkv",), ("q", "embed"), ("o", "down")], ids=str)
def test_some_layers(tmp_path, config, targets):
    model = random_model(config, seed=1)
    adapter = adapter_of(model, *targets, layers=(1,))
    check_round_trip(tmp_path, model, adapter)
    as_peft_writes(tmp_path / "a")
    loaded = ln.load_adapter(tmp_path / "a", model)
    assert loaded.config.layers == (1,)
    if "q" not in targets and (config is not LLAMA or "qkv" not in targets):
        assert_same(loaded, adapter)


def test_the_configurations_that_json_might_change(tmp_path, model):
    config = ln.LoRAConfig(
        r=np.int64(2), alpha=np.float64(0.1), targets=["v", "k", "head"], dropout=np.float32(0.1), sigma=1e-300,
        layers=np.arange(2), init="normal", rank_pattern={"head": np.int32(3)}, rslora=True,
    )  # fmt: skip
    check_round_trip(tmp_path, model, trained_adapter(model, config, seed=0))


def test_a_combination_whose_matrices_follow_no_pattern(tmp_path, model):
    parts = [adapter_of(model, "q", "v", layers=(0,)), adapter_of(model, "v", "up", layers=(1,), seed=4)]
    check_round_trip(tmp_path, model, ln.combine(parts, [1.0, 0.5]))


# --- GPT-2's fused c_attn --------------------------------------------------------------------------------------------


@pytest.mark.proves("L1")
@given(
    targets=st.lists(st.sampled_from("qkv"), min_size=1, unique=True),
    ranks=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    rslora=st.booleans(),
    seed=seeds,
)
def test_the_fused_update_is_the_separate_ones(tmp_path_factory, targets, ranks, rslora, seed):
    """s B A of c_attn is that of q, k and v, one below the other: the products to the bit, s within a rounding."""
    path = tmp_path_factory.mktemp("adapter")
    model = random_model(GPT2, seed=1)
    ranks = dict(zip("qkv", ranks, strict=True))
    alphas = {t: 3.0 * (np.sqrt(ranks[t]) if rslora else ranks[t]) for t in targets}  # so that s is 3
    config, tensors = saved(
        path / "a", model, *targets, seed=seed, rslora=rslora, alpha_pattern=alphas,
        rank_pattern={t: ranks[t] for t in targets},
    )  # fmt: skip
    adapter = ln.load_adapter(path / "a", model)
    A, B = tensors[f"{ATTN}.lora_A.weight"], tensors[f"{ATTN}.lora_B.weight"]
    assert A.shape[0] == B.shape[1] == config["r"] == sum(ranks[t] for t in targets)
    assert config["target_modules"] == ["attn.c_attn"]
    assert not config["use_rslora"]
    assert config["lora_alpha"] / config["r"] == pytest.approx(3, rel=1e-15)
    for block, target in zip(np.split(B, 3), "qkv", strict=True):
        if target not in targets:
            assert not block.any()
            continue
        own_A, own_B = (ln.asnumpy(adapter.params[f"layers.0.attn.{target}.{factor}"]) for factor in "AB")
        columns = block.any(axis=0)
        assert bits(A[columns]) == bits(own_A)
        assert bits(np.ascontiguousarray(block[:, columns])) == bits(own_B)


def test_the_defaults_on_gpt2(tmp_path, model):
    config, tensors = saved(tmp_path / "a", model, r=8, alpha=16)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["task_type"]) == (16, 32, {}, "CAUSAL_LM")
    assert config["fan_in_fan_out"] is True
    assert {key: t.shape for key, t in tensors.items() if key.startswith(LAYER)} == {
        f"{ATTN}.lora_A.weight": (16, 8),
        f"{ATTN}.lora_B.weight": (24, 16),
    }


def test_gpt2s_names(tmp_path, model):
    _, tensors = saved(tmp_path / "a", model, "qkv", "o", "up", "down", "embed", "head")
    in_layer = {key.removeprefix(LAYER) for key in tensors if key.startswith(LAYER)}
    assert in_layer == {
        f"{module}.lora_{factor}.weight"
        for module in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        for factor in "AB"
    }
    assert {key.removeprefix("base_model.model.") for key in tensors if ".h." not in key} == {
        "transformer.wte.lora_embedding_A",
        "transformer.wte.lora_embedding_B",
        "lm_head.lora_A.weight",
        "lm_head.lora_B.weight",
    }


@pytest.mark.parametrize(
    ("head", "name", "task"),
    [("lm", "lm_head", "CAUSAL_LM"), ("classify", "score", "SEQ_CLS"), ("tag", "classifier", "TOKEN_CLS")],
)
def test_a_head_that_is_trained_whole(tmp_path, head, name, task):
    model = random_model(replace(GPT2, head=head, n_labels=None if head == "lm" else 3), seed=1)
    config, tensors = saved(tmp_path / "a", model, train_head=True)
    assert (config["modules_to_save"], config["task_type"]) == ([name], task)
    adapter = ln.load_adapter(tmp_path / "a", model)
    assert bits(tensors[f"base_model.model.{name}.weight"]) == bits(adapter.params["head.weight"])
    as_peft_writes(tmp_path / "a", modules_to_save=["score", "classifier"] if head != "lm" else [name])
    loaded = ln.load_adapter(tmp_path / "a", model)
    assert loaded.config.train_head
    assert same_bits(loaded.whole, adapter.whole)


def test_own_names(tmp_path):
    model = random_model(OWN, seed=1)
    config, tensors = saved(tmp_path / "a", model, "q", "gate", "embed", "head", rslora=True)
    assert config["target_modules"] == ["embed.tokens", "attn.q", "mlp.gate", "head"]
    assert config["use_rslora"] is True
    assert config["fan_in_fan_out"] is False
    assert "base_model.model.layers.0.attn.q.lora_A.weight" in tensors
    assert "base_model.model.embed.tokens.lora_embedding_A" in tensors
    assert "base_model.model.head.lora_B.weight" in tensors


def test_biases_of_q_and_v_take_the_bases_k_along(tmp_path, model):
    _, tensors = saved(tmp_path / "a", model, bias="lora_only")
    bias = tensors[f"{ATTN}.base_layer.bias"]
    adapter = ln.load_adapter(tmp_path / "a", model)
    for part, target in zip(np.split(bias, 3), "qkv", strict=True):
        name = f"layers.0.attn.{target}.bias"
        assert bits(part) == bits(model.weights[name] if target == "k" else adapter.params[name])
    assert "layers.0.attn.k.bias" not in adapter.params


def test_all_biases(tmp_path, model):
    _, tensors = saved(tmp_path / "a", model, bias="all")
    biases = {key.removeprefix("base_model.model.transformer.") for key in tensors if key.endswith("bias")}
    assert biases == {
        "ln_f.bias",
        *(f"h.{i}.{n}.bias" for i in (0, 1) for n in ("ln_1", "attn.c_attn.base_layer", "attn.c_proj")),
        *(f"h.{i}.{n}.bias" for i in (0, 1) for n in ("ln_2", "mlp.c_fc", "mlp.c_proj")),
    }


# --- Files of PEFT's own ---------------------------------------------------------------------------------------------


def test_without_our_metadata_c_attn_is_qkv(folder, model):
    separate = ln.load_adapter(folder, model)
    as_peft_writes(folder)
    fused = ln.load_adapter(folder, model)
    assert fused.config == ln.LoRAConfig(r=4, alpha=6, targets=("qkv",))
    tokens = np.arange(6).reshape(2, 3)
    ours, theirs = (ln.asnumpy(ln.forward(model, tokens, adapter)) for adapter in (separate, fused))
    assert np.abs(ours - theirs).max() < 1e-14


@given(data=st.data(), config=configs(**GPT2_FIELDS), dtype=dtypes, seed=seeds)
def test_peft_file_to_adapter_to_file_keeps_every_tensor(tmp_path_factory, data, config, dtype, seed):
    path = tmp_path_factory.mktemp("adapter")
    model = random_model(config, seed=seed, dtype=dtype)
    adapter = trained_adapter(model, data.draw(lora_configs(config)), seed=seed)
    assume(not refused(adapter, config))
    ln.save_adapter(path / "a", adapter, model)
    as_peft_writes(path / "a")
    loaded = ln.load_adapter(path / "a", model)
    for name in loaded.matrices:
        if name in adapter.matrices:
            assert loaded.config.scale(name) == pytest.approx(adapter.config.scale(name), rel=1e-15)
    ln.save_adapter(path / "b", loaded, model)
    before, after = (tensors_and_metadata(path / name / WEIGHTS)[0] for name in "ab")
    assert same_bits(before, after)
    before, after = (json.loads((path / name / CONFIG).read_text()) for name in "ab")
    assert {k: v for k, v in before.items() if k != "init_lora_weights"} == {
        k: v for k, v in after.items() if k != "init_lora_weights"
    }


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"target_modules": ["c_attn"]}, {}),
        ({"target_modules": ["c_attn", "c_proj"], "exclude_modules": ["c_proj", "lm_head"]}, {}),
        ({"target_modules": ["transformer.h.0.attn.c_attn", "h.1.attn.c_attn"]}, {}),
        ({"layers_to_transform": [0, 1], "layers_pattern": "h"}, {}),
        ({"r": 9, "rank_pattern": {"h.0.attn.c_attn": 4, "c_attn": 4}}, {"r": 9, "rank_pattern": {"qkv": 4}}),
        (
            {"alpha_pattern": {"^transformer.h.1.attn.c_attn": 2.5, "c_attn": 7}},
            {"alpha_pattern": {"layers.0.attn.qkv": 7, "layers.1.attn.qkv": 2.5}},
        ),
        ({"init_lora_weights": "gaussian"}, {"init": "normal", "sigma": 0.25}),
        ({"use_rslora": True, "lora_dropout": 0.5}, {"rslora": True, "dropout": 0.5}),
        ({"base_model_name_or_path": "gpt2", "peft_version": "9", "auto_mapping": {"a": 1}, "loftq_config": {}}, {}),
    ],
    ids=str,
)
def test_what_pefts_configuration_may_say(folder, model, values, expected):
    as_peft_writes(folder, **values)
    assert ln.load_adapter(folder, model).config == replace(ln.LoRAConfig(r=4, alpha=6, targets=("qkv",)), **expected)


def test_a_float32_file_is_widened_and_a_float64_file_not_rounded(tmp_path, model):
    narrow = ln.Model(GPT2, {name: w.astype("float32") for name, w in model.weights.items()})
    adapter = adapter_of(narrow, "qkv")
    ln.save_adapter(tmp_path / "a", adapter, narrow)
    as_peft_writes(tmp_path / "a")
    loaded = ln.load_adapter(tmp_path / "a", model)
    assert same_bits(dict(loaded.params), {name: p.astype("float64") for name, p in adapter.params.items()})
    ln.save_adapter(tmp_path / "b", loaded, model)
    as_peft_writes(tmp_path / "b")
    assert "rounded" in refusal(tmp_path / "b", narrow)


def test_copies_of_the_bases_table_must_be_copies(tmp_path, model):
    """PEFT writes the table and the head that it adapted, unchanged, beside the adapter."""
    adapter = adapter_of(model, "embed", "head")
    ln.save_adapter(tmp_path / "a", adapter, model)
    as_peft_writes(tmp_path / "a")
    table = ln.asnumpy(model.weights["embed.tokens"])
    for key in ("transformer.wte.base_layer.weight", "lm_head.base_layer.weight", "transformer.wte.weight"):
        edit_tensors(tmp_path / "a" / WEIGHTS, lambda t, key=key: t.update({f"base_model.model.{key}": table}))
        assert same_bits(dict(ln.load_adapter(tmp_path / "a", model).params), dict(adapter.params))
    edit_tensors(tmp_path / "a" / WEIGHTS, lambda t: t.update({f"base_model.model.{key}": table + 1}))
    assert f"{key} is there twice, and not the same" in refusal(tmp_path / "a", model)
    edit_tensors(tmp_path / "a" / WEIGHTS, lambda t: t.pop("base_model.model.transformer.wte.base_layer.weight"))
    assert f"{key}: expected a copy of embed.tokens, got other values" in refusal(tmp_path / "a", model)
    edit_tensors(tmp_path / "a" / WEIGHTS, lambda t: t.update({f"base_model.model.{key}": table[1:]}))
    assert f"{key}: expected a copy of embed.tokens, got other values" in refusal(tmp_path / "a", model)


def test_a_bias_that_peft_writes_three_times(tmp_path):
    """With bias="all" and a head trained whole: its own, the same once more, and the base's."""
    model = random_model(replace(GPT2, head="tag", n_labels=3), seed=1)
    adapter = adapter_of(model, "qkv", bias="all", train_head=True)
    head = "base_model.model.classifier"
    copies = {
        f"{head}.modules_to_save.bias": ln.asnumpy(adapter.params["head.bias"]),
        f"{head}.original_module.bias": ln.asnumpy(model.weights["head.bias"]),
    }
    ln.save_adapter(tmp_path / "a", adapter, model)
    as_peft_writes(tmp_path / "a")
    edit_tensors(tmp_path / "a" / WEIGHTS, lambda t: t.update(copies))
    assert same_bits(dict(ln.load_adapter(tmp_path / "a", model).params), dict(adapter.params))
    for (key, value), said in zip(copies.items(), ("is there twice", "expected a copy of head.bias"), strict=True):
        edit_tensors(tmp_path / "a" / WEIGHTS, lambda t, c={**copies, key: value + 1}: t.update(c))
        assert f"classifier.bias{' ' if 'twice' in said else ': '}{said}" in refusal(tmp_path / "a", model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: expected 'LORA', got 'IA3'"),
        ({"peft_type": "A" * 10**5}, "peft_type: expected 'LORA'"),
        ({"a\nb": 1}, "not known"),
        ({"target_modules": ["a" * 10**5]}, "target_modules: 'aaaaa"),
        ({"alpha_pattern": {"c_attn\n": "x"}}, "expected a number"),
        ({"use_dora": True}, "c_attn: use_dora is true, and lora_magnitude_vector is missing"),
        ({"use_dora": None}, "LoRAConfig.dora: a value of the wrong type: None"),
        ({"brand_new": True}, "brand_new: not known"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'"),
        ({"init_lora_weights": 1}, "init_lora_weights: 1"),
        ({"target_modules": ".*c_attn", "layers_to_transform": [1]}, "regular expression and layers_to_transform"),
        ({"target_modules": ".*c_attn", "layers_pattern": "h"}, "regular expression and layers_to_transform"),
        (
            {"target_modules": None},
            "2 modules of the file are not targeted",
        ),
        ({"target_modules": ["(c_attn|x)"]}, "target_modules: '(c_attn|x)': no module fits"),
        ({"target_modules": ["c_attn", "ln_f"]}, "target_modules: 'ln_f': no module fits"),
        ({"target_modules": ["c_attn", "wpe"]}, "1 modules are targeted of which the file has no tensor"),
        ({"target_modules": ["c_attn", "c_fc"]}, "at their start: transformer.h.0.mlp.c_fc"),
        (
            {"target_modules": ["c_fc"]},
            "2 modules of the file are not targeted",
        ),
        ({"target_modules": {"c_attn": 1}}, "target_modules: expected a list"),
        ({"exclude_modules": {"c_attn": 1}}, "exclude_modules: expected a list"),
        ({"layers_to_transform": [1]}, "1 modules of the file are not targeted"),
        ({"layers_to_transform": [7]}, "2 modules of the file are not targeted"),
        ({"layers_to_transform": [[1]]}, "layers_to_transform: expected a list of integers, got [[1]]"),
        ({"layers_to_transform": "1"}, "layers_to_transform: expected"),
        ({"layers_to_transform": [True]}, "layers_to_transform: expected"),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, "2 modules of the file are not targeted"),
        ({"rank_pattern": {"c_fc": 4}}, "rank_pattern: 'c_fc': no adapted module"),
        ({"rank_pattern": {"c_attn": [4]}}, "rank_pattern: c_attn: expected a number"),
        ({"rank_pattern": {"c_attn": 2}}, "h.0.attn.c_attn: expected rank 4, as its tensors have, got 2"),
        ({"rank_pattern": 3}, "rank_pattern: expected an object"),
        ({"alpha_pattern": {"c_attn": "x"}}, "alpha_pattern: c_attn: expected a number"),
        ({"r": 3}, "h.0.attn.c_attn: expected rank 4, as its tensors have, got 3"),
        ({"r": 0}, "r: expected an integer of at least 1"),
        ({"r": 10**12}, "expected rank 4, as its tensors have, got 1000000000000"),
        ({"r": 4.0}, "LoRAConfig.r: a value of the wrong type"),
        ({"r": [4]}, "LoRAConfig.r: a value of the wrong type: [4]"),
        ({"r": True}, "LoRAConfig.r: a value of the wrong type: True"),
        ({"lora_alpha": None}, "LoRAConfig.alpha: a value of the wrong type: None"),
        ({"lora_alpha": 10**400}, "no float holds"),
        ({"lora_dropout": 1}, "dropout: expected 0 <= p < 1"),
        ({"lora_dropout": "0"}, "dropout: a value of the wrong type"),
        ({"use_rslora": 1}, "rslora: a value of the wrong type"),
        ({"bias": "some"}, "bias: expected none, all or lora_only"),
        ({"bias": "lora_only"}, "the tensor transformer.h.0.attn.c_attn.bias is missing"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: 'lm_head': the file has no tensor of it"),
        ({"modules_to_save": ["ln_f"]}, "'ln_f': only the head, lm_head, can be trained whole; lora-np merge takes it"),
        ({"lora_bias": True}, "lora_bias: not supported (expected it to be off, got True); lora-np merge takes it"),
        ({"modules_to_save": "lm_head"}, "modules_to_save: expected a list"),
    ],
    ids=str,
)
def test_what_pefts_configuration_may_not_say(folder, model, values, message):
    as_peft_writes(folder, **values)
    assert message in refusal(folder, model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_modules": ".*nothing"}, "target_modules: 2 modules of the file are not targeted"),
        ({"target_modules": "("}, "target_modules: '(': no regular expression"),
        ({"exclude_modules": "(?:.*.*.*.*)*q"}, "exclude_modules: '(?:.*.*.*.*)*q': takes too long to match"),
        ({"rank_pattern": {"c_attn|(": 4}}, "rank_pattern: "),
        ({"rank_pattern": {"c_(fc|x)": 4}}, "rank_pattern: 'c_(fc|x)': no adapted module fits"),
    ],
    ids=str,
)
def test_expressions_that_are_refused(folder, model, values, message):
    as_peft_writes(folder, **values)
    assert message in refusal(folder, model)


@pytest.mark.parametrize("key", sorted(OFF))
def test_no_switch_is_passed_over(folder, model, key):
    edit_json(folder / CONFIG, **{key: OFF[key][0]})
    ln.load_adapter(folder, model)
    edit_json(folder / CONFIG, **{key: {"on": [1]}})
    assert f"{key}: not supported" in refusal(folder, model)


# --- What we refuse to write -----------------------------------------------------------------------------------------


def test_differing_scales_are_refused(tmp_path, model):
    adapter = adapter_of(model, alpha_pattern={"v": 5})
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.qkv: PEFT gives one scale.*s = 1\.5 for .*q, s = 2\.5 for"):
        ln.save_adapter(tmp_path / "a", adapter, model)
    with pytest.raises(ValueError, match="one scale"):
        ln.save_adapter(tmp_path / "a", adapter_of(model, rank_pattern={"layers.1.attn.q": 1}), model)
    own = random_model(LLAMA, seed=1)
    check_round_trip(tmp_path, own, adapter_of(own, alpha_pattern={"v": 5}))


def test_an_adapter_that_does_not_fit(tmp_path, model):
    adapter = adapter_of(model)
    for changed, message in [
        ({"norm.weight": model.weights["norm.weight"]}, "norm.weight: the configuration does not say"),
        ({"norm.bias": model.weights["norm.bias"]}, "norm.bias: the configuration does not say"),
        ({"layers.0.attn.q.B": adapter.params["layers.0.attn.q.B"] * np.nan}, "NaN or infinite"),
    ]:
        with pytest.raises(ValueError, match=message):
            ln.save_adapter(tmp_path / "a", replace(adapter, params={**adapter.params, **changed}), model)
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.q\.bias is missing"):
        ln.save_adapter(tmp_path / "a", replace(adapter, config=replace(adapter.config, bias="lora_only")), model)
    with pytest.raises(ValueError, match="no such matrix"):
        ln.save_adapter(tmp_path / "a", adapter_of(random_model(LLAMA, seed=0), "gate"), model)
    both = {**adapter.params, **adapter_of(model, "qkv").params}
    with pytest.raises(ValueError, match="one matrix of the file"):
        ln.save_adapter(tmp_path / "a", replace(adapter, params=both), model)
    assert os.listdir(tmp_path) == []


def test_complex_parameters_are_not_saved(tmp_path, model):
    weights = {name: w.astype("complex128") for name, w in model.weights.items()}
    complex_model = ln.Model(GPT2, weights)
    adapter = adapter_of(model)
    adapter = replace(adapter, params={name: p.astype("complex128") for name, p in adapter.params.items()})
    with pytest.raises(TypeError, match="complex128"):
        ln.save_adapter(tmp_path / "a", adapter, complex_model)


# --- Whole or not at all ---------------------------------------------------------------------------------------------


def test_an_existing_adapter_is_replaced_and_its_neighbours_stay(folder, model):
    (folder / "README.md").write_text("mine")
    adapter = adapter_of(model, "k", "o", seed=9)
    ln.save_adapter(folder, adapter, model)
    assert_same(ln.load_adapter(str(folder), model), adapter)
    assert sorted(os.listdir(folder)) == sorted(["README.md", CONFIG, WEIGHTS])
    with pytest.raises(FileExistsError, match="got a file"):
        ln.save_adapter(folder / "README.md", adapter, model)


class Stop(Exception):
    """The power goes."""


def failing(monkeypatch, at):
    """Makes the at-th step of a write fail: a file written, a wait for the disk, or a rename. -> the steps so far."""
    steps = []

    def guard(module, name):
        real = getattr(module, name)

        def step(*args, **kwargs):
            steps.append(name)
            if len(steps) > at:
                raise Stop
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, step)

    guard(peft, "write_tensors")
    guard(atomic, "_sync")
    guard(atomic.os, "rename")
    guard(atomic.os, "replace")
    return steps


@pytest.mark.parametrize("at", range(12))
def test_a_new_adapter_is_there_or_not(tmp_path, model, monkeypatch, at):
    adapter = adapter_of(model)
    steps = failing(monkeypatch, at)
    try:
        ln.save_adapter(tmp_path / "a", adapter, model)
    except Stop:
        if "rename" not in steps[:-1]:
            assert os.listdir(tmp_path) == []
            return
    assert os.listdir(tmp_path) == ["a"]
    assert_same(ln.load_adapter(tmp_path / "a", model), adapter)


@pytest.mark.parametrize("at", range(12))
@pytest.mark.parametrize("targets", [("q", "v"), ("k", "up")], ids=str)
def test_an_adapter_in_place_is_the_old_one_or_the_new_one(folder, model, monkeypatch, at, targets):
    """Only between the two renames do old and new meet, and then the file says so."""
    before, old, new = contents(folder), ln.load_adapter(folder, model), adapter_of(model, *targets, seed=8)
    steps = failing(monkeypatch, at)
    try:
        ln.save_adapter(folder, new, model)
    except Stop:
        moved = steps[:-1].count("replace")
        if moved == 0:
            assert contents(folder) == before
            assert_same(ln.load_adapter(folder, model), old)
            return
        if moved == 1 and old.config != new.config:
            assert "the tensors beside it were saved with" in refusal(folder, model)
            return
    assert sorted(os.listdir(folder)) == sorted([CONFIG, WEIGHTS])
    assert_same(ln.load_adapter(folder, model), new)


# --- Damaged and hostile files ---------------------------------------------------------------------------------------


def test_an_adapter_of_another_base(folder, model):
    other = random_model(GPT2, seed=2)
    message = refusal(folder, other)
    assert "another base" in message
    for base in (model, other):
        assert model_hash(base)[:12] in message


def in_dtype(model, dtype):
    """The same base in another dtype."""
    return ln.Model(model.config, {name: w.astype(dtype) for name, w in model.weights.items()})


def test_an_adapter_of_the_base_before_it_was_widened(tmp_path, model):
    narrow = in_dtype(model, "float32")
    wide = in_dtype(narrow, "float64")
    adapter = adapter_of(narrow, train_head=True, bias="all")
    ln.save_adapter(tmp_path / "adapter", adapter, narrow)
    loaded = ln.load_adapter(tmp_path / "adapter", wide)
    assert loaded.config == adapter.config
    assert same_bits(dict(loaded.params), {name: p.astype("float64") for name, p in adapter.params.items()})
    # `model` differs from `wide` by less than float32 shows: another base all the same.
    assert "another base" in refusal(tmp_path / "adapter", model)
    assert "another base" in refusal(tmp_path / "adapter", in_dtype(random_model(GPT2, seed=2), "float32"))


def test_an_adapter_of_the_widened_base_is_not_rounded(tmp_path, model):
    narrow = in_dtype(model, "float32")
    wide = in_dtype(narrow, "float64")
    ln.save_adapter(tmp_path / "adapter", adapter_of(wide), wide)
    assert "float64 would be rounded to the model's float32" in refusal(tmp_path / "adapter", narrow)


@pytest.mark.parametrize("head", ["classify", "tag"])
def test_weights_that_the_adapter_has_whole_may_be_others_in_the_base(tmp_path, head):
    model = random_model(replace(GPT2, head=head, n_labels=3), seed=1)
    adapter = adapter_of(model, train_head=True)
    ln.save_adapter(tmp_path / "adapter", adapter, model)
    changed = {**model.weights, "head.weight": model.weights["head.weight"] + 1}
    assert_same(ln.load_adapter(tmp_path / "adapter", ln.Model(model.config, changed)), adapter)
    changed["norm.weight"] = changed["norm.weight"] + 1
    assert "another base" in refusal(tmp_path / "adapter", ln.Model(model.config, changed))
    ln.save_adapter(tmp_path / "adapter", adapter_of(model), model)  # its head is the base's
    changed = {**model.weights, "head.weight": model.weights["head.weight"] + 1}
    assert "another base" in refusal(tmp_path / "adapter", ln.Model(model.config, changed))


def test_the_hash_of_an_adapter_without_weights_of_its_own_is_the_models(folder, model):
    """So that what was saved before weights were left out of it still loads."""
    assert json.loads(tensors_and_metadata(folder / WEIGHTS)[1]["lora_np"])["base_sha256"] == model_hash(model)


def test_files_that_are_missing(tmp_path, folder, model):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ln.load_adapter(tmp_path / "none", model)
    assert "got a file" in refusal(folder / CONFIG, model)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert "any code" in refusal(folder, model)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        ln.load_adapter(folder, model)
    (folder / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=CONFIG):
        ln.load_adapter(folder, model)


def test_a_truncated_file(folder, model):
    whole = (folder / WEIGHTS).read_bytes()
    for size in (0, 7, 8, 100, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:size])
        assert "truncated" in refusal(folder, model)


def set_one(key, index, value):
    def change(tensors):
        tensors[key][index] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{ATTN}.lora_A.weight"), f"{ATTN}.lora_A.weight is missing"),
        (lambda t: t.update(x=np.ones(2)), "the tensor x has no place"),
        (lambda t: t.update({f"{LAYER}attn.c_proj.lora_A.weight": np.ones((2, 8))}), "c_proj.lora_A.weight has no"),
        (set_one(f"{ATTN}.lora_B.weight", (0, 0), np.nan), f"{ATTN}.lora_B.weight: holds NaN"),
        (set_one(f"{ATTN}.lora_B.weight", (0, 0), np.inf), f"{ATTN}.lora_B.weight: holds NaN"),
        (set_one(f"{ATTN}.lora_B.weight", (9, 0), 1), "the base's own values between"),  # a row of k's
        (set_one(f"{ATTN}.lora_B.weight", (0, 3), 1), "the base's own values between"),  # q's rows, v's columns
        (lambda t: t.update({f"{ATTN}.lora_A.weight": np.ones((4, 9))}), "expected shape (4, 8), got (4, 9)"),
        (lambda t: t.update({f"{ATTN}.lora_A.weight": np.ones((4, 8), "int64")}), "F64 F32 F16 BF16, got I64"),
    ],
)  # fmt: skip
def test_tensors_that_were_changed(folder, model, change, message):
    edit_tensors(folder / WEIGHTS, change)
    assert message in refusal(folder, model)


def test_a_bias_of_the_bases_that_was_changed(tmp_path, model):
    saved(tmp_path / "adapter", model, bias="lora_only")
    edit_tensors(tmp_path / "adapter" / WEIGHTS, set_one(f"{ATTN}.base_layer.bias", 8, 1))
    assert "the base's own values between" in refusal(tmp_path / "adapter", model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "metadata: format: expected 1, got 2"),
        ({"params": None}, "metadata: params: expected a list of names, each once, got None"),
        ({"params": []}, "h.0.attn.c_attn.lora_A.weight has no place in this model"),
        ({"params": ["x"]}, "adapter: x: the configuration does not say that it is trained"),
        ({"params": [1]}, "metadata: params: expected a list of names, each once, got [1]"),
        ({"config": None}, "metadata: expected an object with LoRAConfig's fields, got NoneType"),
        ({"params": ["layers.0.attn.q.A"]}, "adapter: layers.0.attn.q.B is missing"),
        ({"params": ["layers.0.attn.q.A", "layers.0.attn.q.A"]}, "expected a list of names, each once, got ['layers"),
        ({"params": ["layers.9.attn.q.A", "layers.9.attn.q.B"]}, "layers.9.attn.q: the model has no such matrix"),
        ({"config": {"r": 10**12}}, "lora_A.weight: expected shape (2000000000000, 8), got (4, 8)"),
        ({"config": {"r": "2"}}, "metadata: LoRAConfig.r: a value of the wrong type: '2'"),
        ({"config": {"targets": ["q", "z"]}}, "metadata: LoRAConfig.targets: expected names of q k v"),
        ({"config": {"surplus": 1}}, "metadata: LoRAConfig has no field 'surplus'"),
        ({"config": {"bias": "all"}}, "adapter: layers.0.attn.k.bias is missing"),
        (
            {"config": {"alpha": 10**400}},
            "metadata: not valid JSON: 'alpha': expected a number, got one",
        ),
        ({"config": {"layers": [1.5]}}, "metadata: LoRAConfig.layers: a value of the wrong type: [1.5]"),
        ({"config": {"alpha": 7}}, "lora_alpha: the tensors beside it were saved with 14, got 6"),
        ({"base_sha256": 1}, "metadata: made for another base: the SHA-256 of its base's weights starts with 1,"),
        ({"base_sha256": "\n" * 64}, r"the SHA-256 of its base's weights starts with \n\n"),
        ({"params": ["a\nb"]}, r"metadata: params: expected a list of names, each once, got ['a\nb']"),
        ({"params": ["a" * 1000]}, "metadata: params: expected a list of names, each once, got ['aaa"),
        ({"config": {"init": "a" * 10**5}}, "metadata: LoRAConfig.init: expected uniform or normal, got 'aaa"),
        ({"config": {"a" * 10**5: 1}}, "metadata: LoRAConfig has no field 'aaa"),
        ({"config": {"targets": ["q", "a" * 10**5]}}, "metadata: LoRAConfig.targets: expected names of q k v"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_metadata_that_was_changed(folder, model, change, message):
    tensors, metadata = tensors_and_metadata(folder / WEIGHTS)
    about = json.loads(metadata["lora_np"])
    for key, value in change.items():
        about[key] = {**about[key], **value} if isinstance(value, dict) else value
    save_file(tensors, folder / WEIGHTS, {"lora_np": json.dumps(about)})
    assert message in refusal(folder, model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "expected a JSON object, got list"),
        ("{", "not valid JSON"),
        ("[" * 10**5, "the JSON is nested too deeply"),
        ('{"format": NaN}', "not valid JSON: 'format': expected a number, got one that no float holds: nan"),
        ("x" * (5 * 2**20), "expected at most 4194304 bytes of JSON"),
    ],
    ids=range(6),
)
def test_metadata_that_is_no_object(folder, model, text, message):
    tensors, _ = tensors_and_metadata(folder / WEIGHTS)
    save_file(tensors, folder / WEIGHTS, {"lora_np": text})
    assert f"metadata: {message}" in refusal(folder, model)


def test_a_configuration_that_the_tensors_were_not_saved_with(folder, model):
    for key, value in {"r": 2, "lora_alpha": 7, "target_modules": ["c_attn"], "use_rslora": True}.items():
        before = (folder / CONFIG).read_bytes()
        edit_json(folder / CONFIG, **{key: value})
        assert f"{key}: the tensors beside it were saved with" in refusal(folder, model)
        (folder / CONFIG).write_bytes(before)


def test_a_dtype_of_two_lines(folder, model):
    hostile.raw_safetensors(folder / WEIGHTS, {"x": {"dtype": "F\n4", "shape": [], "data_offsets": [0, 0]}})
    assert "not a safetensors file" in refusal(folder, model)


def test_a_header_of_2_to_the_60(folder, model):
    hostile.raw_safetensors(folder / WEIGHTS, {}, length=2**60)
    assert str(2**60) in refusal(folder, model)


@given(data=st.data())
def test_any_byte_changed_gives_an_adapter_or_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "adapter"
    model = random_model(GPT2, seed=1)
    ln.save_adapter(path, adapter_of(model, bias=data.draw(st.sampled_from(["none", "lora_only"]))), model)
    if data.draw(st.booleans()):
        as_peft_writes(path)
    file = path / data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, min(len(content), 3000) - 1))
        content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        ln.load_adapter(path, model)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017 (most changes are refused, some are not)
        assert str(path) in str(error)  # noqa: PT017


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_a_16_bit_file_is_widened(tmp_path, model, dtype):
    """As PEFT saves the adapter of a model that is held so: no number is rounded."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="reads bfloat16: the extra models")
    kind = ml_dtypes.bfloat16 if dtype == "BF16" else np.dtype("float16")
    rng = np.random.default_rng(0)
    A, B = (rng.standard_normal(shape).astype(kind) for shape in ((2, 8), (24, 2)))
    hostile.write_peft(tmp_path / "ad", {"transformer.h.1.attn.c_attn": (A, B)}, r=2, alpha=3)
    params = ln.load_adapter(tmp_path / "ad", model).params
    for name, value in (("A", A), ("B", B)):
        assert same_bits(ln.asnumpy(params[f"layers.1.attn.qkv.{name}"]), value.astype(model.dtype))

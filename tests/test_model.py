"""What a model is: its configuration, the names and shapes of its weights, and that they are frozen."""

import copy
import math
import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import configs, device, dtypes, host_weights, random_model, same_bits, seeds

import lora_np as ln
from lora_np.backend import asnumpy, backend_name, xp
from lora_np.storage import BFloat16, Held, narrowed

SMALL = ln.Config(7, 8, 2, 2, 8, 6)
no_flag = pytest.mark.skipif(backend_name == "cupy", reason="CuPy's arrays have no writeable flag")

# ---- configurations ----

# Parameters of the published models (encoders without their poolers, which come with a classifier).
SIZES = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "bert-base": 109_482_240 - 768 * 769,
    "roberta-base": 124_645_632 - 768 * 769,
    "roberta-large": 355_359_744 - 1024 * 1025,
    "smollm2-135m": 134_515_008,
    "deberta-v3-base": 183_831_552,
    "llama-2-7b": 6_738_415_616,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "gemma-3-270m": 268_098_176,
    "t5-small": 60_506_624,
    "flan-t5-base": 247_577_856,
}


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_the_sizes_of_the_published_models(name):
    assert sum(int(np.prod(shape)) for shape in ln.PRESETS[name].weight_shapes().values()) == SIZES[name]


def test_gpt3_has_175_billion_parameters():
    assert sum(int(np.prod(s)) for s in ln.PRESETS["gpt3-175b"].weight_shapes().values()) == pytest.approx(
        175e9, rel=0.01
    )


def test_presets_cannot_be_changed():
    with pytest.raises(TypeError, match="does not support item assignment"):
        ln.PRESETS["gpt2"] = SMALL
    with pytest.raises(FrozenInstanceError):
        ln.PRESETS["gpt2"].n_layer = 1


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("gpt-2", "gpt2"), ("GPT2-Medium", "gpt2-medium"), ("smollm", "smollm2-135m"), ("roberta", "roberta-base")],
)
def test_an_unknown_preset_is_told_with_its_nearest_names(name, nearest):
    with pytest.raises(KeyError, match=f"PRESETS: no '{name}'; nearest are {nearest}"):
        ln.PRESETS[name]


def test_where_no_preset_is_near_all_are_told():
    with pytest.raises(KeyError, match=f"PRESETS: no 3; there are {', '.join(ln.PRESETS)}"):
        ln.PRESETS[3]
    assert 3 not in ln.PRESETS
    assert ln.PRESETS.get("gpt-2") is None


@pytest.mark.parametrize(
    ("preset", "fields", "has", "lacks"),
    [
        ("gpt2", {}, {"embed.positions", "norm.bias", "layers.0.attn.q.bias"}, {"head.weight", "embed.norm.weight"}),
        ("gpt2", {"tie_head": False}, {"head.weight"}, {"head.bias"}),
        ("gpt2", {"head": "classify", "n_labels": 2}, {"head.weight"}, {"head.bias", "pooler.weight"}),
        ("gpt2", {"head": "tag", "n_labels": 2}, {"head.weight", "head.bias"}, {"pooler.weight"}),
        ("bert-base", {}, {"embed.types", "embed.norm.bias"}, {"norm.weight", "head.weight", "pooler.weight"}),
        (
            "bert-base",
            {"head": "classify", "n_labels": 2},
            {"pooler.weight", "pooler.bias", "head.bias"},
            {"norm.bias"},
        ),
        ("smollm2-135m", {}, {"layers.0.mlp.gate.weight"}, {"embed.positions", "norm.bias", "layers.0.attn.q.bias"}),
    ],
)
def test_each_architecture_has_its_weights(preset, fields, has, lacks):
    shapes = replace(ln.PRESETS[preset], **fields).weight_shapes()
    assert has <= shapes.keys()
    assert not lacks & shapes.keys()


def test_derived_sizes():
    config = replace(SMALL, n_kv_head=1, position_offset=2)
    assert (config.head_width, config.kv_heads, SMALL.kv_heads, config.longest) == (4, 1, 2, 6)
    assert config.matrix_shapes()["layers.1.attn.k"] == (4, 8)
    assert [replace(SMALL, head=h, n_labels=3).head_size for h in ("lm", "classify", "tag", "none")] == [7, 3, 3, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layer": 0}, "Config.n_layer: expected an integer of at least 1, got 0"),
        ({"d_ff": 1.5}, "Config.d_ff: expected an integer"),
        ({"vocab_size": True}, "Config.vocab_size: expected an integer"),
        ({"n_types": -1}, "Config.n_types: expected an integer of at least 0"),
        ({"norm": "batch"}, "Config.norm: expected one of layer rms rms_1p, got 'batch'"),
        ({"head": None}, "Config.head: expected one of"),
        ({"n_head": 3}, "d_model = 8 is not a multiple of n_head = 3"),
        ({"n_head": 4, "n_kv_head": 3}, "n_head = 4 is not a multiple of n_kv_head = 3"),
        ({"n_kv_head": 0}, "Config.n_kv_head: expected an integer of at least 1"),
        ({"n_head": 8, "positions": "rotary"}, "a head's width is odd: 1"),
        ({"head": "tag"}, "head='tag' needs n_labels"),
        ({"head": "classify", "n_labels": 0}, "Config.n_labels: expected an integer of at least 1"),
        ({"position_offset": 8}, "leaves no place"),
        ({"eps": 0.0}, "Config.eps: expected a number above 0, got 0.0"),
        ({"rope_theta": -1.0}, "Config.rope_theta: expected a number above 0, got -1.0"),
        ({"activation": "tanh"}, "Config.activation: expected one of gelu gelu_tanh silu relu .*, got 'tanh'"),
        ({"pooler": "silu"}, "Config.pooler: expected one of tanh gelu relu, got 'silu'"),
        ({"qkv_bias": 2}, "Config.qkv_bias: expected one of None True False, got 2"),
        ({"d_head": 0}, "Config.d_head: expected an integer of at least 1, got 0"),
        ({"positions": "rotary", "d_head": 3}, "a head's width is odd: 3"),
        ({"positions": "rotary", "rope_width": 3}, "a head's width is odd: 3"),
        ({"positions": "rotary", "rope_width": 6}, "rope_width = 6 passes a head's width, 4"),
        (
            {"positions": "rotary", "rope_factors": (1.0, 2.0, 3.0)},
            "rope_factors: expected one, or 2, one for each frequency, got 3",
        ),
        ({"rope_factors": (1.0, 0.0)}, r"Config.rope_factors\[1\]: expected a number above 0, got 0.0"),
        ({"embed_scale": 0}, "Config.embed_scale: expected a number above 0, got 0"),
        ({"head_scale": math.inf}, "Config.head_scale: expected a number above 0, got inf"),
        ({"window_theta": -1.0}, "Config.window_theta: expected a number above 0, got -1.0"),
        ({"window": 0}, "Config.window: expected an integer of at least 1, got 0"),
        ({"full_layers": (-1,)}, "Config.full_layers: expected an integer of at least 0, got -1"),
        ({"window": 2, "causal": False}, "a window needs causal attention"),
        ({"window": 2, "prefix": 1}, "a prefix stands at no distance: expected no window and no score_buckets"),
        ({"score_buckets": 4, "prefix": 1}, "a prefix stands at no distance"),
        ({"qk_norm": True}, "qk_norm is an RMS norm: expected norm='rms' or 'rms_1p'"),
        ({"score_buckets": 6}, "score_buckets: expected a multiple of 4 below 256, got 6"),
        ({"score_buckets": 8, "score_distance": 4}, "score_buckets: expected a multiple of 4 below 8, got 8"),
        (
            {"score_buckets": 8, "score_distance": 5, "disentangled": True, "causal": False},
            "score_buckets: expected a multiple of 4 below 8, got 8",
        ),
        ({"score_scale": 0.0}, "Config.score_scale: expected a number above 0, got 0.0"),
        ({"disentangled": True, "score_buckets": 4}, "disentangled attention needs score_buckets; it is not causal"),
        ({"disentangled": True, "causal": False}, "disentangled attention needs score_buckets"),
        (
            {"disentangled": True, "causal": False, "score_buckets": 4, "n_kv_head": 1},
            "its heads share no keys",
        ),
        *(
            ({"n_encoder": 1, **other}, "n_encoder: expected a causal decoder with head lm or none, without rotary")
            for other in (
                {"positions": "rotary"}, {"norm": "rms", "qk_norm": True}, {"prefix": 1}, {"window": 2}, {"n_types": 1},
                {"causal": False}, {"head": "tag", "n_labels": 2}, {"head": "classify", "n_labels": 2},
            )
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_configuration_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qk_norm": 1}, "Config.qk_norm: expected True or False, got int"),
        ({"rope_factors": 2.0}, "Config.rope_factors: expected a sequence of numbers, got float"),
        ({"full_layers": 1}, "Config.full_layers: expected a sequence of numbers, got int"),
    ],
    ids=str,
)
def test_a_field_of_another_type_is_refused(fields, message):
    with pytest.raises(TypeError, match=message):
        replace(SMALL, **fields)


def test_what_follows_from_the_fields():
    """By hand: widths, scales, and which layers have a window."""
    wide = replace(SMALL, d_head=6)
    assert (wide.head_width, SMALL.head_width, wide.turned, replace(wide, rope_width=2).turned) == (6, 4, 6, 2)
    shapes = replace(wide, n_kv_head=1).matrix_shapes()
    assert [shapes[f"layers.0.attn.{part}"] for part in "qkvo"] == [(12, 8), (6, 8), (6, 8), (8, 12)]
    near = replace(SMALL, disentangled=True, causal=False, score_buckets=4, score_distance=8)
    assert (SMALL.scale, near.scale, replace(near, score_scale=2.0).scale) == (1 / 2, 1 / math.sqrt(12), 2.0)
    mixed = replace(SMALL, n_layer=3, window=5, full_layers=[1])
    assert mixed.full_layers == (1,)
    assert [mixed.window_of(i) for i in range(3)] == [5, None, 5]
    assert [c.by_distance for c in (SMALL, mixed, near, replace(SMALL, score_buckets=4))] == [False, True, True, True]
    assert [replace(SMALL, activation=a).gated for a in ("gelu", "relu_gated")] == [False, True]


def test_each_field_has_its_weights():
    """Which weights a field adds to GPT-2's, and which it takes away."""
    base = SMALL.weight_shapes()

    def differs(**fields):
        shapes = replace(SMALL, **fields).weight_shapes()
        return {n: shapes[n] for n in shapes if base.get(n) != shapes[n]}, base.keys() - shapes.keys()

    assert differs(positions="none") == ({}, {"embed.positions"})
    assert differs(qkv_bias=False) == ({}, {f"layers.{i}.attn.{part}.bias" for i in (0, 1) for part in "qkv"})
    assert differs(qkv_bias=True) == ({}, set())
    assert differs(score_buckets=4) == ({"embed.score_bias": (4, 2)}, set())
    far = {"embed.distances": (8, 8), "embed.distances_norm.weight": (8,), "embed.distances_norm.bias": (8,)}
    assert differs(score_buckets=4, disentangled=True, causal=False) == (far, set())
    outs = {
        f"layers.{i}.{norm}_out.{part}" for i in (0, 1) for norm in ("norm1", "norm2") for part in ("weight", "bias")
    }
    assert differs(norm_outputs=True) == (dict.fromkeys(outs, (8,)), set())
    added, gone = differs(norm="rms", qk_norm=True, d_head=6)
    assert {n: s for n, s in added.items() if "_norm" in n} == {
        f"layers.{i}.attn.{part}_norm.weight": (6,) for i in (0, 1) for part in "qk"
    }
    assert gone == {name for name in base if "norm" in name and name.endswith(".bias")}
    assert all(not replace(SMALL, bias=False, qkv_bias=True).weight_shapes().get(f"layers.0.{m}.bias")
               for m in ("attn.o", "mlp.up", "mlp.down"))  # fmt: skip


def test_an_encoder_s_weights_are_a_model_s_own():
    """Under `encoder.`, but for the token table, which is the decoder's too; and a second attention in each layer."""
    config = replace(SMALL, n_encoder=1, score_buckets=4)
    shapes, alone = config.weight_shapes(), config.encoder.weight_shapes()
    encoder = {name.removeprefix("encoder."): s for name, s in shapes.items() if name.startswith("encoder.")}
    assert encoder == {name: s for name, s in alone.items() if name != "embed.tokens"}
    assert (config.encoder.n_layer, config.encoder.causal, config.encoder.head, config.encoder.n_encoder) == (
        1, False, "none", 0
    )  # fmt: skip
    decoder = {name: s for name, s in shapes.items() if not name.startswith("encoder.")}
    cross = {name: s for name, s in decoder.items() if "cross" in name}
    assert decoder.keys() - cross.keys() == replace(SMALL, score_buckets=4).weight_shapes().keys()
    own = {n.replace(".attn.", ".cross.").replace("norm1", "norm_cross"): s for n, s in SMALL.weight_shapes().items()
           if ".attn." in n or ".norm1." in n}  # fmt: skip
    assert cross == own
    assert config.sublayers == ("attn", "cross", "mlp")
    assert config.depth == 6
    assert {name for name in config.matrix_shapes() if "cross" in name} == {
        f"layers.{i}.cross.{part}" for i in (0, 1) for part in "qkvo"
    }


# ---- weights ----


@given(configs(), seeds, dtypes)
def test_first_weights(config, seed, dtype):
    weights = ln.init_weights(config, seed=seed, dtype=dtype)
    assert {name: w.shape for name, w in weights.items()} == config.weight_shapes()
    assert {w.dtype.name for w in weights.values()} == {dtype}
    assert same_bits(weights, ln.init_weights(config, seed=seed, dtype=dtype))
    for name, w in weights.items():
        if name.endswith(".bias"):
            assert not w.any()
        elif "norm" in name:
            assert np.all(w == (config.norm != "rms_1p"))  # T4: there it is 1 + w that multiplies
        else:
            assert len(np.unique(w)) == w.size


@given(configs(), seeds, st.data())
def test_some_first_weights_have_the_same_bits_as_among_all(config, seed, data):
    names = data.draw(st.lists(st.sampled_from(list(config.weight_shapes())), unique=True))
    everything = ln.init_weights(config, seed=seed)
    assert same_bits(ln.init_weights(config, seed=seed, names=names), {name: everything[name] for name in names})
    with pytest.raises(ValueError, match=r"no \['head.x'\]"):
        ln.init_weights(config, seed=seed, names=["head.x"])


@pytest.mark.parametrize("norm_first", [True, False])
def test_first_weights_have_their_deviation(norm_first):
    """0.02, and 0.02 / sqrt(2 n_layer) into the residual stream of pre-norm models: within five of the sample's own."""
    config = ln.Config(300, 20, 2, 2, 64, 100, norm_first=norm_first)
    for name, w in ln.init_weights(config, seed=0, dtype="float64").items():
        if w.ndim == 2 and w.size > 4000:
            sigma = 0.02 / (2 if norm_first and name.endswith(("o.weight", "down.weight")) else 1)
            assert abs(w.std() / sigma - 1) <= 5 / np.sqrt(2 * w.size)
            assert abs(w.mean()) <= 5 * sigma / np.sqrt(w.size)


def test_first_weights_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match="expected float32 or float64, got 'float16'"):
        ln.init_weights(SMALL, seed=0, dtype="float16")


# ---- models ----


@no_flag
def test_writing_to_a_frozen_weight_raises():
    model = random_model(SMALL, seed=0)
    adapter = ln.init_adapter(model, ln.LoRAConfig(r=2, targets=("q", "embed")), seed=0)
    for frozen in (model, ln.merge(model, adapter), ln.unmerge(ln.merge(model, adapter), adapter)):
        for w in frozen.weights.values():
            with pytest.raises(ValueError, match="read-only"):
                w[...] = 0
            with pytest.raises(ValueError, match="read-only"):
                w += 1


def test_weights_cannot_be_replaced():
    model = random_model(SMALL, seed=0)
    with pytest.raises(TypeError, match="does not support item assignment"):
        model.weights["norm.bias"] = 0
    with pytest.raises(FrozenInstanceError):
        model.weights = {}


@no_flag
def test_the_callers_arrays_stay_writeable_and_are_not_copied():
    weights = host_weights(random_model(SMALL, seed=0))
    model = ln.Model(SMALL, weights)
    assert all(w.flags.writeable for w in weights.values())
    assert all(np.shares_memory(w, model.weights[name]) for name, w in weights.items())


def test_a_model_has_the_weights_in_the_order_of_its_configuration():
    weights = host_weights(random_model(SMALL, seed=0))
    model = ln.Model(SMALL, dict(reversed(weights.items())))
    assert list(model.weights) == list(SMALL.weight_shapes())
    assert all(same_bits(asnumpy(model.weights[name]), w) for name, w in weights.items())
    assert model.dtype == "float64"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"norm.bias": None}, ValueError, "weights missing: norm.bias; not known: none"),
        ({"head.weight": np.zeros(3)}, ValueError, "weights missing: none; not known: head.weight"),
        ({"norm.bias": np.zeros(3)}, ValueError, r"norm.bias: expected shape \(8,\), got \(3,\)"),
        (
            {"norm.bias": np.zeros(8, "float32")},
            TypeError,
            "norm.bias: expected float64, as layers.0.norm1.weight has, got float32",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, error, message):
    weights = {**host_weights(random_model(SMALL, seed=0)), **change}
    with pytest.raises(error, match=message):
        ln.Model(SMALL, {name: w for name, w in weights.items() if w is not None})


def test_weights_of_another_dtype_are_refused():
    weights = {name: w.astype("float16") for name, w in host_weights(random_model(SMALL, seed=0)).items()}
    with pytest.raises(TypeError, match="expected float32 or float64 weights, got float16"):
        ln.Model(SMALL, weights)


def test_what_is_held_in_fewer_bits_stands_for_float32_matrices_alone():
    config = ln.Config(7, 8, 1, 1, 4, 4)
    weights = {name: device(w) for name, w in ln.init_weights(config, seed=0).items()}
    halves = BFloat16((7, 4), xp.zeros((7, 4), "uint16"))
    assert ln.Model(config, {**weights, "embed.tokens": halves}).dtype == "float32"
    with pytest.raises(ValueError, match=r"norm.bias: expected shape \(4,\), got \(1, 4\)"):
        ln.Model(config, {**weights, "norm.bias": BFloat16((1, 4), xp.zeros((1, 4), "uint16"))})
    with pytest.raises(TypeError, match=r"embed.tokens: expected float32, as layers.0.norm1.weight has, got uint16"):
        ln.Model(config, {**weights, "embed.tokens": halves.halves})
    with pytest.raises(TypeError, match=r"embed.tokens: expected float32, as layers.0.norm1.weight has, got float16"):
        ln.Model(config, {**weights, "embed.tokens": xp.zeros((7, 4), "float16")})
    double = {name: w.astype("float64") for name, w in weights.items()}
    with pytest.raises(TypeError, match=r"embed.tokens: expected float64"):
        ln.Model(config, {**double, "embed.tokens": halves})


# ---- shown and copied ----


def test_a_model_is_shown_in_a_line():
    config = replace(SMALL, head="classify", n_labels=2, causal=False)
    model = ln.Model(config, ln.init_weights(config, seed=0))
    size = sum(int(np.prod(shape)) for shape in config.weight_shapes().values())
    assert repr(model) == f"Model(2 layers, d_model 8, head classify, {size:,} weights, float32)"
    adapter = ln.init_adapter(model, ln.LoRAConfig(r=2), seed=0)
    assert repr(ln.merge(model, adapter)).endswith("weights, float32, merged)")


def copies(value):
    """What each way to copy a value gives: as a whole, or by way of a file."""
    return [copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value))]


@pytest.mark.parametrize("value", [SMALL, ln.LoRAConfig(rank_pattern={"q": 2}, layers=range(2))])
def test_configurations_are_copied(value):
    assert copies(value) == [value] * 3


@pytest.mark.parametrize("narrow", [False, True])
def test_copies_of_a_model_have_its_bits_and_are_frozen(narrow):
    weights = {name: device(w) for name, w in ln.init_weights(SMALL, seed=0).items()}
    if narrow:
        weights |= {"embed.tokens": narrowed(device(asnumpy(weights["embed.tokens"]).round()))}
    model = ln.Model(SMALL, weights)
    for other in copies(model):
        assert (other.config, list(other.weights)) == (SMALL, list(model.weights))
        assert same_bits(dict(other.weights), dict(model.weights))
        with pytest.raises(TypeError, match="does not support item assignment"):
            other.weights["norm.bias"] = 0
        if backend_name == "numpy":
            held = [w.halves if isinstance(w, Held) else w for w in other.weights.values()]
            assert not any(w.flags.writeable for w in held)
    assert not np.shares_memory(asnumpy(copy.deepcopy(model).weights["norm.bias"]), asnumpy(weights["norm.bias"]))


def test_a_copy_of_a_merged_model_has_its_bits_and_is_not_unmerged():
    model = random_model(SMALL, seed=0)
    adapter = ln.init_adapter(model, ln.LoRAConfig(r=2), seed=0)
    merged = ln.merge(model, adapter)
    for other in copies(merged):
        assert same_bits(dict(other.weights), dict(merged.weights))
        with pytest.raises(ValueError, match="merge made in this process; this one was not, or is a copy"):
            ln.unmerge(other, adapter)
    assert ln.unmerge(merged, adapter) is model

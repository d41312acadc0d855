"""The update of a whole model: start, merge, unmerge, combine, count."""

import itertools
import math
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import (
    ATTENTION,
    bits,
    cases,
    configs,
    dense_updates,
    deviation,
    device,
    frozen_matrix,
    gamma,
    inputs,
    lora_configs,
    random_model,
    same_bits,
    seeds,
    trained_adapter,
    whole_numbers,
    with_updates,
)

import lora_np as ln
from lora_np.adapter import LoRAConfig, target_of
from lora_np.backend import asnumpy, xp
from lora_np.vectors.derivatives import architectures

proves = pytest.mark.proves
GPT2 = ln.Config(7, 8, 2, 2, 8, 6)


def pair(targets=("q", "v"), seed=0, config=GPT2, dtype="float64", **fields):
    """A small model and an adapter as after training."""
    model = random_model(config, seed=seed, dtype=dtype)
    return model, trained_adapter(model, ln.LoRAConfig(r=2, targets=targets, **fields), seed=seed)


# --- L1: the configuration -----------------------------------------------------------------------------------------


@proves("L1")
@given(st.integers(1, 64), st.floats(0.01, 1e3))
def test_scale_is_alpha_over_r(r, alpha):
    assert LoRAConfig(r=r, alpha=alpha).scale("layers.0.attn.q") == alpha / r
    assert LoRAConfig(r=r, alpha=alpha, rslora=True).scale("layers.0.attn.q") == alpha / math.sqrt(r)


@proves("L1")
def test_patterns_set_rank_and_scale_by_matrix_then_by_target():
    config = LoRAConfig(
        r=4,
        alpha=8,
        targets=("q", "v", "embed"),
        rank_pattern={"q": 2, "layers.1.attn.q": 1},
        alpha_pattern={"q": 6, "layers.1.attn.q": 5, "embed.tokens": 12},
    )
    expected = {
        "layers.0.attn.q": (2, 3.0),
        "layers.1.attn.q": (1, 5.0),
        "layers.1.attn.v": (4, 2.0),
        "embed.tokens": (4, 3.0),
    }
    assert {name: (config.rank(name), config.scale(name)) for name in expected} == expected


@proves("L1")
def test_the_defaults_are_the_papers_and_everything_is_frozen():
    """Wq and Wv, as in the paper; alpha = 2 r, so s = 2; nothing else is trained."""
    config = LoRAConfig()
    assert config == LoRAConfig(8, 16, ("q", "v"), 0.0, "none", False, False, {}, {}, None, "uniform", 0.02)
    assert config.scale("layers.0.attn.q") == 2
    adapter = ln.Adapter(config, {})
    assert adapter != replace(adapter)  # arrays have no one truth: an adapter is itself alone
    for frozen, name in ((config, "r"), (adapter, "params")):
        with pytest.raises(FrozenInstanceError):
            setattr(frozen, name, None)


@proves("L1")
@pytest.mark.parametrize(
    ("name", "target"),
    [("layers.3.attn.q", "q"), ("layers.12.mlp.gate", "gate"), ("embed.tokens", "embed"), ("head", "head")],
)
def test_target_of_a_matrix(name, target):
    assert target_of(name) == target


BAD_CONFIGS = [
    ({"r": 0}, ValueError, "r: expected an integer of at least 1"),
    ({"r": 1.5}, ValueError, "r: expected an integer"),
    ({"r": True}, ValueError, "r: expected an integer"),
    ({"rank_pattern": {"q": 0}}, ValueError, r"rank_pattern\['q'\]"),
    ({"alpha": math.inf}, ValueError, "alpha: expected a finite number"),
    ({"alpha": "8"}, ValueError, "alpha: expected a finite number"),
    ({"alpha_pattern": {"v": math.nan}}, ValueError, r"alpha_pattern\['v'\]"),
    ({"targets": "q"}, TypeError, r"targets: expected a sequence of names, as \('q', 'v'\), got 'q'"),
    ({"targets": 3}, TypeError, "targets: expected a sequence"),
    ({"targets": ()}, ValueError, "targets: expected names"),
    ({"targets": ("q", "q")}, ValueError, "each once"),
    ({"targets": ("q_proj",)}, ValueError, r"got \('q_proj',\) \(q_proj and query are q here, c_attn is qkv"),
    ({"targets": ("query",)}, ValueError, "targets: expected names"),
    ({"targets": ("qkv", "v")}, ValueError, "qkv stands for"),
    ({"targets": ("head",), "train_head": True}, ValueError, "not both"),
    ({"dropout": 1.0}, ValueError, "dropout"),
    ({"dropout": -0.1}, ValueError, "dropout"),
    ({"bias": "some"}, ValueError, "bias"),
    ({"init": "zeros"}, ValueError, "init"),
    ({"sigma": 0.0}, ValueError, "sigma"),
    ({"sigma": math.inf}, ValueError, "sigma"),
    ({"layers": (-1,)}, ValueError, "layers"),
    ({"layers": (0.5,)}, ValueError, "layers"),
]


@pytest.mark.parametrize(("fields", "error", "message"), BAD_CONFIGS)
def test_a_wrong_configuration_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        LoRAConfig(**fields)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"q.A": (2, 3)}, "q.A stands alone"),
        ({"q.B": (3, 2)}, "q.B stands alone"),
        ({"q.A": (3, 3), "q.B": (3, 3)}, "the configuration's rank is 2"),
        ({"q.A": (2, 3), "q.B": (2, 3)}, "expected A"),
        ({"q.A": (2,), "q.B": (3, 2)}, "expected A"),
    ],
)
def test_factors_that_do_not_fit_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        ln.Adapter(LoRAConfig(r=2), {name: xp.zeros(shape) for name, shape in params.items()})


# --- L3: start -----------------------------------------------------------------------------------------------------


@proves("L3")
@given(st.data(), seeds)
def test_an_adapter_starts_with_b_zero_and_copies_of_what_is_trained_whole(data, seed):
    config = data.draw(configs())
    model = random_model(config, seed=seed)
    lora_config = data.draw(lora_configs(config))
    adapter = ln.init_adapter(model, lora_config, seed=seed)
    for name in adapter.matrices:
        A, B = adapter.params[f"{name}.A"], adapter.params[f"{name}.B"]
        assert asnumpy(A).all()
        assert not asnumpy(B).any()
        assert len(A) == B.shape[1] == lora_config.rank(name)
    for name, value in adapter.whole.items():
        source = model.weights.get(name, model.weights["embed.tokens"])
        assert same_bits(value, source)
        assert not xp.may_share_memory(value, source)
    assert {p.dtype for p in adapter.params.values()} == {model.dtype}
    assert same_bits(adapter.params, ln.init_adapter(model, lora_config, seed=seed).params)


@proves("L3")
def test_another_seed_gives_another_a():
    model = random_model(GPT2, seed=0)
    one, other = (ln.init_adapter(model, ln.LoRAConfig(r=2), seed=seed) for seed in (0, 1))
    assert all(not same_bits(one.params[n], other.params[n]) for n in one.params if n.endswith(".A"))
    firsts = [bits(one.params[f"{name}.A"]) for name in one.matrices]
    assert len(set(firsts)) == len(firsts)


WHOLE = {
    "nothing": ({}, set()),
    "the head": ({"train_head": True}, {"pooler.weight", "pooler.bias", "head.weight", "head.bias"}),
    "adapted biases": ({"bias": "lora_only"}, {"layers.0.attn.q.bias", "layers.0.attn.v.bias"}),
    "fused biases": (
        {"bias": "lora_only", "targets": ("qkv",)},
        {"layers.0.attn.q.bias", "layers.0.attn.k.bias", "layers.0.attn.v.bias"},
    ),
}


@proves("L3", "T14")
@pytest.mark.parametrize(("fields", "whole"), WHOLE.values(), ids=WHOLE)
def test_what_is_trained_whole(fields, whole):
    config = replace(
        ln.PRESETS["roberta-base"], vocab_size=7, n_positions=9, n_layer=1, n_head=2, d_model=4, d_ff=5,
        head="classify", n_labels=3,
    )  # fmt: skip
    adapter = ln.init_adapter(random_model(config, seed=0), ln.LoRAConfig(r=1, **fields), seed=0)
    assert set(adapter.whole) == whole


@proves("L3", "T14")
def test_all_biases_are_trained_and_berts_pooler_is_not():
    config = replace(GPT2, causal=False, head="classify", n_labels=3)
    model = random_model(config, seed=0)
    biases = {name for name in model.weights if name.endswith(".bias")}
    assert set(ln.init_adapter(model, ln.LoRAConfig(r=2, bias="all"), seed=0).whole) == biases
    head = {"head.weight", "head.bias"}
    assert set(ln.init_adapter(model, ln.LoRAConfig(r=2, train_head=True), seed=0).whole) == head


@proves("L3")
def test_layers_narrow_the_targets():
    adapter = ln.init_adapter(random_model(GPT2, seed=0), ln.LoRAConfig(r=2, layers=(1,)), seed=0)
    assert adapter.matrices == ["layers.1.attn.q", "layers.1.attn.v"]


# --- L5: merge -----------------------------------------------------------------------------------------------------


@proves("L5")
@given(cases(heads=("lm", "classify", "tag", "none"), dtype="float64"))
def test_merged_weights_are_w0_plus_s_b_a(case):
    model, adapter, _, _ = case
    merged = ln.merge(model, adapter)
    expected = with_updates(model, dense_updates(model, adapter), adapter.whole)
    assert merged.config == expected.config
    for name, w in expected.weights.items():
        size = np.abs(asnumpy(w)).max() + 8 * max(np.abs(asnumpy(p)).max() ** 2 for p in adapter.params.values())
        assert np.abs(asnumpy(merged.weights[name]) - asnumpy(w)).max() <= 100 * gamma(16) * size


@proves("L5")
@given(cases(heads=("lm", "classify", "tag", "none")))
def test_merge_makes_new_arrays_of_adapted_matrices_only(case):
    model, adapter, _, _ = case
    before = {name: bits(w) for name, w in model.weights.items()}
    merged = ln.merge(model, adapter)
    adapted = {"embed.tokens" if name == "embed.tokens" else f"{name}.weight" for name in dense_updates(model, adapter)}
    if merged.config == model.config:
        adapted = {model.config.head_weight if name == "head.weight" else name for name in adapted}
    for name, w in merged.weights.items():
        assert w.dtype == model.dtype
        if name not in adapted and name not in adapter.whole and name in model.weights:
            assert xp.may_share_memory(w, model.weights[name])
        for other in model.weights.values():
            assert not (name in adapted and xp.may_share_memory(w, other))
    assert before == {name: bits(w) for name, w in model.weights.items()}


@proves("L5")
@given(cases(heads=("lm", "classify", "tag", "none"), dtype="float64"))
def test_merged_and_unmerged_models_agree(case):
    """Within 1e-12 of the largest logit, in float64."""
    model, adapter, batch, _ = case
    unmerged = ln.forward(model, adapter=adapter, **inputs(batch))
    merged = ln.forward(ln.merge(model, adapter), **inputs(batch))
    assert deviation(merged, unmerged) <= 1e-12


@proves("L5", "T14")
@pytest.mark.parametrize(
    ("targets", "fields", "unties"),
    [
        (("q",), {}, False),
        (("embed",), {}, True),
        (("head",), {}, True),
        (("embed", "head"), {}, True),
        (("q",), {"train_head": True}, True),
        (("embed",), {"train_head": True}, True),
    ],
)
def test_merging_the_look_up_or_a_tied_head_unties_them(targets, fields, unties):
    model, adapter = pair(targets, **fields)
    merged = ln.merge(model, adapter)
    table, updates = model.weights["embed.tokens"], dense_updates(model, adapter)
    assert merged.config.tie_head is not unties
    assert ("head.weight" in merged.weights) is unties
    if "embed" not in targets:
        assert same_bits(merged.weights["embed.tokens"], table)
    if "head" not in targets and unties and not fields:
        assert same_bits(merged.weights["head.weight"], table)
    if fields:
        assert same_bits(merged.weights["head.weight"], adapter.whole["head.weight"])
        assert not same_bits(merged.weights["head.weight"], table)
    for name, weight in (("embed.tokens", "embed.tokens"), ("head", "head.weight")):
        if name in updates:
            dW = updates[name].T if name == "embed.tokens" else updates[name]
            np.testing.assert_allclose(asnumpy(merged.weights[weight]), asnumpy(table) + dW, rtol=1e-14, atol=1e-15)


# --- L6: unmerge ---------------------------------------------------------------------------------------------------


@proves("L6")
@given(cases(), st.integers(1, 3))
def test_unmerge_gives_back_the_model_itself_after_nested_merges(case, n):
    model, adapter, _, seed = case
    before = {name: bits(w) for name, w in model.weights.items()}
    models, adapters = [model], []
    for i in range(n):
        # Merging one of embed or head unties the model: its own shapes decide what comes next.
        adapters.append(trained_adapter(models[-1], replace(adapter.config, train_head=False), seed=(seed + i) % 2**32))
        models.append(ln.merge(models[-1], adapters[-1]))
    while adapters:
        assert ln.unmerge(models.pop(), adapters.pop()) is models[-1]
    assert before == {name: bits(w) for name, w in model.weights.items()}


@proves("L6")
def test_unmerge_takes_an_equal_adapter():
    """Equal to the bit: a copy, as read from a file."""
    model, adapter = pair()
    copied = replace(adapter, params={name: p.copy() for name, p in adapter.params.items()})
    assert ln.unmerge(ln.merge(model, adapter), copied) is model


def one_bit_changed(adapter):
    first = next(iter(adapter.params))
    return replace(adapter, params={**adapter.params, first: adapter.params[first] * (1 + 2.0**-52)})


OTHERS = {
    "another seed": lambda adapter: pair(seed=1)[1],
    "another scale": lambda adapter: replace(adapter, config=replace(adapter.config, alpha=17)),
    "one bit": one_bit_changed,
    "fewer matrices": lambda adapter: replace(adapter, params=dict(itertools.islice(adapter.params.items(), 2))),
    "other targets": lambda adapter: pair(("q", "k"))[1],
}


@proves("L6")
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_unmerge_of_another_adapter_is_refused(other):
    model, adapter = pair()
    with pytest.raises(ValueError, match="last merged with another adapter"):
        ln.unmerge(ln.merge(model, adapter), other(adapter))


@proves("L6")
def test_unmerge_in_the_wrong_order_is_refused():
    model, first = pair()
    second = pair(("k",), seed=1)[1]
    both = ln.merge(ln.merge(model, first), second)
    with pytest.raises(ValueError, match="another adapter"):
        ln.unmerge(both, first)
    assert ln.unmerge(ln.unmerge(both, second), first) is model


@proves("L6")
def test_unmerge_of_a_model_that_was_not_merged_is_refused():
    model, adapter = pair()
    remade = replace(ln.merge(model, adapter), weights=ln.merge(model, adapter).weights)
    for plain in (model, remade):
        with pytest.raises(ValueError, match="this one was not, or is a copy"):
            ln.unmerge(plain, adapter)


# --- L8: count -----------------------------------------------------------------------------------------------------

# The paper's figures (tables 2 to 4), and those of its table 6: 18,874,368 whatever is adapted at one budget.
COUNTS = [
    ("gpt3-175b", 1, ("q", "v"), 4_718_592),
    ("gpt3-175b", 8, ("q", "v"), 37_748_736),
    ("gpt3-175b", 8, ("q",), 18_874_368),
    ("gpt3-175b", 4, ("q", "v"), 18_874_368),
    ("gpt3-175b", 2, ATTENTION, 18_874_368),
    ("roberta-base", 8, ("q", "v"), 294_912),
    ("roberta-large", 8, ("q", "v"), 786_432),
    ("deberta-v2-xxlarge", 16, ("q", "v"), 4_718_592),
    ("gpt2", 8, ("q", "v"), 294_912),
    ("gpt2", 8, ("qkv",), 12 * 8 * (768 + 3 * 768)),
    ("smollm2-135m", 8, ("q", "v"), 30 * 8 * (576 + 576 + 576 + 192)),
    ("smollm2-135m", 8, ("gate",), 30 * 8 * (576 + 1536)),
    ("gpt2", 8, ("embed",), 8 * (50257 + 768)),
]


@proves("L8")
@pytest.mark.parametrize(("preset", "r", "targets", "count"), COUNTS)
def test_counts_of_the_paper(preset, r, targets, count):
    assert ln.count_parameters(ln.PRESETS[preset], ln.LoRAConfig(r=r, targets=targets)) == count


@proves("L8")
@given(st.data())
def test_count_is_what_an_adapter_has(data):
    config = data.draw(configs())
    lora_config = data.draw(lora_configs(config))
    adapter = ln.init_adapter(random_model(config, seed=0), lora_config, seed=0)
    assert ln.count_parameters(config, lora_config) == sum(p.size for p in adapter.params.values())


@proves("L8")
# --- L9: combine ---------------------------------------------------------------------------------------------------


@st.composite
def several(draw, **fields):
    """A model and two or three adapters of it, with other targets, ranks and scales, and a weight for each."""
    config = draw(configs(**fields))
    seed = draw(seeds)
    model = random_model(config, seed=seed)
    targets = draw(st.sampled_from([None, ("q", "v")]))
    lora = [
        draw(lora_configs(config, whole=False, dropout=False, targets=targets, dora=False))
        for _ in range(draw(st.integers(2, 3)))
    ]
    adapters = [trained_adapter(model, c, seed=(seed + i) % 2**32) for i, c in enumerate(lora)]
    return model, adapters, [draw(st.sampled_from([-1.5, 0.0, 0.3, 2.0])) for _ in adapters]


def weighted_sum(model, adapters, weights, absolute=False):
    """sum_i w_i dW_i, dense; or the sum of the sizes of all products in it."""
    total = {}
    for adapter, w in zip(adapters, weights, strict=True):
        if absolute:
            adapter = replace(adapter, params={name: abs(p) for name, p in adapter.params.items()})
        for name, dW in dense_updates(model, adapter).items():
            total[name] = total.get(name, 0) + (abs(w) if absolute else w) * dW
    return total


def fits_together(adapters):
    """Whether no adapter has a fused qkv where another has q, k or v of its own."""
    targets = {name.rsplit(".", 1)[-1] for adapter in adapters for name in adapter.matrices}
    return "qkv" not in targets or not targets & {"q", "k", "v"}


@proves("L9")
@given(several())
def test_combine_is_the_weighted_sum(several):
    """Each product passes at most R + 3 roundings here, and as many in the reference."""
    model, adapters, weights = several
    if not fits_together(adapters):
        with pytest.raises(ValueError, match="qkv"):
            ln.combine(adapters, weights)
        return
    combined = ln.combine(adapters, weights)
    expected, sizes = weighted_sum(model, adapters, weights), weighted_sum(model, adapters, weights, absolute=True)
    got = dense_updates(model, combined)
    assert got.keys() == expected.keys()
    for name, dW in expected.items():
        assert np.all(np.abs(got[name] - dW) <= 2 * gamma(40) * sizes[name])
    for name in combined.matrices:
        ranks = [len(a.params[f"{name}.A"]) for a in adapters if name in a.matrices]
        assert len(combined.params[f"{name}.A"]) == combined.config.rank(name) == sum(ranks)
        assert combined.config.scale(name) == 1.0


@proves("L9")
@given(several(heads=("lm",)), seeds)
def test_combine_acts_as_the_weighted_sum(several, seed):
    """The logits are those of the model whose weights are W0 + sum_i w_i dW_i."""
    model, adapters, weights = several
    assume(fits_together(adapters))
    tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size, (2, 4))
    source = {"source": tokens[::-1]} if model.config.n_encoder else {}
    expected = ln.forward(with_updates(model, weighted_sum(model, adapters, weights)), tokens, **source)
    assert deviation(ln.forward(model, tokens, ln.combine(adapters, weights), **source), expected) <= 1e-12


@proves("L9")
@given(seeds)
def test_combine_stacks_the_factors_exactly(seed):
    """A is stacked as it is; B is multiplied by w s, one rounding: here, with whole numbers, none."""
    rng = np.random.default_rng(seed)
    parts = [
        ln.Adapter(
            ln.LoRAConfig(r=r, alpha=2 * r, targets=("q",)),
            {"layers.0.attn.q.A": whole_numbers(rng, r, 5), "layers.0.attn.q.B": whole_numbers(rng, 4, r)},
        )
        for r in (1, 3)
    ]
    combined = ln.combine(parts, [0.5, -1.0]).params
    A = [asnumpy(part.params["layers.0.attn.q.A"]) for part in parts]
    B = [asnumpy(part.params["layers.0.attn.q.B"]) for part in parts]
    np.testing.assert_array_equal(asnumpy(combined["layers.0.attn.q.A"]), np.concatenate(A))
    np.testing.assert_array_equal(asnumpy(combined["layers.0.attn.q.B"]), np.hstack([B[0], -2 * B[1]]))


def frobenius(a):
    return float(np.sqrt((a**2).sum()))


@proves("L9")
@given(several(), st.integers(1, 3), seeds)
def test_truncation_is_optimal(several, rank, seed):
    """Its error is the tail of the singular values, and no random factors of that rank come nearer (Eckart, Young)."""
    _, adapters, weights = several
    assume(fits_together(adapters))
    dense = ln.combine(adapters, weights)
    cut = ln.combine(adapters, weights, rank=rank)
    rng = np.random.default_rng(seed)
    for name in dense.matrices:
        A, B, A2, B2 = (asnumpy(a.params[f"{name}.{f}"]) for a in (dense, cut) for f in "AB")
        values = np.linalg.svd(B @ A, compute_uv=False)
        error, noise = frobenius(B @ A - B2 @ A2), 200 * gamma(1) * frobenius(B) * frobenius(A)
        assert (
            len(A2)
            == B2.shape[1]
            == cut.config.rank(name)
            == min(rank, len(A), *dense.params[f"{name}.B"].shape, A.shape[1])
        )
        assert abs(error - frobenius(values[rank:])) <= noise
        other = rng.standard_normal(B2.shape)
        best = other @ np.linalg.lstsq(other, B @ A, rcond=None)[0]  # the nearest for these random columns
        assert error <= frobenius(B @ A - best) + noise
        nudged = (B2 + 1e-3 * other) @ (A2 + 1e-3 * rng.standard_normal(A2.shape))
        assert error <= frobenius(B @ A - nudged) + noise
        assert cut.config.scale(name) == 1.0


@pytest.mark.parametrize(
    ("weights", "fields", "message"),
    [
        ([], {}, "expected a weight for each adapter, got 1 and 0"),
        ([1.0, 2.0], {}, "got 1 and 2"),
        ([1.0], {"rank": 0}, "rank: expected an integer of at least 1"),
    ],
)
def test_a_wrong_combination_is_refused(weights, fields, message):
    with pytest.raises(ValueError, match=message):
        ln.combine([pair()[1]], weights, **fields)


def test_combining_what_is_trained_whole_or_of_other_shapes_is_refused():
    with pytest.raises(ValueError, match="trained whole"):
        ln.combine([pair(bias="all")[1]], [1.0])
    with pytest.raises(ValueError, match="of different shapes"):
        ln.combine([pair()[1], pair(config=replace(GPT2, d_model=4))[1]], [1.0, 1.0])
    with pytest.raises(ValueError, match="got 0 and 0"):
        ln.combine([], [])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ("gate",)}, "this model has no 'gate'"),
        ({"r": 9}, r"at most min\(in, out\) = 8, got r = 9"),
        ({"layers": (2,)}, r"expected layers in 0\.\.1"),
        ({"rank_pattern": {"k": 1}}, "the pattern 'k' matches no adapted matrix"),
        ({"alpha_pattern": {"layers.2.attn.q": 1}}, "matches no adapted matrix"),
    ],
)
def test_a_configuration_that_does_not_fit_the_model_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ln.init_adapter(random_model(GPT2, seed=0), ln.LoRAConfig(**{"r": 2, **fields}), seed=0)


def test_train_head_without_a_head_is_refused():
    with pytest.raises(ValueError, match="this model has no head"):
        ln.count_parameters(replace(GPT2, head="none"), ln.LoRAConfig(train_head=True))


def test_merging_an_adapter_of_another_model_is_refused():
    model = pair()[0]
    for other, error in ((pair(config=replace(GPT2, d_model=4))[1], ValueError), (pair(dtype="float32")[1], TypeError)):
        with pytest.raises(error, match=r"adapter: layers\.0\.attn\.q"):
            ln.merge(model, other)


# --- L12: a start from the base's own decomposition ------------------------------------------------------------------


PISSA = ln.LoRAConfig(r=2, alpha=3, targets=("qkv", "down", "embed", "head"))


@proves("L12")
@given(seeds, st.sampled_from(["float32", "float64"]))
def test_pissa_parts_the_base_into_its_leading_directions_and_a_residual(seed, dtype):
    """W0 = residual + s B A to one rounding of each; s B A is the best of its rank, so its singular values are W0's."""
    model = random_model(architectures()["GPT-2, language model"], seed=seed, dtype=dtype)
    residual, adapter = ln.init_pissa(model, PISSA)
    assert {p.dtype for p in adapter.params.values()} == {model.dtype}
    start = dense_updates(residual, adapter)
    for name, dW in start.items():
        W0, rest = frozen_matrix(model, name), frozen_matrix(residual, name)
        assert np.abs(rest + dW - W0).max() <= gamma(2, dtype) * np.abs(W0).max() + 1e-14
    W0 = np.concatenate([frozen_matrix(model, f"layers.0.attn.{part}") for part in "qkv"])
    dW = np.concatenate([start[f"layers.0.attn.{part}"] for part in "qkv"])
    values = np.linalg.svd(W0, compute_uv=False)
    assert np.abs(np.linalg.svd(dW, compute_uv=False)[:2] - values[:2]).max() <= 100 * gamma(8, dtype) * values[0]
    lost = np.linalg.norm(W0 - dW, 2)
    assert abs(lost - values[2]) <= 100 * gamma(8, dtype) * values[0]


@proves("L12")
@given(seeds)
def test_pissa_acts_as_the_base_and_converts_to_its_plain_lora(seed):
    """At the start the logits are the base's, but for roundings; after training, those of the adapter of rank 2r on the
    first base."""
    model = random_model(architectures()["GPT-2, language model"], seed=seed)
    residual, start = ln.init_pissa(model, PISSA)
    tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size, (2, 5))
    assert deviation(ln.forward(residual, tokens, start), ln.forward(model, tokens)) <= 1e-12
    rng = np.random.default_rng(seed)
    moved = {name: p + device(0.1 * rng.standard_normal(p.shape)) for name, p in start.params.items()}
    trained = replace(start, params=moved)
    plain = ln.combine([trained, start], [1, -1])
    assert {plain.config.rank(name) for name in plain.matrices} == {4}
    assert deviation(ln.forward(model, tokens, plain), ln.forward(residual, tokens, trained)) <= 1e-11


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"dora": True}, "init_pissa: expected dora=False"), ({"alpha": 0}, "layers.0.attn.q: expected s > 0, got 0")],
)
def test_pissa_with_what_it_cannot_part_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ln.init_pissa(random_model(GPT2, seed=0), ln.LoRAConfig(r=2, **fields))

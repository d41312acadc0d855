"""A model with its adapter in place: the weights in force, the updates beside them, what is trained, and how deep."""

from dataclasses import replace

import numpy as np
import pytest
from strategies import device, random_model, same_bits, trained_adapter

import lora_np as ln
from lora_np.adapter import fuse_grads, fused_parts, matrix_updates
from lora_np.backend import asnumpy, xp
from lora_np.binding import SOURCE, bind, encoder_of, with_source
from lora_np.layout import Layout

proves = pytest.mark.proves
GROUPED = ln.Config(7, 8, 2, 4, 8, 6, n_kv_head=2)
MODEL = random_model(GROUPED, seed=0)


def bound(model=MODEL, **fields):
    """A model with an adapter as after training in place, and the adapter."""
    adapter = trained_adapter(model, ln.LoRAConfig(**{"r": 2, **fields}), seed=0)
    return bind(model, adapter, rows=3), adapter


@proves("L1")
def test_a_fused_pair_stands_for_q_k_and_v():
    """The rows of B in that order, k and v of the grouped heads' width; A, s and the mask's stream are shared."""
    assert fused_parts(GROUPED, "layers.1.attn.qkv") == {
        "layers.1.attn.q": slice(0, 8),
        "layers.1.attn.k": slice(8, 12),
        "layers.1.attn.v": slice(12, 16),
    }
    assert fused_parts(GROUPED, "layers.1.attn.q") == {"layers.1.attn.q": slice(None)}
    _, adapter = bound(targets=("qkv",), dropout=0.1)
    updates = matrix_updates(GROUPED, adapter)
    B = adapter.params["layers.0.attn.qkv.B"]
    assert same_bits(xp.concatenate([updates[f"layers.0.attn.{part}"].B for part in "qkv"]), B)
    for part in "qkv":
        update = updates[f"layers.0.attn.{part}"]
        assert update.A is adapter.params["layers.0.attn.qkv.A"]
        assert update[2:] == (8.0, 0.1, "layers.0.attn.qkv", None, None)


@proves("L4")
def test_gradients_of_a_fused_pair():
    """A's is the sum of the three, B's are joined; the names are the adapter's, in its order."""
    _, adapter = bound(targets=("up", "qkv"), layers=(0,), bias="lora_only")
    rng = np.random.default_rng(0)
    grads = {}
    for name, n_out in (("attn.q", 8), ("attn.k", 4), ("attn.v", 4), ("mlp.up", 6)):
        shapes = {f"layers.0.{name}.A": (2, 8), f"layers.0.{name}.B": (n_out, 2), f"layers.0.{name}.bias": (n_out,)}
        grads |= {key: device(rng.integers(-9, 9, shape).astype(float)) for key, shape in shapes.items()}
    fused = fuse_grads(GROUPED, adapter, grads)
    assert list(fused) == list(adapter.params)
    parts = [asnumpy(grads[f"layers.0.attn.{part}.A"]) for part in "qkv"]
    np.testing.assert_array_equal(asnumpy(fused["layers.0.attn.qkv.A"]), sum(parts))
    joined = np.concatenate([asnumpy(grads[f"layers.0.attn.{part}.B"]) for part in "qkv"])
    np.testing.assert_array_equal(asnumpy(fused["layers.0.attn.qkv.B"]), joined)
    for name in ("layers.0.mlp.up.A", "layers.0.mlp.up.B", "layers.0.attn.k.bias"):
        assert fused[name] is grads[name]


@proves("L4")
@pytest.mark.parametrize(
    ("fields", "lowest"),
    [
        ({"targets": ("embed", "head")}, (-1, 0)),
        ({"targets": ("q",)}, (0, 1)),
        ({"targets": ("up",)}, (1, 1)),
        ({"targets": ("o", "down"), "layers": (1,)}, (2, 2)),
        ({"targets": ("down",), "layers": (1,)}, (3, 2)),
        ({"targets": ("down",), "layers": (1,), "bias": "all"}, (0, 0)),
        ({"targets": ("head",)}, (4, 2)),
    ],
    ids=str,
)
def test_the_lowest_trained_parameter(fields, lowest):
    """Half blocks: -1 the embedding, two to a layer, then the last norm, the pooler, the head; in each, the norm, what
    reads it, what writes into the residual stream."""
    assert bound(**fields)[0].lowest == lowest


@proves("L4", "T13")
def test_what_is_below_a_matrix():
    """Pre-norm, a sublayer's own norm is below its matrices; post-norm, it is above them."""
    first, post = replace(bound()[0], trained=frozenset({"layers.1.norm1.weight"})), replace(GROUPED, norm_first=False)
    last = replace(first, config=post)
    asked = ("layers.0.mlp.down", "layers.1.attn.q", "layers.1.attn.o", "layers.1.mlp.up", "head")
    assert [first.trained_below(name) for name in asked] == [False, True, True, True, True]
    assert [last.trained_below(name) for name in asked] == [False, False, False, True, True]
    only_o = replace(first, trained=frozenset({"layers.1.attn.o.A"}))
    assert [only_o.trained_below(name) for name in asked] == [False, False, False, True, True]


CLASSIFIER = {"head": "classify", "n_labels": 2, "causal": False}


@proves("L4", "T13", "T17", "T20")
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {"prefix": 2, "n_types": 2, **CLASSIFIER},
        {"norm": "rms", "qk_norm": True, "norm_outputs": True, **CLASSIFIER},
        {"n_encoder": 1, "norm_outputs": True, "tie_head": False, "score_buckets": 4},
    ],
    ids=["usual", "norms", "encoder"],
)
def test_the_depth_of_every_parameter(fields, norm_first):
    """As a token meets them: what writes into the residual stream stands above what reads it; a norm is first or last,
    and one of what a sublayer gives stands right above that.

    So the order is that of the forward, and within a step there is none: q, k, v, their norms and a prefix stand side
    by side. An encoder's states are no state of the decoder: what a second attention asks of them is not above it.
    """
    config = replace(GROUPED, n_layer=1, norm_first=norm_first, activation="silu_gated", **fields)
    steps = [["embed."]]
    for norm, first, then in (
        ("norm1", "attn.q attn.k attn.v attn.prefix attn.q_norm attn.k_norm", "attn.o"),
        ("norm_cross", "cross.q cross.k cross.v", "cross.o"),
        ("norm2", "mlp.up mlp.gate", "mlp.down"),
    ):
        half = [first.split(), [then], [f"{norm}_out"]]
        half = [[norm], *half] if norm_first else [*half, [norm]]
        steps += [[f"layers.0.{part}." for part in step] for step in half]
    steps += [["norm."], ["pooler."], ["head."]]
    own = [name for name in config.weight_shapes() if not name.startswith("encoder.")]
    matrices = [name for name in config.matrix_shapes() if not name.startswith("encoder.")]
    names = [[name for name in own if name.startswith(tuple(step))] for step in steps]
    assert {name for step in names for name in step} == set(own)
    model = replace(bound()[0], config=config)
    for i, step in enumerate(names):
        for name in step:
            run = replace(model, trained=frozenset({name}))
            below = [matrix for matrix in matrices if run.trained_below(matrix)]
            above = tuple(start for later in steps[i + 1 :] for start in later)
            reached = [m for m in matrices if f"{m}.".startswith(above) and not m.endswith((".cross.k", ".cross.v"))]
            assert below == reached, name


@proves("T20", "L4")
def test_an_encoder_alone_and_the_decoder_that_asks_its_states():
    """The encoder under the names of any model, the token table being both's; the states count as trained if any of it
    is, and then backward reaches the keys and values that are made of them, in every layer."""
    model = random_model(replace(GROUPED, n_encoder=1), seed=0)
    run, adapter = bound(model, targets=("q", "up"), layers=(0,), bias="lora_only")
    encoder = encoder_of(run)
    assert encoder.config == replace(GROUPED, n_layer=1, causal=False, head="none")
    assert encoder.weights.keys() == encoder.config.weight_shapes().keys()
    assert encoder.weights["layers.0.attn.q.weight"] is run.weights["encoder.layers.0.attn.q.weight"]
    assert encoder.weights["embed.tokens"] is run.weights["embed.tokens"]
    assert encoder.updates.keys() == {"layers.0.attn.q", "layers.0.mlp.up"}
    assert encoder.updates["layers.0.attn.q"].A is adapter.params["encoder.layers.0.attn.q.A"]
    assert encoder.trained == {name.removeprefix("encoder.") for name in adapter.params if name.startswith("encoder.")}
    x, at = xp.zeros((3, 2, 8)), Layout(3, 2)
    asked = [f"layers.{i}.{matrix}" for i in (0, 1) for matrix in ("attn.q", "cross.q", "cross.k", "cross.v", "mlp.up")]

    def decoder(*trained):
        alone = replace(run, trained=frozenset(trained))
        return with_source(alone, x, at, trained=bool(encoder_of(alone).trained))

    of_encoder = decoder("encoder.layers.0.attn.q.A")
    assert of_encoder.source is at
    assert of_encoder.weights[SOURCE] is x
    assert of_encoder.trained == {SOURCE}
    assert [of_encoder.trained_below(name) for name in asked] == [False, False, True, True, True] + [True] * 5
    own = decoder("layers.0.attn.q.A")
    assert own.trained == {"layers.0.attn.q.A"}
    assert [own.trained_below(name) for name in asked] == [
        False,
        True,
        False,
        False,
        True,
        True,
        True,
        False,
        False,
        True,
    ]
    assert decoder("embed.tokens").trained == {"embed.tokens", SOURCE}
    assert decoder("encoder.embed.positions").lowest == of_encoder.lowest


@proves("L4", "T14")
def test_the_lowest_of_a_classifiers_parts():
    model = random_model(replace(GROUPED, head="classify", n_labels=2, causal=False, pooler_in_head=True), seed=0)
    run, _ = bound(model, targets=("down",), layers=(1,), train_head=True)
    top = [replace(run, trained=frozenset({name})).lowest for name in ("norm.weight", "pooler.bias", "head.weight")]
    assert top == [(4, 0), (4, 1), (4, 2)]
    assert replace(run, trained=frozenset()).lowest == (4, 3)


@proves("T14")
def test_the_weight_of_a_tied_head():
    assert bound()[0].weight_name("head") == "embed.tokens"
    assert bound(train_head=True)[0].weight_name("head") == "head.weight"
    assert (
        bind(random_model(replace(GROUPED, tie_head=False), seed=0), None, rows=1).weight_name("head") == "head.weight"
    )
    assert bound()[0].weight_name("layers.0.attn.q") == "layers.0.attn.q.weight"


@proves("T12", "L2")
def test_a_dropout_mask_for_each_adapted_matrix():
    """Each matrix has its own, a fused pair shares one; none without a seed, a probability or an update."""
    run, _ = bound(targets=("q", "v", "up"), dropout=0.5)
    x, at = xp.zeros((3, 4, 8)), Layout(3, 4)
    assert run.dropout_mask("layers.0.attn.q", x, at) is None
    run = replace(run, dropout_seed=1)
    names = [f"layers.{i}.{name}" for i in (0, 1) for name in ("attn.q", "attn.v", "mlp.up")]
    masks = [asnumpy(run.dropout_mask(name, x, at)) for name in names]
    assert len({mask.tobytes() for mask in masks}) == len(names)
    assert all(set(mask.ravel()) == {0.0, 2.0} for mask in masks)
    assert same_bits(run.dropout_mask(names[0], x[1:], Layout(2, 4, first=1)), masks[0][1:])
    packed = Layout(3, 4, xp.asarray([1, 6, 7]))
    assert same_bits(run.dropout_mask(names[0], x[0, :3], packed), masks[0].reshape(12, 8)[[1, 6, 7]])
    assert not same_bits(replace(run, dropout_seed=2).dropout_mask(names[0], x, at), masks[0])
    fused = replace(bound(targets=("qkv",), dropout=0.5)[0], dropout_seed=1)
    assert len({asnumpy(fused.dropout_mask(f"layers.0.attn.{part}", x, at)).tobytes() for part in "qkv"}) == 1
    assert replace(bound()[0], dropout_seed=1).dropout_mask("layers.0.attn.q", x, at) is None


@proves("L7")
def test_rows_with_what_is_trained_whole():
    """Each row its own copy, or the base's; a bias gets a place for the tokens."""
    _, adapter = bound(bias="lora_only", train_head=True)
    run = bind(MODEL, [adapter, None], rows=2)
    for name, value in adapter.whole.items():
        base = MODEL.weights.get(name, MODEL.weights["embed.tokens"])
        stacked = run.weights[name]
        assert stacked.shape == (2, *(value.shape if value.ndim > 1 else (1, *value.shape)))
        assert np.array_equal(asnumpy(stacked[0]).reshape(value.shape), asnumpy(value))
        assert np.array_equal(asnumpy(stacked[1]).reshape(value.shape), asnumpy(base))
    assert run.trained == frozenset()


def renamed(adapter, **params):
    return ln.Adapter(adapter.config, {**adapter.params, **{name.replace("__", "."): p for name, p in params.items()}})


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        (3, TypeError, "expected an Adapter, None, or a list of them, got int"),
        ([None, 3, None], TypeError, "expected an Adapter, None"),
        ([None], ValueError, "for each of 3 rows, got a list of 1"),
        (
            {"layers__2__attn__q__A": (2, 8), "layers__2__attn__q__B": (8, 2)},
            ValueError,
            "layers.2.attn.q: the model has no",
        ),
        ({"layers__0__attn__q__A": (2, 9)}, ValueError, r"\(out, in\) = \(8, 8\), but A is \(2, 9\)"),
        ({"layers__0__attn__v__B": (8, 2)}, ValueError, r"\(out, in\) = \(4, 8\), but A is \(2, 8\), B \(8, 2\)"),
        ({"norm__bias": (9,)}, ValueError, r"norm.bias: expected shape \(8,\), got \(9,\)"),
        ({"no__weight": (9,)}, ValueError, "no.weight: expected shape of a weight"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_is_refused(adapter, error, message):
    if isinstance(adapter, dict):
        adapter = renamed(bound()[1], **{name: xp.zeros(shape) for name, shape in adapter.items()})
    with pytest.raises(error, match=message):
        bind(MODEL, adapter, rows=3)


def test_an_adapter_of_another_dtype_is_refused():
    _, adapter = bound()
    narrow = replace(adapter, params={name: p.astype("float32") for name, p in adapter.params.items()})
    with pytest.raises(TypeError, match="expected the model's dtype float64, got float32"):
        bind(MODEL, narrow, rows=1)

"""Every derivative of the package against complex steps: each primitive, and whole models of each architecture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from .. import dora, lora, ops
from ..adapter import Adapter, LoRAConfig, init_adapter, init_pissa
from ..backend import Array, asnumpy, xp
from ..batch import IGNORED
from ..distance import PositionBias, deberta_buckets, t5_buckets
from ..formats.models.presets import PRESETS
from ..gradcheck import Arrays, Scalar, central_difference, check, complex_step, relative_error
from ..loss import loss, loss_and_grads
from ..model import Config, Model, init_weights
from ..storage import quantise_nf4

FLOOR = 1e-8  # of a model's largest gradient: what is smaller is held against this
# What an architecture is there to show, with every weight trained; T13 if not said.
SHOWS = {"Qwen 3": "T17", "T5": "T18", "DeBERTa, classifier": "T19", "T5 1.1": "T20", "Marian": "T20"}


# --- Every primitive -----------------------------------------------------------------------------------------------


class Primitive(NamedTuple):
    """One operation, as `check` takes it."""

    id: str
    name: str
    inputs: Arrays
    forward: Callable[..., Array]
    backward: Callable[..., Mapping[str, Array]]


def _elementwise(f: Callable[[Array], tuple[Array, Array]]) -> dict[str, Any]:
    return {
        "forward": lambda x: f(x)[0],
        "backward": lambda dy, x: {"x": ops.activation_backward(dy, f(x)[1])},
    }


def primitives(seed: int = 0) -> Iterator[Primitive]:
    """Every primitive of `ops` and `lora`, with inputs at which it is checked."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape)

    tokens = xp.asarray(rng.integers(0, 5, (2, 4)))
    yield Primitive(
        "T1", "embedding", {"E": normal(5, 3)},
        lambda E: ops.embedding(tokens, E),
        lambda dy, E: {"E": ops.embedding_backward(dy, tokens, len(E))},
    )  # fmt: skip
    yield Primitive(
        "T2", "linear", {"x": normal(2, 3, 4), "W": normal(5, 4), "b": normal(5)},
        ops.linear,
        lambda dy, x, W, b: {
            "x": ops.linear_backward(dy, W), "W": ops.linear_weight_backward(dy, x), "b": ops.bias_backward(dy),
        },
    )  # fmt: skip
    yield Primitive(
        "T3", "layer_norm", {"x": normal(2, 3, 6), "w": normal(6), "b": normal(6)},
        lambda x, w, b: ops.layer_norm(x, w, b, 1e-5)[0],
        lambda dy, x, w, b: {
            "x": ops.layer_norm_backward(dy, ops.layer_norm(x, w, b, 1e-5)[1]),
            "w": ops.norm_weight_backward(dy, ops.layer_norm(x, w, b, 1e-5)[1]),
            "b": ops.bias_backward(dy),
        },
    )  # fmt: skip
    yield Primitive(
        "T4", "rms_norm", {"x": normal(2, 3, 6), "w": normal(6)},
        lambda x, w: ops.rms_norm(x, w, 1e-5)[0],
        lambda dy, x, w: {
            "x": ops.rms_norm_backward(dy, ops.rms_norm(x, w, 1e-5)[1]),
            "w": ops.norm_weight_backward(dy, ops.rms_norm(x, w, 1e-5)[1]),
        },
    )  # fmt: skip
    wide = {"x": 3 * normal(2, 3, 7)}
    yield Primitive("T5", "gelu", wide, **_elementwise(ops.gelu))
    yield Primitive("T6", "gelu_tanh", wide, **_elementwise(ops.gelu_tanh))
    yield Primitive("T7", "silu", wide, **_elementwise(ops.silu))
    yield Primitive("T7", "relu", wide, **_elementwise(ops.relu))
    yield Primitive("T14", "tanh", wide, **_elementwise(ops.tanh))
    yield Primitive(
        "T8", "softmax", {"x": normal(2, 3, 5)},
        lambda x: ops.softmax(x)[0],
        lambda dy, x: {"x": ops.softmax_backward(dy, ops.softmax(x)[1])},
    )  # fmt: skip
    mask = np.ones((2, 5), dtype=bool)
    mask[0, :2] = mask[1, 4:] = False  # padding on the left, and on the right
    for name, G, causal, keys in [
        ("attention, causal", 4, True, None),
        ("attention, bidirectional", 4, False, None),
        ("attention, causal, padded", 4, True, mask),
        ("attention, padded, grouped", 2, False, mask),
        ("attention, causal, grouped", 2, True, None),
    ]:
        yield _attention(
            name, {"q": normal(2, 4, 5, 3), "k": normal(2, G, 5, 3), "v": normal(2, G, 5, 3)}, causal, keys
        )
    yield from _attentions_by_place(normal)
    for name, p, factors in [("rotary", 6, (1.0,)), ("rotary, the first 4 of 6, scaled", 4, (1.0, 8.0))]:
        yield _rotary(name, ops.rotary_angles(xp.arange(3, 8), p, 10000.0, "float64", factors), normal)
    n, t = xp.arange(6) // 3, xp.arange(6) % 3
    drop = ops.dropout_mask(n, t, 6, 0.3, seed=1, stream="q", dtype="float64").reshape(2, 3, 6)
    yield Primitive(
        "T12", "dropout", {"x": normal(2, 3, 6)},
        lambda x: ops.dropout(x, drop)[0],
        lambda dy, x: {"x": ops.dropout_backward(dy, ops.dropout(x, drop)[1])},
    )  # fmt: skip
    index = xp.asarray([5, 0, 2])
    yield Primitive(
        "T14", "pick", {"x": normal(2, 3, 4)},
        lambda x: ops.pick(x, index),
        lambda dy, x: {"x": ops.pick_backward(dy, index, x.shape)},
    )  # fmt: skip
    targets = xp.asarray([1, 0, 4])
    yield Primitive(
        "T15", "cross_entropy", {"logits": normal(3, 5)},
        lambda logits: ops.cross_entropy(logits.copy(), targets)[0],
        lambda dy, logits: {"logits": ops.cross_entropy_backward(dy, ops.cross_entropy(logits.copy(), targets)[1])},
    )  # fmt: skip
    for name, m in [("lora_linear", None), ("lora_linear, dropout", drop)]:
        yield _lora_linear(name, m, normal)
    for name, m in [("dora_linear", None), ("dora_linear, dropout", drop)]:
        yield _dora_linear(name, m, normal)
    yield _on_four_bits(normal)
    yield Primitive(
        "L4", "lora_embedding", {"E": normal(5, 3), "A": normal(2, 5), "B": normal(3, 2)},
        lambda E, A, B: lora.lora_embedding(tokens, E, A, B, 0.7)[0],
        lambda dy, E, A, B: dict(
            zip("AB", lora.lora_embedding_backward(dy, lora.lora_embedding(tokens, E, A, B, 0.7)[1]), strict=True)
        ),
    )  # fmt: skip
    norm = xp.asarray(normal(3))
    yield Primitive(
        "L10", "dora_embedding", {"E": normal(5, 3), "A": normal(2, 5), "B": normal(3, 2), "m": normal(3)},
        lambda E, A, B, m: dora.dora_embedding(tokens, E, A, B, 0.7, m, norm)[0],
        lambda dy, E, A, B, m: dict(
            zip(
                "ABm", dora.dora_embedding_backward(dy, dora.dora_embedding(tokens, E, A, B, 0.7, m, norm)[1]),
                strict=True,
            )
        ),
    )  # fmt: skip


def _attention(name: str, inputs: Arrays, causal: bool, mask: Array | None) -> Primitive:
    keys = None if mask is None else xp.asarray(mask)

    def backward(dy: Array, q: Array, k: Array, v: Array) -> Arrays:
        _, saved = ops.attention(q, k, v, causal=causal, mask=keys)
        return dict(zip("qkv", ops.attention_backward(dy, saved)[:3], strict=True))

    return Primitive(
        "T10" if "grouped" in name else "T9", name, inputs,
        lambda q, k, v: ops.attention(q, k, v, causal=causal, mask=keys)[0], backward,
    )  # fmt: skip


def _attentions_by_place(normal: Callable[..., Array]) -> Iterator[Primitive]:
    """T9 with a window and another scale; what is added by distance, T18's table and T19's queries and keys."""
    inputs = {"q": normal(2, 4, 5, 3), "k": normal(2, 2, 5, 3), "v": normal(2, 2, 5, 3)}
    distance = xp.arange(-4, 5)
    t5, deberta = t5_buckets(distance, 4, 4, causal=True), deberta_buckets(distance, 4, 4)

    def bias(E: Array) -> PositionBias:
        return PositionBias(t5, xp.broadcast_to(E.T[None, :, None], (2, 4, 5, 4)))  # (J,H) -> (N,H,T,J)

    def disentangled(c2p: Array, p2c: Array) -> PositionBias:
        return PositionBias(deberta, c2p, p2c)

    name = "attention, a window of 2, another scale"
    yield _by_place("T9", name, inputs, lambda: None, causal=True, window=2, scale=0.7)
    biased = {**inputs, "E": normal(4, 4)}
    yield _by_place("T18", "attention, a bias by distance", biased, bias, causal=True, scale=1.0)
    added = {**inputs, "c2p": normal(2, 4, 5, 8), "p2c": normal(2, 4, 5, 8)}
    yield _by_place("T19", "attention, disentangled", added, disentangled, causal=False)


def _by_place(
    id: str, name: str, inputs: Arrays, bias: Callable[..., PositionBias | None], **options: Any
) -> Primitive:
    def forward(q: Array, k: Array, v: Array, **added: Array) -> tuple[Array, ops.AttentionSaved]:
        return ops.attention(q, k, v, bias=bias(**added), **options)

    def backward(dy: Array, **inputs: Array) -> Arrays:
        _, saved = forward(**inputs)
        dq, dk, dv, dbias = ops.attention_backward(dy, saved)
        grads = {"q": dq, "k": dk, "v": dv}
        if dbias is None:
            return grads
        if dbias.p2c is None:
            return {**grads, "E": dbias.c2p.sum(axis=(0, 2)).T}
        return {**grads, "c2p": dbias.c2p, "p2c": dbias.p2c}

    return Primitive(id, name, inputs, lambda **inputs: forward(**inputs)[0], backward)


def _rotary(name: str, angles: tuple[Array, Array], normal: Callable[..., Array]) -> Primitive:
    return Primitive(
        "T11", name, {"x": normal(2, 2, 5, 6)},
        lambda x: ops.rotary(x, *angles)[0],
        lambda dy, x: {"x": ops.rotary_backward(dy, ops.rotary(x, *angles)[1])},
    )  # fmt: skip


def _lora_linear(name: str, mask: Array | None, normal: Callable[..., Array]) -> Primitive:
    inputs = {"x": normal(2, 3, 6), "W0": normal(5, 6), "b": normal(5), "A": normal(2, 6), "B": normal(5, 2)}

    def backward(dh: Array, x: Array, W0: Array, b: Array, A: Array, B: Array) -> Arrays:
        _, saved = lora.lora_linear(x, W0, b, A, B, 0.7, dropout_mask=mask)
        dx, dA, dB = lora.lora_linear_backward(dh, saved)
        assert dx is not None
        return {"x": dx, "A": dA, "B": dB}

    return Primitive(
        "L4", name, inputs,
        lambda x, W0, b, A, B: lora.lora_linear(x, W0, b, A, B, 0.7, dropout_mask=mask)[0], backward,
    )  # fmt: skip


def _on_four_bits(normal: Callable[..., Array]) -> Primitive:
    """L11: the base is what is dequantised, 60 numbers of one block; it has no gradient."""
    W0 = quantise_nf4(xp.asarray(normal(5, 12).astype("float32")))

    def forward(**arrays: Array) -> tuple[Array, lora.LinearSaved]:
        return lora.lora_linear(W0=W0, b=None, s=0.7, **arrays)

    def backward(dh: Array, **arrays: Array) -> Arrays:
        dx, dA, dB = lora.lora_linear_backward(dh, forward(**arrays)[1])
        assert dx is not None
        return {"x": dx, "A": dA, "B": dB}

    inputs = {"x": normal(2, 3, 12), "A": normal(2, 12), "B": normal(5, 2)}
    return Primitive("L11", "lora_linear, NF4", inputs, lambda **arrays: forward(**arrays)[0], backward)


def _dora_linear(name: str, mask: Array | None, normal: Callable[..., Array]) -> Primitive:
    """With its norm given: in backward that is a constant."""
    inputs = {"x": normal(2, 3, 6), "W0": normal(5, 6), "b": normal(5), "A": normal(2, 6), "B": normal(5, 2)}
    norm = xp.asarray(normal(5))

    def forward(**arrays: Array) -> tuple[Array, dora.DoraSaved]:
        return dora.dora_linear(**arrays, s=0.7, norm=norm, dropout_mask=mask)

    def backward(dh: Array, **arrays: Array) -> Arrays:
        dx, dA, dB, dm = dora.dora_linear_backward(dh, forward(**arrays)[1])
        assert dx is not None
        return {"x": dx, "A": dA, "B": dB, "m": dm}

    return Primitive("L10", name, {**inputs, "m": normal(5)}, lambda **arrays: forward(**arrays)[0], backward)


# --- Whole models --------------------------------------------------------------------------------------------------


def architectures() -> dict[str, Config]:
    """A small model of each architecture and head."""

    def small(preset: str, **fields: Any) -> Config:
        size = {"vocab_size": 11, "n_positions": 8, "n_layer": 2, "n_head": 2, "d_model": 8, "d_ff": 12}
        return replace(PRESETS[preset], **size | fields)

    llama = {"n_head": 4, "n_kv_head": 2}
    near = {"score_buckets": 4, "score_distance": 4}
    gemma = {
        "norm": "rms_1p", "norm_outputs": True, "qk_norm": True, "embed_scale": 8**0.5, "activation": "gelu_tanh_gated",
        "window": 2, "full_layers": (1,), "window_theta": 100.0, "rope_factors": (8.0,), "score_scale": 0.5,
    }  # fmt: skip
    t5 = {"n_encoder": 1, "positions": "none", "norm": "rms", "bias": False, "score_scale": 1.0, **near}
    return {
        "GPT-2, language model": small("gpt2"),
        "GPT-2, classifier": small("gpt2", head="classify", n_labels=3),
        "GPT-2, with a prefix": small("gpt2", prefix=2),
        "BERT, classifier": small("bert-base", head="classify", n_labels=3),
        "BERT, tagger": small("bert-base", head="tag", n_labels=3),
        "RoBERTa, classifier": small("roberta-base", head="classify", n_labels=3),
        "Llama, tied": small("smollm2-135m", **llama),
        "Llama, untied": small("smollm2-135m", tie_head=False, **llama),
        "Llama 3.1": small("smollm2-135m", **llama, d_head=4, rope_factors=(1.0, 8.0)),
        "Phi-3": small("smollm2-135m", **llama, d_head=4, rope_width=2),
        "Qwen 2": small("smollm2-135m", **llama, qkv_bias=True),
        "Qwen 3": small("smollm2-135m", **llama, d_head=6, qk_norm=True),
        "Gemma 3": small("smollm2-135m", **llama, **gemma),
        "DistilBERT, classifier": small("bert-base", n_types=0, head="classify", n_labels=3, pooler="relu"),
        "DeBERTa, classifier": small("deberta-v2-xxlarge", head="classify", n_labels=3, **near),
        "T5": small("gpt2", **t5, activation="relu", head_scale=8**-0.5),
        "T5 1.1": small("gpt2", **t5, activation="gelu_tanh_gated", tie_head=False),
        "Marian": small("gpt2", n_encoder=1, norm_first=False, activation="silu", embed_scale=8**0.5),
    }


def example_batch(config: Config, *, seed: int = 0, N: int = 2, T: int = 5) -> dict[str, Any]:
    """A batch with padding on both sides and a target left out, as keyword arguments of `loss`; an encoder's source."""
    rng = np.random.default_rng(seed)
    mask = np.ones((N, T), dtype=bool)
    mask[0, 0] = mask[-1, -1] = False
    places = (N,) if config.head == "classify" else (N, T)
    targets = rng.integers(0, config.head_size, places)
    if config.head != "classify":
        targets[~mask] = IGNORED
        targets[0, 1] = IGNORED
    batch = {"tokens": rng.integers(0, config.vocab_size, (N, T)), "targets": targets, "mask": mask}
    if config.n_types:
        batch["token_types"] = rng.integers(0, config.n_types, (N, T))
    if config.n_encoder:
        batch |= {"source": rng.integers(0, config.vocab_size, (N, T)), "source_mask": mask[::-1]}
    return batch


def check_model(
    config: Config,
    lora_config: LoRAConfig | None,
    *,
    seed: int = 0,
    gradient: Callable[[Scalar, Array], Array] = complex_step,
    pissa: bool = False,
) -> float:
    """The worst error of the gradient of a whole model of float64 weights: by an adapter, or (None) by every weight.

    The adapter's B is random, not zero, so that every gradient has something to say. pissa: by PiSSA's adapter, of its
    residual. Relative to the largest element
    of each gradient, or to FLOOR of the largest of all.
    """
    model = Model(config, init_weights(config, seed=seed, dtype="float64"))
    adapter = None if lora_config is None else perturbed(init_adapter(model, lora_config, seed=seed), seed=seed)
    if lora_config is not None and pissa:
        model, adapter = init_pissa(model, lora_config)
    batch = example_batch(config, seed=seed)
    _, grads = loss_and_grads(model, adapter, **batch, trainable="all" if adapter is None else "adapter")
    complex_model = Model(config, {name: w.astype(complex) for name, w in model.weights.items()})
    floor = FLOOR * max(float(xp.abs(g).max()) for g in grads.values())

    def loss_with(name: str, value: Array) -> Any:
        base = model if value.dtype == model.dtype else complex_model
        if adapter is None:
            return loss(replace(base, weights={**base.weights, name: value}), **batch)
        params = {other: p.astype(value.dtype) for other, p in adapter.params.items()}
        return loss(base, adapter=replace(adapter, params={**params, name: value}), **batch)

    trained = model.weights if adapter is None else adapter.params
    return max(
        relative_error(grads[name], gradient(lambda x, name=name: loss_with(name, x), value), floor=floor)  # type: ignore[misc]
        for name, value in trained.items()
    )


def perturbed(adapter: Adapter, *, seed: int = 0) -> Adapter:
    """The adapter as it might be after training: every B random, at the scale of init_weights."""
    rng = np.random.default_rng(seed)
    params = {
        name: xp.asarray(rng.normal(0.0, 0.02, p.shape).astype(p.dtype)) if name.endswith(".B") else p
        for name, p in adapter.params.items()
    }
    return replace(adapter, params=params)


class Row(NamedTuple):
    """A line of the table."""

    id: str
    what: str
    method: str
    error: float
    bound: float


def table(*, seed: int = 0) -> Iterator[Row]:
    """Every primitive, then every architecture, LoRA and full: its worst error, and the bound that it must keep."""
    for p in primitives(seed):
        errors = check(p.forward, p.backward, p.inputs, seed=seed)
        yield Row(p.id, p.name, "complex step", max(errors.values()), 1e-12)
    yield Row("T5", "erf, its derivative", "central difference", _erf_derivative_error(), 1e-8)
    yield Row("T5", "erf, against math.erf", "libm", _erf_error(), 1e-15)
    for name, config in architectures().items():
        gate = ("gate",) if config.gated else ()
        everything = LoRAConfig(r=2, targets=("q", "k", "v", "o", "up", "down", "embed", "head", *gate))
        yield Row("L4", f"{name}: LoRA on q, v", "complex step", check_model(config, LoRAConfig(r=2), seed=seed), 1e-11)
        yield Row("L4", f"{name}: LoRA on all", "complex step", check_model(config, everything, seed=seed), 1e-11)
        with_dora = replace(everything, dora=True)
        yield Row("L10", f"{name}: DoRA on all", "complex step", check_model(config, with_dora, seed=seed), 1e-11)
        yield Row(
            SHOWS.get(name, "T13"), f"{name}: every weight", "complex step", check_model(config, None, seed=seed), 1e-11
        )

    name, config = next(iter(architectures().items()))
    error = check_model(config, LoRAConfig(r=2), seed=seed, pissa=True)
    yield Row("L12", f"{name}: LoRA from PiSSA's start", "complex step", error, 1e-11)


def _erf_derivative_error() -> float:
    """erf's complex continuation uses its derivative: that alone is held against central differences."""
    x = np.linspace(-4, 4, 81)
    by_step = complex_step(lambda z: ops.erf(z).sum(), x)
    return relative_error(by_step, central_difference(lambda z: ops.erf(z).sum(), x))


def _erf_error() -> float:
    x = np.concatenate([np.linspace(-6.5, 6.5, 20001), np.logspace(-300, 0, 301)])
    return float(np.abs(asnumpy(ops.erf(xp.asarray(x))) - [math.erf(v) for v in x]).max())

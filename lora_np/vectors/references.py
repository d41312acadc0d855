"""What the package itself gives: each operation's own forward and backward.

Every function takes a case's inputs by name, on the device, its floats of one dtype, and its scalars; and gives its
outputs by name, and gradients by the names of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeAlias

import numpy as np

from .. import analysis, dora, lora, ops, optim, storage
from ..adapter import Adapter, LoRAConfig, count_parameters, init_pissa
from ..adapter import combine as combined
from ..adapter import merge as merged
from ..adapter import unmerge as unmerged
from ..backend import Array, asnumpy, xp
from ..batch import IGNORED
from ..binding import AnyAdapter, bind, frozen
from ..decode import choose, new_cache, next_logits
from ..decode import generate as generated
from ..distance import PositionBias, deberta_buckets, t5_buckets
from ..formats.models.presets import PRESETS
from ..layout import Layout
from ..lora import Update
from ..loss import forward, loss_and_grads
from ..model import Config, Model, init_weights
from ..parallel import sharded_loss_and_grads
from ..transformer import ACTIVATIONS
from .precision import rounded

Arrays: TypeAlias = Mapping[str, Array]
Scalars: TypeAlias = Mapping[str, Any]
Answers: TypeAlias = tuple[Mapping[str, Any], Mapping[str, Any]]
Reference: TypeAlias = Callable[[Arrays, Scalars], Answers]


def _mask(t: Arrays, c: Scalars, dtype: Any) -> Array | None:
    return t["keep"].astype(dtype) * (1 / (1 - c["p"])) if "keep" in t else None


def _head_config(c: Scalars) -> LoRAConfig:
    return LoRAConfig(r=c["r"], alpha=c["alpha"], rslora=c["rslora"], targets=("head",))


def _scale(c: Scalars) -> float:
    return _head_config(c).scale("head")


def _update(t: Arrays, c: Scalars) -> Update:
    return Update(t["A"], t["B"], _scale(c))


def lora_update(t: Arrays, c: Scalars) -> Answers:
    zero = xp.zeros((t["B"].shape[0], t["A"].shape[1]), dtype=t["A"].dtype)
    return {"s": _scale(c), "dW": lora.merge_matrix(zero, _update(t, c))}, {}


def lora_linear(t: Arrays, c: Scalars) -> Answers:
    mask = _mask(t, c, t["x"].dtype)
    h, saved = lora.lora_linear(t["x"], t["W0"], t.get("b"), t["A"], t["B"], _scale(c), dropout_mask=mask)
    if "dh" not in t:
        return {"h": h}, {}
    dx, dA, dB = lora.lora_linear_backward(t["dh"], saved)
    return {"h": h}, {"x": dx, "A": dA, "B": dB}


def lora_embedding(t: Arrays, c: Scalars) -> Answers:
    h, saved = lora.lora_embedding(t["tokens"], t["E"], t["A"], t["B"], _scale(c))
    return {"h": h}, dict(zip("AB", lora.lora_embedding_backward(t["dh"], saved), strict=True))


def lora_start(t: Arrays, c: Scalars) -> Answers:
    outputs, grads = lora_linear(t, c)
    return {**outputs, "difference": outputs["h"] - ops.linear(t["x"], t["W0"], t.get("b"))}, grads


def merge(t: Arrays, c: Scalars) -> Answers:
    dtype, wide = c["dtype"], t["W0"].dtype
    if dtype == "bfloat16":  # NumPy has none: summed in float64, rounded once
        total = lora.merge_matrix(t["W0"].astype(xp.float64), _update(t, c))
        W = xp.asarray(rounded(asnumpy(total), dtype).astype(wide))
    else:
        W = lora.merge_matrix(t["W0"].astype(dtype), _update(t, c)).astype(wide)
    return {"W": W, "h": ops.linear(t["x"], W, t.get("b"))}, {}


def dora_linear(t: Arrays, c: Scalars) -> Answers:
    mask = _mask(t, c, t["x"].dtype)
    h, saved = dora.dora_linear(t["x"], t["W0"], t.get("b"), t["A"], t["B"], _scale(c), t["m"], dropout_mask=mask)
    return {"h": h}, dict(zip(("x", "A", "B", "m"), dora.dora_linear_backward(t["dh"], saved), strict=True))


def dora_embedding(t: Arrays, c: Scalars) -> Answers:
    norm = dora.weight_norm(t["E"], t["B"].T, t["A"].T, _scale(c), axis=0)
    h, saved = dora.dora_embedding(t["tokens"], t["E"], t["A"], t["B"], _scale(c), t["m"], norm)
    return {"h": h}, dict(zip("ABm", dora.dora_embedding_backward(t["dh"], saved), strict=True))


def dora_merge(t: Arrays, c: Scalars) -> Answers:
    return {"W": dora.dora_merge_matrix(t["W0"], _update(t, c)._replace(m=t["m"]))}, {}


def pissa(t: Arrays, c: Scalars) -> Answers:
    model = _head_model(t["W0"])
    residual, adapter = init_pissa(model, _head_config(c))
    A, B = adapter.params["head.A"], adapter.params["head.B"]
    return {"update": _scale(c) * B @ A, "residual": residual.weights["head.weight"]}, {}


def quantise_nf4(t: Arrays, c: Scalars) -> Answers:
    q = storage.quantise_nf4(t["W"].astype(xp.float32), block=c["block"], double="map" in t)
    given = {"codes": q.codes, "absmax": q.absmax}
    return (given if q.outer is None else {**given, "outer": q.outer, "offset": q.offset}), {}


def _nf4(t: Arrays, c: Scalars) -> storage.NF4:
    codes, outer, offset = t["codes"].astype(xp.uint8), t.get("outer"), t.get("offset")
    if outer is None or offset is None:
        return storage.NF4((c["out"], c["in"]), c["block"], codes, t["absmax"].astype(xp.float32))
    absmax, outer, offset = t["absmax"].astype(xp.uint8), outer.astype(xp.float32), offset.astype(xp.float32)
    return storage.NF4((c["out"], c["in"]), c["block"], codes, absmax, outer, offset)


def dequantise_nf4(t: Arrays, c: Scalars) -> Answers:
    return {"W": storage.dequantise_nf4(_nf4(t, c))}, {}


def nf4_linear(t: Arrays, c: Scalars) -> Answers:
    h, saved = lora.lora_linear(t["x"], _nf4(t, c), t["b"], t["A"], t["B"], _scale(c))
    return {"h": h}, dict(zip(("x", "A", "B"), lora.lora_linear_backward(t["dh"], saved), strict=True))


def _head_model(W0: Array) -> Model:
    """A model whose head is a matrix (out, in): the way to what the package does with whole models."""
    (n_out, n_in), dtype = W0.shape, W0.dtype
    config = Config(1, 1, 1, 1, n_in, 1, head="tag", n_labels=n_out)
    return Model(config, {**init_weights(config, seed=0, dtype=str(dtype)), "head.weight": W0})


def _head_adapter(A: Array, B: Array, c: Scalars) -> Adapter:
    """A pair as an adapter of a head: the way to what the package does with whole adapters."""
    return Adapter(_head_config(c), {"head.A": A, "head.B": B})


def unmerge(t: Arrays, c: Scalars) -> Answers:
    model, adapter = _head_model(t["W0"]), _head_adapter(t["A"], t["B"], c)
    for _ in range(c["times"]):
        model = merged(model, adapter)
    for _ in range(c["times"]):
        model = unmerged(model, adapter)
    return {"W0": model.weights["head.weight"]}, {}


def per_row(t: Arrays, c: Scalars) -> Answers:
    updates = [Update(t[f"A{i}"], t[f"B{i}"], _scale(one)) for i, one in enumerate(c["adapters"])]
    stacked = lora.stack_updates([None if i < 0 else updates[i] for i in asnumpy(t["rows"]).tolist()])
    return {"h": lora.lora_linear(t["x"], t["W0"], t.get("b"), *stacked[:3])[0]}, {}


def segments(t: Arrays, c: Scalars) -> Answers:
    updates = [
        Update(t["A"][i, : one["r"]], t["B"][i, :, : one["r"]], _scale(one)) for i, one in enumerate(c["adapters"])
    ]
    stacked = lora.stack_updates([None if i < 0 else updates[i] for i in asnumpy(t["index"]).tolist()])
    low = ops.linear(ops.linear(t["x"][:, None], stacked.A), stacked.B)[:, 0]  # (M,1,in) -> (M,out)
    y = t["y"].copy()
    y[:, c["start"] : c["start"] + low.shape[1]] += low
    return {"y": y}, {}


def count(t: Arrays, c: Scalars) -> Answers:
    config = LoRAConfig(r=c["r"], targets=tuple(c["targets"]))
    return {"parameters": np.asarray(count_parameters(PRESETS[c["preset"]], config))}, {}


def combine(t: Arrays, c: Scalars) -> Answers:
    adapters = [_head_adapter(t[f"A{i}"], t[f"B{i}"], one) for i, one in enumerate(c["adapters"])]
    joined = combined(adapters, [one["w"] for one in c["adapters"]], rank=c["rank"])
    return {"dW": (joined.params["head.B"] @ joined.params["head.A"]) * joined.config.scale("head")}, {}


def embedding(t: Arrays, c: Scalars) -> Answers:
    parts = [name for name in ("tokens", "positions", "types") if name in t]
    scale = c.get("scale", 1.0)
    x = scale * ops.embedding(t["tokens"], t["tokens_table"])
    for name in parts[1:]:
        x = x + ops.embedding(t[name], t[f"{name}_table"])
    index = {name: xp.broadcast_to(t[name], t["tokens"].shape) for name in parts}
    dx = {**dict.fromkeys(parts, t["dx"]), "tokens": scale * t["dx"]}
    grads = {f"{n}_table": ops.embedding_backward(dx[n], index[n], len(t[f"{n}_table"])) for n in parts}
    return {"x": x}, grads


def linear(t: Arrays, c: Scalars) -> Answers:
    grads = {"x": ops.linear_backward(t["dy"], t["W"]), "W": ops.linear_weight_backward(t["dy"], t["x"])}
    return {"y": ops.linear(t["x"], t["W"], t.get("b"))}, {
        **grads,
        **({"b": ops.bias_backward(t["dy"])} if "b" in t else {}),
    }


def layer_norm(t: Arrays, c: Scalars) -> Answers:
    y, saved = ops.layer_norm(t["x"], t["w"], t["b"], c["eps"])
    dx, dw = ops.layer_norm_backward(t["dy"], saved), ops.norm_weight_backward(t["dy"], saved)
    return {"y": y}, {"x": dx, "w": dw, "b": ops.bias_backward(t["dy"])}


def rms_norm(t: Arrays, c: Scalars) -> Answers:
    y, saved = ops.rms_norm(t["x"], 1 + t["w"] if c.get("one_plus") else t["w"], c["eps"])
    return {"y": y}, {"x": ops.rms_norm_backward(t["dy"], saved), "w": ops.norm_weight_backward(t["dy"], saved)}


def _elementwise(f: Callable[[Array], tuple[Array, Array]]) -> Reference:
    def reference(t: Arrays, c: Scalars) -> Answers:
        y, dydx = f(t["x"])
        return {"y": y}, {"x": ops.activation_backward(t["dy"], dydx)}

    return reference


gelu, gelu_tanh = _elementwise(ops.gelu), _elementwise(ops.gelu_tanh)
silu, relu = _elementwise(ops.silu), _elementwise(ops.relu)


def gated_mlp(t: Arrays, c: Scalars) -> Answers:
    gate, up = ops.linear(t["x"], t["W_gate"]), ops.linear(t["x"], t["W_up"])
    act, slope = ACTIVATIONS[c.get("activation", "silu")](gate)
    dh = ops.linear_backward(t["dy"], t["W_down"])
    d_gate, d_up = ops.activation_backward(dh * up, slope), dh * act
    return {"y": ops.linear(act * up, t["W_down"])}, {
        "x": ops.linear_backward(d_gate, t["W_gate"]) + ops.linear_backward(d_up, t["W_up"]),
        "W_gate": ops.linear_weight_backward(d_gate, t["x"]),
        "W_up": ops.linear_weight_backward(d_up, t["x"]),
        "W_down": ops.linear_weight_backward(t["dy"], act * up),
    }


def softmax(t: Arrays, c: Scalars) -> Answers:
    p, saved = ops.softmax(xp.where(t["mask"], t["x"], -xp.inf).astype(t["x"].dtype))
    return {"p": p}, {"x": ops.softmax_backward(t["dp"], saved)}


def attention(t: Arrays, c: Scalars) -> Answers:
    by_place = {name: c.get(name) for name in ("window", "scale")}
    y, saved = ops.attention(t["q"], t["k"], t["v"], causal=c["causal"], mask=t.get("mask"), **by_place)
    return {"y": y}, dict(zip("qkv", ops.attention_backward(t["dy"], saved)[:3], strict=True))


def _angles(t: Arrays, c: Scalars) -> tuple[Array, Array]:
    positions = t["positions"] if t["positions"].ndim == 1 else t["positions"][:, None]
    p, factors = c.get("width", t["x"].shape[-1]), tuple(c.get("factors", (1.0,)))
    return ops.rotary_angles(positions, p, c["theta"], t["x"].dtype, factors)


def rotary(t: Arrays, c: Scalars) -> Answers:
    y, saved = ops.rotary(t["x"], *_angles(t, c))
    return {"y": y}, {"x": ops.rotary_backward(t["dy"], saved)}


def head_norm(t: Arrays, c: Scalars) -> Answers:
    normed, saved = ops.rms_norm(t["x"], t["w"], c["eps"])
    y, turn = ops.rotary(normed, *_angles(t, c))
    d = ops.rotary_backward(t["dy"], turn)
    return {"y": y}, {"x": ops.rms_norm_backward(d, saved), "w": ops.norm_weight_backward(d, saved)}


def _tile(T: int) -> tuple[slice, slice, slice, slice]:
    """All scores of one sequence, or of two, as a tile."""
    return slice(0, 2), slice(0, None), slice(0, T), slice(0, T)


def score_bias(t: Arrays, c: Scalars) -> Answers:
    T, table = c["T"], t["table"]
    buckets = t5_buckets(xp.arange(1 - T, T), len(table), c["last"], causal=c["causal"])
    bias = PositionBias(buckets, xp.broadcast_to(table.T[None, :, None], (1, table.shape[1], T, len(table))))
    grads = bias.zeros()
    grads.tile(*_tile(T)).add(t["db"][None])
    return {"b": bias.tile(*_tile(T)).scores()[0]}, {"table": grads.c2p.sum(axis=(0, 2)).T}


def disentangled(t: Arrays, c: Scalars) -> Answers:
    """As the transformer composes it: position_bias and its backward, of projections that are given."""
    (T, K), B = t["q"].shape[2:], t["k_far"].shape[1]
    s = 1 / math.sqrt(3 * K)
    c2p, p2c = s * t["q"] @ t["k_far"].swapaxes(-1, -2), s * t["k"] @ t["q_far"].swapaxes(-1, -2)
    bias = PositionBias(deberta_buckets(xp.arange(1 - T, T), B // 2, c["last"]), c2p, p2c)
    z = s * t["q"] @ t["k"].swapaxes(-1, -2) + bias.tile(*_tile(T)).scores()
    grads = bias.zeros()
    grads.tile(*_tile(T)).add(t["dz"])
    assert grads.p2c is not None
    d_query, d_key = s * grads.c2p, s * grads.p2c
    dz = s * t["dz"]
    return {"z": z}, {
        "q": dz @ t["k"] + d_query @ t["k_far"],
        "k": dz.swapaxes(-1, -2) @ t["q"] + d_key @ t["q_far"],
        "k_far": (d_query.swapaxes(-1, -2) @ t["q"]).sum(axis=0),
        "q_far": (d_key.swapaxes(-1, -2) @ t["k"]).sum(axis=0),
    }


def cross_attention(t: Arrays, c: Scalars) -> Answers:
    at, source = (Layout(*t[one].shape[:2]) for one in ("x", "X"))
    K = len(t["W_q"]) // c["n_head"]
    q = at.heads(ops.linear(t["x"], t["W_q"]), K)
    k, v = (source.heads(ops.linear(t["X"], t[f"W_{one}"]), K) for one in "kv")
    y, saved = ops.attention(q, k, v, causal=False, mask=t.get("source_mask"))
    rows = at.rows(y)
    dy = at.heads(ops.linear_backward(t["dy"], t["W_o"]), K)
    dq, dk, dv, _ = ops.attention_backward(dy, saved)
    dq, dk, dv = at.rows(dq), source.rows(dk), source.rows(dv)
    return {"y": ops.linear(rows, t["W_o"])}, {
        "x": ops.linear_backward(dq, t["W_q"]),
        "X": ops.linear_backward(dk, t["W_k"]) + ops.linear_backward(dv, t["W_v"]),
        "W_q": ops.linear_weight_backward(dq, t["x"]),
        "W_k": ops.linear_weight_backward(dk, t["X"]),
        "W_v": ops.linear_weight_backward(dv, t["X"]),
        "W_o": ops.linear_weight_backward(t["dy"], rows),
    }


def dropout(t: Arrays, c: Scalars) -> Answers:
    mask = _mask(t, c, t["x"].dtype)
    assert mask is not None
    y, saved = ops.dropout(t["x"], mask)
    return {"y": y}, {"x": ops.dropout_backward(t["dy"], saved)}


def cross_entropy(t: Arrays, c: Scalars) -> Answers:
    counted = xp.asarray(np.flatnonzero(asnumpy(t["targets"]) != IGNORED))
    losses, saved = ops.cross_entropy(ops.pick(t["logits"], counted), t["targets"][counted])
    d_rows = ops.cross_entropy_backward(xp.full_like(losses, 1 / len(losses)), saved)
    return {"loss": losses.sum() / len(losses)}, {"logits": ops.pick_backward(d_rows, counted, t["logits"].shape)}


def _config(c: Scalars) -> Config:
    return Config(**{field.name: c[field.name] for field in fields(Config) if field.name in c})


def _model_and_adapter(t: Arrays, c: Scalars) -> tuple[Model, Adapter | None]:
    config = _config(c)
    base = Model(config, {name: t[name] for name in config.weight_shapes()})
    if "r" not in c:
        return base, None
    trained = {name: t[name] for name in t if name.endswith((".A", ".B")) or name in c["trained_whole"]}
    return base, Adapter(_lora_config(c), trained)


def _lora_config(c: Scalars) -> LoRAConfig:
    return LoRAConfig(
        r=c["r"], alpha=c["alpha"], rslora=c["rslora"], targets=tuple(c["adapted"]),
        rank_pattern=c.get("rank_pattern", {}),
    )  # fmt: skip


def model(t: Arrays, c: Scalars) -> Answers:
    base, adapter = _model_and_adapter(t, c)
    batch: dict[str, Any] = {"mask": t.get("mask"), "token_types": t.get("token_types")}
    trainable: Any = "all" if adapter is None else "adapter"
    if "shards" in c:
        loss, grads = sharded_loss_and_grads(
            base, adapter, t["tokens"], t["targets"], **batch, trainable=trainable, shards=c["shards"]
        )
    else:
        loss, grads = loss_and_grads(base, adapter, t["tokens"], t["targets"], **batch, trainable=trainable)
    outputs: dict[str, Any] = {"loss": loss}
    if "mask" not in t or base.config.head == "classify":
        outputs["logits"] = forward(base, t["tokens"], adapter, **batch)
    return outputs, grads


def merge_model(t: Arrays, c: Scalars) -> Answers:
    dtype = c["dtype"]
    wide = {name: a.astype(xp.float64) for name, a in t.items()}  # NumPy has no bfloat16: rounded at the end
    base, adapter = _model_and_adapter(wide, c)
    assert adapter is not None
    weights = merged(base, adapter).weights
    return {name: rounded(asnumpy(w), dtype) for name, w in weights.items()}, {}


def generate(t: Arrays, c: Scalars) -> Answers:
    base, single = _model_and_adapter(t, c)
    adapter: AnyAdapter = single
    if "rows" in t:
        adapters = [_numbered(t, i, one) for i, one in enumerate(c["adapters"])]
        adapter = [None if i < 0 else adapters[i] for i in asnumpy(t["rows"]).tolist()]
    tokens = generated(base, t["tokens"], adapter, n=c["n"], mask=t.get("mask"))
    if not c.get("logits"):
        return {"tokens": tokens}, {}
    return {"tokens": tokens, "logits": _cached_logits(base, adapter, tokens, c["n"], t.get("mask"))}, {}


def _numbered(t: Arrays, i: int, c: Scalars) -> Adapter:
    """The adapter `i` of several."""
    stem = f"adapters.{i}."
    return Adapter(_lora_config(c), {name.removeprefix(stem): a for name, a in t.items() if name.startswith(stem)})


def _cached_logits(base: Model, adapter: AnyAdapter, tokens: Array, n: int, mask: Any) -> Array:
    """The logits that chose each of the last n tokens, as generate has them from its cache. -> (N,n,V)."""
    N, S = tokens.shape
    adapted, cache = frozen(bind(base, adapter, rows=N)), new_cache(base.config, N=N, longest=S, dtype=base.dtype)
    kept = None if mask is None else np.concatenate([asnumpy(mask), np.ones((N, n), dtype=bool)], axis=1)
    start, chosen = 0, []
    for end in range(S - n, S):
        chosen.append(next_logits(adapted, cache, tokens[:, start:end], None if kept is None else kept[:, :end]))
        start = end
    return xp.stack(chosen, axis=1)


class _Given:
    """A source of random numbers that are given."""

    def __init__(self, u: Array) -> None:
        self.u = u

    def random(self, shape: tuple[int, ...]) -> Array:
        return self.u.reshape(shape)


def sample(t: Arrays, c: Scalars) -> Answers:
    source: Any = _Given(asnumpy(t["u"]))
    how = {name: c[name] for name in ("temperature", "top_k", "top_p")}
    return {"tokens": choose(asnumpy(t["logits"]), source, **how)}, {}


def adamw(t: Arrays, c: Scalars) -> Answers:
    state = optim.AdamWState(c["step"] - 1, {"p": t["m"]}, {"p": t["v"]})
    params, state = optim.adamw(
        {"p": t["p"]}, {"p": t["g"]}, state, lr=c["lr"], betas=(c["beta1"], c["beta2"]), eps=c["eps"],
        weight_decay=c["weight_decay"],
    )  # fmt: skip
    return {"p": params["p"], "m": state.m["p"], "v": state.v["p"]}, {}


def warmup_cosine(t: Arrays, c: Scalars) -> Answers:
    steps = asnumpy(t["steps"]).tolist()
    return {"factor": np.array([optim.warmup_cosine(n, warmup=c["warmup"], total=c["total"]) for n in steps])}, {}


def clip(t: Arrays, c: Scalars) -> Answers:
    clipped, norm = optim.clip(t, c["max_norm"])
    return {"norm": norm, **{f"clipped_{name}": g for name, g in clipped.items()}}, {}


def subspace_similarity(t: Arrays, c: Scalars) -> Answers:
    return {"phi": analysis.subspace_similarity(t["A"], t["other"])}, {}


def amplification(t: Arrays, c: Scalars) -> Answers:
    found = analysis.amplification(t["W0"], t["A"], t["B"], _scale(c))
    return {name: getattr(found, name) for name in ("update", "in_update", "in_weight", "factor")}, {}

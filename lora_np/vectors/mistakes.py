"""Known mistakes, as wrong definitions: what each would give for a case, so that a result that is wrong can be named.

A mistake takes an operation's definition and gives the wrong one; a WrongCase says that it cannot show in this case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array
from .answers import error_ratio, errors
from .cases import Case
from .definitions import (
    IGNORED,
    Definition,
    Inputs,
    Outputs,
    Scalars,
    affine,
    asked,
    attended,
    distances,
    dora_of,
    dropped,
    far_scores,
    gelu_of,
    gelu_tanh_of,
    lesser,
    norm_weight,
    normalised,
    row_losses,
    rows_of,
    scale,
    turned,
    with_norm,
)
from .operations import OPERATIONS
from .tracked import Tracked, cos, sin, sqrt, tanh, tracked


class WrongCase(Exception):
    """The mistake makes no difference here."""


class Mistake(NamedTuple):
    """text: what it is. operations: where it can be made. wrong: from the definition, what it gives instead."""

    text: str
    operations: tuple[str, ...]
    wrong: Callable[[Definition], Definition]

    def gives(self, case: Case) -> dict[str, tuple[Array, Array]] | None:
        """What it gives for a case, each array with its error; None where it cannot be made, or shows nothing."""
        if case.operation not in self.operations:
            return None
        try:
            return errors(case, self.wrong(OPERATIONS[case.operation].definition))
        except WrongCase:
            return None

    def explains(self, case: Case, got: Mapping[str, Array]) -> bool:
        """Whether all that was got for a case is what this mistake gives, within its bounds."""
        wrong = self.gives(case)
        return wrong is not None and all(
            a.shape == wrong[n][0].shape and error_ratio(a, *wrong[n], case.precision) <= 1 for n, a in got.items()
        )


def _altered(f: Callable[[Inputs, Scalars], tuple[Inputs, Scalars]]) -> Callable[[Definition], Definition]:
    """The definition on other inputs or scalars than the case's own."""
    return lambda definition: lambda t, c: definition(*f(t, c))


def _instead(f: Definition) -> Callable[[Definition], Definition]:
    """Another formula in the place of the definition."""
    return lambda definition: f


def _scaled(f: Callable[[Scalars], float]) -> Callable[[Definition], Definition]:
    """Another scale s, in every place where there is one."""

    def alter(c: Scalars) -> Scalars:
        if "adapters" in c:
            return {**c, "adapters": [alter(one) for one in c["adapters"]]}
        _need("r" in c)
        return {**c, "alpha": f(c) * c["r"], "rslora": False}

    return _altered(lambda t, c: (t, alter(c)))


def _need(fits: bool) -> None:
    """A WrongCase unless the mistake can show."""
    if not fits:
        raise WrongCase


def _graded(x: Tracked, f: Callable[[Tracked], Tracked]) -> Tracked:
    """The same numbers, whose gradient goes back through f."""
    return Tracked(x.value, x.error, [(x, f)])


def _unscaled(*names: str) -> Callable[[Definition], Definition]:
    """The gradients of these lack the scale."""

    def wrong(t: Inputs, c: Scalars) -> Outputs:
        h = OPERATIONS["lora_linear"].definition({**t, **{name: t[name].detached() for name in names}}, c)["h"]
        for name in names:
            alone = {n: x if n in (name, "keep") else x.detached() for n, x in t.items()}
            low = (dropped(alone["x"], alone, c) @ alone["A"].mT) @ alone["B"].mT
            h = h + Tracked(np.zeros(h.shape), parents=[(low, lambda g: g)])  # adds nothing but its gradient
        return {"h": h}

    return _instead(wrong)


def _unmasked(name: str) -> Callable[[Definition], Definition]:
    """The gradient of this factor is that without dropout."""

    def wrong(t: Inputs, c: Scalars) -> Outputs:
        _need("keep" in t)
        h = OPERATIONS["lora_linear"].definition({**t, name: t[name].detached()}, c)["h"]
        alone = {n: x if n == name else x.detached() for n, x in t.items() if n != "keep"}
        low = ((alone["x"] @ alone["A"].mT) @ alone["B"].mT) * scale(c)
        return {"h": h + Tracked(np.zeros(h.shape), parents=[(low, lambda g: g)])}

    return _instead(wrong)


def _without(name: str) -> Callable[[Definition], Definition]:
    """An input is left out."""

    def alter(t: Inputs, c: Scalars) -> tuple[Inputs, Scalars]:
        _need(name in t)
        return {n: v for n, v in t.items() if n != name}, c

    return _altered(alter)


# --- LoRA -----------------------------------------------------------------------------------------------------------


def _swapped(t: Inputs, c: Scalars) -> tuple[Inputs, Scalars]:
    _need(t["A"].shape[1] == t["B"].shape[0])
    return {**t, "A": t["B"].mT, "B": t["A"].mT}, c


def _dora_with(norm: Callable[[Inputs, Scalars], Tracked]) -> Callable[[Definition], Definition]:
    """L10 with another norm."""
    return _instead(lambda t, c: {"h": dora_of(t, c, norm(t, c))})


def _norm_of_base(t: Inputs, c: Scalars) -> Tracked:
    return sqrt((t["W0"] * t["W0"]).sum(-1))


def _norm_of_columns(t: Inputs, c: Scalars) -> Tracked:
    _need(t["W0"].shape[0] == t["W0"].shape[1])
    V, _ = with_norm(t, c)
    return sqrt((V * V).sum(0)).detached()


def _norm_with_gradient(t: Inputs, c: Scalars) -> Tracked:
    V, _ = with_norm(t, c)
    return sqrt((V * V).sum(-1))


def _transposed(t: Inputs, c: Scalars) -> tuple[Inputs, Scalars]:
    _need(t["W0"].shape[0] == t["W0"].shape[1])
    return {**t, "W0": t["W0"].mT}, c


def _mask_unscaled(t: Inputs, c: Scalars) -> tuple[Inputs, Scalars]:
    _need("keep" in t)
    return t, {**c, "p": 0.0}


def _bias_twice(t: Inputs, c: Scalars) -> tuple[Inputs, Scalars]:
    _need("b" in t)
    return {**t, "b": t["b"] * 2}, c


def _bias_merged(t: Inputs, c: Scalars) -> tuple[Inputs, Scalars]:
    _need("b" in t)
    return {**t, "W0": t["W0"] + t["b"].reshape(-1, 1)}, c


def _mean_over_rows(t: Inputs, c: Scalars) -> tuple[Inputs, Scalars]:
    rows = math.prod(t["x"].shape[:-1])
    return {**t, **{n: _graded(t[n], lambda g: g / rows) for n in ("A", "B")}}, c


def _first_for_all(t: Inputs, c: Scalars) -> tuple[Inputs, Scalars]:
    return {**t, "rows": np.full_like(t["rows"], t["rows"][0])}, c


def _minus_one_is_last(t: Inputs, c: Scalars) -> tuple[Inputs, Scalars]:
    return {**t, "rows": t["rows"] % len(c["adapters"])}, c


def _fused(order: Callable[[Array, int, int], Sequence[Array]]) -> Callable[[Definition], Definition]:
    """The rows of a fused B in another order: of their numbers, the heads and the key/value heads, parts of them."""

    def alter(t: Inputs, c: Scalars) -> tuple[Inputs, Scalars]:
        fused = [name for name in t if name.endswith(".qkv.B")]
        _need(bool(fused))
        rows = np.concatenate(order(np.arange(len(t[fused[0]].value)), c["n_head"], c["n_kv_head"]))
        return {**t, **{name: t[name][rows] for name in fused}}, c

    return _altered(alter)


def _values_before_keys(rows: Array, H: int, G: int) -> Sequence[Array]:
    K = len(rows) // (H + 2 * G)
    q, k, v = np.split(rows, [H * K, (H + G) * K])
    return q, v, k


def _by_head(rows: Array, H: int, G: int) -> Sequence[Array]:
    _need(G == H)
    return [part.ravel() for part in rows.reshape(H, 3, -1).swapaxes(0, 1)]


def _weights(f: Callable[[float], float]) -> Callable[[Definition], Definition]:
    """Other weights of the adapters that are combined."""
    return _altered(lambda t, c: (t, {**c, "adapters": [{**one, "w": f(one["w"])} for one in c["adapters"]]}))


def _dropout_on_base(t: Inputs, c: Scalars) -> Outputs:
    _need("keep" in t)
    x = dropped(t["x"], t, c)
    return {"h": affine(x, t["W0"], t.get("b")) + ((x @ t["A"].mT) @ t["B"].mT) * scale(c)}


def _dropout_unmasked_backward(t: Inputs, c: Scalars) -> Outputs:
    _need("keep" in t)
    m_x = dropped(t["x"], t, c)
    low = (Tracked(m_x.value, m_x.error, [(t["x"], lambda g: g)]) @ t["A"].mT) @ t["B"].mT
    return {"h": affine(t["x"], t["W0"], t.get("b")) + low * scale(c)}


def _base_gradient_alone(t: Inputs, c: Scalars) -> Outputs:
    low = (dropped(t["x"].detached(), t, c) @ t["A"].mT) @ t["B"].mT
    return {"h": affine(t["x"], t["W0"], t.get("b")) + low * scale(c)}


def _subtracted(t: Inputs, c: Scalars) -> Outputs:
    """(W0 + dW) - dW, which is W0 but for its roundings."""
    W0 = t["W0"]
    for _ in range(c["times"]):
        dW = (t["B"] @ t["A"]) * scale(c)
        W0 = (W0 + dW) - dW
    return {"W0": W0}


# --- The transformer ------------------------------------------------------------------------------------------------


def _sample_variance(t: Inputs, c: Scalars) -> Outputs:
    x, D = t["x"] - t["x"].mean(), t["x"].shape[-1]
    return {"y": x / sqrt((x * x).sum(-1, keepdims=True) / (D - 1) + c["eps"]) * t["w"] + t["b"]}


def _eps_outside(t: Inputs, c: Scalars) -> Outputs:
    x = t["x"] - t["x"].mean() if "b" in t else t["x"]
    square = (x * x).mean()
    _need(bool((square.value > 0).all()))  # a root has no gradient at zero
    y = x / (sqrt(square) + c["eps"]) * norm_weight(t, c)
    return {"y": y + t["b"] if "b" in t else y}


def _rms_centred(t: Inputs, c: Scalars) -> Outputs:
    return {"y": normalised(t["x"] - t["x"].mean(), c["eps"]) * norm_weight(t, c)}


def _not_centred(t: Inputs, c: Scalars) -> Outputs:
    return {"y": normalised(t["x"], c["eps"]) * t["w"] + t["b"]}


def _quick_gelu(t: Inputs, c: Scalars) -> Outputs:
    return {"y": t["x"] * ((tanh(t["x"] * (1.702 / 2)) + 1) * 0.5)}


def _attention_of(
    width: Callable[[int], float] | None = None, *, causal: bool | None = None, mask: bool = True,
    heads: bool = True,
) -> Callable[[Definition], Definition]:  # fmt: skip
    """Attention with another width under the root, or without what makes places unseen, or with other shared heads."""

    def wrong(t: Inputs, c: Scalars) -> Outputs:
        q, k, v, K = t["q"], t["k"], t["v"], t["q"].shape[-1]
        if width is not None:
            _need("scale" not in c)
            q = q * (width(K) * math.sqrt(K))
        _need(causal is None or causal != c["causal"])
        _need(mask or "mask" in t)
        H, G = q.shape[1], k.shape[1]
        if not heads:
            _need(1 < G < H)
            shared = np.arange(H) % G
            k, v = k[:, shared], v[:, shared]
        causal_ = c["causal"] if causal is None else causal
        by_place = {name: c.get(name) for name in ("window", "scale")}
        return {"y": attended(q, k, v, causal_, t.get("mask") if mask else None, **by_place)}

    return _instead(wrong)


def _rotary_interleaved(t: Inputs, c: Scalars) -> Outputs:
    """The pairs (x_2i, x_2i+1)."""
    x, positions, K = t["x"], t["positions"], t["x"].shape[-1]
    _need(not {"width", "factors"} & c.keys())
    rate = c["theta"] ** (-2.0 * (np.arange(K) // 2) / K)
    angle = Tracked(positions[..., None] * rate)
    if positions.ndim == 2:
        angle = angle[:, None]
    other = x[..., np.arange(K) ^ 1] * np.where(np.arange(K) % 2 == 0, -1.0, 1.0)
    return {"y": x * cos(angle) + other * sin(angle)}


def _replaced(**changes: Callable[[Any], Any]) -> Callable[[Definition], Definition]:
    """A scalar that the case gives, by name, is another."""

    def alter(t: Inputs, c: Scalars) -> tuple[Inputs, Scalars]:
        _need(changes.keys() <= c.keys())
        return t, {**c, **{name: change(c[name]) for name, change in changes.items()}}

    return _altered(alter)


def _usual_eps(t: Inputs, c: Scalars) -> tuple[Inputs, Scalars]:
    _need(c["eps"] > 1e-4)
    return t, {**c, "eps": Tracked(5.5e-6, 4.5e-6)}


def _tied(*, look_up: bool) -> Callable[[Definition], Definition]:
    """A tied table whose gradient comes from one of its two uses."""

    def alter(t: Inputs, c: Scalars) -> tuple[Inputs, Scalars]:
        _need(c["head"] == "lm" and "head.weight" not in t)
        table = t["embed.tokens"]
        names = ("embed.tokens", "head.weight") if look_up else ("head.weight", "embed.tokens")
        return {**t, **dict(zip(names, (table, table.detached()), strict=True))}, c

    return _altered(alter)


def _positions_scaled_too(t: Inputs, c: Scalars) -> tuple[Inputs, Scalars]:
    _need("scale" in c)
    return {**t, "positions_table": t["positions_table"] * c["scale"]}, c


def _turned_first(t: Inputs, c: Scalars) -> Outputs:
    return {"y": normalised(turned(t["x"], t["positions"], c["theta"]), c["eps"]) * t["w"]}


def _mirrored(t: Inputs, c: Scalars) -> Outputs:
    """Of keys ahead what is of keys behind."""
    if "table" in t:
        return {"b": OPERATIONS["score_bias"].definition(t, c)["b"].mT}
    return _far(t, c, -1, -1)


def _far(t: Inputs, c: Scalars, by_query: int, by_key: int, width: int = 3) -> Outputs:
    """Disentangled scores, the distances times 1 or -1."""
    distance = distances(t["q"].shape[2])
    rows = (rows_of(t, c, sign * distance) for sign in (by_query, by_key))
    return {"z": far_scores(t["q"], t["k"], t["q_far"], t["k_far"], *rows) * (1 / math.sqrt(width * t["q"].shape[-1]))}


def _asked_with(mask: str | None, *, causal: bool = False) -> Callable[[Definition], Definition]:
    """The second attention with another mask."""

    def wrong(t: Inputs, c: Scalars) -> Outputs:
        _need(causal or "source_mask" in t)
        return asked(t, c, None if mask is None else t.get(mask), causal=causal)

    return _instead(wrong)


def _loss_with(divisor: Callable[[int, int], float]) -> Callable[[Definition], Definition]:
    """The sum of the losses over another number than that of the targets that count."""

    def wrong(t: Inputs, c: Scalars) -> Outputs:
        counted = np.flatnonzero(t["targets"] != IGNORED)
        total = row_losses(t["logits"][counted], t["targets"][counted]).sum()
        return {"loss": total / divisor(len(counted), len(t["targets"]))}

    return _instead(wrong)


def _mean_of_means(t: Inputs, c: Scalars) -> Outputs:
    _need("shards" in c)
    parts, M = [], len(t["targets"])
    edges = [M * i // c["shards"] for i in range(c["shards"] + 1)]
    for start, end in pairwise(edges):
        counted = start + np.flatnonzero(t["targets"][start:end] != IGNORED)
        if len(counted):
            parts.append(row_losses(t["logits"][counted], t["targets"][counted]).sum() / len(counted))
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return {"loss": total / c["shards"]}


# --- The optimizer --------------------------------------------------------------------------------------------------


def _adamw(
    *, coupled: bool = False, corrected: bool = True, inside: bool = False, by_rate: bool = True
) -> Callable[[Definition], Definition]:
    """AdamW with one thing another way."""

    def wrong(t: Inputs, c: Scalars) -> Outputs:
        p, lr, decay = t["p"], c["lr"], c["weight_decay"]
        g = t["g"] + p * decay if coupled else t["g"]
        m = t["m"] * c["beta1"] + g * (1 - c["beta1"])
        v = t["v"] * c["beta2"] + g * g * (1 - c["beta2"])
        up = m / (1 - c["beta1"] ** c["step"]) if corrected else m
        down = v / (1 - c["beta2"] ** c["step"]) if corrected else v
        under = sqrt(down + c["eps"]) if inside else sqrt(down) + c["eps"]
        kept = p if coupled else p * (1 - (lr if by_rate else 1.0) * decay)
        return {"p": kept - up / under * lr, "m": m, "v": v}

    return _instead(wrong)


def _each_alone(t: Inputs, c: Scalars) -> Outputs:
    outputs = OPERATIONS["clip"].definition(t, c)
    for name, g in t.items():
        norm = sqrt((g * g).sum())
        above = norm.value > c["max_norm"]
        outputs[f"clipped_{name}"] = g * (tracked(c["max_norm"]) / norm) if above else g
    return outputs


def _more_than_norm(t: Inputs, c: Scalars) -> Outputs:
    """PyTorch's clip_grad_norm_."""
    right = OPERATIONS["clip"].definition(t, c)
    by = tracked(c["max_norm"]) / (right["norm"] + 1e-6)
    return {**right, **{f"clipped_{name}": g * by for name, g in t.items()}} if by.value < 1 else right


def _from_zero(t: Inputs, c: Scalars) -> Outputs:
    _need(c["warmup"] > 0)
    right = OPERATIONS["warmup_cosine"].definition(t, c)["factor"]
    warming = t["steps"] < c["warmup"]
    return {"factor": Tracked(t["steps"] / c["warmup"]) * (warming * 1.0) + right * (~warming * 1.0)}


# --- The analysis ---------------------------------------------------------------------------------------------------


def _phi(f: Callable[[Tracked, Array], Tracked]) -> Callable[[Definition], Definition]:
    """Another value made of norm_F(U_i^T V_j)^2 and min(i, j)."""

    def wrong(t: Inputs, c: Scalars) -> Outputs:
        right = OPERATIONS["subspace_similarity"].definition(t, c)["phi"]
        least = lesser(*right.shape)
        return {"phi": f(right * least, least)}

    return _instead(wrong)


def _weights_directions(t: Inputs, c: Scalars) -> Outputs:
    right = OPERATIONS["amplification"].definition(t, c)
    return {**right, "in_update": right["in_weight"], "factor": right["update"] / right["in_weight"]}


def _halves_exchanged(definition: Definition) -> Definition:
    def wrong(t: Inputs, c: Scalars) -> Outputs:
        if "codes" in t:
            return definition({**t, "codes": t["codes"] >> 4 | (t["codes"] & 15) << 4}, c)
        right = definition(t, c)
        codes = right["codes"].value.astype(int)
        return {**right, "codes": Tracked(codes >> 4 | (codes & 15) << 4)}

    return wrong


def _without_offset(t: Inputs, c: Scalars) -> tuple[Inputs, Scalars]:
    _need("offset" in t)
    return {**t, "offset": tracked(np.zeros(()))}, c


_FOUR_BITS = ("quantise_nf4", "dequantise_nf4", "nf4_linear")
_DORA = ("dora_linear", "dora_merge")
_SCALED = (
    "lora_update", "lora_linear", "lora_embedding", "merge", "per_row", "combine", "model", "amplification", *_DORA,
)  # fmt: skip
_PAIRS = ("lora_update", "lora_linear", "merge", *_DORA)
_NORMS = ("layer_norm", "rms_norm")
_BIASED = ("lora_linear", "lora_start", "merge", "per_row", "linear", "dora_linear")

MISTAKES = (
    Mistake("the first of two numbers is in the lower half of a byte", _FOUR_BITS, _halves_exchanged),
    Mistake("sixteen numbers at equal distances take the place of NF4's", _FOUR_BITS,
            _altered(lambda t, c: ({**t, "levels": tracked(np.linspace(-1, 1, 16))}, c))),
    Mistake("the mean of the maxima is left out", _FOUR_BITS[1:], _altered(_without_offset)),
    Mistake("the whole matrix has one absolute maximum", ("quantise_nf4",),
            _altered(lambda t, c: (t, {**c, "block": t["W"].value.size}))),
    Mistake("the scale s is left out", _SCALED, _scaled(lambda c: 1.0)),
    Mistake("the scale s is applied twice", _SCALED, _scaled(lambda c: scale(c) ** 2)),
    Mistake("s = alpha, not divided by r", _SCALED, _scaled(lambda c: c["alpha"])),
    Mistake("s is rounded down to a whole number, as alpha // r does", _PAIRS,
            _scaled(lambda c: float(math.floor(scale(c))))),
    Mistake("s = alpha / r in a rank-stabilised case, which asks for alpha / sqrt(r)", _SCALED,
            _scaled(lambda c: c["alpha"] / c["r"])),
    Mistake("s = alpha / sqrt(r) in a case that is not rank-stabilised", _SCALED,
            _scaled(lambda c: c["alpha"] / math.sqrt(c["r"]))),
    Mistake("the update is subtracted", _SCALED, _scaled(lambda c: -scale(c))),
    Mistake("the update is added twice", _SCALED, _scaled(lambda c: 2 * scale(c))),
    Mistake("the update is not added", tuple(name for name in _SCALED if name not in ("combine", "amplification")),
            _scaled(lambda c: 0.0)),
    Mistake("A and B are swapped: the update is transposed", _PAIRS,
            _altered(_swapped)),
    Mistake("W0 is transposed, as fan_in_fan_out stores it", ("lora_linear", "merge"),
            _altered(_transposed)),
    Mistake("the dropout mask is not divided by 1 - p", ("lora_linear", "dropout"), _altered(_mask_unscaled)),
    Mistake("dropout is left out", ("lora_linear", "dora_linear"), _without("keep")),
    Mistake("dropout acts on the base's branch too", ("lora_linear",), _instead(_dropout_on_base)),
    Mistake("dx does not go back through the dropout mask", ("lora_linear",), _instead(_dropout_unmasked_backward)),
    Mistake("dA is formed without the dropout mask", ("lora_linear",), _unmasked("A")),
    Mistake("dB is formed without the dropout mask", ("lora_linear",), _unmasked("B")),
    Mistake("dx lacks the low-rank branch", ("lora_linear",), _instead(_base_gradient_alone)),
    Mistake("dA lacks the scale s", ("lora_linear",), _unscaled("A")),
    Mistake("dB lacks the scale s", ("lora_linear",), _unscaled("B")),
    Mistake("dA and dB lack the scale s", ("lora_linear",), _unscaled("A", "B")),
    Mistake("dA and dB are means over the rows, not sums", ("lora_linear", "lora_start"), _altered(_mean_over_rows)),
    Mistake("the bias is left out", _BIASED, _without("b")),
    Mistake("the bias is added twice", _BIASED, _altered(_bias_twice)),
    Mistake("the bias is merged into the weight", ("merge",), _altered(_bias_merged)),
    Mistake("the update is subtracted from the merged weight; W0 was not kept", ("unmerge",), _instead(_subtracted)),
    Mistake("the first row's adapter is taken for all rows", ("per_row",), _altered(_first_for_all)),
    Mistake("-1, which is no adapter, is taken as an index: the last", ("per_row",), _altered(_minus_one_is_last)),
    Mistake("a fused update is cut as q, v, k", ("model",), _fused(_values_before_keys)),
    Mistake("a fused update is cut by head: q, k and v of the first, then of the next", ("model",), _fused(_by_head)),
    Mistake("a tied table's gradient is that of the look-up alone", ("model",), _tied(look_up=True)),
    Mistake("a tied table's gradient is that of the head alone", ("model",), _tied(look_up=False)),
    Mistake("the weights w are left out", ("combine",), _weights(lambda w: 1.0)),
    Mistake("the weight w is in both factors", ("combine",), _weights(lambda w: w * w)),
    Mistake("c is the norm of W0's rows, not of W0 + s B A's", ("dora_linear",), _dora_with(_norm_of_base)),
    Mistake("c is the norm of the columns", ("dora_linear",), _dora_with(_norm_of_columns)),
    Mistake("c is no constant in backward", ("dora_linear",), _dora_with(_norm_with_gradient)),
    Mistake("the magnitude m is left out", ("dora_linear",), _instead(OPERATIONS["lora_linear"].definition)),
    Mistake("the variance is over D - 1", ("layer_norm",), _instead(_sample_variance)),
    Mistake("eps is added outside the root", _NORMS, _instead(_eps_outside)),
    Mistake("eps is 1e-5 or 1e-6, not the larger one given", (*_NORMS, "head_norm"), _altered(_usual_eps)),
    Mistake("the mean is subtracted in an RMS norm", ("rms_norm",), _instead(_rms_centred)),
    Mistake("the mean is not subtracted in a layer norm", ("layer_norm",), _instead(_not_centred)),
    Mistake("the tanh form in the place of erf", ("gelu",), _instead(lambda t, c: {"y": gelu_tanh_of(t["x"])})),
    Mistake("erf in the place of the tanh form", ("gelu_tanh",), _instead(lambda t, c: {"y": gelu_of(t["x"])})),
    Mistake("x sigmoid(1.702 x) in the place of GELU", ("gelu", "gelu_tanh"), _instead(_quick_gelu)),
    Mistake("scores are not divided by sqrt(K)", ("attention",), _attention_of(lambda K: 1.0)),
    Mistake("scores are divided by K, not sqrt(K)", ("attention",), _attention_of(lambda K: 1 / K)),
    Mistake("causal attention sees what comes after", ("attention",), _attention_of(causal=False)),
    Mistake("the padding mask is left out", ("attention",), _attention_of(mask=False)),
    Mistake("query head h has key/value head h mod G", ("attention",), _attention_of(heads=False)),
    Mistake("the window is one key too long", ("attention",), _replaced(window=lambda w: w + 1)),
    Mistake("the window is left out", ("attention",), _replaced(window=lambda w: None)),
    Mistake("the model's own scale of scores is left out", ("attention",), _replaced(scale=lambda s: None)),
    Mistake("the token's embedding is not multiplied", ("embedding",), _replaced(scale=lambda s: 1.0)),
    Mistake("the position's embedding is multiplied too", ("embedding",), _altered(_positions_scaled_too)),
    Mistake("w stands in the place of 1 + w", ("rms_norm",), _replaced(one_plus=lambda one: False)),
    Mistake("all of K are turned, not the first p", ("rotary",), _replaced(width=lambda p: None)),
    Mistake("frequencies are multiplied by their factors", ("rotary",),
            _replaced(factors=lambda factors: [1 / one for one in factors])),
    Mistake("frequencies are not scaled", ("rotary",), _replaced(factors=lambda factors: [1.0])),
    Mistake("the gate's activation is SiLU", ("gated_mlp",), _replaced(activation=lambda name: "silu")),
    Mistake("the norm comes after the turn", ("head_norm",), _instead(_turned_first)),
    Mistake("buckets are mirrored: keys ahead have those of keys behind", ("score_bias", "disentangled"),
            _instead(_mirrored)),
    Mistake("the last bucket begins at twice the distance", ("score_bias", "disentangled"),
            _replaced(last=lambda last: 2 * last)),
    Mistake("scores are divided by sqrt(K), not sqrt(3 K)", ("disentangled",),
            _instead(lambda t, c: _far(t, c, 1, 1, width=1))),
    Mistake("position to content asks the row of the distance the other way", ("disentangled",),
            _instead(lambda t, c: _far(t, c, 1, -1))),
    Mistake("the second attention is causal", ("cross_attention",), _asked_with("source_mask", causal=True)),
    Mistake("the source's padding mask is left out", ("cross_attention",), _asked_with(None)),
    Mistake("the decoder's mask is laid on the encoder's keys", ("cross_attention",), _asked_with("mask")),
    Mistake("the pairs (x_2i, x_2i+1) are turned", ("rotary",), _instead(_rotary_interleaved)),
    Mistake("positions are turned the other way", ("rotary",),
            _altered(lambda t, c: ({**t, "positions": -t["positions"]}, c))),
    Mistake("the loss is a sum, not a mean", ("cross_entropy",), _loss_with(lambda counted, rows: 1)),
    Mistake("the mean is over all rows, those left out too", ("cross_entropy",),
            _loss_with(lambda counted, rows: rows)),
    Mistake("each shard's mean is taken, and the mean of these", ("cross_entropy",), _instead(_mean_of_means)),
    Mistake("weight decay goes into the gradient, as in Adam", ("adamw",), _adamw(coupled=True)),
    Mistake("bias correction is left out", ("adamw",), _adamw(corrected=False)),
    Mistake("eps is added inside the root", ("adamw",), _adamw(inside=True)),
    Mistake("weight decay is not multiplied by the learning rate", ("adamw",), _adamw(by_rate=False)),
    Mistake("each gradient is clipped by its own norm", ("clip",), _instead(_each_alone)),
    Mistake("1e-6 is added to the norm that divides", ("clip",), _instead(_more_than_norm)),
    Mistake("warm-up starts at zero", ("warmup_cosine",), _instead(_from_zero)),
    Mistake("phi is not divided by min(i, j)", ("subspace_similarity",), _phi(lambda square, least: square)),
    Mistake("the norm in phi is not squared", ("subspace_similarity",),
            _phi(lambda square, least: sqrt(square) / least)),
    Mistake("the directions are the weight's, not the update's", ("amplification",), _instead(_weights_directions)),
)  # fmt: skip


PRECISIONS = {  # the unit roundoff of the factors
    "the factors of products are rounded to 11 bits, as if in TF32 or float16": 2.0**-11,
    "the factors of products are rounded to 8 bits, as if in bfloat16": 2.0**-8,
}
_PRODUCTS = ("lora_update", "lora_linear", "lora_embedding", "merge", "per_row", "combine", "linear")
ENOUGH = 8  # elements that are off, to say that it is by roundings


def explained(failing: list[tuple[Case, Mapping[str, Array]]]) -> tuple[str, int] | None:
    """The mistake that explains what was got for the most of some failing cases, and how many; None: none for most.

    Where no formula does, the coarser precision that explains them all.
    """
    counts = [sum(mistake.explains(case, got) for case, got in failing) for mistake in MISTAKES]
    most = max(counts, default=0)
    if 2 * most > len(failing):
        return MISTAKES[counts.index(most)].text, most
    coarse = next((text for text, u in PRECISIONS.items() if _as_exact_as(u, failing)), None)
    return None if coarse is None else (coarse, len(failing))


def _as_exact_as(u: float, failing: list[tuple[Case, Mapping[str, Array]]]) -> bool:
    """Whether all is within what factors rounded to u give, and is off in no one direction, as roundings are."""
    up, total = np.zeros(2), 0  # of the elements that are off: how many are above, how many farther from zero
    for case, got in failing:
        if case.operation not in _PRODUCTS:
            return False
        right, rough = errors(case), errors(case, _roughly(u)(OPERATIONS[case.operation].definition))
        for name, a in got.items():
            value, bound = right[name]
            if a.shape != value.shape or error_ratio(a.astype(np.float32), *rough[name]) > 1:
                return False
            e = a.astype(np.float64) - value
            off = np.abs(e) > bound
            up += (e[off] > 0).sum(), (e[off] * value[off] > 0).sum()
            total += int(off.sum())
    return total >= ENOUGH and bool((np.abs(up / total - 0.5) <= 0.3).all())


def _roughly(u: float) -> Callable[[Definition], Definition]:
    """The definition, of inputs that are rounded to u.

    What is made of them is rounded too, where it is a factor. But roundings do not all go one way: all together stay
    within 1.5 times the most that those of the inputs can come to.
    """

    def rough(x: Tracked) -> Tracked:
        return Tracked(x.value, x.error + 1.5 * u * np.abs(x.value), [(x, lambda g: g)])

    return _altered(lambda t, c: ({n: rough(x) if isinstance(x, Tracked) else x for n, x in t.items()}, c))

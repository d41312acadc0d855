"""What a model is: its configuration, and the names, shapes and first values of its weights."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from .backend import Array, blocks, read_only
from .checks import as_array, check_count, expect, few, is_number
from .storage import Held, Matrix


@dataclass(frozen=True)
class Config:
    """The architecture.

    Models are settings of these fields (`PRESETS` has some by name). The defaults are GPT-2's; the second group is what
    others have beside it.

        vocab_size, n_positions         rows of the token table; longest sequence, and rows of the position table
        n_layer, n_head, d_model, d_ff  layers, heads, width D, feed-forward width F
        n_kv_head                       key/value heads (T10); None: as many as heads
        norm                            "layer" (T3), "rms" (T4), or "rms_1p": RMS norm with 1 + w
        norm_first                      pre-norm (GPT-2, Llama) or post-norm (BERT, RoBERTa) (T13)
        positions                       "learned" (T1), "rotary" (T11) or "none"
        activation                      gelu (T5), gelu_tanh (T6), silu or relu (T7); as gelu_gated, it gates the MLP
        causal                          whether a token sees only what stands before it (T9)
        tie_head                        whether the language model's head is the token table (T14)
        head                            "lm": next token; "classify", "tag": a label a sequence, a token; "none": states
        n_labels                        labels of a classifier or tagger
        eps, rope_theta                 the norms' epsilon; rotary's base
        n_types                         rows of the token-type table; 0: there is none
        position_offset                 the first token's row in the position table (RoBERTa: 2)
        bias                            whether projections have biases (Llama: not)
        pooler_in_head                  whether train_head trains the pooler too (RoBERTa: it belongs to the classifier)
        prefix                          keys and values, weights of each layer, before a sequence's (T9): prefix tuning

        qkv_bias                        whether q, k and v have biases; None: as all projections (Qwen2: they alone)
        pooler                          the activation of a classifier's pooler (T14)
        d_head                          a head's width K; None: D / H
        norm_outputs                    a norm of each sublayer's output too, before it joins the residual (T13)
        embed_scale, head_scale         times the token's embedding (T1); times the state that the head reads (T14)
        rope_width                      how many of K are turned (T11); None: all
        rope_factors                    what rotary's frequencies are divided by, each or all of them (T11)
        window, full_layers             how many keys, its own the last, a query sees (T9); layers where it sees all
        window_theta                    rotary's base, and no factors, in the layers with a window; None: as in others
        qk_norm                         an RMS norm of each head's query and key (T17)
        score_scale                     times q k^T; None: 1 / sqrt(K) (T9), or 1 / sqrt(3K) (T19)
        score_buckets, score_distance   buckets of distance (T18; T19: on each side), and where the last begins; 0: none
        disentangled                    DeBERTa's attention (T19)
        n_encoder                       layers of an encoder, to which the decoder's second attention attends (T20)
        family                          whose names its files use; it has no bearing on what is computed
    """

    vocab_size: int
    n_positions: int
    n_layer: int
    n_head: int
    d_model: int
    d_ff: int
    n_kv_head: int | None = None
    norm: Literal["layer", "rms", "rms_1p"] = "layer"
    norm_first: bool = True
    positions: Literal["learned", "rotary", "none"] = "learned"
    activation: str = "gelu_tanh"
    causal: bool = True
    tie_head: bool = True
    head: Literal["lm", "classify", "tag", "none"] = "lm"
    n_labels: int | None = None
    eps: float = 1e-5
    rope_theta: float = 10000.0
    n_types: int = 0
    position_offset: int = 0
    bias: bool = True
    pooler_in_head: bool = False
    disentangled: bool = False
    prefix: int = 0
    qkv_bias: bool | None = None
    pooler: Literal["tanh", "gelu", "relu"] = "tanh"
    d_head: int | None = None
    norm_outputs: bool = False
    embed_scale: float = 1.0
    head_scale: float = 1.0
    rope_width: int | None = None
    rope_factors: tuple[float, ...] = (1.0,)
    window: int | None = None
    full_layers: tuple[int, ...] = ()
    window_theta: float | None = None
    qk_norm: bool = False
    score_scale: float | None = None
    score_buckets: int = 0
    score_distance: int = 128
    n_encoder: int = 0
    family: str | None = None

    def __post_init__(self) -> None:
        for least, names in _COUNTS.items():
            for name in names.split():
                if getattr(self, name) is not None or name not in _OPTIONAL:
                    check_count(f"Config.{name}", getattr(self, name), at_least=least)
        for name in _FLAGS:
            expect(f"Config.{name}", getattr(self, name), bool, "True or False")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                choices = " ".join(map(str, allowed))
                raise ValueError(f"Config.{name}: expected one of {choices}, got {getattr(self, name)!r}")
        for name in ("rope_factors", "full_layers"):
            expect(f"Config.{name}", getattr(self, name), (tuple, list), "a sequence of numbers")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        positive = {name: getattr(self, name) for name in _POSITIVE}
        for name, value in {**positive, **{f"rope_factors[{i}]": f for i, f in enumerate(self.rope_factors)}}.items():
            if not (is_number(value) and value > 0) and not (value is None and name in _OPTIONAL):
                raise ValueError(f"Config.{name}: expected a number above 0, got {value!r}")
        for layer in self.full_layers:
            check_count("Config.full_layers", layer, at_least=0)
        if self.family is not None:
            expect("Config.family", self.family, str, "a name, or None")
        for wrong in self._clashes():
            raise ValueError(f"Config: {wrong}")

    def _clashes(self) -> Iterator[str]:
        """What two fields may not say together."""
        D, H, p, n = self.d_model, self.n_head, self.turned, len(self.rope_factors)
        if self.d_head is None and D % H:
            yield f"d_model = {D} is not a multiple of n_head = {H}"
        if H % self.kv_heads:
            yield f"n_head = {H} is not a multiple of n_kv_head = {self.n_kv_head}"
        if self.positions == "rotary":
            if p % 2:
                yield f"rotary positions turn pairs, but a head's width is odd: {p}"
            if p > self.head_width:
                yield f"rope_width = {p} passes a head's width, {self.head_width}"
            if n not in (1, p // 2):
                yield f"rope_factors: expected one, or {p // 2}, one for each frequency, got {n}"
        if self.head in ("classify", "tag") and self.n_labels is None:
            yield f"head={self.head!r} needs n_labels"
        if self.longest < 1:
            yield f"n_positions = {self.n_positions} leaves no place after position_offset"
        if self.qk_norm and self.norm == "layer":
            yield "qk_norm is an RMS norm: expected norm='rms' or 'rms_1p'"
        if self.window is not None and not self.causal:
            yield "a window needs causal attention"
        if self.by_distance and self.prefix:
            yield "a prefix stands at no distance: expected no window and no score_buckets"
        most = 2 * (self.score_distance - self.disentangled)
        if self.score_buckets % 4 or self.score_buckets >= most:
            yield f"score_buckets: expected a multiple of 4 below {most}, got {self.score_buckets}"
        turned = self.positions == "rotary" or self.qk_norm
        if self.disentangled and (self.causal or not self.score_buckets or self.kv_heads != H or turned):
            yield (
                "disentangled attention needs score_buckets; it is not causal, its heads share no keys, and its "
                "queries and keys are neither turned nor normed"
            )
        if self.full_layers and self.window is None:
            yield "full_layers: expected a window"
        if self.window_theta is not None and (self.window is None or self.positions != "rotary"):
            yield "window_theta: expected a window, and rotary positions"
        others = (self.positions == "rotary", self.qk_norm, self.prefix, self.window, self.disentangled, self.n_types)
        if self.n_encoder and (any(others) or not self.causal or self.head not in ("lm", "none")):
            yield (
                "n_encoder: expected a causal decoder with head lm or none, without rotary positions, qk_norm, prefix, "
                "window, disentangled attention or token types"
            )

    @property
    def head_width(self) -> int:
        """K: d_head, or D / H."""
        return self.d_model // self.n_head if self.d_head is None else self.d_head

    @property
    def turned(self) -> int:
        """T11: how many of a head's K rotary positions turn."""
        return self.head_width if self.rope_width is None else self.rope_width

    @property
    def scale(self) -> float:
        """T9, T19: what q k^T is multiplied by."""
        return (
            1 / math.sqrt((3 if self.disentangled else 1) * self.head_width)
            if self.score_scale is None
            else self.score_scale
        )

    @property
    def gated(self) -> bool:
        """T7: whether the MLP is gated."""
        return self.activation.endswith("_gated")

    @property
    def by_distance(self) -> bool:
        """Whether attention asks how far a key is from a query: with a window, T18 or T19."""
        return self.window is not None or self.score_buckets > 0

    def window_of(self, layer: int) -> int | None:
        """T9: the window of a layer; None: its queries see all keys."""
        return None if layer in self.full_layers else self.window

    @property
    def sublayers(self) -> tuple[str, ...]:
        """T13: what a layer consists of; the cross-attention is T20's."""
        return ("attn", "cross", "mlp") if self.n_encoder else ("attn", "mlp")

    @property
    def depth(self) -> int:
        """The sublayers of all layers."""
        return len(self.sublayers) * self.n_layer

    @property
    def encoder(self) -> Config:
        """T20: the encoder alone."""
        return replace(self, n_layer=self.n_encoder, n_encoder=0, causal=False, head="none", n_labels=None)

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def longest(self) -> int:
        """The most tokens that a sequence may have."""
        return self.n_positions - self.position_offset

    @property
    def has_pooler(self) -> bool:
        """An encoder's classifier reads its token through a linear and an activation (T14)."""
        return self.head == "classify" and not self.causal

    @property
    def head_size(self) -> int:
        """Logits a token, or a sequence; 0 without a head."""
        return {"lm": self.vocab_size, "none": 0}.get(self.head, self.n_labels or 0)

    @property
    def head_weight(self) -> str:
        """The name of the head's weight: the token table's when they are tied (T14)."""
        return "embed.tokens" if self.head == "lm" and self.tie_head else "head.weight"

    def _layer_matrices(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each matrix of one layer, by the end of its name."""
        D, F, q, kv = self.d_model, self.d_ff, self.n_head * self.head_width, self.kv_heads * self.head_width
        shapes: dict[str, tuple[int, int]] = {}
        for part in self.sublayers[:-1]:
            shapes |= {f"{part}.q": (q, D), f"{part}.k": (kv, D), f"{part}.v": (kv, D), f"{part}.o": (D, q)}
        gate = {"mlp.gate": (F, D)} if self.gated else {}
        return shapes | gate | {"mlp.up": (F, D), "mlp.down": (D, F)}

    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each matrix that can be adapted, by name; the look-up embed.tokens counts as (D, V)."""
        shapes: dict[str, tuple[int, int]] = {"embed.tokens": (self.d_model, self.vocab_size)}
        layer = self._layer_matrices()
        if self.n_encoder:
            shapes |= _below(ENCODER, self.encoder.matrix_shapes())
        for i in range(self.n_layer):
            shapes |= {f"layers.{i}.{part}": shape for part, shape in layer.items()}
        if self.head != "none":
            shapes["head"] = (self.head_size, self.d_model)
        return shapes

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight, by name, from the bottom of the model to its top."""
        D, K = self.d_model, self.head_width

        def norm(name: str) -> dict[str, tuple[int, ...]]:
            parts = ("weight", "bias") if self.norm == "layer" else ("weight",)
            return {f"{name}.{part}": (D,) for part in parts}

        def matrix(name: str, shape: tuple[int, int], bias: bool) -> dict[str, tuple[int, ...]]:
            return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})

        shapes: dict[str, tuple[int, ...]] = {"embed.tokens": (self.vocab_size, D)}
        if self.n_encoder:
            shapes |= _below(ENCODER, self.encoder.weight_shapes())
        if self.positions == "learned":
            shapes["embed.positions"] = (self.n_positions, D)
        if self.n_types:
            shapes["embed.types"] = (self.n_types, D)
        if self.disentangled:
            shapes |= {"embed.distances": (2 * self.score_buckets, D), **norm("embed.distances_norm")}
        elif self.score_buckets:
            shapes["embed.score_bias"] = (self.score_buckets, self.n_head)
        if not self.norm_first:
            shapes |= norm("embed.norm")
        for i in range(self.n_layer):
            for part in self.sublayers:
                name = f"layers.{i}.{NORMS[part]}"
                shapes |= norm(name)
                if self.qk_norm and part == "attn":
                    shapes |= {f"layers.{i}.attn.{one}_norm.weight": (K,) for one in "qk"}
                if self.prefix and part == "attn":
                    shapes |= {f"layers.{i}.attn.prefix.{one}": (self.kv_heads, self.prefix, K) for one in "kv"}
                for matrix_name, shape in self._layer_matrices().items():
                    if matrix_name.startswith(part):
                        reads = matrix_name[-2:] in (".q", ".k", ".v") and self.qkv_bias is not None
                        shapes |= matrix(
                            f"layers.{i}.{matrix_name}", shape, bool(self.qkv_bias) if reads else self.bias
                        )
                if self.norm_outputs:
                    shapes |= norm(f"{name}_out")
        if self.norm_first:
            shapes |= norm("norm")
        if self.has_pooler:
            shapes |= {"pooler.weight": (D, D), "pooler.bias": (D,)}
        if self.head_weight == "head.weight" and self.head != "none":
            # GPT-2's and Llama's classifiers have no bias; taggers, and BERT's classifiers, have one.
            shapes |= matrix("head", (self.head_size, D), bias=self.head == "tag" or self.has_pooler)
        return shapes


def _below(prefix: str, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """T20: the encoder's names in the whole model; the token table is the decoder's too."""
    return {prefix + name: shape for name, shape in shapes.items() if name != "embed.tokens"}


ENCODER = "encoder."  # what the names of an encoder's weights begin with in an encoder-decoder (T20)
NORMS = {"attn": "norm1", "cross": "norm_cross", "mlp": "norm2"}  # of each sublayer, by the end of its name
_COUNTS = {
    1: "vocab_size n_positions n_layer n_head d_model d_ff n_kv_head n_labels d_head rope_width window score_distance",
    0: "n_types position_offset prefix score_buckets n_encoder",
}
_FLAGS = ("norm_first", "causal", "tie_head", "bias", "pooler_in_head", "disentangled", "norm_outputs", "qk_norm")
_POSITIVE = ("eps", "rope_theta", "embed_scale", "head_scale", "window_theta", "score_scale")
_OPTIONAL = ("n_kv_head", "n_labels", "d_head", "rope_width", "window", "window_theta", "score_scale")
_PLAIN = ("gelu", "gelu_tanh", "silu", "relu")
_CHOICES: dict[str, tuple[Any, ...]] = {
    "norm": ("layer", "rms", "rms_1p"),
    "positions": ("learned", "rotary", "none"),
    "activation": (*_PLAIN, *(f"{name}_gated" for name in _PLAIN)),
    "head": ("lm", "classify", "tag", "none"),
    "pooler": ("tanh", "gelu", "relu"),
    "qkv_bias": (None, True, False),
}


DTYPE_OF = "layers.0.norm1.weight"  # has the dtype of all: no matrix, so never held in fewer bits


@dataclass(frozen=True, eq=False)
class Model:
    """A configuration and its weights, frozen: under NumPy the arrays are read-only views of the caller's own.

    weights: a flat dict with exactly the names and shapes of config.weight_shapes(), all of one dtype, float32 or
    float64 (or complex, for derivatives by complex step); matrices of a float32 model may be held in fewer bits, as
    `storage` has them. A ValueError or TypeError says which weight does not fit.
    merged_from, merged_adapter: what `merge` made this model of (L5, L6); None for any other model.
    """

    config: Config
    weights: Mapping[str, Any]  # arrays, and what is held
    merged_from: Model | None = field(default=None, init=False, repr=False)
    merged_adapter: Any = field(default=None, init=False, repr=False)  # an Adapter, which a model knows nothing of

    def __post_init__(self) -> None:
        expect("Model: config", self.config, Config, "a Config")
        expect("Model: weights", self.weights, Mapping, "a dict of arrays")
        shapes = self.config.weight_shapes()
        missing, unknown = few(shapes.keys() - self.weights.keys()), few(self.weights.keys() - shapes.keys())
        if missing or unknown:
            raise ValueError(f"Model: weights missing: {missing or 'none'}; not known: {unknown or 'none'}")
        weights = {name: _frozen(name, self.weights[name]) for name in shapes}
        for name, shape in shapes.items():
            if weights[name].shape != shape:
                raise ValueError(f"Model: {name}: expected shape {shape}, got {weights[name].shape}")
            dtype = weights[DTYPE_OF].dtype
            if weights[name].dtype != dtype:
                raise TypeError(f"Model: {name}: expected {dtype}, as {DTYPE_OF} has, got {weights[name].dtype}")
        if weights[DTYPE_OF].dtype.name not in ("float32", "float64", "complex64", "complex128"):
            raise TypeError(f"Model: expected float32 or float64 weights, got {weights[DTYPE_OF].dtype}")
        object.__setattr__(self, "weights", MappingProxyType(weights))

    def __repr__(self) -> str:
        size, c = sum(w.size for w in self.weights.values()), self.config
        merged = "" if self.merged_from is None else ", merged"
        return f"Model({c.n_layer} layers, d_model {c.d_model}, head {c.head}, {size:,} weights, {self.dtype}{merged})"

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or a pickle: frozen too, and no merged model: what that was made of is known in its process alone."""
        return type(self), (self.config, dict(self.weights))

    @property
    def dtype(self) -> np.dtype[Any]:
        """The one dtype of all weights, however they are held."""
        return self.weights[DTYPE_OF].dtype


def _frozen(name: str, weight: Any) -> Matrix:
    """A weight that nobody changes."""
    return weight if isinstance(weight, Held) else read_only(as_array(f"Model: {name}", weight))


def check_model(model: object) -> None:
    """A TypeError unless it is a Model: its weights alone are none."""
    expect("model", model, Model, "a Model, as Model(config, weights) makes it")


def init_weights(
    config: Config, *, seed: int, dtype: str = "float32", names: Collection[str] | None = None
) -> dict[str, Array]:
    """Weights to start from, as GPT-2 does: N(0, 0.02), norms 1, biases 0; same seed, same bits.

    What writes into the residual stream, o and down, is N(0, 0.02 / sqrt(2 n_layer)) when norm_first, so that the sum
    of 2 n_layer of them (of an encoder-decoder, as many as its sublayers) keeps its size. dtype: float32 or float64.
    names: only these, the same bits as among all: each weight is drawn from the seed and its own name. -> {name: array}
    of config.weight_shapes().
    """
    expect("config", config, Config, "a Config")
    check_count("seed", seed, at_least=0)
    if dtype not in ("float32", "float64", np.float32, np.float64):
        raise ValueError(f"init_weights: dtype: expected float32 or float64, got {dtype!r}")
    shapes = config.weight_shapes()
    if names is not None and not set(names) <= shapes.keys():
        raise ValueError(f"init_weights: names: the model has no {sorted(set(names) - shapes.keys())}")
    weights = {}
    for name, shape in shapes.items():
        if names is not None and name not in names:
            continue
        if len(shape) == 1:
            is_factor = "norm" in name and name.endswith(".weight") and config.norm != "rms_1p"
            weights[name] = np.full(shape, float(is_factor), dtype)
            continue
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        weights[name] = np.empty(shape, dtype)
        for part in blocks(weights[name].size, 1):  # drawn in float64, which is never held whole
            first = rng.standard_normal(part.stop - part.start)
            first *= 0.02
            if config.norm_first and name.endswith((".o.weight", ".down.weight")):
                first /= math.sqrt((config.encoder if name.startswith(ENCODER) else config).depth)
            weights[name].reshape(-1)[part] = first
    return weights

"""The update of a whole model: what it is made of, start, merge, unmerge, combine, count (L1, L3, L5 to L9)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from .backend import Array, xp
from .checks import as_array, check_count, expect, is_number
from .dora import dora_merge_matrix, weight_norm
from .lora import Update, init_factors, merge_matrix, nearest_update, sum_updates
from .model import ENCODER, Config, Model, check_model
from .storage import Matrix, widened

TARGETS = ("q", "k", "v", "o", "up", "gate", "down", "embed", "head", "qkv")


def target_of(name: str) -> str:
    """The target that a matrix's name belongs to: layers.3.attn.q -> q, embed.tokens -> embed, head -> head."""
    return "embed" if name == "embed.tokens" else name.rsplit(".", 1)[-1]


def layer_of(name: str) -> int | None:
    """The number of the layer that a matrix is in, of an encoder or a decoder; None: in no layer."""
    part = name.removeprefix(ENCODER).split(".")
    return int(part[1]) if part[0] == "layers" else None


@dataclass(frozen=True)
class LoRAConfig:
    """Which matrices are adapted, and how (L1 to L3; paper 4.1 and 4.2).

    The defaults are the paper's Wq and Wv.

        r               rank, at least 1
        alpha           s = alpha / r (L1), or alpha / sqrt(r) with rslora
        targets         of q k v o up gate down embed head; or qkv, one fused pair in the place of q, k and v
        dropout         probability, on the low-rank branch alone (L2); embed has none
        bias            what else is trained: "none"; "all" biases; "lora_only", those of adapted matrices
        train_head      whether the head's own weight is trained whole, as a copy
        rslora          rank-stabilised scale
        rank_pattern    ranks that differ, by target ("q") or by matrix ("layers.3.attn.q")
        alpha_pattern   alphas that differ, likewise
        layers          the layers adapted; None for all
        init, sigma     A's start (L3): "uniform" in +-1/sqrt(in), or "normal" with deviation sigma
        dora            whether the length of each row of W is trained too, as m (L10)
    """

    r: int = 8
    alpha: float = 16
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    train_head: bool = False
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    init: Literal["uniform", "normal"] = "uniform"
    sigma: float = 0.02
    dora: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.targets, str) or not isinstance(self.targets, Iterable):
            raise TypeError(f"LoRAConfig.targets: expected a sequence of names, as ('q', 'v'), got {self.targets!r}")
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.layers is not None:
            expect("LoRAConfig.layers", self.layers, Iterable, "the layers' numbers, or None")
            object.__setattr__(self, "layers", tuple(self.layers))
            for layer in self.layers:
                check_count("LoRAConfig.layers", layer, at_least=0)
        self._check_targets()
        for name in ("rank_pattern", "alpha_pattern"):
            expect(f"LoRAConfig.{name}", getattr(self, name), Mapping, "a dict by target or matrix")
            object.__setattr__(self, name, dict(getattr(self, name)))
        for name in ("train_head", "rslora", "dora"):
            expect(f"LoRAConfig.{name}", getattr(self, name), bool, "True or False")
        for where, r in [("r", self.r), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]:
            check_count(f"LoRAConfig.{where}", r, at_least=1)
        for where, a in [("alpha", self.alpha), *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items())]:
            if not is_number(a):
                raise ValueError(f"LoRAConfig.{where}: expected a finite number, got {a!r}")
        if not (is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ValueError(f"LoRAConfig.dropout: expected 0 <= p < 1, got {self.dropout!r}")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"LoRAConfig.bias: expected none, all or lora_only, got {self.bias!r}")
        if self.init not in ("uniform", "normal"):
            raise ValueError(f"LoRAConfig.init: expected uniform or normal, got {self.init!r}")
        if not (is_number(self.sigma) and self.sigma > 0):
            raise ValueError(f"LoRAConfig.sigma: expected a positive number, got {self.sigma!r}")

    def _check_targets(self) -> None:
        unknown = [t for t in self.targets if t not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"LoRAConfig.targets: expected names of {' '.join(TARGETS)}, each once, got {self.targets!r} "
                "(q_proj and query are q here, c_attn is qkv, fc1 up, lm_head head)"
            )
        if "qkv" in self.targets and {"q", "k", "v"} & set(self.targets):
            raise ValueError(f"LoRAConfig.targets: qkv stands for q, k and v together, got {self.targets!r}")
        if "head" in self.targets and self.train_head:
            raise ValueError("LoRAConfig: the head is a target, or trained whole with train_head: not both")

    def rank(self, name: str) -> int:
        """r of the matrix `name`."""
        return self.rank_pattern.get(name, self.rank_pattern.get(target_of(name), self.r))

    def scale(self, name: str) -> float:
        """L1: s of the matrix `name`."""
        alpha = self.alpha_pattern.get(name, self.alpha_pattern.get(target_of(name), self.alpha))
        return alpha / (math.sqrt(self.rank(name)) if self.rslora else self.rank(name))


@dataclass(frozen=True, eq=False)
class Adapter:
    """The update of a model: a configuration and a flat dict of arrays.

    params: A (r, in) and B (out, r) of each adapted matrix, as layers.3.attn.q.A and layers.3.attn.q.B, with DoRA m
    (out,), layers.3.attn.q.m; and what is trained whole, a copy under its weight's own name.
    """

    config: LoRAConfig
    params: Mapping[str, Array]

    def __post_init__(self) -> None:
        expect("Adapter: config", self.config, LoRAConfig, "a LoRAConfig")
        expect("Adapter: params", self.params, Mapping, "a dict of arrays")
        params = {name: as_array(f"Adapter: {name}", value) for name, value in self.params.items()}
        object.__setattr__(self, "params", params)
        for name in self.params:
            stem, _, factor = name.rpartition(".")
            if factor in ("A", "B") and f"{stem}.{'B' if factor == 'A' else 'A'}" not in self.params:
                raise ValueError(f"Adapter: {name} stands alone; expected both {stem}.A and {stem}.B")
        for name in self.matrices:
            A, B, r = self.params[f"{name}.A"], self.params[f"{name}.B"], self.config.rank(name)
            if A.ndim != 2 or B.ndim != 2 or A.shape[0] != r or B.shape[1] != r:
                raise ValueError(
                    f"Adapter: {name}: expected A ({r}, in) and B (out, {r}), as the configuration's rank is {r}; "
                    f"got A {A.shape} and B {B.shape}"
                )
        self._check_magnitudes()

    def _check_magnitudes(self) -> None:
        """A ValueError unless there is an m (out,) for each B (out, r) with DoRA, and none without."""
        found = {name[:-2]: value.shape for name, value in self.params.items() if name.endswith(".m")}
        wanted = {name: (len(self.params[f"{name}.B"]),) for name in self.matrices if self.config.dora}
        for name in dict.fromkeys((*wanted, *found)):
            if found.get(name) != wanted.get(name):
                raise ValueError(
                    f"Adapter: {name}.m: with dora={self.config.dora} expected "
                    f"{f'shape {wanted[name]}' if name in wanted else 'none'}, got {found.get(name, 'none')}"
                )

    def __repr__(self) -> str:
        c, size = self.config, sum(value.size for value in self.params.values())
        dtypes = " ".join(sorted({str(value.dtype) for value in self.params.values()}))
        return f"Adapter(r={c.r}, alpha={c.alpha}, targets={c.targets}, {size:,} parameters, {dtypes})"

    @property
    def matrices(self) -> list[str]:
        """The names of the adapted matrices: layers.3.attn.q, ..."""
        return [name[:-2] for name in self.params if name.endswith(".A")]

    @property
    def whole(self) -> dict[str, Array]:
        """What is trained whole, by its weight's name."""
        return {name: value for name, value in self.params.items() if name[-2:] not in (".A", ".B", ".m")}


# --- Its names, and the model's --------------------------------------------------------------------------------------


def matrix_updates(config: Config, adapter: Adapter) -> dict[str, Update]:
    """The update of each adapted matrix; a fused qkv gives three, which share A and the dropout mask."""
    updates = {}
    for name in adapter.matrices:
        A, B, s = adapter.params[f"{name}.A"], adapter.params[f"{name}.B"], adapter.config.scale(name)
        m = adapter.params.get(f"{name}.m")
        for matrix, rows in fused_parts(config, name).items():
            updates[matrix] = Update(A, B[rows], s, adapter.config.dropout, name, None if m is None else m[rows])
    return updates


def fused_parts(config: Config, name: str) -> dict[str, slice]:
    """The matrices that one adapted name stands for, and the rows of B that each takes: qkv gives q, k and v."""
    if target_of(name) != "qkv":
        return {name: slice(None)}
    layer, q, kv = name.removesuffix("qkv"), config.n_head * config.head_width, config.kv_heads * config.head_width
    ends = (0, q, q + kv, q + 2 * kv)
    return {f"{layer}{part}": slice(*ends[i : i + 2]) for i, part in enumerate("qkv")}


def fuse_grads(config: Config, adapter: Adapter, grads: dict[str, Array]) -> dict[str, Array]:
    """Gradients under the adapter's own names: a fused pair's A sums over its parts, its B and m join them."""
    result = {}
    for name in adapter.params:
        stem, _, factor = name.rpartition(".")
        if factor not in ("A", "B", "m"):
            result[name] = grads[name]
            continue
        parts = [grads[f"{matrix}.{factor}"] for matrix in fused_parts(config, stem)]
        if len(parts) > 1:
            parts = [parts[0] + parts[1] + parts[2] if factor == "A" else xp.concatenate(parts)]
        result[name] = parts[0]
    return result


def weight_of(config: Config, name: str) -> str:
    """The name of a matrix's weight: a tied head's, and the look-up's, is the token table."""
    return name if name == "embed.tokens" else config.head_weight if name == "head" else f"{name}.weight"


def norm_of(config: Config, weights: Mapping[str, Matrix], name: str, update: Update) -> Array:
    """L10: c of the matrix `name` with its update: the norms of its rows. -> (out,)."""
    W0 = weights[weight_of(config, name)]
    if name == "embed.tokens":  # stored (V,D): its rows are the table's columns
        return weight_norm(W0, update.B.T, update.A.T, update.s, axis=0)
    return weight_norm(W0, update.A, update.B, update.s)


def adapted_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """(out, in) of each name that may be adapted: every matrix, and the fused qkv of each layer."""
    shapes = config.matrix_shapes()
    fused = (config.n_head + 2 * config.kv_heads) * config.head_width
    q = [name for name in shapes if name.endswith(".attn.q")]
    return shapes | {f"{name}kv": (fused, config.d_model) for name in q}


def check_adapter(model: Model, adapter: Adapter) -> None:
    """A TypeError or ValueError unless every parameter of the adapter has its place in the model."""
    check_model(model)
    expect("adapter", adapter, Adapter, "an Adapter")
    shapes = adapted_shapes(model.config)
    for name in adapter.matrices:
        if name not in shapes:
            raise ValueError(f"adapter: {name}: the model has no such matrix")
        n_out, n_in = shapes[name]
        A, B = adapter.params[f"{name}.A"], adapter.params[f"{name}.B"]
        if A.shape[1] != n_in or B.shape[0] != n_out:
            raise ValueError(
                f"adapter: {name}: the model's matrix is (out, in) = ({n_out}, {n_in}), but A is {A.shape}, B {B.shape}"
            )
    whole = {**model.config.weight_shapes(), "head.weight": (model.config.head_size, model.config.d_model)}
    for name, value in adapter.whole.items():
        if whole.get(name) != value.shape:
            raise ValueError(f"adapter: {name}: expected shape {whole.get(name, 'of a weight')}, got {value.shape}")
    for name, value in adapter.params.items():
        if value.dtype != model.dtype:
            raise TypeError(f"adapter: {name}: expected the model's dtype {model.dtype}, got {value.dtype}")


# --- L3, L8: start, count --------------------------------------------------------------------------------------------


def _adapted(config: Config, lora_config: LoRAConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of the matrices that lora_config adapts, by name; a ValueError if a name of it matches nothing."""
    expect("config", config, Config, "a Config")
    expect("lora_config", lora_config, LoRAConfig, "a LoRAConfig")
    layers = range(max(config.n_layer, config.n_encoder))
    if lora_config.layers is not None and not set(lora_config.layers) <= set(layers):
        raise ValueError(f"LoRAConfig.layers: expected layers in 0..{layers[-1]}, got {lora_config.layers}")
    targeted = {name: shape for name, shape in adapted_shapes(config).items() if target_of(name) in lora_config.targets}
    for target in lora_config.targets:
        if target not in map(target_of, targeted):
            raise ValueError(f"LoRAConfig.targets: this model has no {target!r}")
    in_layers = {
        name: shape
        for name, shape in targeted.items()
        if lora_config.layers is None or layer_of(name) is None or layer_of(name) in lora_config.layers
    }
    for pattern in (*lora_config.rank_pattern, *lora_config.alpha_pattern):
        if pattern not in in_layers and pattern not in map(target_of, in_layers):
            raise ValueError(f"LoRAConfig: the pattern {pattern!r} matches no adapted matrix")
    return in_layers


def trained_whole(config: Config, lora_config: LoRAConfig, matrices: Iterable[str]) -> list[str]:
    """The names of the weights that are trained whole beside the adapted matrices: biases, the head."""
    shapes = config.weight_shapes()
    biases = [name for name in shapes if name.endswith(".bias")]
    if lora_config.bias == "none":
        biases = []
    if lora_config.bias == "lora_only":
        adapted = {f"{part}.bias" for name in matrices for part in fused_parts(config, name)}
        biases = [name for name in biases if name in adapted]
    head = []
    if lora_config.train_head:
        if config.head == "none":
            raise ValueError("LoRAConfig.train_head: this model has no head")
        stems = ("pooler.", "head.") if config.pooler_in_head else ("head.",)
        head = [name for name in (*shapes, "head.weight") if name.startswith(stems)]
    return list(dict.fromkeys([*biases, *head]))


def init_adapter(model: Model, lora_config: LoRAConfig, *, seed: int) -> Adapter:
    """L3: A random from seed, B zero, and copies of what is trained whole: the adapted model starts as the base.

    Same seed, same bits. A ValueError says which target, rank or pattern does not fit the model.
    """
    check_model(model)
    check_count("seed", seed, at_least=0)
    adapted = _adapted(model.config, lora_config)
    rng, sigma = np.random.default_rng(seed), lora_config.sigma if lora_config.init == "normal" else None
    params: dict[str, Array] = {}
    for name, (n_out, n_in) in adapted.items():
        try:
            A, B = init_factors(rng, n_out, n_in, lora_config.rank(name), model.dtype, sigma=sigma)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        params |= {f"{name}.A": A, f"{name}.B": B}
        if lora_config.dora:
            params[f"{name}.m"] = _magnitude(model, name, A, B)
    for name in trained_whole(model.config, lora_config, adapted):
        source = name if name in model.weights else model.config.head_weight
        params[name] = widened(model.weights[source]).copy()
    return Adapter(lora_config, params)


def _magnitude(model: Model, name: str, A: Array, B: Array) -> Array:
    """L10: the start of m, the norms of W0's rows, since B is zero. -> (out,)."""
    parts = fused_parts(model.config, name).items()
    return xp.concatenate([norm_of(model.config, model.weights, part, Update(A, B[rows], 1.0)) for part, rows in parts])


def init_pissa(model: Model, lora_config: LoRAConfig) -> tuple[Model, Adapter]:
    """L12 (PiSSA, Meng et al. 2024): W0 = residual + s B A, where s B A has W0's r leading singular directions.

    B = U sqrt(S / s), A = sqrt(S / s) V^T, by SVD in float64. -> the model of the residuals round(W0 - s B A), which is
    the base that stays frozen, and the adapter to train on it. Trained, it is plain LoRA of the first base too, of rank
    2r: combine([trained, adapter], [1, -1]), which is s B A less that of the start.
    A ValueError with DoRA, or unless s > 0.
    """
    start = init_adapter(model, lora_config, seed=0)  # checked, and with what is trained whole
    if lora_config.dora:
        raise ValueError("init_pissa: expected dora=False: m would be that of the residual")
    factors: dict[str, Array] = {}
    for name in start.matrices:
        r, s = lora_config.rank(name), lora_config.scale(name)
        if s <= 0:
            raise ValueError(f"init_pissa: {name}: expected s > 0, got {s:g}")
        parts = [widened(model.weights[weight_of(model.config, part)]) for part in fused_parts(model.config, name)]
        W0 = parts[0].T if name == "embed.tokens" else xp.concatenate(parts)  # (out,in)
        found, _ = nearest_update(W0, r)
        for factor, value in (("A", found.A), ("B", found.B)):
            factors[f"{name}.{factor}"] = (value / math.sqrt(s)).astype(model.dtype)
    config, changes = merge_plan(model.config, [Adapter(lora_config, factors)], [-1.0])
    residuals = {name: change.of(model.weights) for name, change in changes.items()}
    return Model(config, {**model.weights, **residuals}), Adapter(lora_config, {**start.params, **factors})


def count_parameters(config: Config, lora_config: LoRAConfig) -> int:
    """L8 (paper, tables 2 to 4): r (in + out) for each adapted matrix, with DoRA out more; and what is trained whole.

    It needs no weights: the configuration of a model that fits no memory will do.
    """
    adapted = _adapted(config, lora_config)
    pairs = sum(lora_config.rank(name) * sum(shape) for name, shape in adapted.items())
    pairs += sum(n_out for n_out, _ in adapted.values()) if lora_config.dora else 0
    shapes: dict[str, tuple[int, ...]] = {"head.weight": (config.head_size, config.d_model), **config.weight_shapes()}
    return pairs + sum(int(np.prod(shapes[name])) for name in trained_whole(config, lora_config, adapted))


class Change(NamedTuple):
    """How a merged model's weight is made: the base's weight `source`, or what is trained whole; then the updates.

    axis: along which DoRA takes norms of the weight as it is stored; 0 for the table of tokens.
    """

    source: str
    whole: Array | None
    updates: tuple[Update, ...]
    axis: int = 1

    def of(self, weights: Mapping[str, Any]) -> Array:
        """The merged weight."""
        start = weights[self.source] if self.whole is None else self.whole
        if self.updates and self.updates[0].m is not None:  # alone: merge_plan sees to it
            return dora_merge_matrix(start, self.updates[0], axis=self.axis)
        return merge_matrix(start, *self.updates) if self.updates else start


def check_weights(adapters: Sequence[object], weights: Sequence[float], what: str = "merge") -> None:
    """A ValueError unless there is a finite weight for each adapter."""
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"{what}: expected a weight for each adapter, got {len(adapters)} and {len(weights)}")
    if not all(is_number(w) for w in weights):
        raise ValueError(f"{what}: expected finite weights, got {' '.join(map(str, weights))}")


def check_alone(has_dora: Iterable[bool], weights: Sequence[float]) -> None:
    """A ValueError if DoRA is merged with a weight other than 1, or beside another adapter."""
    if any(has_dora) and list(weights) != [1]:
        raise ValueError(
            "merge: DoRA scales the rows of W0 + s B A, which is no sum of updates (L10): expected one adapter of "
            f"weight 1, got {len(weights)} of weights {' '.join(f'{w:g}' for w in weights)}"
        )


def merge_plan(
    config: Config, adapters: Sequence[Adapter], weights: Sequence[float]
) -> tuple[Config, dict[str, Change]]:
    """L5: what becomes W0 + sum_i w_i s_i B_i A_i, by its weight's name, and the merged model's configuration.

    An update of the look-up or of a tied head unties the two. A ValueError if more than one adapter trains anything
    whole, or one that does has a weight other than 1; or if DoRA's is not alone.
    """
    check_weights(adapters, weights)
    check_alone([adapter.config.dora for adapter in adapters], weights)
    whole: dict[str, Array] = {}
    updates: dict[str, list[Update]] = {}
    for adapter, w in zip(adapters, weights, strict=True):
        first = next(iter(adapter.whole), None)
        if first is not None and (whole or w != 1):
            raise ValueError(
                f"merge: {first} is trained whole, which cannot be weighted or summed: expected one such adapter, of "
                f"weight 1, got {'another' if whole else f'weight {w:g}'}"
            )
        whole |= adapter.whole
        for name, update in matrix_updates(config, adapter).items():
            if name == "embed.tokens":  # stored (V,D): the look-up of E + s (B A)^T
                update = update._replace(A=update.B.T, B=update.A.T)
            updates.setdefault(name if name == "embed.tokens" else f"{name}.weight", []).append(
                update._replace(s=w * update.s)
            )
    changed = dict.fromkeys((*whole, *updates))
    tied = config.head_weight == "embed.tokens"
    if tied and ({"embed.tokens", "head.weight"} & changed.keys()):
        config = replace(config, tie_head=False)
        changed["head.weight"] = None
    return config, {
        name: Change(
            "embed.tokens" if tied and name == "head.weight" else name,
            whole.get(name),
            tuple(updates.get(name, ())),
            axis=0 if name == "embed.tokens" else 1,
        )
        for name in changed
    }


def merge(model: Model, adapter: Adapter) -> Model:
    """L5 (paper 4.1): the model with W0 + s B A in the place of each adapted W0: no added latency.

    Only adapted matrices are new arrays. An update of the look-up or of a tied head unties the two. The merged model
    remembers what it was made of, for `unmerge`; merges nest. A ValueError says which parameter does not fit.
    """
    check_adapter(model, adapter)
    config, changes = merge_plan(model.config, [adapter], [1.0])
    merged = Model(config, {**model.weights, **{name: change.of(model.weights) for name, change in changes.items()}})
    object.__setattr__(merged, "merged_from", model)
    object.__setattr__(merged, "merged_adapter", adapter)
    return merged


def unmerge(merged: Model, adapter: Adapter) -> Model:
    """L6: the very model that `merge` was given, bit for bit: nothing is subtracted. It takes off the last merge.

    A ValueError if the model was not merged in this process, or was last merged with another adapter.
    """
    check_model(merged)
    expect("adapter", adapter, Adapter, "an Adapter")
    if merged.merged_from is None or merged.merged_adapter is None:
        raise ValueError("unmerge: expected a model that merge made in this process; this one was not, or is a copy")
    if not _same(merged.merged_adapter, adapter):
        raise ValueError("unmerge: the model was last merged with another adapter")
    return merged.merged_from


def _same(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters are equal, to the bit."""
    if one is other:
        return True
    return (
        one.config == other.config
        and one.params.keys() == other.params.keys()
        and all(bool(xp.array_equal(one.params[name], other.params[name])) for name in one.params)
    )


def combine(adapters: Sequence[Adapter], weights: Sequence[float], *, rank: int | None = None) -> Adapter:
    """L9: sum_i w_i dW_i as one adapter, whose rank is the sum of theirs; or truncated by SVD to `rank`.

    The factors are stacked, with w_i s_i in B, so that s = 1: exact but for that one rounding. The truncation is the
    nearest of its rank in Frobenius norm, computed in float64 without forming any dW. A ValueError if the adapters
    train anything but A and B, or do not fit together.
    """
    expect("combine: adapters", adapters, Iterable, "a list of adapters")
    expect("combine: weights", weights, Iterable, "a list of numbers")
    adapters, weights = list(adapters), list(weights)
    check_weights(adapters, weights, "combine")
    if rank is not None:
        check_count("combine: rank", rank, at_least=1)
    for adapter in adapters:
        expect("combine: adapters", adapter, Adapter, "Adapters")
        if adapter.config.dora:
            raise ValueError("combine: DoRA scales the rows of W0 + s B A, which is no sum of updates (L10): merge it")
        if adapter.whole:
            raise ValueError(f"combine: expected A and B alone, got {next(iter(adapter.whole))} trained whole")
    params: dict[str, Array] = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.matrices):
        parts = [
            Update(a.params[f"{name}.A"], a.params[f"{name}.B"], w * a.config.scale(name))
            for a, w in zip(adapters, weights, strict=True)
            if name in a.matrices
        ]
        if len({(p.A.shape[1], p.B.shape[0]) for p in parts}) > 1:
            raise ValueError(f"combine: {name}: the adapters are of different shapes")
        total, _ = sum_updates(parts, rank=rank)
        params |= {f"{name}.A": total.A, f"{name}.B": total.B}
    ranks = {name[:-2]: len(A) for name, A in params.items() if name.endswith(".A")}
    targets = tuple(dict.fromkeys(map(target_of, ranks)))
    r = max(ranks.values())
    differing = {name: n for name, n in ranks.items() if n != r}
    config = LoRAConfig(r=r, alpha=r, targets=targets, rank_pattern=differing, alpha_pattern=dict(differing))
    return Adapter(config, params)

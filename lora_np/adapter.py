"""The update of a whole model: start, merge, unmerge, combine, count (L3, L5 to L9)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from .backend import Array, xp
from .lora import Adapter, LoRAConfig, Update, init_factors, merge_matrix, singular_directions, target_of
from .model import Config, Model
from .ops import widened
from .run import adapted_shapes, check_adapter, fused_parts, matrix_updates


def _adapted(config: Config, lora_config: LoRAConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of the matrices that lora_config adapts, by name; a ValueError if a name of it matches nothing."""
    if lora_config.layers is not None and not set(lora_config.layers) <= set(range(config.n_layer)):
        raise ValueError(f"LoRAConfig.layers: expected layers in 0..{config.n_layer - 1}, got {lora_config.layers}")
    targeted = {name: shape for name, shape in adapted_shapes(config).items() if target_of(name) in lora_config.targets}
    for target in lora_config.targets:
        if target not in map(target_of, targeted):
            raise ValueError(f"LoRAConfig.targets: this model has no {target!r}")
    in_layers = {
        name: shape
        for name, shape in targeted.items()
        if lora_config.layers is None or not name.startswith("layers.") or int(name.split(".")[1]) in lora_config.layers
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
    rng = np.random.default_rng(seed)
    params: dict[str, Array] = {}
    adapted = _adapted(model.config, lora_config)
    for name, (n_out, n_in) in adapted.items():
        A, B = init_factors(rng, n_out, n_in, name, lora_config, model.dtype)
        params |= {f"{name}.A": A, f"{name}.B": B}
    for name in trained_whole(model.config, lora_config, adapted):
        source = name if name in model.weights else model.config.head_weight
        params[name] = widened(model.weights[source]).copy()
    return Adapter(lora_config, params)


def count_parameters(config: Config, lora_config: LoRAConfig) -> int:
    """L8 (paper, tables 2 to 4): r (in + out) for each adapted matrix, and the size of what is trained whole.

    It needs no weights: the configuration of a model that fits no memory will do.
    """
    adapted = _adapted(config, lora_config)
    pairs = sum(lora_config.rank(name) * sum(shape) for name, shape in adapted.items())
    shapes: dict[str, tuple[int, ...]] = {"head.weight": (config.head_size, config.d_model), **config.weight_shapes()}
    return pairs + sum(int(np.prod(shapes[name])) for name in trained_whole(config, lora_config, adapted))


class Change(NamedTuple):
    """How a merged model's weight is made: the base's weight `source`, or what is trained whole; then the updates."""

    source: str
    whole: Array | None
    updates: tuple[Update, ...]

    def of(self, weights: Mapping[str, Array]) -> Array:
        """The merged weight."""
        start = weights[self.source] if self.whole is None else self.whole
        return merge_matrix(start, *self.updates) if self.updates else start


def merge_plan(
    config: Config, adapters: Sequence[Adapter], weights: Sequence[float]
) -> tuple[Config, dict[str, Change]]:
    """L5: what becomes W0 + sum_i w_i s_i B_i A_i, by its weight's name, and the merged model's configuration.

    An update of the look-up or of a tied head unties the two. A ValueError if more than one adapter trains anything
    whole, or one that does has a weight other than 1.
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"merge: expected a weight for each adapter, got {len(adapters)} and {len(weights)}")
    if not all(math.isfinite(w) for w in weights):
        raise ValueError(f"merge: expected finite weights, got {' '.join(map(str, weights))}")
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
            "embed.tokens" if tied and name == "head.weight" else name, whole.get(name), tuple(updates.get(name, ()))
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
    if merged.merged_from is None or merged.merged_adapter is None:
        raise ValueError("unmerge: expected a model that merge made in this process; this one was not merged")
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
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"combine: expected a weight for each adapter, got {len(adapters)} and {len(weights)}")
    if rank is not None and rank < 1:
        raise ValueError(f"combine: rank: expected at least 1, got {rank}")
    for adapter in adapters:
        if adapter.whole:
            raise ValueError(f"combine: expected A and B alone, got {next(iter(adapter.whole))} trained whole")
    params: dict[str, Array] = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.matrices):
        parts = [
            Update(a.params[f"{name}.A"], a.params[f"{name}.B"] * (w * a.config.scale(name)), 1.0)
            for a, w in zip(adapters, weights, strict=True)
            if name in a.matrices
        ]
        if len({(p.A.shape[1], p.B.shape[0]) for p in parts}) > 1:
            raise ValueError(f"combine: {name}: the adapters are of different shapes")
        A, B = xp.concatenate([p.A for p in parts]), xp.concatenate([p.B for p in parts], axis=1)
        params[f"{name}.A"], params[f"{name}.B"] = (A, B) if rank is None else _truncate(A, B, rank)
    ranks = {name[:-2]: len(A) for name, A in params.items() if name.endswith(".A")}
    targets = tuple(dict.fromkeys(map(target_of, ranks)))
    r = max(ranks.values())
    differing = {name: n for name, n in ranks.items() if n != r}
    config = LoRAConfig(r=r, alpha=r, targets=targets, rank_pattern=differing, alpha_pattern=dict(differing))
    return Adapter(config, params)


def _truncate(A: Array, B: Array, rank: int) -> tuple[Array, Array]:
    """The factors of rank at most `rank` whose product is nearest to B A. A (R, in), B (out, R)."""
    U, S, V = singular_directions(A, B)
    rank = min(rank, len(S))
    root = xp.sqrt(S[:rank])
    return (V[:, :rank] * root).T.astype(A.dtype), (U[:, :rank] * root).astype(B.dtype)

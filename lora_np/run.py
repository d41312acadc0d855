"""A run: a model with its adapter in place, and what all layers of one pass read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, TypeAlias

from .backend import Array, xp
from .lora import Adapter, Update, stack_updates, target_of
from .model import Config, Model
from .ops import dropout_mask, widened
from .places import Places, Reading

Trainable: TypeAlias = Literal["adapter", "all"]
AnyAdapter: TypeAlias = Adapter | Sequence[Adapter | None] | None


@dataclass(eq=False)
class Cache:
    """The keys and values of the tokens so far, for each layer: (N,G,S,K) with room for `longest` places."""

    keys: list[Array]
    values: list[Array]
    length: int = 0

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Puts k, v (N,G,T,K) behind those of the layer. -> all of them, two views (N,G,S,K)."""
        end = self.length + k.shape[2]
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


@dataclass(frozen=True, eq=False)
class Run:
    """What all layers of one pass read: the weights in force, the updates beside them, and what the batch shares."""

    config: Config
    weights: Mapping[str, Array]  # the base's; what an adapter trains whole stands in its place
    updates: Mapping[str, Update]  # of each adapted matrix, by its name
    trained: frozenset[str]  # the names that get a gradient
    by_row: bool = False  # whether weights and updates have a row axis: one for each text of the batch
    places: Places = field(default_factory=lambda: Places(0, 0))  # which tokens the rows of the states are
    reading: Reading | None = None  # the one token of each text that the last layer gives; None: all of them
    mask: Array | None = None  # (N,S) bool
    positions: Array | None = None  # (T,) or (M,)
    angles: tuple[Array, Array] | None = None  # rotary's cos and sin
    dropout_seed: int | None = None
    first_row: int = 0  # this shard's first row in the whole batch
    cache: Cache | None = None
    recompute: bool = False  # whether backward computes each half block again, from its input, rather than keep it

    @cached_property
    def lowest(self) -> int:
        """The depth of the lowest trained parameter: what lies below it needs no gradient."""
        return min((_depth(self.config, name) for name in self.trained), default=2 * self.config.n_layer + 3)

    def reading_in(self, layer: int) -> Reading | None:
        """The one token of each text that a layer gives, where it does not give all."""
        return self.reading if layer == self.config.n_layer - 1 else None

    def beyond(self, layer: int) -> Run:
        """The run of the tokens that a layer gives."""
        read = self.reading_in(layer)
        return self if read is None else replace(self, places=read.places, angles=read.angles, reading=None)

    def weight_name(self, matrix: str) -> str:
        """The name of a matrix's weight: a tied head's is the token table's."""
        return self.config.head_weight if matrix == "head" and "head.weight" not in self.weights else f"{matrix}.weight"

    def dropout_mask(self, matrix: str, shape: tuple[int, ...]) -> Array | None:
        """The mask of an adapted matrix's input (..., D); None without dropout, as in evaluation (L2, T12)."""
        update = self.updates.get(matrix)
        if update is None or update.dropout == 0 or self.dropout_seed is None:
            return None
        n, t = self.places.texts_and_places()
        return dropout_mask(
            n + self.first_row, t, shape[-1], update.dropout, seed=self.dropout_seed, stream=update.stream,
            dtype=update.A.real.dtype,
        ).reshape(shape)  # fmt: skip


def _depth(config: Config, name: str) -> int:
    """Where a parameter stands: -1 for the embedding, 2i and 2i + 1 for layer i's halves, then norm, pooler, head."""
    part = name.split(".")
    if part[0] == "layers":
        return 2 * int(part[1]) + (part[2] in ("norm2", "mlp"))
    return {"embed": -1, "norm": 2 * config.n_layer, "pooler": 2 * config.n_layer + 1}.get(
        part[0], 2 * config.n_layer + 2
    )


def bind(model: Model, adapter: AnyAdapter, *, rows: int, trainable: Trainable = "adapter") -> Run:
    """A run of the model with an adapter in place, or one (or none) for each of `rows` rows (L7).

    What is trained: the adapter's parameters; with trainable="all", every weight. A ValueError or TypeError says which
    parameter of which adapter does not fit the model.
    """
    config = model.config
    if config.disentangled:
        raise ValueError("this Config is DeBERTa's: its disentangled attention is counted here, not run")
    if trainable == "all":
        narrow = [name for name, weight in model.weights.items() if weight.dtype != model.dtype]
        if narrow:
            raise ValueError(f"trainable='all': {narrow[0]} is held in bfloat16, which is for frozen weights")
        return Run(config, model.weights, {}, frozenset(model.weights))
    if adapter is None:
        return Run(config, model.weights, {}, frozenset())
    if not isinstance(adapter, Adapter):
        if not isinstance(adapter, (list, tuple)):
            raise TypeError(f"adapter: expected an Adapter, None, or a list of them, got {type(adapter).__name__}")
        check_rows(adapter, rows)
        return _bind_rows(model, adapter)
    check_adapter(model, adapter)
    updates = matrix_updates(config, adapter)
    trained = {f"{name}.{factor}" for name in updates for factor in "AB"} | adapter.whole.keys()
    return Run(config, {**model.weights, **adapter.whole}, updates, frozenset(trained))


def check_rows(adapters: Sequence[Adapter | None], rows: int) -> None:
    """A ValueError unless there is an adapter, or None, for each row."""
    if len(adapters) != rows:
        raise ValueError(f"adapter: expected one, or None, for each of {rows} rows, got a list of {len(adapters)}")


def _bind_rows(model: Model, adapters: Sequence[Adapter | None]) -> Run:
    """L7: as one adapter whose parameters have a row axis."""
    runs = [bind(model, adapter, rows=1) for adapter in adapters]
    updates = {
        name: stack_updates([run.updates.get(name) for run in runs])
        for name in dict.fromkeys(name for run in runs for name in run.updates)
    }
    weights = dict(model.weights)
    for name in dict.fromkeys(name for adapter in adapters if adapter is not None for name in adapter.whole):
        rows = [widened(run.weights[name if name in run.weights else model.config.head_weight]) for run in runs]
        weights[name] = xp.stack([w if w.ndim > 1 else w[None] for w in rows])  # (N,out,in) or (N,1,D)
    by_row = any(adapter is not None for adapter in adapters)
    return Run(model.config, weights, updates, frozenset(), by_row=by_row)


def matrix_updates(config: Config, adapter: Adapter) -> dict[str, Update]:
    """The update of each adapted matrix; a fused qkv gives three, which share A and the dropout mask."""
    updates = {}
    for name in adapter.matrices:
        A, B, s = adapter.params[f"{name}.A"], adapter.params[f"{name}.B"], adapter.config.scale(name)
        for matrix, rows in fused_parts(config, name).items():
            updates[matrix] = Update(A, B[rows], s, adapter.config.dropout, name)
    return updates


def fused_parts(config: Config, name: str) -> dict[str, slice]:
    """The matrices that one adapted name stands for, and the rows of B that each takes: qkv gives q, k and v."""
    if target_of(name) != "qkv":
        return {name: slice(None)}
    layer, kv = name.removesuffix("qkv"), config.kv_heads * config.head_width
    ends = (0, config.d_model, config.d_model + kv, config.d_model + 2 * kv)
    return {f"{layer}{part}": slice(*ends[i : i + 2]) for i, part in enumerate("qkv")}


def fuse_grads(config: Config, adapter: Adapter, grads: dict[str, Array]) -> dict[str, Array]:
    """Gradients under the adapter's own names: a fused pair's A sums over its parts, its B joins them."""
    result = {}
    for name in adapter.params:
        stem, _, factor = name.rpartition(".")
        if factor not in ("A", "B"):
            result[name] = grads[name]
            continue
        parts = [grads[f"{matrix}.{factor}"] for matrix in fused_parts(config, stem)]
        if len(parts) == 1:
            result[name] = parts[0]
        else:
            result[name] = parts[0] + parts[1] + parts[2] if factor == "A" else xp.concatenate(parts)
    return result


def adapted_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """(out, in) of each name that may be adapted: every matrix, and the fused qkv of each layer."""
    shapes = config.matrix_shapes()
    D = config.d_model
    fused = D + 2 * config.kv_heads * config.head_width
    return shapes | {f"layers.{i}.attn.qkv": (fused, D) for i in range(config.n_layer)}


def check_adapter(model: Model, adapter: Adapter) -> None:
    """A TypeError or ValueError unless every parameter of the adapter has its place in the model."""
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

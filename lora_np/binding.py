"""A model with its adapter in place: which weights are in force, which updates stand beside them, what is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

from .adapter import Adapter, check_adapter, matrix_updates, norm_of
from .backend import Array, xp
from .layout import Layout
from .lora import Update, stack_updates
from .model import ENCODER, NORMS, Config, Model
from .ops import dropout_mask
from .storage import Held, widened

Trainable: TypeAlias = Literal["adapter", "all"]
SOURCE = "source"  # an encoder's states, which its decoder takes as it takes a weight (T20)
AnyAdapter: TypeAlias = Adapter | Sequence[Adapter | None] | None


@dataclass(frozen=True, eq=False)
class AdaptedModel:
    """A model with its adapter in place.

    Every layer reads it and none writes to it, so one serves many batches and threads at once.

        weights       the base's; what an adapter trains whole stands in its place
        updates       of each adapted matrix, by its name
        trained       the names that get a gradient
        adapter       the one that is trained; None where it is the weights, or one for each row
        by_row        whether weights and updates have a row axis: one for each sequence of the batch (L7)
        dropout_seed  of the dropout masks; None: no dropout, as in evaluation
        recompute     activation checkpointing: whether backward computes each sublayer again, from its input
        source        the layout of an encoder's states (T20), which are the weight SOURCE here
        source_kv     in decoding, the keys and values that each layer's second attention makes of them, by its name
    """

    config: Config
    weights: Mapping[str, Array]
    updates: Mapping[str, Update]
    trained: frozenset[str]
    adapter: Adapter | None = None
    by_row: bool = False
    dropout_seed: int | None = None
    recompute: bool = False
    source: Layout | None = None
    source_kv: Mapping[str, tuple[Array, Array]] = field(default_factory=dict)

    def weight_name(self, matrix: str) -> str:
        """The name of a matrix's weight: a tied head's is the token table's."""
        return self.config.head_weight if matrix == "head" and "head.weight" not in self.weights else f"{matrix}.weight"

    @cached_property
    def lowest(self) -> tuple[int, int]:
        """The depth of the lowest trained parameter."""
        nothing = (self.config.depth, 3)
        return min((_depth(self.config, name) for name in self.trained), default=nothing)

    def trained_below(self, name: str) -> bool:
        """Whether anything below the matrix `name` is trained: whether its backward must give dx."""
        if name.endswith((".cross.k", ".cross.v")):
            return SOURCE in self.trained
        return self.lowest < _depth(self.config, name)

    def attended(self, part: str, h: Array, at: Layout) -> tuple[Array, Layout]:
        """What keys and values come from, and its layout: h; the second attention's from an encoder's states (T20)."""
        if part != "cross":
            return h, at
        assert self.source is not None
        return self.weights[SOURCE], self.source

    def dropout_mask(self, name: str, x: Array, at: Layout) -> Array | None:
        """L2, T12: the mask of an adapted matrix's input x (..., D); None without dropout."""
        update = self.updates[name]
        if update.dropout == 0 or self.dropout_seed is None:
            return None
        n, t = at.sequence_and_place()
        return dropout_mask(
            n, t, x.shape[-1], update.dropout, seed=self.dropout_seed, stream=update.stream, dtype=x.real.dtype
        ).reshape(x.shape)


def _depth(config: Config, name: str) -> tuple[int, int]:
    """Where a parameter stands, from the bottom: its sublayer, of all layers', and its place in that.

    The embedding is at -1; the last norm, the pooler and the head are above the last sublayer.
    """
    part, count = name.split("."), len(config.sublayers)
    if part[0] == SOURCE:
        part = ["layers", "0", "cross", "k"]
    if part[0] != "layers":
        return (-1, 0) if part[0] == "embed" else (config.depth, ("norm", "pooler", "head").index(part[0]))
    which = next(n for n, one in enumerate(config.sublayers) if part[2].removesuffix("_out") in (one, NORMS[one]))
    norm, out = part[2].startswith("norm"), part[2].endswith("_out")
    kind = "norm_out" if out else "norm" if norm else "out" if part[3] in ("o", "down") else "in"
    order = ("norm", "in", "out", "norm_out") if config.norm_first else ("in", "out", "norm_out", "norm")
    return count * int(part[1]) + which, order.index(kind)


def encoder_of(model: AdaptedModel) -> AdaptedModel:
    """T20: the encoder alone, under the names that any model has; the token table is the decoder's too."""

    def encoders_part(named: Mapping[str, Any]) -> dict[str, Any]:
        names = [name for name in named if name.startswith((ENCODER, "embed.tokens"))]
        return {name.removeprefix(ENCODER): named[name] for name in names}

    weights, updates = encoders_part(model.weights), encoders_part(model.updates)
    trained = frozenset(encoders_part(dict.fromkeys(model.trained)))
    return replace(model, config=model.config.encoder, weights=weights, updates=updates, trained=trained)


def with_source(model: AdaptedModel, x: Array, at: Layout, *, trained: bool) -> AdaptedModel:
    """T20: the decoder, its second attention attending to the encoder's states x (..., D), which are laid out by `at`;
    trained: whether anything of the encoder is."""
    names = {name for name in model.trained if not name.startswith(ENCODER)} | ({SOURCE} if trained else set())
    return replace(model, weights={**model.weights, SOURCE: x}, trained=frozenset(names), source=at)


def is_adapter(given: object) -> bool:
    """Whether an argument is an adapter, none, or a list of these: not data."""
    rows = given if isinstance(given, (list, tuple)) and len(given) else [given]
    return all(row is None or isinstance(row, Adapter) for row in rows)


def data_first(*given: Any) -> tuple[Any, ...]:
    """Data, and then the adapter: as given, or where the adapter was given first."""
    adapter, *data = given
    return (*data, adapter) if is_adapter(adapter) and not is_adapter(data[-1]) else given


def adapter_first(*given: Any) -> tuple[Any, ...]:
    """The adapter, and then the data: as given, or where the adapter was given last."""
    *data, adapter = given
    return (adapter, *data) if is_adapter(adapter) and not is_adapter(data[0]) else given


def bind(model: Model, adapter: AnyAdapter, *, rows: int, trainable: Trainable = "adapter") -> AdaptedModel:
    """The model with an adapter in place, or one (or none) for each of `rows` rows (L7).

    What is trained: the adapter's parameters; with trainable="all", every weight. A ValueError or TypeError says which
    parameter of which adapter does not fit the model.
    """
    config = model.config
    if trainable == "all":
        for name, weight in model.weights.items():
            if isinstance(weight, Held):
                raise ValueError(f"trainable='all': {name} is held in {weight.name}, which is for frozen weights")
        return AdaptedModel(config, model.weights, {}, frozenset(model.weights))
    if adapter is None:
        return AdaptedModel(config, model.weights, {}, frozenset())
    if not isinstance(adapter, Adapter):
        if not isinstance(adapter, (list, tuple)):
            raise TypeError(f"adapter: expected an Adapter, None, or a list of them, got {type(adapter).__name__}")
        check_rows(adapter, rows)
        return _bind_rows(model, adapter)
    check_adapter(model, adapter)
    updates, weights = matrix_updates(config, adapter), {**model.weights, **adapter.whole}
    trained = {f"{name}.{factor}" for name in updates for factor in "AB"} | adapter.whole.keys()
    if adapter.config.dora:
        updates = {name: one._replace(c=norm_of(config, weights, name, one)) for name, one in updates.items()}
        trained |= {f"{name}.m" for name in updates}
    return AdaptedModel(config, weights, updates, frozenset(trained), adapter)


def frozen(model: AdaptedModel) -> AdaptedModel:
    """The same, with nothing trained: a forward then saves nothing for a backward."""
    return replace(model, trained=frozenset())


def check_rows(adapters: Sequence[Adapter | None], rows: int) -> None:
    """A ValueError unless there is an adapter, or None, for each row."""
    if len(adapters) != rows:
        raise ValueError(f"adapter: expected one, or None, for each of {rows} rows, got a list of {len(adapters)}")


def _bind_rows(model: Model, adapters: Sequence[Adapter | None]) -> AdaptedModel:
    """L7: as one adapter whose parameters have a row axis."""
    rows = [bind(model, adapter, rows=1) for adapter in adapters]
    updates = {
        name: stack_updates([row.updates.get(name) for row in rows])
        for name in dict.fromkeys(name for row in rows for name in row.updates)
    }
    weights = dict(model.weights)
    for name in dict.fromkeys(name for adapter in adapters if adapter is not None for name in adapter.whole):
        values = [widened(row.weights[name if name in row.weights else model.config.head_weight]) for row in rows]
        weights[name] = xp.stack([w if w.ndim > 1 else w[None] for w in values])  # (N,out,in) or (N,1,D)
    by_row = any(adapter is not None for adapter in adapters)
    return AdaptedModel(model.config, weights, updates, frozenset(), by_row=by_row)

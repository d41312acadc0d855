"""Another head than the file's, or a first one: what the file has is kept, what it lacks is made from a seed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from ...model import Config, init_weights
from ...storage import Matrix


class LacksWeights(ValueError):
    """A file lacks weights of the model, and there is no seed to make them from. shapes: which."""

    def __init__(self, where: str, names: Collection[str], config: Config) -> None:
        super().__init__(f"{where}: expected a seed to make what it lacks: {' '.join(sorted(names))}")
        self.shapes = {name: shape for name, shape in config.weight_shapes().items() if name in names}


def with_head(saved: Config, head: str | None, n_labels: int | None) -> Config:
    """The configuration with another head; None keeps what the file has."""
    if head is None and n_labels is None:
        return saved
    fields: dict[str, Any] = {
        "head": saved.head if head is None else head,
        "n_labels": saved.n_labels if n_labels is None else n_labels,
    }
    if fields["head"] not in ("classify", "tag"):
        if n_labels is not None:
            raise ValueError(f"load_model: n_labels is for head classify or tag, but the head is {fields['head']!r}")
        fields["n_labels"] = None
    return replace(saved, **fields)


def taken(saved: Config, config: Config) -> list[str]:
    """The weights of `config` that a file of `saved` may have. A head of another kind or size is no use to it."""
    same_head = (saved.head, saved.n_labels) == (config.head, config.n_labels)
    return [name for name in config.weight_shapes() if same_head or not name.startswith("head.")]


def completed(config: Config, weights: Mapping[str, Matrix], seed: int | None, where: str) -> dict[str, Matrix]:
    """The weights, and those that they lack, init_weights' for `seed`; LacksWeights if that is not given."""
    missing = config.weight_shapes().keys() - weights.keys()
    if not missing:
        return dict(weights)
    if seed is None:
        raise LacksWeights(where, missing, config)
    dtype = str(weights["embed.tokens"].dtype)
    return {**weights, **init_weights(config, seed=seed, dtype=dtype, names=missing)}

"""A batch: tokens, mask, token types and targets, checked on the host before anything is computed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from .backend import Array
from .checks import as_array
from .model import Config

IGNORED = -100  # a target that is not counted
BEYOND_CHANCE = 8  # places at which targets are not equal to tokens by chance
# A batch that a caller makes: the keyword arguments of `loss` (tokens, targets; mask and token_types if there are any).
BatchDict: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Batch:
    """A checked batch, on the host: P places a row have a target, T of them, or 1 for a classifier."""

    tokens: Array  # (N,T)
    mask: Array | None  # (N,T) bool, or (N,S) over what a cache holds too; None where every token counts
    token_types: Array | None  # (N,T)
    targets: Array | None = None  # (N,P)
    first: int = 0  # its first row among those of the whole step, of which it may be a shard
    source: Batch | None = None  # what an encoder reads (T20)

    @property
    def counted(self) -> Array:
        """The places, in N*P, of the targets that count."""
        assert self.targets is not None
        return np.flatnonzero(self.targets != IGNORED)

    @property
    def kept(self) -> Array | None:
        """The places, in N*T, of the tokens that count; None where all do."""
        return None if self.mask is None else np.flatnonzero(self.mask[:, -self.tokens.shape[1] :])

    def read_at(self, causal: bool) -> Array:
        """T14: the place of the token that a classifier reads: the last true one if causal, else the first. -> (N,)."""
        N, T = self.tokens.shape
        if self.mask is None:
            return np.full(N, T - 1 if causal else 0)
        return T - 1 - self.mask[:, ::-1].argmax(axis=1) if causal else self.mask.argmax(axis=1)

    def rows(self, n: slice) -> Batch:
        """Some rows of the batch."""
        tokens, mask, types, targets = (
            None if a is None else a[n] for a in (self.tokens, self.mask, self.token_types, self.targets)
        )
        assert tokens is not None
        source = None if self.source is None else self.source.rows(n)
        return Batch(tokens, mask, types, targets, self.first + n.start, source)


def check_inputs(
    config: Config, tokens: Any, mask: Any = None, token_types: Any = None, source: Any = None, source_mask: Any = None
) -> Batch:
    """The inputs of a forward as host arrays; a ValueError or TypeError says what is wrong, and where."""
    tokens = _check_tokens(config, "tokens", tokens)
    mask = _check_mask("mask", mask, tokens.shape)
    if config.head == "classify" and mask is not None and not mask.any(axis=1).all():
        raise ValueError(f"mask: row {int(np.argmin(mask.any(axis=1)))} has no true token for the classifier to read")
    types = _check_types(config, token_types, tokens.shape)
    return Batch(tokens, mask, types, source=_check_source(config, source, source_mask, len(tokens)))


def check_batch(config: Config, tokens: Any, targets: Any, *inputs: Any, **named: Any) -> Batch:
    """The inputs of a loss, those beside targets as `check_inputs` takes them, as host arrays; errors as there."""
    batch = check_inputs(config, tokens, *inputs, **named)
    if config.head == "none":
        raise ValueError("targets: expected a model with a head; this one's Config has head='none'")
    targets = as_array("targets", targets, host=True)
    N, T = batch.tokens.shape
    expected = (N,) if config.head == "classify" else (N, T)
    if targets.shape != expected:
        raise ValueError(f"targets: expected shape {expected} for head={config.head!r}, got {targets.shape}")
    counted = targets != IGNORED
    _check_ids("targets", targets, config.head_size, counted=counted)
    if not counted.any():
        raise ValueError("targets: expected at least one that counts, got -100 throughout")
    if batch.mask is not None and config.head != "classify" and (counted & ~batch.mask).any():
        raise ValueError(
            f"targets: the one at {_first(counted & ~batch.mask)} counts, but the mask is false there; set it to -100"
        )
    if config.head == "lm" and config.causal and _unshifted(batch, targets, counted):
        warnings.warn("targets: equal to tokens wherever they count: nothing is shifted inside; targets[n, t] is the "
                      "token after tokens[n, t]", stacklevel=4)  # fmt: skip
    return replace(batch, targets=targets.reshape(N, -1))


def _unshifted(batch: Batch, targets: Array, counted: Array) -> bool:
    """Whether the shift was forgotten: all counted targets are the tokens themselves, and not those that come next.

    A constant row has both; and a few places may have them by chance, so that some must differ from the next token.
    """
    tokens, mask = batch.tokens, batch.mask
    if not (targets == tokens)[counted].all():
        return False
    known = counted[:, :-1] if mask is None else counted[:, :-1] & mask[:, 1:]  # where the next token is in the batch
    return int((targets[:, :-1] != tokens[:, 1:])[known].sum()) >= BEYOND_CHANCE


def _first(wrong: Array) -> tuple[int, ...]:
    """The place of the first true element."""
    return tuple(int(i) for i in np.argwhere(wrong)[0])


def _check_ids(what: str, ids: Array, n: int, *, counted: Array | None = None) -> None:
    """A TypeError unless ids are integers, a ValueError unless those counted lie in 0..n-1."""
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{what}: expected integers, got {ids.dtype}")
    wrong = (ids < 0) | (ids >= n)
    if counted is not None:
        wrong &= counted
    if wrong.any():
        place = _first(wrong)
        raise ValueError(f"{what}: expected ids in 0..{n - 1}, got {int(ids[place])} at {place}")


def _check_tokens(config: Config, what: str, tokens: Any) -> Array:
    """tokens as a host array (N,T) of valid ids."""
    tokens = as_array(what, tokens, host=True)
    if tokens.ndim != 2 or tokens.size == 0:
        hint = "; one sequence is a batch as [tokens]" if tokens.ndim == 1 else ""
        raise ValueError(f"{what}: expected shape (N, T) with N, T >= 1, got {tokens.shape}{hint}")
    _check_ids(what, tokens, config.vocab_size)
    if tokens.shape[1] > config.longest:
        raise ValueError(f"{what}: expected at most {config.longest} tokens a sequence, got {tokens.shape[1]}")
    return tokens


def _check_source(config: Config, source: Any, mask: Any, N: int) -> Batch | None:
    """T20: what the encoder reads (N,S), which an encoder-decoder needs, and no other takes."""
    if not config.n_encoder:
        if source is not None or mask is not None:
            raise ValueError("source: this model has no encoder")
        return None
    if source is None:
        raise ValueError("source: expected the tokens that the encoder reads, (N, S): this is an encoder-decoder")
    source = _check_tokens(config, "source", source)
    if len(source) != N:
        raise ValueError(f"source: expected as many rows as tokens has, {N}, got {len(source)}")
    return Batch(source, _check_mask("source_mask", mask, source.shape), None)


def _check_mask(what: str, mask: Any, shape: tuple[int, ...]) -> Array | None:
    """mask as a host array (N,T) of bool, or None where every token counts."""
    if mask is None:
        return None
    mask = as_array(what, mask, host=True)
    if mask.shape != shape:
        raise ValueError(f"{what}: expected the shape of tokens, {shape}, got {mask.shape}")
    if mask.dtype != bool:
        if mask.dtype.kind not in "iuf" or not np.isin(mask, (0, 1)).all():
            raise TypeError(f"{what}: expected booleans, or 0 and 1, got {mask.dtype}")
        mask = mask != 0
    return None if mask.all() else mask


def _check_types(config: Config, token_types: Any, shape: tuple[int, ...]) -> Array | None:
    """token_types as a host array (N,T) of valid ids; zeros where none were given; None in a model without types."""
    if config.n_types == 0:
        if token_types is not None:
            raise ValueError("token_types: this model has none")
        return None
    if token_types is None:
        return np.zeros(shape, dtype=np.int64)
    token_types = as_array("token_types", token_types, host=True)
    if token_types.shape != shape:
        raise ValueError(f"token_types: expected the shape of tokens, {shape}, got {token_types.shape}")
    _check_ids("token_types", token_types, config.n_types)
    return token_types

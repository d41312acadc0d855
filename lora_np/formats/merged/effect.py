"""What an update does to a model's outputs: how far logits move, and the probabilities that they stand for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...backend import Array, asnumpy
from ...model import Config


class Effect(NamedTuple):
    """Two outputs of one model beside each other.

    change     the largest change of a logit, or of a state where there is no head
    kl         the largest Kullback-Leibler divergence of the second from the first, in nats; None without a head
    flipped    at how many of the places the likeliest token or label is another; None without a head
    places     how many there are
    """

    change: float
    kl: float | None
    flipped: int | None
    places: int


def effect(config: Config, before: Array, after: Array) -> Effect:
    """before, after: outputs of `forward`, (N,T,V), (N,T,labels), (N,labels), or (N,T,D) without a head."""
    one, other = (asnumpy(logits).astype(np.float64).reshape(-1, logits.shape[-1]) for logits in (before, after))
    change = float(abs(one - other).max())
    if config.head == "none":
        return Effect(change, None, None, len(one))
    log_p, log_q = _log_softmax(one), _log_softmax(other)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    flipped = int((one.argmax(axis=-1) != other.argmax(axis=-1)).sum())
    return Effect(change, max(0.0, float(kl.max())), flipped, len(one))


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

"""Mistakes in whole models and in generation, planted one at a time in the plain formulas: some case catches each."""

from functools import partial

import numpy as np
import pytest
from our_vectors import ours

from lora_np.vectors import definitions
from lora_np.vectors.answers import defined, error_ratio
from lora_np.vectors.tracked import Tracked, cos, sin

WHOLE = [one for one in ours().cases if one[0].operation in ("model", "generate")]
V1 = [one for one in WHOLE if one[0].since == "v1"]
attended, logits_of, turned = definitions.attended, definitions.logits_of, definitions.turned


def failing(cases, alter=lambda t, c: (t, c)):
    """The cases of which something is wrong, computed of inputs and scalars that are altered."""
    found = set()
    for case, right in cases:
        definition = getattr(definitions, case.operation)
        got = defined(case, lambda t, c, definition=definition: definition(*alter(t, c)))
        if any(error_ratio(x.value.astype(np.float32), *right[name]) > 1 for name, x in got.items()):
            found.add(f"{case.id}/{case.name}")
    return found


# --- In the place of parts of the formulas ----------------------------------------------------------------------------


def interleaved(x, positions, theta):
    """The pairs (x_2i, x_2i+1)."""
    K = x.shape[-1]
    angle = Tracked(np.atleast_2d(positions)[:, None, :, None] * theta ** (-2.0 * (np.arange(K) // 2) / K))
    other = x[..., np.arange(K) ^ 1] * np.where(np.arange(K) % 2 == 0, -1.0, 1.0)
    return x * cos(angle) + other * sin(angle)


def coarse(x, positions, theta):
    """Frequencies in bfloat16."""
    K = x.shape[-1]
    rates = definitions.rounded(theta ** (-2.0 * np.arange(K // 2) / K), "bfloat16")
    factors = theta ** (-2.0 * np.arange(K // 2) / K) / rates
    return turned(x, positions, theta, factors=factors)


def tiled(q, k, v, causal, mask, **place):
    """Query head h has key/value head h mod G."""
    shared = np.arange(q.shape[1]) % k.shape[1]
    return attended(q, k[:, shared], v[:, shared], causal, mask, **place)


def hiding(hidden, q, k, v, causal, mask, **place):
    """Of the queries after the given text, a key is not seen: hidden(query), None for none."""
    T = q.shape[2]
    rows = []
    for t in range(T):
        kept = np.arange(T) != (hidden(t) if t >= GIVEN else -1)
        kept = kept & (np.arange(T) <= t) & (True if mask is None else mask)
        rows.append(attended(q[:, :, t : t + 1], k, v, False, np.broadcast_to(kept, (q.shape[0], T)), **place))
    return definitions.joined(rows, 2)


GIVEN = 4  # tokens of each text that is gone on with
PARTS = {
    "the pairs (x_2i, x_2i+1) are turned": ("turned", interleaved),
    "frequencies in bfloat16": ("turned", coarse),
    "query head h has key/value head h mod G": ("attended", tiled),
    "the cache loses its first key": ("attended", partial(hiding, lambda t: 0)),
    "a new token does not see itself": ("attended", partial(hiding, lambda t: t)),
}
# What shows, by the part of the vectors; K = 2, one layer, and constant tokens show none of it.
SHOWN = {
    "the pairs (x_2i, x_2i+1) are turned": {"T13/llama-two", "L4/model-ranks", "T16/logits-rotary"},
    "frequencies in bfloat16": {"L4/model-fused-groups"},
    "query head h has key/value head h mod G": {"T13/llama-two", "L4/model-ranks", "L4/model-fused-groups"},
    "the cache loses its first key": {"T16/logits-learned", "T16/logits-rotary"},
    "a new token does not see itself": {"T16/logits-learned", "T16/logits-rotary"},
}


@pytest.mark.parametrize("mistake", PARTS)
def test_a_wrong_part_of_a_model_is_caught(monkeypatch, mistake):
    name, part = PARTS[mistake]
    monkeypatch.setattr(definitions, name, part)
    assert failing(named(SHOWN[mistake])) == SHOWN[mistake]
    if name == "turned" or part is tiled:
        assert failing(one for one in V1 if one[0].name == "pre-norm-rms-padded") == set()


def named(names):
    return [(case, right) for case, right in WHOLE if f"{case.id}/{case.name}" in names]


# --- In inputs and scalars --------------------------------------------------------------------------------------------


def without_mask(t, c):
    return {name: x for name, x in t.items() if name != "mask"}, c


def of_first_layer(t, c):
    pairs = [name for name in t if name.startswith("layers.1.") and name.endswith((".A", ".B"))]
    firsts = {name: t[name.replace("layers.1.", "layers.0.")] for name in pairs}
    return {**t, **{name: x for name, x in firsts.items() if x.shape == t[name].shape}}, c


ALTERED = {
    "theta is 10000": (lambda t, c: (t, {**c, "rope_theta": 1e4}), {"T13/llama-two", "T16/logits-rotary"}),
    "the first token's position is row 0": (lambda t, c: (t, {**c, "position_offset": 0}), {"T13/position-offset"}),
    "s by the adapter's own r, where ranks differ": (
        lambda t, c: (t, {**c, "rank_pattern": {}}), {"L4/model-ranks", "L4/model-ranks-rslora"},
    ),
    "every layer has the first's update": (of_first_layer, {"L4/model-ranks", "L4/model-fused-groups"}),
    "padding on the left is seen": (without_mask, {"T16/left-padded-learned", "T16/left-padded-rotary"}),
    "the first text's adapter is every text's": (
        lambda t, c: ({**t, "rows": np.full_like(t["rows"], t["rows"][0])}, c), {"T16/adapters", "T16/adapters-both"},
    ),
    "-1 is the last adapter": (
        lambda t, c: ({**t, "rows": t["rows"] % len(c["adapters"])}, c), {"T16/adapters"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", ALTERED)
def test_a_model_of_other_inputs_or_scalars_is_caught(mistake):
    alter, shown = ALTERED[mistake]
    assert failing(named(shown), alter) == shown


def test_positions_that_count_padding_are_caught(monkeypatch):
    """The padding is hidden from attention, and yet moves the positions, of which a rotary model sees no difference."""
    cases = named({"T16/left-padded-learned", "T16/left-padded-rotary"})
    mask = cases[0][0].inputs["mask"]

    def seeing(q, k, v, causal, _, **place):
        new = np.ones((len(mask), k.shape[2] - mask.shape[1]), dtype=bool)
        return attended(q, k, v, causal, np.hstack([mask, new]), **place)

    monkeypatch.setattr(definitions, "attended", seeing)
    assert failing(cases, without_mask) == {"T16/left-padded-learned"}


def test_a_classifier_that_reads_the_last_place_padded_or_not_is_caught(monkeypatch):
    def last(t, c):
        return logits_of(t, {**c, "head": "tag"})[:, -1]

    monkeypatch.setattr(definitions, "logits_of", last)
    assert failing(named({"T14/classifier-last", "T14/classifier-last-differs"})) == {"T14/classifier-last-differs"}

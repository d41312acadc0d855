"""A batch is checked before anything is computed: each message says what was expected, what came, and where."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora_np as ln
from lora_np.backend import asnumpy, xp
from lora_np.batch import check_batch, check_inputs

LM = ln.Config(7, 6, 1, 1, 4, 4)
CLASSIFIER = replace(LM, head="classify", n_labels=2)
TYPES = replace(LM, n_types=2)
TRANSLATOR = replace(LM, n_encoder=1)
TOKENS = [[1, 2, 3], [4, 5, 6]]
MASK = [[True, True, False], [True, True, True]]


@pytest.mark.parametrize(
    ("config", "arguments", "error", "message"),
    [
        (LM, {"tokens": [1, 2]}, ValueError, r"tokens: expected shape \(N, T\) with N, T >= 1, got \(2,\)"),
        (LM, {"tokens": np.zeros((0, 3), int)}, ValueError, r"got \(0, 3\)"),
        (LM, {"tokens": [[1.0, 2.0]]}, TypeError, "tokens: expected integers, got float64"),
        (LM, {"tokens": [[True, False]]}, TypeError, "tokens: expected integers, got bool"),
        (LM, {"tokens": [[1, 7]]}, ValueError, r"tokens: expected ids in 0\.\.6, got 7 at \(0, 1\)"),
        (LM, {"tokens": [[1], [-1]]}, ValueError, r"tokens: expected ids in 0\.\.6, got -1 at \(1, 0\)"),
        (LM, {"tokens": [[0] * 7]}, ValueError, "tokens: expected at most 6 tokens a sequence, got 7"),
        (replace(LM, position_offset=2), {"tokens": [[0] * 5]}, ValueError, "at most 4 tokens a sequence, got 5"),
        (LM, {"mask": [[True, True]]}, ValueError, r"mask: expected the shape of tokens, \(2, 3\), got \(1, 2\)"),
        (LM, {"mask": [[1, 2, 0], [1, 1, 1]]}, TypeError, "mask: expected booleans, or 0 and 1, got int64"),
        (LM, {"mask": [["a"] * 3] * 2}, TypeError, "mask: expected an array of numbers, got text"),
        (CLASSIFIER, {"mask": [[True] * 3, [False] * 3]}, ValueError, "mask: row 1 has no true token"),
        (LM, {"token_types": [[0] * 3] * 2}, ValueError, "token_types: this model has none"),
        (TYPES, {"token_types": [[0] * 2] * 2}, ValueError, r"token_types: expected the shape of tokens, \(2, 3\)"),
        (
            TYPES,
            {"token_types": [[0, 1, 2], [0, 0, 0]]},
            ValueError,
            r"token_types: expected ids in 0\.\.1, got 2 at \(0, 2\)",
        ),
    ],
    ids=str,
)
def test_a_wrong_input_is_refused(config, arguments, error, message):
    arguments = {"tokens": TOKENS, "mask": None, "token_types": None, **arguments}
    with pytest.raises(error, match=message):
        check_inputs(config, **arguments)


@pytest.mark.parametrize(
    ("config", "arguments", "error", "message"),
    [
        (LM, {"targets": [1, 2]}, ValueError, r"targets: expected shape \(2, 3\) for head='lm', got \(2,\)"),
        (
            CLASSIFIER,
            {"targets": TOKENS},
            ValueError,
            r"targets: expected shape \(2,\) for head='classify', got \(2, 3\)",
        ),
        (LM, {"targets": [[1.0] * 3] * 2}, TypeError, "targets: expected integers, got float64"),
        (LM, {"targets": [[0, 1, 7], [0] * 3]}, ValueError, r"targets: expected ids in 0\.\.6, got 7 at \(0, 2\)"),
        (LM, {"targets": [[0, 1, -1], [0] * 3]}, ValueError, r"got -1 at \(0, 2\)"),
        (CLASSIFIER, {"targets": [0, 2]}, ValueError, r"targets: expected ids in 0\.\.1, got 2 at \(1,\)"),
        (LM, {"targets": [[-100] * 3] * 2}, ValueError, "at least one that counts, got -100 throughout"),
        (LM, {"mask": MASK}, ValueError, r"the one at \(0, 2\) counts, but the mask is false there"),
        (replace(LM, head="none"), {}, ValueError, "expected a model with a head"),
    ],
    ids=str,
)
def test_a_wrong_target_is_refused(config, arguments, error, message):
    arguments = {"tokens": TOKENS, "targets": TOKENS, "mask": None, "token_types": None, **arguments}
    with pytest.raises(error, match=message):
        check_batch(config, **arguments)


@pytest.mark.parametrize(
    ("config", "arguments", "error", "message"),
    [
        (LM, {"source": TOKENS}, ValueError, "source: this model has no encoder"),
        (LM, {"source_mask": MASK}, ValueError, "source: this model has no encoder"),
        (TRANSLATOR, {}, ValueError, r"source: expected the tokens that the encoder reads, \(N, S\)"),
        (TRANSLATOR, {"source": TOKENS[:1]}, ValueError, "source: expected as many rows as tokens has, 2, got 1"),
        (TRANSLATOR, {"source": TOKENS[0]}, ValueError, r"source: expected shape \(N, T\) .*got \(3,\)"),
        (TRANSLATOR, {"source": [[1.0] * 3] * 2}, TypeError, "source: expected integers, got float64"),
        (TRANSLATOR, {"source": [[7], [0]]}, ValueError, r"source: expected ids in 0\.\.6, got 7 at \(0, 0\)"),
        (TRANSLATOR, {"source": [[1] * 99] * 2}, ValueError, r"source: expected at most \d+ tokens a sequence, got 99"),
        (
            TRANSLATOR, {"source": TOKENS, "source_mask": [[True] * 2] * 2}, ValueError,
            r"source_mask: expected the shape of tokens, \(2, 3\), got \(2, 2\)",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_source_is_refused(config, arguments, error, message):
    with pytest.raises(error, match=message):
        check_inputs(config, TOKENS, None, None, **arguments)


def test_a_source_has_rows_and_a_mask_of_its_own():
    batch = check_inputs(TRANSLATOR, TOKENS, None, None, [[1, 2, 0], [3, 0, 0]], MASK)
    assert batch.source.tokens.tolist() == [[1, 2, 0], [3, 0, 0]]
    assert batch.source.mask.tolist() == MASK
    assert batch.mask is None
    second = batch.rows(slice(1, 2))
    assert (second.source.tokens.tolist(), second.source.first) == ([[3, 0, 0]], 1)
    assert check_inputs(TRANSLATOR, TOKENS, None, None, TOKENS, [[1] * 3] * 2).source.mask is None


@pytest.mark.parametrize("kind", [bool, int, float])
def test_a_mask_of_0_and_1_is_one_of_booleans(kind):
    batch = check_inputs(LM, TOKENS, np.array(MASK).astype(kind), None)
    assert batch.mask.dtype == bool
    assert batch.mask.tolist() == MASK


def test_a_mask_of_true_alone_is_none():
    assert check_inputs(LM, TOKENS, [[True] * 3] * 2, None).mask is None


def test_types_that_are_not_given_are_zero():
    assert check_inputs(TYPES, TOKENS, None, None).token_types.tolist() == [[0] * 3] * 2
    assert check_inputs(LM, TOKENS, None, None).token_types is None


def test_arrays_of_the_device_are_taken_too():
    device = [xp.asarray(np.array(a)) for a in (TOKENS, MASK)]
    batch = check_inputs(LM, *device, None)
    assert all(type(a) is np.ndarray for a in (batch.tokens, batch.mask))
    assert np.array_equal(batch.tokens, asnumpy(device[0]))


def test_counted_places_and_rows():
    batch = check_batch(TYPES, TOKENS, [[-100, 1, -100], [2, -100, 3]], MASK, None)
    assert batch.counted.tolist() == [1, 3, 5]
    second = batch.rows(slice(1, 2))
    assert (second.tokens.tolist(), second.counted.tolist()) == ([[4, 5, 6]], [0, 2])
    assert (second.mask.tolist(), second.first) == ([[True] * 3], 1)
    assert second.rows(slice(0, 1)).first == 1  # a row's number is the whole step's
    assert second.mask.shape == second.token_types.shape == (1, 3)
    assert check_batch(CLASSIFIER, TOKENS, [0, -100], MASK, None).targets.shape == (2, 1)


# ---- the shift ----

TEXT = np.arange(24).reshape(2, 12) % 7


def padded(a, fill):
    """Each row with two places of padding behind it."""
    return np.concatenate([a, np.full((len(a), 2), fill)], axis=1)


@pytest.mark.parametrize(
    "batch",
    [
        {"tokens": TEXT, "targets": TEXT},
        {"tokens": TEXT, "targets": np.where(TEXT == 3, -100, TEXT)},
        {"tokens": padded(TEXT, 0), "targets": padded(TEXT, -100), "mask": padded(np.ones_like(TEXT), 0)},
    ],
    ids=["all", "some", "padded"],
)
def test_targets_that_were_not_shifted_are_told(batch):
    config = replace(LM, n_positions=14)
    with pytest.warns(UserWarning, match="targets: equal to tokens wherever they count: nothing is shifted inside"):
        check_batch(config, batch["tokens"], batch["targets"], batch.get("mask"), None)
    for other in ({"causal": False}, {"head": "tag", "n_labels": 7}):  # a masked language model's, and labels
        check_batch(replace(config, **other), batch["tokens"], batch["targets"], batch.get("mask"), None)


@given(st.integers(1, 14), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.data())
def test_shifted_targets_are_never_told(T, N, V, pad, data):
    """Whatever the text: constant, of two letters, padded, counted in part. Warnings are errors here."""
    text = np.array([data.draw(st.lists(st.integers(0, V - 1), min_size=T + 1, max_size=T + 1)) for _ in range(N)])
    tokens, targets = text[:, :-1], text[:, 1:].copy()
    counted = np.array(data.draw(st.lists(st.booleans(), min_size=N * T, max_size=N * T))).reshape(N, T)
    counted[0, 0] = True
    targets[~counted] = -100
    if pad:
        tokens, targets, mask = padded(tokens, 0), padded(targets, -100), padded(np.ones_like(tokens), 0)
    check_batch(replace(LM, n_positions=16), tokens, targets, mask if pad else None, None)

"""Texts into examples and batches: what is scored, where pieces meet, and which examples share a batch."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_np.training import examples
from lora_np.training.examples import Example
from lora_np.training.records import Pair
from lora_np.training.text import ByteTokenizer

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


class Framed(ByteTokenizer):
    """Bytes between a first token and a last one, as BERT has them, and with an end of the text."""

    eos = 300

    def encode(self, text, *, special=True):
        return [256, *super().encode(text), 257] if special else super().encode(text)


# --- What is scored --------------------------------------------------------------------------------------------------


@given(texts, texts, st.integers(1, 60), st.booleans())
def test_what_follows_the_prompt_is_scored_and_nothing_else(prompt, completion, longest, framed):
    """targets[t] is the token after tokens[t]; those of the completion, and the end, count, as far as there is room.

    What the tokenizer puts before a text is there, what it puts behind one is not.
    """
    tokenizer = Framed() if framed else ByteTokenizer()
    first = [*([256] if framed else []), *prompt.encode()]
    rest = [*completion.encode(), *([300] if framed else [])]
    room = longest + 1 - len(first)
    scored = rest[: max(0, room)] if first else rest[1 : max(1, room)]  # the very first token follows nothing
    found = examples.encode_pair(tokenizer, Pair(prompt, completion), longest)
    if not scored:
        assert found is None
        return
    tokens, targets, _ = found.example
    assert tokens.tolist() == [*first, *rest][: len(tokens)]
    assert len(tokens) == len(targets) <= longest
    assert targets[targets != -100].tolist() == scored
    assert (targets[: max(0, len(first) - 1)] == -100).all()
    assert (targets[max(0, len(first) - 1) :] != -100).all()
    assert found.cut == (len(first) + len(rest) > longest + 1)


@given(texts, st.integers(2, 30))
def test_a_text_too_long_keeps_the_token_that_ends_it(text, longest):
    ids = Framed().encode(text)
    tokens, target, _ = examples.encode_labelled(Framed(), text, 3, longest)
    assert target == 3
    assert tokens.tolist() == (ids if len(ids) <= longest else [*ids[: longest - 1], 257])


@given(st.lists(st.text("aé€", min_size=1, max_size=4), min_size=1, max_size=6), st.integers(1, 40))
def test_each_words_tag_is_asked_of_its_first_token(words, longest):
    tags = list(range(10, 10 + len(words)))
    tokens, targets, _ = examples.encode_tagged(ByteTokenizer(), words, tags, longest)
    assert bytes(tokens.tolist()) == " ".join(words).encode()[:longest]
    starts = np.cumsum([0, *(len(word.encode()) + 1 for word in words[:-1])])
    expected = np.full(len(" ".join(words).encode()), -100)
    expected[starts] = tags
    assert targets.tolist() == expected[:longest].tolist()


def test_what_has_no_token_to_score_is_refused():
    """An empty text; words of which no first token is left."""

    class Deaf(ByteTokenizer):
        def encode(self, text, *, special=True):
            return []

        def encode_words(self, words):
            return [1, 2], [None, None]

    with pytest.raises(ValueError, match="expected a text with a token in it, got 'abc'"):
        examples.encode_labelled(Deaf(), "abc", 0, 8)
    with pytest.raises(ValueError, match="expected a word with a token in it, got 'a b'"):
        examples.encode_tagged(Deaf(), ["a", "b"], [0, 1], 8)


def test_an_example_that_cannot_be_encoded_is_named_by_its_line(tmp_path):
    def encode(one):
        if one == "b":
            raise ValueError("no")
        return None if one == "c" else one

    assert examples.each(tmp_path / "a.txt", encode, ["a", "c"], [1, 4]) == ["a"]
    with pytest.raises(ValueError, match=r"a\.txt:7: no$"):
        examples.each(tmp_path / "a.txt", encode, ["a", "b"], [1, 7])


# --- Batches ---------------------------------------------------------------------------------------------------------


def made(lengths, classes=True):
    return [
        Example(np.arange(1, n + 1) + 100 * i, np.array(i) if classes else np.arange(n) + i)
        for i, n in enumerate(lengths)
    ]


lengths = st.lists(st.integers(1, 12), min_size=1, max_size=40)


@given(lengths, st.booleans())
def test_a_batch_is_its_examples_filled_up_on_the_right(lengths, classes):
    batch = examples.padded(made(lengths, classes))
    N, T = batch["tokens"].shape
    assert (len(lengths), max(lengths)) == (N, T)
    assert batch["mask"].sum(axis=1).tolist() == lengths
    for i, example in enumerate(made(lengths, classes)):
        assert batch["tokens"][i, batch["mask"][i]].tolist() == example.tokens.tolist()
        assert batch["mask"][i, : lengths[i]].all()
        if classes:
            assert batch["targets"][i] == i
        else:
            assert batch["targets"][i, : lengths[i]].tolist() == example.targets.tolist()
            assert (batch["targets"][i, lengths[i] :] == -100).all()


def epoch_of(made_of, N, seed, epoch):
    steps = examples.steps_an_epoch(made_of, N)
    return [examples.bucketed(made_of, N=N, seed=seed, step=epoch * steps + i) for i in range(steps)]


@given(lengths, st.integers(1, 7), st.integers(0, 99), st.integers(0, 3))
def test_each_example_comes_once_an_epoch_among_those_of_its_length(lengths, N, seed, epoch):
    """Below POOL batches all examples are sorted: no batch has lengths between those of another."""
    batches = epoch_of(made(lengths), N, seed, epoch)
    assert sorted(int(n) for batch in batches for n in batch["targets"]) == list(range(len(lengths)))
    assert sorted(len(batch["targets"]) for batch in batches)[1:] == [N] * (len(batches) - 1)
    spans = sorted((min(row := batch["mask"].sum(axis=1)), max(row)) for batch in batches)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))
    again = epoch_of(made(lengths), N, seed, epoch)
    assert all((one["tokens"] == other["tokens"]).all() for one, other in zip(batches, again, strict=True))


def test_each_example_comes_once_an_epoch_of_several_pools():
    many = made([1 + i % 7 for i in range(2 * examples.POOL * 3 + 5)])
    seen = [int(n) for batch in epoch_of(many, 3, 0, 0) for n in batch["targets"]]
    assert sorted(seen) == list(range(len(many)))


def test_epochs_and_seeds_have_orders_of_their_own():
    many = made([5] * 64)
    orders = {
        tuple(int(n) for batch in epoch_of(many, 8, seed, epoch) for n in batch["targets"])
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_long_and_short_batches_are_mixed():
    """Sorted pools must not make an epoch that goes from short to long."""
    longest = [batch["tokens"].shape[1] for batch in epoch_of(made(list(range(1, 65))), 4, 0, 0)]
    assert longest != sorted(longest)


@given(lengths, st.integers(1, 7))
def test_evaluation_sees_each_example_once(lengths, N):
    batches = list(examples.in_order(made(lengths), N=N))
    assert sorted(int(n) for batch in batches for n in batch["targets"]) == list(range(len(lengths)))
    assert max(len(batch["targets"]) for batch in batches) <= N

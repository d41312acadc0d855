"""Probabilities of labels: softmax of what the model says of each text alone, in the texts' own order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOAT64, random_model, seeds, trained_adapter

import lora_np as ln
from lora_np.backend import asnumpy
from lora_np.training.predict import (
    encode_sentence,
    encode_text,
    text_probabilities,
    word_probabilities,
)
from lora_np.training.text import ByteTokenizer

CONFIG = ln.Config(256, 24, n_layer=1, n_head=2, d_model=8, d_ff=8, head="classify", n_labels=3)
CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # float64, in batches and alone
texts = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30), min_size=1, max_size=70)
words = st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=8)


def made(head, seed):
    model = random_model(ln.Config(**{**vars(CONFIG), "head": head}), seed=seed, **FLOAT64)
    return model, trained_adapter(model, ln.LoRAConfig(r=2, train_head=True), seed=seed)


def softmax_of(model, adapter, tokens):
    """The probabilities of one sequence alone, by their definition."""
    e = np.exp(asnumpy(ln.forward(model, np.array([tokens]), adapter)).astype(float)[0])
    return e / e.sum(axis=-1, keepdims=True)


@given(texts, seeds, st.integers(1, 24))
def test_a_texts_probabilities_are_its_own(some, seed, longest):
    model, adapter = made("classify", seed)
    encoded = [encode_text(ByteTokenizer(), text, longest) for text in some]
    found = text_probabilities(model, adapter, [example for example, _ in encoded])
    for text, (_, cut), p in zip(some, encoded, found, strict=True):
        ids = list(text.encode())
        kept = ids if len(ids) <= longest else [*ids[: longest - 1], ids[-1]]  # the last one ends a text
        assert cut == (len(ids) > longest)
        np.testing.assert_allclose(p, softmax_of(model, adapter, kept), **CLOSE)


@given(st.lists(words, min_size=1, max_size=40), seeds, st.integers(1, 24))
def test_a_words_probabilities_are_those_of_its_first_token(some, seed, longest):
    model, adapter = made("tag", seed)
    encoded = [encode_sentence(ByteTokenizer(), sentence, longest) for sentence in some]
    found = word_probabilities(model, adapter, [example for example, _ in encoded])
    for sentence, (_, cut), tags in zip(some, encoded, found, strict=True):
        ids = list(" ".join(sentence).encode())
        firsts = [len(" ".join([*sentence[:n], ""]).encode()) for n in range(len(sentence))]
        p = softmax_of(model, adapter, ids[:longest])
        assert cut == (len(ids) > longest)
        assert list(tags) == [n for n, first in enumerate(firsts) if first < longest]
        for n in tags:
            np.testing.assert_allclose(tags[n], p[firsts[n]], **CLOSE)


def test_probabilities_that_are_no_numbers_are_no_answer():
    model, _ = made("classify", 0)
    loud = ln.Model(model.config, {**model.weights, "head.weight": np.full((3, 8), 1e308)})
    example, _ = encode_text(ByteTokenizer(), "a", 8)
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="probabilities are NaN: the weights, or the ad"):
        text_probabilities(loud, None, [example])

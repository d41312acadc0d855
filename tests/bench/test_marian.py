"""T20 learns: a small encoder-decoder from nothing, on real texts with their translations; another language by LoRA."""

import numpy as np
import pytest

import lora_np as ln
from lora_np.backend import asnumpy

pytest.importorskip("django", reason="the texts are those of the package Django: the extra `peers`")

from bench import marian

LONGEST, CHARACTERS = 36, 28


@pytest.fixture(scope="module")
def tasks():
    return {language: marian.task_of(language, CHARACTERS, LONGEST) for language in ("fr", "de")}


@pytest.fixture(scope="module")
def model(tasks):
    return marian.from_nothing(marian.config_of(64, 1, LONGEST), tasks["fr"], 120, 5e-3)


def test_no_source_that_is_held_out_is_learned_from(tasks):
    """In neither language: what LoRA is asked, the base has not seen either."""
    out = {one.source.tobytes() for task in tasks.values() for one in task.dev}
    assert not out & {one.source.tobytes() for task in tasks.values() for one in task.train}
    assert all(len(task.dev) > 25 for task in tasks.values())


def test_bytes_alone_say_much_less_than_the_model(tasks, model):
    """The unigram loss is the entropy of the targets' bytes, nearly: nothing that knows no order is better."""
    counts = np.bincount(np.concatenate([one.targets for one in tasks["fr"].dev]), minlength=256)
    p = counts[counts > 0] / counts.sum()
    unigram = marian.unigram_loss(tasks["fr"])
    assert unigram > -(p * np.log(p)).sum()
    assert marian.score(model, None, tasks["fr"].dev) < unigram - 0.6


def test_the_decoder_reads_what_the_encoder_read(tasks, model):
    """With the source of another text each target is less likely, by far."""
    dev = tasks["fr"].dev
    assert marian.score(model, None, marian.misread(dev)) > marian.score(model, None, dev) + 0.2


def test_lora_learns_another_language_on_the_frozen_model(tasks, model):
    before = {name: asnumpy(w).tobytes() for name, w in model.weights.items()}
    adapter = marian.adapted(model, tasks["de"], 40, 8)
    assert {name: asnumpy(w).tobytes() for name, w in model.weights.items()} == before
    base, after = (marian.score(model, one, tasks["de"].dev) for one in (None, adapter))
    assert after < base - 0.25
    assert after < marian.unigram_loss(tasks["de"]) - 0.3
    assert marian.score(model, adapter, marian.misread(tasks["de"].dev)) > after + 0.1
    parts = {name.split(".")[0] for name in adapter.params} | {"cross" for name in adapter.params if "cross" in name}
    assert parts == {"encoder", "layers", "cross"}
    assert all(np.abs(asnumpy(b)).max() > 0 for name, b in adapter.params.items() if name.endswith(".B"))
    merged = ln.merge(model, adapter)
    assert marian.score(merged, None, tasks["de"].dev) == pytest.approx(after, abs=1e-4)

"""Mistakes that people make, planted one at a time in another implementation: each fails, and is caught by name."""

import numpy as np
import planted
import pytest
from our_vectors import ours

pytest.importorskip("safetensors", reason="files of vectors: the extra cli")

from lora_np.formats.files.atomic import write_tensors
from lora_np.vectors.conform import compare
from lora_np.vectors.files import Vectors
from lora_np.vectors.mistakes import MISTAKES

COVERED = Vectors(ours().digest, [one for one in ours().cases if one[0].operation in planted.OPERATIONS])


def results(folder, mistake):
    """What the other implementation computes, in float32."""
    folder.mkdir()
    tensors = {}
    for case, wanted in COVERED.cases:
        t = {n: a.astype(np.float32) if a.dtype == np.float64 else a for n, a in case.inputs.items()}
        outputs, grads = planted.OPERATIONS[case.operation](t, case.scalars, mistake)
        found = {f"out/{n}": a for n, a in outputs.items()} | {f"grad/{n}": a for n, a in grads.items()}
        into = tensors.setdefault(case.id, {})
        into |= {f"{case.name}/{n}": np.asarray(a, np.float32) for n, a in found.items() if n in wanted}
    for id, of_id in tensors.items():
        write_tensors(folder / f"{id}.safetensors", of_id)
    return folder


def test_without_a_mistake_it_conforms(tmp_path):
    verdicts = compare(results(tmp_path / "r", None), COVERED)
    assert not any(one.failed for one in verdicts)
    every = "L1 L2 L3 L4 L5 L7 L9 L12 T2 T3 T7 T8 T9 T10 T15 T16 O1 O4"
    assert {one.id for one in verdicts} == {*every.split()}
    assert 0 < max(one.worst.ratio for one in verdicts) < 0.7


@pytest.mark.parametrize(("mistake", "ids", "text"), planted.MISTAKES, ids=[m[0] for m in planted.MISTAKES])
def test_a_planted_mistake_is_caught_by_name(tmp_path, mistake, ids, text):
    verdicts = compare(results(tmp_path / "r", mistake), COVERED)
    assert {one.id for one in verdicts if one.failed} == set(ids)
    for one in verdicts:
        if one.failed:
            assert one.worst.ratio > 1000
            name, explained = one.looks_like
            assert name.startswith(text)
            assert explained == len(one.failed)


@pytest.mark.parametrize(("mistake", "cases"), planted.UNNAMED, ids=[m[0] for m in planted.UNNAMED])
def test_a_planted_mistake_is_caught_where_it_shows(tmp_path, mistake, cases):
    """Where numbers are far from one another, and in many draws: nowhere else is it wrong."""
    with np.errstate(all="ignore"):
        verdicts = compare(results(tmp_path / "r", mistake), COVERED, name_mistakes=False)
    assert {one.id: {found.case.name for found in one.failed} for one in verdicts if one.failed} == cases


@pytest.mark.parametrize("precision", planted.PRECISIONS)
def test_factors_of_11_bits_are_caught_in_every_product_of_24(tmp_path, precision):
    """On a GPU float32 products may be TF32's. Inputs of 11 bits are the same in it: some cases pass, no id does."""
    verdicts = compare(results(tmp_path / "r", precision), COVERED, name_mistakes=False)
    fine = {one.id: [found for found in one.found if found.case.name.endswith("fine")] for one in verdicts}
    assert {id for id, found in fine.items() if found} == {"L1", "L2", "L3", "L4", "L5", "L7", "L9", "T2", "T7", "T9"}
    assert min(found.ratio for of_id in fine.values() for found in of_id) > 100
    assert {"L1", "L9", "T2"} == {one.id for one in verdicts if 0 < len(one.failed) == len(fine[one.id])}


def test_the_names_are_all_different():
    texts = [mistake.text for mistake in MISTAKES]
    assert len(set(texts)) == len(texts)

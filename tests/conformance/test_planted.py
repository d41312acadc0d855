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
    assert {one.id for one in verdicts} == {"L2", "L4", "L5", "T3", "T9", "T10", "T15", "O1", "O4"}
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


def test_the_names_are_all_different():
    texts = [mistake.text for mistake in MISTAKES]
    assert len(set(texts)) == len(texts)

"""Adapters that must be refused: ours is a loader that refuses each, for the reason that the case has."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="files of vectors: the extra cli")

from lora_np.formats.files.safetensors_file import open_tensors
from lora_np.formats.merged.folder import merge_folder
from lora_np.vectors.adapter_files import write_file_cases
from lora_np.vectors.adapter_results import judge_refusals
from lora_np.vectors.refusals import refusals, refusals_digest, write_refusals

WHY = {
    "rank-0": r"r: expected an integer of at least 1, got 0",
    "rank-of-another": r"q_proj: expected rank 2, as its tensors have, got 4",
    "ranks-differ": r"expected A \(r, in\) and B \(out, r\), got A \(2, 8\) and B \(8, 3\)",
    "nan": r"q_proj\.lora_A\.weight: holds NaN or infinite numbers",
    "infinite": r"q_proj\.lora_B\.weight: holds NaN or infinite numbers",
    "missing-B": r"q_proj: the tensor lora_B is missing",
    "missing-A": r"q_proj: the tensor lora_A is missing",
    "no-tensor": r"expected lora_A and lora_B of each module, got no tensor at all",
    "misspelt-factor": r"got model\.layers\.0\.self_attn\.q_proj\.lora_a\.weight",
    "misspelt-module": r"q_porj: expected a module of .*nearest are model\.layers\.0\.self_attn\.q_proj",
    "no-such-layer": r"model\.layers\.7\.self_attn\.q_proj: expected a module of",
    "another-base": r"q_proj: expected a module of .* of shape \(8, 16\), there it is \(8, 8\)",
    "another-base-out": r"q_proj: expected a module of .* of shape \(16, 8\), there it is \(8, 8\)",
    "another-head": r"lm_head\.weight: expected shape \(10, 8\), .* got \(10, 16\)",
    "unmatched-rank-pattern": r"rank_pattern: 'v_porj': no adapted module fits",
    "unmatched-alpha-pattern": r"alpha_pattern: 'v_porj': no adapted module fits",
    "dora-without-magnitudes": r"DoRA|magnitude",
    "magnitudes-without-dora": r"lora_magnitude_vector",
    "another-method": r"peft_type: expected 'LORA', got 'LOHA'",
    "alpha-in-words": r"alpha: a value of the wrong type: 'six'",
    "truncated": r"truncated, or not a safetensors file",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    write_file_cases(folder / "files")
    write_refusals(folder / "refusals")
    return folder


def results(folder, path, refuses):
    """What a loader says, which gives an error's words or None."""
    cases = json.loads((folder / "refusals" / "manifest.json").read_text())["cases"]
    said = {one["name"]: refuses(folder / "refusals" / one["base"], folder / "refusals" / one["name"]) for one in cases}
    path.write_text(json.dumps(said))
    return path


def ours(out):
    """The words with which our merge refuses an adapter before anything is written."""

    def refuses(base, adapter):
        try:
            merge_folder(base, [adapter], [1.0], out / adapter.name)
        except ValueError as error:
            assert not (out / adapter.name).exists()
            return str(error)
        return None

    return refuses


def test_our_own_loader_refuses_each_for_its_reason(folder, tmp_path):
    found = judge_refusals(results(folder, tmp_path / "refusals.json", ours(tmp_path)))
    assert found.holds
    assert found.missing == found.unread == found.accepted == []
    assert found.refused.keys() == WHY.keys()
    for name, words in found.refused.items():
        assert re.search(WHY[name], words), (name, words)


def test_what_is_right_is_taken_by_it(folder, tmp_path):
    """So it does not refuse them all for another reason."""
    for right in ("plain", "patterns", "modules-to-save"):
        assert ours(tmp_path)(folder / "files" / "bases" / "llama", folder / "files" / right) is None


def test_a_loader_that_takes_nan_does_not_hold(folder, tmp_path):
    """And one that looks at nothing but numbers: what it takes is named."""

    def careless(base, adapter):
        words = ours(tmp_path)(base, adapter)
        return None if "NaN" in str(words) else words

    def numbers_alone(base, adapter):
        try:
            with open_tensors(adapter / "adapter_model.safetensors") as file:
                return None if all(np.isfinite(file.read(name)).all() for name in file.shapes) else "NaN"
        except ValueError as error:
            return str(error)

    found = judge_refusals(results(folder, tmp_path / "a.json", careless))
    assert (found.holds, found.accepted) == (False, ["nan", "infinite"])
    found = judge_refusals(results(folder, tmp_path / "b.json", numbers_alone))
    assert (found.holds, list(found.refused)) == (False, ["nan", "infinite", "truncated"])


def test_what_is_missing_or_misnamed_is_said(tmp_path):
    path = tmp_path / "refusals.json"
    path.write_text(json.dumps({"nan": "no", "NaN": "no"}))
    found = judge_refusals(path)
    assert (found.holds, list(found.refused), found.unread) == (True, ["nan"], ["NaN"])
    assert len(found.missing) == len(refusals()) - 1
    path.write_text("{}")
    assert not judge_refusals(path).holds


@pytest.mark.parametrize("words", [0, "", " ", [], True])
def test_what_is_no_error_s_words_is_refused(tmp_path, words):
    path = tmp_path / "refusals.json"
    path.write_text(json.dumps({"nan": words}))
    with pytest.raises(
        ValueError, match=r"refusals\.json: nan: expected an error's words, or null where there was none"
    ):
        judge_refusals(path)


def test_the_digest_of_the_refusals_is_that_of_the_files(folder):
    assert json.loads((folder / "refusals" / "manifest.json").read_text())["digest"] == refusals_digest()


def test_the_committed_refusals_are_these(folder):
    new, committed = folder / "refusals", Path(__file__).parents[1] / "conformance" / "vectors" / "v2" / "refusals"
    names = sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(committed) for path in committed.rglob("*") if path.is_file())
    assert all((new / name).read_bytes() == (committed / name).read_bytes() for name in names)

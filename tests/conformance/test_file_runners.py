"""Adapters as files in PEFT: its updates are those expected; what it takes that must be refused stands here by name."""

import warnings

import pytest

pytest.importorskip("torch", reason="a peer: the extra peers")
pytest.importorskip("transformers", reason="a peer: the extra peers")
pytest.importorskip("peft", reason="a peer: the extra peers")

from files_with_peft import main

from lora_np.vectors.adapter_files import write_file_cases
from lora_np.vectors.adapter_results import judge_files, judge_refusals
from lora_np.vectors.refusals import write_refusals

# Of tensors that are missing and of patterns that fit nothing PEFT warns; of the others it says nothing.
WARNED = [
    "missing-B", "missing-A", "no-tensor", "misspelt-factor", "misspelt-module", "no-such-layer", "another-method",
    "unmatched-alpha-pattern", "dora-without-magnitudes",
]  # fmt: skip
SILENT = ["nan", "infinite", "magnitudes-without-dora"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    write_file_cases(folder / "files")
    write_refusals(folder / "refusals")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied heads, when it merges
        main(folder, folder / "results")
    return folder / "results"


@pytest.mark.proves("L1")
def test_updates_are_pefts(results):
    verdict = judge_files(results / "files.safetensors")
    assert verdict.passed
    assert verdict.unread == []


def test_what_peft_takes_that_must_be_refused(results):
    found = judge_refusals(results / "refusals.json")
    assert sorted(found.accepted) == sorted([*WARNED, *SILENT])
    assert found.missing == found.unread == []

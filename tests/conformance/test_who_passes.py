"""The table of who passes: each implementation that is installed here beside the vectors, and how the table is made.

PEFT, loralib and JavaScript have tests of their own (test_runners.py).
"""

import importlib.util
import re
import subprocess
import sys

import pytest

pytest.importorskip("safetensors", reason="files of vectors: the extra cli")

from who_passes import BEGIN, END, FINDINGS, HERE, IMPLEMENTATIONS, README, VECTORS, table, unexplained

from lora_np.formats.files.atomic import write_tensors
from lora_np.formats.files.safetensors_file import open_tensors
from lora_np.vectors.conform import compare
from lora_np.vectors.files import read_vectors

# What each is imported as.
MODULES = {
    "litgpt": "litgpt", "torchtune": "torchtune", "adapters": "adapters", "mlx-lm": "mlx_lm", "Keras": "keras",
    "qwix": "qwix", "llama.cpp": "xllamacpp", "transformers": "transformers",
    "bitsandbytes": "bitsandbytes",
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_an_implementation(tmp_path, name):
    """Nothing is wrong but what the findings say, some of which another CPU does not show; and nothing is misnamed."""
    if importlib.util.find_spec(MODULES[name]) is None:
        pytest.skip(f"{MODULES[name]} is not installed here: tests/conformance/who_passes.py installs it")
    program = [sys.executable, "-W", "ignore", HERE / IMPLEMENTATIONS[name].runner]
    subprocess.run([*program, VECTORS, tmp_path / "results"], check=True, capture_output=True)
    verdicts = [one for one in compare(tmp_path / "results", read_vectors(VECTORS)) if one.run]
    strange = unexplained({name: ("", {one.id: one for one in verdicts})})
    assert [line for line in strange if not line.endswith("right now")] == []
    assert all(not one.unread for one in verdicts)


def results(folder, ids, changed=lambda name, a: a):
    """The vectors' own values as somebody's results."""
    folder.mkdir()
    for id in ids:
        with open_tensors(VECTORS / f"{id}.safetensors") as file:
            kept = [name for name in file.shapes if re.match(r"[^/]+/(out|grad)/", name)]
            write_tensors(folder / f"{id}.safetensors", {name: changed(name, file.read(name)) for name in kept})
    return {one.id: one for one in compare(folder, read_vectors(VECTORS)) if one.run}


def test_right_wrong_and_not_offered(tmp_path, monkeypatch):
    """A cell has the number of cases that are right, or of those that are wrong with a note; or nothing."""
    right = results(tmp_path / "right", ["L6", "L9"])
    wrong = results(tmp_path / "wrong", ["L6"], lambda name, a: a + 1)
    monkeypatch.setitem(FINDINGS, ("PyTorch + PEFT", "L6"), ("wrong", "one is added"))
    text = table({"plain JavaScript": ("Node.js 18", right), "PyTorch + PEFT": ("peft 1", wrong)})
    cases = {id: len(right[id].found) for id in right}
    assert f"| L6 | Unmerge | {cases['L6']} | **wrong** {cases['L6']} of {cases['L6']} [1] |" in text
    assert f"| L9 | Combine | {cases['L9']} |  |" in text
    assert "1. PyTorch + PEFT, L6, times-1, times-3: one is added" in text
    assert "plain JavaScript (Node.js 18); PyTorch + PEFT (peft 1)" in text


def test_nothing_stands_in_the_table_that_was_not_looked_into(tmp_path):
    """A wrong case without a finding, and a finding that nothing shows, are told."""
    wrong = results(tmp_path / "wrong", ["L6", "L9"], lambda name, a: a + 1)
    (told,) = unexplained({"loralib": ("", wrong)})
    cases = ", ".join(found.case.name for found in wrong["L9"].found)
    assert re.fullmatch(rf"loralib, L9: {cases}: out/dW is [\d.e+]+ times its bound off", told)
    right = results(tmp_path / "right", ["L6"])
    assert unexplained({"loralib": ("", right)}) == ["loralib, L6: right now"]


def test_the_table_stands_in_the_readme():
    """With every implementation, and a note for each finding."""
    text = README.read_text(encoding="utf-8")
    _, _, rest = text.partition(BEGIN)
    written, end, _ = rest.partition(END)
    assert end
    (head,) = [line for line in written.splitlines() if line.startswith("| id |")]
    assert head == f"| id | statement | {' | '.join(IMPLEMENTATIONS)} |"
    notes = [re.match(r"\d+\. ([^,]+), (\w+), ", line) for line in written.splitlines()]
    assert {(note[1], note[2]) for note in notes if note} == FINDINGS.keys()

"""Independent implementations beside the committed vectors: PyTorch with PEFT, loralib, and plain JavaScript.

What a peer does otherwise is a finding, and stands here by name. How near to its bounds a peer comes depends on the CPU
(`ATEN_CPU_CAPABILITY=default` or `avx2` shows others); what passes must not, nor may the README's table.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("safetensors", reason="files of vectors: the extra cli")

from lora_np.vectors.conform import compare
from lora_np.vectors.files import read_vectors

HERE = Path(__file__).parent
FOLDER = HERE / "vectors" / "v2"
VECTORS = read_vectors(FOLDER)
precisions = pytest.mark.parametrize("dtype", ["float32", "float64"])

SUBTRACTED = "the update is subtracted from the merged weight; W0 was not kept"
ADDED = "1e-6 is added to the norm that divides"


def compared(tmp_path, program, dtype):
    """Runs a program on the vectors: the verdicts on its results."""
    subprocess.run([*program, FOLDER, tmp_path / "results", dtype], check=True, capture_output=True)
    return {one.id: one for one in compare(tmp_path / "results", VECTORS) if one.run}


def findings(verdicts):
    """What fails: the cases of each id, and the mistake that they look like."""
    return {
        id: ([found.case.name for found in one.failed], one.looks_like and one.looks_like[0])
        for id, one in verdicts.items()
        if one.failed
    }


def missing(verdicts):
    return {id: [found.case.name for found in one.missing] for id, one in verdicts.items() if one.missing}


def largest(verdicts):
    """The largest error beside its bound, of the cases that pass."""
    return max(found.ratio for one in verdicts.values() for found in one.found if not found.failed)


def check_readme(peer, verdicts):
    """The README's line about a peer is what its results in float32 are."""
    rows = (Path(__file__).parents[2] / "README.md").read_text().splitlines()
    (row,) = [row for row in rows if row.startswith(f"| {peer}") and "under" in row]
    ids, right, computed, limit = re.fullmatch(r".*?\| (\d+) \| (\d+) of (\d+).*\| under (0\.\d+) \|", row).groups()
    whole = [found for one in verdicts.values() for found in one.found if not found.missing]
    assert (int(ids), int(computed)) == (len(verdicts), len(whole))
    assert int(right) == sum(not found.failed for found in whole)
    assert largest(verdicts) < float(limit)


@precisions
def test_pytorch_and_peft(tmp_path, dtype):
    """All ids but L8, L11 and O2, of which they have nothing to compute.

    PEFT unmerges by subtracting, which does not give back W0 (L6). PyTorch's clip_grad_norm_ divides by norm + 1e-6
    (O3): in float32 that shows where the norm is small. PEFT makes no start of PiSSA in float64.
    """
    pytest.importorskip("torch", reason="a peer: the extra peers")
    pytest.importorskip("peft", reason="a peer: the extra peers")
    verdicts = compared(tmp_path, [sys.executable, HERE / "with_peft.py"], dtype)
    clipped = ["small"] if dtype == "float32" else ["clipped", "small"]
    assert findings(verdicts) == {"L6": (["times-1", "times-3"], SUBTRACTED), "O3": (clipped, ADDED)}
    models = [case.name for case, _ in VECTORS.cases if case.operation == "merge_model"]  # it merges transformers'
    assert missing(verdicts) == {"L5": models} | ({} if dtype == "float32" else {"L12": ["rank-2", "rslora"]})
    assert {case.id for case, _ in VECTORS.cases} - verdicts.keys() == {"L8", "L11", "O2"}
    assert largest(verdicts) < 0.9
    if dtype == "float32":
        check_readme("PyTorch", verdicts)


@precisions
def test_loralib(tmp_path, dtype):
    """L1 to L6: it has no rank-stabilised scale, and unmerges by subtracting, as PEFT does."""
    pytest.importorskip("torch", reason="a peer: the extra peers")
    pytest.importorskip("loralib", reason="a peer: the extra peers")
    verdicts = compared(tmp_path, [sys.executable, HERE / "with_loralib.py"], dtype)
    assert findings(verdicts) == {"L6": (["times-1", "times-3"], SUBTRACTED)}
    assert verdicts.keys() == {"L1", "L2", "L3", "L4", "L5", "L6"}
    models = [case.name for case, _ in VECTORS.cases if case.id == "L4" and case.operation == "model"]
    merged = [case.name for case, _ in VECTORS.cases if case.operation == "merge_model"]
    assert missing(verdicts) == {
        "L1": ["rslora"], "L2": ["rslora"], "L4": ["rslora", *models], "L5": ["float32-rslora", *merged],
    }  # fmt: skip
    assert largest(verdicts) < 0.9
    if dtype == "float32":
        check_readme("loralib", verdicts)


@precisions
def test_plain_javascript(tmp_path, dtype):
    """Every case, whole models forward and backward too."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node.js is not installed here")
    verdicts = compared(tmp_path, [node, HERE / "plain" / "run.mjs"], dtype)
    assert findings(verdicts) == {}
    assert verdicts.keys() == {case.id for case, _ in VECTORS.cases}
    assert missing(verdicts) == {}
    assert largest(verdicts) < 0.9
    if dtype == "float32":
        check_readme("plain JavaScript", verdicts)

"""What the program does before NumPy is imported."""

import subprocess
import sys

import pytest

from lora_np.cli.early import BLAS_THREADS

SCRIPT = """
import os, sys
sys.argv = [{program!r}]
if {missing}:
    sys.modules["threadpoolctl"] = None
import lora_np
print(*(os.environ.get(name) for name in {names}))
"""


def seen(monkeypatch, *, program="lora-np", missing=True, **given):
    """The environment's limits of BLAS's threads after the import, in a process of its own."""
    for name in BLAS_THREADS:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    script = SCRIPT.format(program=program, missing=missing, names=BLAS_THREADS)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()


def test_the_program_gives_blas_one_thread_where_nothing_else_can(monkeypatch):
    assert seen(monkeypatch) == ["1", "1", "1"]
    assert seen(monkeypatch, program="other") == ["None"] * 3, "another program's settings are its own"
    assert seen(monkeypatch, OMP_NUM_THREADS="3") == ["None", "None", "3"], "somebody said how many"


def test_with_threadpoolctl_the_environment_is_left_as_it_is(monkeypatch):
    pytest.importorskip("threadpoolctl", reason="limits of BLAS: the extra cli")
    assert seen(monkeypatch, missing=False) == ["None"] * 3

"""The choice of the array library, what it may use of CuPy, and what a training step sends between host and device."""

import os
import subprocess
import sys
from pathlib import Path

import cupy_names
import numpy as np
import pytest

import lora_np
from lora_np import backend
from lora_np.vectors.derivatives import architectures

PACKAGE = Path(lora_np.__file__).parent
on_standin = pytest.mark.skipif(backend.backend_name == "numpy", reason="NumPy has no device")


def python(code, *, backend=None, first=()):
    """Runs code in a process of its own, with LORA_NP_BACKEND and the folders that come first on its path."""
    path = [
        *map(str, first),
        str(PACKAGE.parent),
        *(p for p in sys.path if p and Path(p).resolve() != cupy_names.STANDIN),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    environment.pop("LORA_NP_BACKEND", None)
    if backend is not None:
        environment["LORA_NP_BACKEND"] = backend
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


NAME = "import lora_np; print(lora_np.backend_name, lora_np.backend.xp.__name__)"
MISSING = "raise ImportError('there is no CuPy here')"
COUNT = """
class cuda:
    class runtime:
        class CUDARuntimeError(RuntimeError):
            pass

        @staticmethod
        def getDeviceCount():
            {body}
"""
NO_DEVICE = COUNT.format(body="raise cuda.runtime.CUDARuntimeError('no CUDA-capable device is detected')")
NO_GPU = COUNT.format(body="return 0")


@pytest.fixture
def fake(tmp_path):
    """Puts a module named cupy, of the given source, into a folder."""

    def make(source):
        (tmp_path / "cupy.py").write_text(source)
        return [tmp_path]

    return make


# ---- the choice ----


@pytest.mark.parametrize("wanted", [None, "numpy"])
def test_numpy_is_the_default_and_imports_no_cupy(wanted, fake):
    found = python(NAME, backend=wanted, first=fake("raise SystemExit('cupy was imported')"))
    assert (found.stdout, found.returncode) == ("numpy numpy\n", 0), found.stderr


def test_cupy_is_taken_where_it_is_wanted():
    for wanted in ("cupy", "auto"):
        found = python(NAME, backend=wanted, first=[cupy_names.STANDIN])
        assert (found.stdout, found.returncode) == ("cupy cupy\n", 0), found.stderr


@pytest.mark.parametrize("wanted", ["torch", "CUPY", ""])
def test_another_name_is_refused(wanted):
    found = python(NAME, backend=wanted)
    assert found.returncode == 1
    assert found.stderr.endswith(f"ValueError: LORA_NP_BACKEND: expected numpy, cupy or auto, got {wanted!r}\n")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (MISSING, ["CuPy is not installed", "pip install cupy-cuda12x", "pip install cupy-cuda13x"]),
        (NO_DEVICE, ["finds no GPU", "no CUDA-capable device is detected", "driver", "LORA_NP_BACKEND=numpy"]),
        (NO_GPU, ["this machine has no GPU", "LORA_NP_BACKEND=numpy"]),
    ],
    ids=["no CuPy", "no driver", "no GPU"],
)
def test_cupy_that_cannot_be_had_is_one_clear_error(source, says, fake):
    first = fake(source)
    found = python(NAME, backend="cupy", first=first)
    message = found.stderr.splitlines()[-1]
    assert found.returncode == 1
    assert message.startswith("ImportError: LORA_NP_BACKEND=cupy: ")
    assert all(part in message for part in says)
    assert python(NAME, backend="auto", first=first).stdout == "numpy numpy\n"


@pytest.mark.parametrize("wanted", ["cupy", "torch"])
def test_the_command_line_says_it_in_one_line(wanted, fake):
    """The package is what fails to be imported: there is no command yet that could say it."""
    code = "import runpy, sys; sys.argv = ['lora-np', '--version']; from lora_np.cli import main; sys.exit(main())"
    script = fake(MISSING)[0] / "lora-np"
    script.write_text(code)
    found = python(f"import runpy, sys; sys.argv = [{str(script)!r}]; runpy.run_path({str(script)!r})", backend=wanted,
                   first=[script.parent])  # fmt: skip
    assert found.returncode == 2
    assert found.stderr.startswith("lora-np: LORA_NP_BACKEND")
    assert found.stderr.count("\n") == 1


def test_a_mistake_of_ours_while_importing_has_its_trace(tmp_path):
    code = "import sys; sys.argv = ['lora-np']; import lora_np; raise KeyError('ours')"
    found = python(code)
    assert found.returncode == 1
    assert "Traceback" in found.stderr


def test_no_other_module_imports_cupy():
    importers = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if "import cupy" in path.read_text() or "from cupy" in path.read_text()
    }
    assert importers == {"backend.py"}


# ---- what it gives ----


def test_asnumpy():
    a = backend.xp.arange(6.0).reshape(2, 3)
    host = backend.asnumpy(a)
    assert type(host) is np.ndarray
    assert host.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert backend.asnumpy(host) is host
    assert backend.asnumpy([1, 2]).tolist() == [1, 2]


def test_read_only():
    own = np.arange(3.0)
    view = backend.read_only(own)
    assert backend.asnumpy(view).tolist() == [0, 1, 2]
    assert own.flags.writeable
    if backend.backend_name == "numpy":
        assert np.shares_memory(own, view)
        assert not view.flags.writeable


@pytest.mark.parametrize(
    ("rows", "width", "expected"),
    [
        (10, 8, [4, 4, 2]),
        (8, 8, [4, 4]),
        (3, 8, [3]),
        (3, 100, [1, 1, 1]),
        (40, 0, [32, 8]),
        (0, 8, []),
    ],
)
def test_blocks(rows, width, expected, monkeypatch):
    """Rows of at most so many elements, one at least; all rows at once on a GPU."""
    monkeypatch.setattr(backend, "CACHE_ELEMENTS", 32)
    parts = list(backend.blocks(rows, width))
    if backend.backend_name == "cupy":
        expected = [rows] if rows else []
    assert [part.stop - part.start for part in parts] == expected
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(rows))


# ---- what CuPy has ----


@pytest.mark.skipif(not cupy_names.real_cupy_installed(), reason="real CuPy is not installed")
def test_every_name_and_keyword_exists_in_cupy():
    uses = cupy_names.xp_uses(PACKAGE) | cupy_names.xp_uses(Path(__file__).parents[1] / "bench")
    assert len(uses) > 30
    assert cupy_names.missing_in_cupy(uses) == []


# ---- copies of a training step ----

STEP = """
import sys
from dataclasses import replace
import numpy as np
import lora_np as ln
from lora_np.vectors.derivatives import architectures, example_batch
from lora_np.backend import xp

for name, config in architectures().items():
    for N, layers, masked, dropout in [(2, 1, False, None), (2, 3, False, 1), (7, 3, True, None), (7, 1, True, 1)]:
        config = replace(config, n_layer=layers)
        model = ln.Model(config, ln.init_weights(config, seed=0))
        targets, p = ("q", "v", "o", "up", "embed"), 0.1 if dropout else 0.0
        lora_config = ln.LoRAConfig(r=2, targets=targets, dropout=p, bias="all")
        adapter = ln.init_adapter(model, lora_config, seed=0)
        batch = example_batch(config, N=N, T=5)
        if not masked:
            batch["mask"] = None
        rates = ln.optim.learning_rates(adapter.params, 1e-3, b_ratio=16)
        state = None
        for _ in range(2):
            xp.copies.reset()
            loss, grads = ln.loss_and_grads(model, adapter, **batch, dropout_seed=dropout)
            grads, norm = ln.optim.clip(grads, 1.0)
            params, state = ln.adamw(adapter.params, grads, state, lr=rates, weight_decay=0.1)
            adapter = replace(adapter, params=params)
            counts = xp.copies.to_device, xp.copies.to_host, xp.copies.syncs
            more = bool(config.n_types) + (config.head == "classify") + 3 * bool(config.n_encoder)
            print(masked, more + (len(config.rope_factors) > 1), *counts)
"""


def test_a_training_step_copies_only_its_batch_and_its_loss():
    """Tokens, counted places and targets go in, and the loss comes out.

    Types too, where there are any; a mask, with the places that it keeps; what a classifier reads; an encoder's tokens,
    mask and places; the factors of rotary's frequencies, where each has its own.

    However many layers, rows or optimizer steps; and nothing else makes the host wait.
    """
    found = python(STEP, backend="cupy", first=[cupy_names.STANDIN])
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == len(architectures()) * 4 * 2
    for line in lines:
        masked, more, to_device, to_host, syncs = line.split()
        expected = 3 + 2 * (masked == "True") + int(more)
        assert (int(to_device), int(to_host), int(syncs)) == (expected, 1, 0), line

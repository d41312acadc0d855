"""Training's state in a file: never half-written, and whatever is wrong with one is said in one line."""

import io
import json
import os
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loop import batches, make

from lora_np.training.checkpoint import load_checkpoint, save_checkpoint
from lora_np.training.loop import Settings, State, start, train


@pytest.fixture
def checkpoint(tmp_path):
    model, adapter = make()
    state = train(model, adapter, batches, Settings(steps=2, lr=1e-2))
    save_checkpoint(tmp_path / "c.npz", state, {"a": [1, None]})
    return tmp_path / "c.npz", adapter, state


@pytest.mark.parametrize("failing", ["os.replace", "os.fsync", "numpy.savez"])
def test_a_write_that_fails_leaves_the_last_checkpoint_and_nothing_else(checkpoint, monkeypatch, failing):
    path, adapter, _state = checkpoint
    before = path.read_bytes()

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    module, name = failing.split(".")
    monkeypatch.setattr({"os": os, "numpy": np}[module], name, fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, start(*make()), {})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    assert load_checkpoint(path, adapter.params)[0].step == 2


@given(st.floats(0, 1, exclude_max=True))
@settings(max_examples=min(20, settings().max_examples))
def test_a_truncated_checkpoint_is_refused_in_one_line(tmp_path_factory, part):
    folder = tmp_path_factory.mktemp("cut")
    model, adapter = make()
    save_checkpoint(folder / "c.npz", start(model, adapter), {})
    whole = (folder / "c.npz").read_bytes()
    (folder / "c.npz").write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=r"c\.npz: damaged, or not a file of ours"):
        load_checkpoint(folder / "c.npz", adapter.params)


def test_a_checkpoint_of_another_training_is_refused(checkpoint):
    path, adapter, state = checkpoint
    name = "layers.0.attn.q.A"
    with pytest.raises(ValueError, match="this training has no such parameter"):
        load_checkpoint(path, {n: p for n, p in adapter.params.items() if n != name})
    with pytest.raises(ValueError, match="not a whole checkpoint: it lacks"):
        load_checkpoint(path, {**adapter.params, "head.weight": adapter.params[name]})
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.q\.A: expected float32 \(1, 8\), got float32 \(2, 8\)"):
        load_checkpoint(path, {**adapter.params, name: adapter.params[name][:1]})
    with pytest.raises(ValueError, match="expected float64"):
        load_checkpoint(path, make("float64")[1].params)
    save_checkpoint(path, State(1, state.params, None), {})
    with pytest.raises(ValueError, match="not a whole checkpoint: it lacks"):
        load_checkpoint(path, adapter.params)
    with pytest.raises(FileNotFoundError, match=r"none\.npz: no such file"):
        load_checkpoint(path.with_name("none.npz"), adapter.params)


def test_hostile_checkpoints_are_refused_and_nothing_in_them_is_run(checkpoint):
    path, adapter, _ = checkpoint
    np.savez(path, header=np.array([print], dtype=object))
    with pytest.raises(ValueError, match="damaged, or not a file of ours"):
        load_checkpoint(path, adapter.params)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("header.npy", bytes(10_000_000))
    with pytest.raises(ValueError, match="expected arrays that are not compressed"):
        load_checkpoint(path, adapter.params)
    path.write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ValueError, match="damaged, or not a file of ours"):
        load_checkpoint(path, adapter.params)


def test_an_array_that_says_it_is_larger_than_the_file_takes_no_memory(checkpoint):
    """Its own header may claim any shape, and the archive any size."""
    path, adapter, _ = checkpoint
    array = io.BytesIO()
    np.save(array, np.zeros(4, np.float32))
    claim = array.getvalue().replace(b"'shape': (4,), }" + b" " * 11, b"'shape': (400000000000,), }")
    assert claim != array.getvalue()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("param/x.npy", claim)
    with pytest.raises(ValueError, match=r"param/x\.npy: shape \(400000000000,\) does not fit its"):
        load_checkpoint(path, adapter.params)


@pytest.mark.parametrize(
    "header",
    [{}, {"format": 2, "step": 1, "about": {}}, {"format": 1, "step": -1, "about": {}}, {"format": 1, "step": 1}],
)
def test_a_header_that_says_too_little_is_refused(checkpoint, header):
    path, adapter, _ = checkpoint
    np.savez(path, header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"c\.npz: header: expected format 1, a step and what it is about"):
        load_checkpoint(path, adapter.params)

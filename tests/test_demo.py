"""The embedded base: made once, kept under a key of what it was made from, and the same whenever it is made."""

from dataclasses import replace

import numpy as np
import pytest

import lora_np as ln
from lora_np import demo
from lora_np.backend import asnumpy

TINY = replace(
    demo.QUICK,
    config=ln.Config(256, 16, n_layer=1, n_head=2, d_model=16, d_ff=16),
    pretrain=replace(demo.QUICK.pretrain, steps=20),
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_NP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def nothing(progress):
    pass


def test_the_base_is_trained_once_and_kept(cache):
    seen = []
    folder, there = demo.base_folder(seen.append, TINY)
    assert not there
    assert folder.parent == cache
    assert [one.step for one in seen] == list(range(1, 21))
    assert {(one.stage, one.steps) for one in seen} == {("pretraining", 20)}
    assert seen[-1].loss < seen[0].loss - 0.5  # it has learned
    before = (folder / "model.safetensors").read_bytes()
    assert demo.base_folder(seen.append, TINY) == (folder, True)
    assert len(seen) == 20
    assert (folder / "model.safetensors").read_bytes() == before


def test_what_is_kept_is_the_trained_model(cache):
    """Not the first weights: every matrix has moved; its configuration is the plan's."""
    folder, _ = demo.base_folder(nothing, TINY)
    base = ln.load_model(folder)
    first = ln.init_weights(TINY.config, seed=TINY.pretrain.seed)
    assert base.config == TINY.config
    assert all(not np.array_equal(asnumpy(base.weights[name]), asnumpy(w)) for name, w in first.items())


def test_the_same_plan_gives_the_same_bytes_and_another_its_own_folder(cache, tmp_path, monkeypatch):
    folder, _ = demo.base_folder(nothing, TINY)
    longer, _ = demo.base_folder(nothing, replace(TINY, pretrain=replace(TINY.pretrain, steps=3)))
    assert longer != folder
    monkeypatch.setenv("LORA_NP_CACHE", str(tmp_path / "elsewhere"))
    again, there = demo.base_folder(nothing, TINY)
    assert (again.name, there) == (folder.name, False)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LORA_NP_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/lora_np"),
        ({"XDG_CACHE_HOME": ""}, "/home/one/.cache/lora_np"),
        ({}, "/home/one/.cache/lora_np"),
    ],
)
def test_where_bases_are_kept(monkeypatch, variables, expected):
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("LORA_NP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/one", **variables}.items():
        monkeypatch.setenv(name, value)
    assert demo.cache_folder().as_posix() == expected

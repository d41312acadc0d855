"""The demonstration's base is pretrained once and kept: whole to the byte, or made anew."""

import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lora_np as ln
from lora_np import cli
from lora_np.backend import asnumpy
from lora_np.training import embedded

PLAN = replace(
    embedded.QUICK,
    config=ln.Config(256, 16, n_layer=1, n_head=1, d_model=4, d_ff=4),
    settings=replace(embedded.QUICK.settings, steps=2, warmup=1),
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    pytest.importorskip("safetensors", reason="the extra `cli` is not installed")
    monkeypatch.setenv("LORA_NP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made(stages=None):
    """The base's folder, and whether it was there; the stages that were shown."""
    return embedded.base_folder(lambda p: None if stages is None else stages.append(p.stage), PLAN)


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_base_is_made_once_and_kept(cache):
    stages = []
    folder, there = made(stages)
    assert not there
    assert set(stages) == {"pretraining"}
    before = files(cache)
    assert made(stages) == (folder, True)
    assert len(stages) == PLAN.settings.steps
    assert files(cache) == before
    assert ln.load_model(folder).config == PLAN.config


def test_each_flipped_bit_of_a_cached_base_is_seen(cache):
    made()
    (folder,) = cache.iterdir()
    assert embedded._is_whole(folder)
    rng = random.Random(0)
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        data = path.read_bytes()
        for at in range(8 * len(data)) if len(data) < 100 else rng.sample(range(8 * len(data)), 200):
            path.write_bytes(data[: at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1 :])
            assert not embedded._is_whole(folder), (path, at)
        for changed in (b"", data[:-1], data + b"\n"):
            path.write_bytes(changed)
            assert not embedded._is_whole(folder), (path, changed)
        path.unlink()
        assert not embedded._is_whole(folder), path
        path.write_bytes(data)
        assert embedded._is_whole(folder)


@pytest.mark.parametrize("damage", ["a byte", "a file less", "a file more", "empty", "a file in its place"])
def test_a_damaged_base_is_said_and_made_anew(cache, damage):
    made()
    before = files(cache)
    (folder,) = cache.iterdir()
    config = folder / "base" / "config.json"
    if damage == "a byte":
        config.write_bytes(config.read_bytes().replace(b'"n_head": 1', b'"n_head": 2'))
    elif damage == "a file less":
        config.unlink()
    elif damage == "a file more":
        (folder / "base" / "tokenizer.json").write_text("{}")
    else:
        shutil.rmtree(folder)
        folder.mkdir() if damage == "empty" else folder.write_text("")
    stages = []
    assert made(stages) == (folder / "base", False)
    assert set(stages) == {f"pretraining anew, as {folder} was damaged"}
    assert files(cache) == before
    assert os.listdir(cache) == [folder.name]


@pytest.mark.parametrize("damaged", [False, True])
def test_who_loses_the_race_takes_the_winner_s(cache, monkeypatch, damaged):
    """Another process makes the base while this one pretrains: the other's files stay."""
    if damaged:
        made()
        (folder,) = cache.iterdir()
        (folder / "sha256").write_text("")
    run = embedded.train_on_text
    kept = {}

    def slower(*args, **kwargs):
        monkeypatch.setattr(embedded, "train_on_text", run)
        assert not made()[1]
        for path in cache.rglob("*"):
            kept[path] = path.stat().st_ino
        return run(*args, **kwargs)

    monkeypatch.setattr(embedded, "train_on_text", slower)
    folder, there = made()
    assert (folder.name, there) == ("base", False)
    assert {path: path.stat().st_ino for path in cache.rglob("*")} == kept
    assert made() == (folder, True)


def test_demonstrations_at_once_share_one_cache(cache):
    argv = [sys.executable, "-m", "lora_np", "demo", "--quick"]
    for _ in range(2):
        running = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        done = [process.communicate(timeout=300) for process in running]
        assert [process.returncode for process in running] == [0, 0], done
        (folder,) = cache.iterdir()  # one, and nothing half-written
        assert embedded._is_whole(folder)
        (folder / "base" / "config.json").write_text("{}")


def test_a_cache_that_cannot_be_written_is_known_before_the_work(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_NP_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(embedded, "train_on_text", lambda *args, **kwargs: pytest.fail("it pretrains"))
    assert cli.main(["demo", "--quick"]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert str(tmp_path / "file") in err


def test_where_the_cache_is(monkeypatch, tmp_path):
    for name in ("LORA_NP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert embedded.cache_folder() == tmp_path / ".cache" / "lora_np"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert embedded.cache_folder() == tmp_path / "x" / "lora_np"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert embedded.cache_folder() == tmp_path / "Library" / "Caches" / "lora_np"
    monkeypatch.setenv("LORA_NP_CACHE", str(tmp_path / "y"))
    assert embedded.cache_folder() == tmp_path / "y"


@pytest.mark.skipif(os.name != "posix", reason="users without a home are POSIX")
def test_a_user_without_a_home_is_told_what_to_set(capsys, monkeypatch):
    import pwd

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("LORA_NP_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert cli.main(["demo", "--quick"]) == 2
    assert capsys.readouterr().err == (
        "lora-np: this user has no home to keep a base in: set LORA_NP_CACHE to a folder\n"
    )


# --- What is trained ------------------------------------------------------------------------------------------------

TINY = replace(
    embedded.QUICK,
    config=ln.Config(256, 16, n_layer=1, n_head=2, d_model=16, d_ff=16),
    settings=replace(embedded.QUICK.settings, steps=20),
)


def nothing(progress):
    pass


def test_the_base_is_trained(cache):
    seen = []
    embedded.base_folder(seen.append, TINY)
    assert [one.step for one in seen] == list(range(1, 21))
    assert {(one.stage, one.steps) for one in seen} == {("pretraining", 20)}
    assert seen[-1].loss < seen[0].loss - 0.5  # it has learned


def test_what_is_kept_is_the_trained_model(cache):
    """Not the first weights: every matrix has moved; its configuration is the plan's."""
    folder, _ = embedded.base_folder(nothing, TINY)
    base = ln.load_model(folder)
    first = ln.init_weights(TINY.config, seed=TINY.settings.seed)
    assert base.config == TINY.config
    assert all(not np.array_equal(asnumpy(base.weights[name]), asnumpy(w)) for name, w in first.items())


def test_the_same_plan_gives_the_same_bytes_and_another_its_own_folder(cache, tmp_path, monkeypatch):
    folder, _ = embedded.base_folder(nothing, TINY)
    longer, _ = embedded.base_folder(nothing, replace(TINY, settings=replace(TINY.settings, steps=3)))
    assert longer != folder
    monkeypatch.setenv("LORA_NP_CACHE", str(tmp_path / "elsewhere"))
    again, there = embedded.base_folder(nothing, TINY)
    assert (again.parent.name, there) == (folder.parent.name, False)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()

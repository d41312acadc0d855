"""Every command on files of which one is made to do harm: an answer, or one line that names a file; no traceback."""

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
from hostile import EXOTIC, GPT2, hostile_json, hostile_texts, is_safe, raw_safetensors, write_gpt2, write_peft
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_np.cli import main

FILES = ("base/config.json", "base/model.safetensors.index.json", "adapter/adapter_config.json", "adapter/task.json")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A base in one shard with its index, an adapter of PEFT's own, their merge, and data."""
    home = tmp_path_factory.mktemp("good")
    names = write_gpt2(home / "base", GPT2)
    (home / "base" / "model.safetensors").rename(home / "base" / "a.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "a.safetensors")}
    (home / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    rng = np.random.default_rng(0)
    A, B = (rng.standard_normal(shape).astype("float32") for shape in ((2, 8), (24, 2)))
    settings = {"rank_pattern": {"c_attn": 2}, "lora_dropout": 0.1, "bias": "none", "use_rslora": False}
    write_peft(home / "adapter", {"transformer.h.0.attn.c_attn": (A, B)}, r=2, alpha=4, **settings)
    (home / "adapter" / "task.json").write_text('{"name": "lm", "labels": [], "longest": 8}')
    shutil.copytree(home / "base", home / "merged")
    return home


def commands(home):
    base, adapter = ["--base", home / "base"], ["--adapter", home / "adapter"]
    return [
        ["inspect", home / "adapter", *base], ["verify", *base, *adapter, "--merged", home / "merged"],
        ["merge", *base, *adapter, "--out", home / "out"], ["convert", *base, *adapter, "--out", home / "out.npz"],
        ["inspect", home / "adapter", "--json"],
    ]  # fmt: skip


def check(home):
    """Each command ends in a status, and what it shows are safe lines; an error is one, and names a file."""
    for argv in commands(home):
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            status = main([str(a) for a in argv])
        out, err = out.getvalue(), err.getvalue()
        assert all(map(is_safe, (out + err).split("\n")))
        assert "NaN" not in out or "--json" not in argv
        if status == 2:
            assert len(err.splitlines()) == 1
            assert str(home) in err
            assert not out
        else:
            assert status in (0, 1)
            assert not err
        for path in home.glob("out*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def copy(good, tmp_path_factory):
    home = tmp_path_factory.mktemp("bad") / "home"
    shutil.copytree(good, home)
    return home


def test_the_good_files_are_good(good, tmp_path_factory):
    home = copy(good, tmp_path_factory)
    check(home)
    assert main([str(a) for a in commands(home)[2]]) == 0


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
@settings(max_examples=min(25, settings().max_examples))
def test_json_that_is_made_to_do_harm(good, tmp_path_factory, name, data):
    home = copy(good, tmp_path_factory)
    (home / name).write_bytes(data.draw(hostile_json((home / name).read_text())))
    check(home)


@given(data=st.data())
@settings(max_examples=min(25, settings().max_examples))
def test_tensors_of_other_names_dtypes_and_shapes(good, tmp_path_factory, data):
    """In the base, the adapter or the merged model; the header fits the file, or not."""
    home = copy(good, tmp_path_factory)
    path = home / data.draw(st.sampled_from(["base/a", "adapter/adapter_model", "merged/a"]))
    path = path.with_suffix(".safetensors")
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    name = data.draw(st.sampled_from(sorted(header)))
    entry = header.pop(name)
    kind = data.draw(st.sampled_from(["name", "dtype", "shape", "metadata"]))
    if kind == "dtype":
        entry["dtype"] = data.draw(st.sampled_from([*EXOTIC, "F16", "BF16", "F64", "F99", "\x1b"]))
    if kind == "shape":
        entry["shape"] = data.draw(st.sampled_from([[], [0], [2**62, 2**62], [1] * 70, [-1], [0, 2**62]]))
    if kind == "metadata":
        header["__metadata__"] = {
            "lora_np": data.draw(st.sampled_from(["{}", "[", '{"format": 1, "format": 1}', "\x1b"]))
        }
    new_name = data.draw(hostile_texts()) if kind == "name" else name
    header[new_name.encode("utf-8", "replace").decode()] = entry
    raw_safetensors(path, header, raw[8 + length :])
    check(home)

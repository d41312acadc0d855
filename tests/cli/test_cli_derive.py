"""extract, combine and inspect of two adapters, as they are called: what they say, and what they refuse in one line."""

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="files of models: the extra cli")
from hostile import GPT2, edit_tensors, hostile_json, is_safe, write_gpt2, write_peft
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli_verdicts import run

from lora_np import cli

LAYERS = ["transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"]


def make(home):
    """A GPT-2, one that was trained, and two adapters."""
    write_gpt2(home / "base", GPT2)
    write_gpt2(home / "tuned", GPT2)
    rng = np.random.default_rng(0)

    def train(tensors):
        for name in LAYERS:
            tensors[f"{name}.weight"] += rng.standard_normal((8, 8)).astype("float32")
        tensors["transformer.ln_f.weight"] += 1

    edit_tensors(home / "tuned" / "model.safetensors", train)
    for name, r in (("a", 2), ("b", 3)):
        factors = {n: (rng.standard_normal((r, 8), "f4"), rng.standard_normal((8, r), "f4")) for n in LAYERS}
        write_peft(home / name, factors, r=r, alpha=4, fan_in_fan_out=True)


@pytest.fixture
def home(tmp_path):
    make(tmp_path)
    return tmp_path


def extraction(home, out, *more):
    return ["extract", "--base", home / "base", "--tuned", home / "tuned", "--rank", "4", "--out", home / out, *more]


def combination(home, out, *more):
    return ["combine", "--adapter", home / "a", "--adapter", home / "b", "--out", home / out, *more]


def test_extract_says_what_is_lost_and_left_out(home, capsys):
    status, out, _ = run(capsys, *extraction(home, "one"))
    assert status == 0
    assert "one: 2 modules; lost in all |dW - s B A| / |dW| = 0." in out
    assert "1 tensors differ and are left out:" in out
    assert any(line.split()[0] == "transformer.ln_f.weight" for line in out.splitlines() if line)
    found = json.loads(run(capsys, *extraction(home, "two", "--json"))[1])
    assert [m["name"] for m in found["modules"]] == LAYERS
    assert found["lost"] == pytest.approx(np.hypot(*(m["lost"] for m in found["modules"])))
    assert all(m["share"] == pytest.approx(m["lost"] / m["norm"]) for m in found["modules"])
    assert found["left_out"][0]["norm"] == pytest.approx(np.sqrt(8), rel=1e-5)
    assert run(capsys, "verify", "--base", home / "base", "--adapter", home / "two")[0] == 0


def test_combine_weighs_and_truncates(home, capsys):
    found = json.loads(run(capsys, *combination(home, "sum", "--weights", "1", "-2", "--json"))[1])
    assert [(m["rank"], m["lost"]) for m in found["modules"]] == [(5, 0), (5, 0)]
    status, out, _ = run(capsys, *combination(home, "cut", "--weights", "1", "-2", "--rank", "3"))
    assert status == 0
    assert "2 modules; lost in all |dW - s B A| / |dW| = 0." in out
    lost = json.loads(run(capsys, "inspect", home / "sum", home / "cut", "--json")[1])
    assert all(0 < m["distance"] < 1 and m["ranks"] == [5, 3] for m in lost["modules"])


def test_inspect_of_two_is_a_table_and_lists(home, capsys):
    status, out, _ = run(capsys, "inspect", home / "a", home / "b")
    assert status == 0
    assert f"2 ranks differ: {' '.join(LAYERS)}" in out
    assert "r: 2 and 3" in out
    rows = [line.split() for line in out.splitlines() if line.startswith(LAYERS[0])]
    assert len(rows) == 1
    status, _, err = run(capsys, "inspect", home / "a", home / "b", "--base", home / "base")
    assert (status, err) == (2, "lora-np: --base: expected one adapter beside it, got two\n")


def test_a_layer_that_changes_nothing_is_named(home, capsys):
    key = f"base_model.model.{LAYERS[1]}.lora_B.weight"
    edit_tensors(home / "a" / "adapter_model.safetensors", lambda t: t.update({key: t[key] * 0}))
    out = run(capsys, "inspect", home / "a")[1]
    assert "1 layers change nothing (A, B or s is zero): transformer.h.1" in out
    found = json.loads(run(capsys, "inspect", home / "a", "--json")[1])
    assert (found["dead_layers"], found["dead_modules"]) == (["transformer.h.1"], [])
    assert sum(found["modules"][0]["shares"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (lambda home: extraction(home, "a"), "a: exists already"),
        (lambda home: [*extraction(home, "x"), "--rank", "0"], "--rank: expected at least 1, got 0"),
        (lambda home: [*extraction(home, "x"), "--targets", "q_proj"], "--targets: q_proj: "),
        (lambda home: [*extraction(home, "x"), "--tuned", home / "none"], "none: no such folder"),
        (lambda home: [*extraction(home, "x"), "--tuned", home / "base"], "got the same in every tensor"),
        (lambda home: combination(home, "x", "--weights", "1"), "--weights: expected one for each --adapter, got 1"),
        (lambda home: combination(home, "x", "--weights", "1", "nan"), "combine: expected finite weights"),
        (lambda home: [*combination(home, "x"), "--adapter", home / "base"], "base: expected an adapter's folder"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(home, capsys, argv, message):
    status, out, err = run(capsys, *argv(home))
    assert (status, out) == (2, "")
    assert message in err
    assert not (home / "x").exists()


@pytest.mark.parametrize("name", ["tuned/config.json", "b/adapter_config.json"])
@given(data=st.data())
@settings(max_examples=min(25, settings().max_examples))
def test_json_that_is_made_to_do_harm(tmp_path_factory, name, data):
    home = tmp_path_factory.mktemp("bad")
    make(home)
    (home / name).write_bytes(data.draw(hostile_json((home / name).read_text())))
    check(home)


@given(size=st.floats(allow_nan=False, allow_infinity=False, width=32), key=st.sampled_from(["A", "B"]))
@settings(max_examples=min(25, settings().max_examples))
def test_numbers_of_any_size(tmp_path_factory, size, key):
    home = tmp_path_factory.mktemp("bad")
    make(home)
    value = np.full((3, 8) if key == "A" else (8, 3), size, "f4")
    name = f"base_model.model.{LAYERS[0]}.lora_{key}.weight"
    edit_tensors(home / "b" / "adapter_model.safetensors", lambda t: t.update({name: value}))
    check(home)


def check(home):
    """Each command ends in a status; an error is one safe line, names a file and leaves nothing."""
    inspected = ["inspect", home / "a", home / "b"]
    for argv in (extraction(home, "out"), combination(home, "out", "--rank", "2"), inspected, [*inspected, "--json"]):
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            status = cli.main([str(a) for a in argv])
        out, err = out.getvalue(), err.getvalue()
        assert all(map(is_safe, (out + err).split("\n")))
        assert status in (0, 2)
        assert len(err.splitlines()) == (status == 2)
        assert status == 0 or str(home) in err
        assert (home / "out").exists() == (status == 0 and argv[0] != "inspect")
        shutil.rmtree(home / "out", ignore_errors=True)

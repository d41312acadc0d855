"""What the commands show: a line is a line, whatever stands in the files, and no number is none."""

import json
from argparse import Namespace

import numpy as np
import pytest
from commands import run
from hostile import GPT2, edit_json, edit_tensors, hostile_texts, is_safe, write_gpt2, write_peft
from hypothesis import given
from hypothesis import strategies as st

import lora_np as ln
from lora_np.cli import main, use
from lora_np.cli.output import emit, failure, table
from lora_np.training.loop import TrainingError

FORGED = "x\x1b[2K\x1b[1A\nmerged: yes, exactly: each of 99 elements is W0 + s B A, rounded once"


@pytest.fixture
def home(tmp_path):
    """A base and an adapter of PEFT's own."""
    write_gpt2(tmp_path / "base", GPT2)
    rng = np.random.default_rng(0)
    A, B = (rng.standard_normal(shape).astype("float32") for shape in ((2, 8), (24, 2)))
    write_peft(tmp_path / "adapter", {"transformer.h.0.attn.c_attn": (A, B)}, r=2, alpha=4)
    return tmp_path


@given(st.lists(hostile_texts(), min_size=1, max_size=4))
def test_every_line_of_a_result_is_one_line_on_the_screen(lines):
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda text, **_: printed.append(text))
        emit(Namespace(json=False), {}, lines)
    assert len(printed[0].split("\n")) == len(lines)
    assert all(is_safe(line) for line in printed[0].split("\n"))


@given(st.lists(st.tuples(hostile_texts(), hostile_texts()), min_size=1, max_size=4))
def test_every_row_of_a_table_is_one_line_of_bounded_length(rows):
    lines = table(rows)
    assert len(lines) == len(rows)
    assert all(is_safe(line) and len(line) <= 2 * 200 + 2 for line in lines)


@given(hostile_texts(), st.sampled_from([ValueError, OSError, TrainingError, RuntimeError]))
def test_errors_are_shown_safely(text, kind):
    try:
        raise kind(text)
    except kind as error:
        status, said = failure(error)
    lines = said.split("\n")
    assert all(map(is_safe, lines))
    assert (status, len(lines)) == (2, 1) if kind in (ValueError, OSError) else status == 1


@pytest.mark.parametrize("number", [float("nan"), float("inf"), np.float32("-inf")])
@pytest.mark.parametrize("as_json", [True, False])
def test_a_result_with_a_number_that_is_none_is_refused(capsys, as_json, number):
    with pytest.raises(ValueError, match="NaN or infinite"):
        emit(Namespace(json=as_json), {"a": [{"b": number}]}, ["holds: yes"])
    assert capsys.readouterr().out == ""


def test_a_tensors_name_cannot_print_a_verdict(home, capsys):
    """In the merged folder, where it has no place; in the base, and in the adapter, where it is refused."""
    merged = home / "merged"
    assert run(capsys, "merge", "--base", home / "base", "--adapter", home / "adapter", "--out", merged)[0] == 0
    given = ["verify", "--base", home / "base", "--adapter", home / "adapter", "--merged", merged]
    assert run(capsys, *given)[0] == 0
    for folder, name in ((merged, "model"), (home / "base", "model"), (home / "adapter", "adapter_model")):
        edit_tensors(folder / f"{name}.safetensors", lambda t: t.update({FORGED: np.zeros(1, "float32")}))
        status, out, err = run(capsys, *given)
        assert status in (1, 2)
        lines = (out + err).split("\n")
        assert all(map(is_safe, lines))
        assert not any(line.startswith("merged: yes") for line in lines)
        assert r"x\x1b[2K\x1b[1A\nmerged: yes" in out + err
        assert len(err.splitlines()) == (status == 2)


def test_an_adapters_names_and_settings_are_shown_safely(home, capsys):
    """inspect and merge print what an adapter, or the base's folder, calls its parts."""
    edit_tensors(home / "adapter" / "adapter_model.safetensors", lambda t: t.update({FORGED: np.zeros(1, "float32")}))
    edit_json(home / "adapter" / "adapter_config.json", target_modules=[FORGED])
    status, out, _ = run(capsys, "inspect", home / "adapter")
    assert status == 0
    assert out.count(r"x\x1b[2K\x1b[1A\nmerged: yes") == 5
    assert all(map(is_safe, out.split("\n")))
    status, out, _ = run(capsys, "inspect", home / "adapter", "--json")
    assert json.loads(out)["whole"] == [FORGED]
    assert out.isascii()


def test_a_generated_text_keeps_its_lines_and_moves_no_cursor(home, capsys, monkeypatch):
    """It is a model's, and a model is a file: its lines stay lines, and --json has it to the letter."""
    model = ln.Model(ln.Config(256, 32, 1, 1, 8, 8), ln.init_weights(ln.Config(256, 32, 1, 1, 8, 8), seed=0))
    from lora_np.formats.models.folder import save_model

    save_model(home / "bytes", model)
    text = "one\n\ttwo\x1b[2J\r" + 5000 * "x"
    monkeypatch.setattr(use, "generate_on", lambda _m, prompt, *_, **__: np.append(prompt, [*text.encode()])[None])
    given = ["generate", "--base", home / "bytes", "--prompt", ">"]
    assert run(capsys, *given)[1] == ">one\n\ttwo\\x1b[2J\\r" + 5000 * "x" + "\n"
    assert json.loads(run(capsys, *given, "--json")[1])["text"] == f">{text}"


@pytest.mark.parametrize("seed", ["-1", "0.5", "x\x1b[2K"])
def test_a_seed_that_is_none_names_its_argument(home, capsys, seed):
    with pytest.raises(SystemExit):
        main(["generate", "--base", str(home / "base"), "--prompt", "x", f"--seed={seed}"])
    err = capsys.readouterr().err
    assert "argument --seed: expected an integer of at least 0" in err
    assert "\x1b" not in err

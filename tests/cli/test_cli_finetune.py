"""lora-np finetune: on from an adapter, stopped and told how to go on, and what it cannot write said at the start."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import one_line, run

import lora_np as ln
from lora_np import cli
from lora_np.backend import asnumpy

posix = pytest.mark.skipif(os.name != "posix", reason="signals and terminals are POSIX")
CONFIG = ln.Config(256, 32, n_layer=2, n_head=2, d_model=16, d_ff=32)
LABELLED = "".join(f"{'abc' if i % 2 else 'xyz'} {i}\t{'low' if i % 2 else 'high'}\n" for i in range(60))
TIMEOUT = 300  # seconds: longer than anything here takes, or it hangs


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, a text, a file of labels, and an adapter trained on each."""
    pytest.importorskip("safetensors", reason="the extra `cli` is not installed")
    folder = tmp_path_factory.mktemp("home")
    ln.save_model(folder / "base", ln.Model(CONFIG, ln.init_weights(CONFIG, seed=0)))
    (folder / "text").write_text("the quick brown fox jumps over the lazy dog; " * 60)
    (folder / "labels").write_text(LABELLED)
    (folder / "more").write_text(LABELLED.replace("low", "mid", 3))
    assert cli.main(finetune(folder, "lm")) == 0
    assert cli.main(finetune(folder, "classify", "--task", "classify", data="labels")) == 0
    return folder


def finetune(home, out, *more, data="text", steps=20):
    return [
        "finetune", "--data", f"{home / data}", "--base", f"{home / 'base'}", "--out", f"{home / out}", "--batch", "4",
        "--window", "16", "--every", "5", "--steps", f"{steps}", "--lr", "0.05", *map(str, more),
    ]  # fmt: skip


# --- DoRA ---------------------------------------------------------------------------------------------------------


@pytest.mark.proves("L10")
def test_dora_trains_magnitudes_and_goes_on_with_them(home, tmp_path, capsys):
    argv = finetune(home, tmp_path / "dora", "--dora", "--targets", "qkv", "--r", "2")
    assert run(capsys, *argv)[0] == 0
    model = ln.load_model(home / "base")
    found = ln.load_adapter(tmp_path / "dora", model)
    start = ln.init_adapter(model, found.config, seed=0)
    assert found.config.dora
    for name in ("layers.0.attn.qkv.m", "layers.1.attn.qkv.m"):
        moved = np.abs(asnumpy(found.params[name]) / asnumpy(start.params[name]) - 1)
        assert moved.max() > 1e-2
    given = ["--base", home / "base", "--adapter", tmp_path / "dora"]
    assert run(capsys, "merge", *given, "--out", tmp_path / "merged")[0] == 0
    status, out, _ = run(capsys, "verify", *given, "--merged", tmp_path / "merged")
    assert status == 0
    assert "is (m / c) (W0 + s B A), rounded once" in out
    assert "DoRA: W' = (m / c) (W0 + s B A), row by row; |s B A| is without m" in run(capsys, "inspect", given[-1])[1]
    argv = finetune(home, tmp_path / "on", "--adapter", tmp_path / "dora", steps=1)
    assert run(capsys, *argv)[0] == 0
    assert ln.load_adapter(tmp_path / "on", model).config == found.config


def test_dora_that_no_file_holds_is_refused_before_the_work(home, capsys):
    """On GPT-2's one matrix of q, k and v, the default targets q and v leave k's rows out."""
    message = one_line(capsys, *finetune(home, "never", "--dora"))
    assert "layers.0.attn.qkv is one matrix in PEFT, each of whose rows DoRA scales" in message
    assert not (home / "never").exists()
    message = one_line(capsys, *finetune(home, "never", "--dora", "--adapter", home / "lm"))
    assert "expected --dora False, or none; got --dora True" in message


# --- On from an adapter ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["lm", "classify"])
def test_training_goes_on_from_an_adapter_as_it_is(home, tmp_path, capsys, task):
    """Its configuration, task and labels need not be said; what is told as before is its loss."""
    data = home / ("text" if task == "lm" else "labels")
    given = ["--base", home / "base", "--data", data]
    argv = ["finetune", *given, "--out", tmp_path / "on", "--adapter", home / task, "--steps", "5", "--batch", "4"]
    status, out, _ = run(capsys, *argv, "--dev", data, "--json")
    result = json.loads(out)
    assert status == 0
    evaluated = json.loads(run(capsys, "eval", *given, "--adapter", home / task, "--json", "--windows", "999")[1])
    assert result["labels"] == ([] if task == "lm" else ["high", "low"])
    assert result["curve"][0]["loss"] == result["loss"]["start"]
    if task == "classify":
        assert result["loss"]["start"] == pytest.approx(evaluated["losses"]["adapter"], rel=1e-5)
    for name in ("task.json", "adapter_config.json"):
        assert (tmp_path / "on" / name).read_bytes() == (home / task / name).read_bytes()


@pytest.mark.parametrize("ending", [".npz", ".safetensors", ".gguf"])
def test_a_start_may_be_in_any_format(home, tmp_path, capsys, ending):
    if ending == ".gguf":
        pytest.importorskip("gguf", reason="GGUF files: the extra models")
    start = tmp_path / f"start{ending}"
    model = ln.load_model(home / "base")
    adapter = ln.init_adapter(model, ln.LoRAConfig(r=2, alpha=6, targets=("o", "up")), seed=3)
    ln.save_adapter(start, adapter, model)
    argv = finetune(home, tmp_path / "out", "--adapter", start, "--lr", "1e-30", steps=1)
    assert run(capsys, *argv)[0] == 0
    found = ln.load_adapter(tmp_path / "out", model)
    assert found.config == ln.load_adapter(start, model).config
    for name, value in adapter.params.items():
        np.testing.assert_allclose(asnumpy(found.params[name]), asnumpy(value), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("task", "more", "message"),
    [
        ("lm", ["--r", "4"], r"lm: training goes on from it as it is: expected --r 8, or none; got --r 4$"),
        (
            "lm",
            ["--targets", "q,k", "--alpha", "1"],
            r"expected --alpha 16 --targets q v, or none; got --alpha 1 --targets q k$",
        ),
        ("lm", ["--task", "classify"], r"--task: expected lm, as .*lm.task\.json has it, got classify$"),
        ("classify", ["--data", "more"], r"more: expected the labels of .*classify, high low; got also mid$"),
        ("lm", ["--out", "lm"], r"--out: expected another folder than --adapter, .*lm, which stays as it is$"),
        ("lm", ["--out", "lm", "--resume"], r"--out: expected another folder than --adapter"),
    ],
)
def test_what_contradicts_the_start_is_refused(home, capsys, task, more, message):
    more = [home / word if word in ("more", "lm") else word for word in more]
    argv = [*finetune(home, "never", data="text" if task == "lm" else "labels"), "--adapter", home / task, *more]
    assert re.search(message, one_line(capsys, *argv))
    assert not (home / "never").exists()


def test_labels_that_only_weights_tell_are_counted(home, tmp_path, capsys):
    shutil.copytree(home / "classify", tmp_path / "start", ignore=shutil.ignore_patterns("task.json"))
    argv = finetune(home, tmp_path / "out", "--adapter", tmp_path / "start", "--task", "classify", data="more")
    expected = "expected a model for task classify with 3 labels, as the data has: high low mid; got head 'classify'"
    assert expected in one_line(capsys, *argv)


def test_what_agrees_with_the_start_and_another_dropout_are_taken(home, tmp_path, capsys):
    more = ["--adapter", home / "lm", "--r", "8", "--alpha", "16", "--targets", "v,q_proj", "--dropout", "0.25"]
    assert run(capsys, *finetune(home, tmp_path / "out", *more, steps=1))[0] == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_dropout"] == 0.25


# --- The end of a run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("held_out", "is_worse"), [("labels", True), ("text", False)])
def test_a_run_that_ends_worse_than_it_began_says_so(home, tmp_path, capsys, held_out, is_worse):
    """As where what is held out is of another kind than what is learned."""
    argv = finetune(home, tmp_path / "out", "--dev", home / held_out, "--targets", "all,head", steps=40)
    _, out, _ = run(capsys, *argv, "--json")
    result = json.loads(out)
    losses = [point["loss"] for point in result["curve"]]
    assert result["best"] == 5 * int(np.argmin(losses))
    shutil.rmtree(tmp_path / "out")
    lines = [line for line in run(capsys, *argv)[1].splitlines() if line.startswith("warning: ")]
    assert lines == ([] if result["warning"] is None else [f"warning: {result['warning']}"])
    assert bool(lines) == (losses[-1] > losses[0]) == is_worse


@posix
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_says_how_to_go_on_and_does(home, tmp_path, capsys, signum):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_np", *finetune(home, out, steps=10**6)], stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + TIMEOUT
    while not (out / "checkpoint.npz").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signum)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    last = err.splitlines()[-1]
    found = re.fullmatch(
        r"lora-np: interrupted at step (\d+); the checkpoint is of step (\d+): go on with the same line and --resume",
        last,
    )
    assert found, last
    step, saved = map(int, found.groups())
    assert saved % 5 == 0
    assert saved <= step < saved + 10
    error = one_line(capsys, *finetune(home, out, "--resume", "--r", "4"))
    assert "of another job (the checkpoint's -> this one's): r: 8 -> 4, steps: 1000000 -> 20\n" in error


# --- What it shows ---------------------------------------------------------------------------------------------------


def on_a_terminal(argv, columns):
    """Runs a command whose standard error is a terminal of so many columns. -> the lines that stood there"""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    call = [sys.executable, "-m", "lora_np", *argv]
    process = subprocess.Popen(call, stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    text = b""
    try:
        while part := os.read(ours, 65536):
            text += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait(TIMEOUT) == 0
    return [line.rstrip() for line in re.split(r"[\r\n]+", text.decode()) if line.strip()]


@posix
@pytest.mark.parametrize("task", ["lm", "classify"])
def test_the_progress_line_keeps_the_held_out_score_and_fits_80_columns(home, tmp_path, task):
    pytest.importorskip("tqdm", reason="the extra `cli` is not installed")
    data, score = ("labels", r"\S+ \(\d+\.\d%\)") if task == "classify" else ("text", r"\S+")
    lines = on_a_terminal(finetune(home, tmp_path / "out", "--adapter", home / task, data=data, steps=32), 80)
    bars = [line for line in lines if line.startswith("fine-tuning: ")]
    assert all(len(line) <= 80 for line in bars)
    last = re.fullmatch(rf"fine-tuning: 32/32 (\|.*\| )?00:00, loss \S+, held out {score} at 32", bars[-1])
    assert last, bars[-1]
    assert last[1] or task == "classify"
    later = [line for line in bars if re.match(r"fine-tuning: (6|7|8|9|1\d|2\d|31)/", line)]
    assert [line for line in later if not re.search(r" at (5|10|15|20|25|30)$", line)] == []


def test_lines_of_progress_fit_80_columns_even_of_long_runs():
    """The widest that may come: six digits of steps, a score with all of its own."""
    from lora_np.cli.data import short_score
    from lora_np.formats.adapters.task import Task
    from lora_np.training.loop import Score

    held_out = short_score(Task("classify", ("a", "b")), Score(0.123456789, 1.0))
    assert held_out == "0.1235 (100.0%)"
    assert len(f"fine-tuning: step 99999 of 99999, loss 0.1235, held out {held_out} at 99999") <= 80
    assert short_score(Task("lm"), Score(2.3456789, 0.5)) == "2.346"


# --- What cannot be written is said before any work ------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--out", "--plot"])
def test_what_cannot_be_written_is_said_before_the_data_is_read(home, tmp_path, capsys, option):
    if option == "--plot":
        pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    (tmp_path / "file").write_text("")
    argv = [*finetune(home, tmp_path / "new" / "out", data="nowhere"), option, tmp_path / "file" / "a.png"]
    assert one_line(capsys, *argv) == f"lora-np: {tmp_path / 'file'}: expected a folder, got a file\n"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("task", ["lm", "classify", "tag"])
def test_data_that_is_a_folder_is_said_to_be_one(home, tmp_path, capsys, task):
    argv = finetune(home, tmp_path / "out", "--task", task, data="base")
    assert one_line(capsys, *argv) == f"lora-np: {home / 'base'}: expected a file, got a folder\n"


def test_folders_that_are_missing_are_made_once_there_is_something_to_write(home, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    out, picture = tmp_path / "a" / "b", tmp_path / "c" / "d" / "loss.png"
    assert "nowhere: no such file" in one_line(capsys, *finetune(home, out, "--plot", picture, data="nowhere"))
    assert os.listdir(tmp_path) == []
    assert run(capsys, *finetune(home, out, "--plot", picture, steps=2))[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (out / "adapter_config.json").exists()


@pytest.mark.parametrize("command", ["merge", "extract", "combine", "convert", "vectors"])
def test_the_other_commands_say_it_too_and_leave_nothing(home, tmp_path, capsys, command):
    """Before they read what they were given, which is not there."""
    (tmp_path / "file").write_text("")
    more = {
        "merge": ["--base", "nowhere", "--adapter", "nowhere"],
        "extract": ["--base", "nowhere", "--tuned", "nowhere", "--rank", "1"],
        "combine": ["--adapter", "nowhere", "--adapter", "nowhere"],
        "convert": ["--base", "nowhere", "--adapter", "nowhere"],
        "vectors": [],
    }[command]
    expected = f"lora-np: {tmp_path / 'file'}: expected a folder, got a file\n"
    assert one_line(capsys, command, *more, "--out", tmp_path / "file" / "out") == expected
    if command != "vectors":
        assert "nowhere" in one_line(capsys, command, *more, "--out", tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == ["file"]

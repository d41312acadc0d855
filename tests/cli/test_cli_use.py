"""The command line where a model is used: what is named is looked at first, and what cannot be used says what can."""

import os

import pytest

import lora_np as ln
from lora_np import cli
from lora_np.formats.adapters.unfinished import CHECKPOINT
from lora_np.training import finetune

CONFIG = ln.Config(256, 32, n_layer=1, n_head=2, d_model=8, d_ff=8)


def run(capsys, *argv):
    capsys.readouterr()
    status = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return status, out, err


def refusal(capsys, *argv):
    """The one line that a command ends with that cannot be done."""
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    return err


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a base of bytes and a text."""
    pytest.importorskip("safetensors", reason="the extra `cli` is not installed")
    folder = tmp_path_factory.mktemp("home")
    ln.save_model(folder / "base", ln.Model(CONFIG, ln.init_weights(CONFIG, seed=0)))
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 20)
    return folder


# --- What is named ---------------------------------------------------------------------------------------------------


READERS = [
    ["finetune", "--out", "OUT", "--data", "PATH"],
    ["finetune", "--out", "OUT", "--task", "classify", "--data", "PATH"],
    ["finetune", "--out", "OUT", "--data", "TEXT", "--dev", "PATH"],
    ["finetune", "--out", "OUT", "--data", "TEXT", "--chat-template", "PATH"],
    ["eval", "--data", "PATH"],
    ["eval", "--data", "PATH", "--task", "tag"],
]  # fmt: skip


@pytest.fixture
def no_base(monkeypatch, tmp_path):
    """Nothing is in the cache, and making the embedded base takes too long to be done for nothing."""
    monkeypatch.setenv("LORA_NP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lora_np.training.embedded.train_on_text", lambda *_: pytest.fail("the base was made"))


@pytest.mark.parametrize("argv", READERS, ids=" ".join)
@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("folder", "expected a file, got a folder"),
        ("nothing", "no such file"),
        pytest.param(
            "pipe", "no regular file", marks=pytest.mark.skipif(os.name != "posix", reason="pipes with names are POSIX")
        ),
    ],
)
def test_what_is_no_file_is_said_before_any_work(home, tmp_path, capsys, no_base, argv, made, said):
    path = tmp_path / "path"
    if made == "folder":
        path.mkdir()
    elif made == "pipe":
        os.mkfifo(path)
    names = {"PATH": path, "TEXT": home / "text.txt", "OUT": tmp_path / "out"}
    assert f"{path}: {said}" in refusal(capsys, *(names.get(arg, arg) for arg in argv))
    assert not (tmp_path / "out").exists()


# --- Training that is not finished -----------------------------------------------------------------------------------


class Stopped(KeyboardInterrupt):
    """Whoever watched has seen enough."""


@pytest.fixture(scope="module")
def unfinished(home):
    """The folder of a training of 20 steps that was stopped when its checkpoint after 5 was written."""

    def save(*args):
        saved(*args)
        raise Stopped

    saved, out = finetune.save_checkpoint, home / "unfinished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "save_checkpoint", save)
        argv = ["finetune", "--base", home / "base", "--data", home / "text.txt", "--out", out]
        more = ["--window", "8", "--batch", "2", "--r", "2", "--every", "5", "--steps", "20"]
        assert cli.main([*map(str, argv), *more]) == 130
    assert os.listdir(out) == [CHECKPOINT]
    return out


TAKERS = [
    ["inspect", "ADAPTER"],
    ["inspect", "ADAPTER", "ADAPTER"],
    ["generate", "--adapter", "ADAPTER", "--prompt", "x"],
    ["eval", "--adapter", "ADAPTER", "--data", "TEXT"],
    ["merge", "--adapter", "ADAPTER", "--out", "OUT"],
    ["convert", "--adapter", "ADAPTER", "--out", "OUT.npz"],
    ["combine", "--adapter", "ADAPTER", "--adapter", "ADAPTER", "--out", "OUT"],
    ["verify", "--base", "BASE", "--adapter", "ADAPTER"],
    ["verify", "--base", "BASE", "--adapter", "ADAPTER", "--merged", "BASE"],
]  # fmt: skip


@pytest.mark.parametrize("argv", TAKERS, ids=" ".join)
def test_an_adapter_that_is_still_trained_is_refused_with_its_step_and_how_to_go_on(
    home, unfinished, tmp_path, capsys, no_base, argv
):
    names = {"ADAPTER": unfinished, "TEXT": home / "text.txt", "BASE": home / "base", "OUT": tmp_path / "out"}
    line = refusal(capsys, *(names.get(arg, arg) for arg in argv))
    expected = "training is not finished: its checkpoint is at step 5 of 20; the same lora-np finetune with --resume"
    assert line.startswith(f"lora-np: {unfinished}: {expected}")
    assert "--base" not in line


@pytest.mark.parametrize("argv", TAKERS, ids=" ".join)
def test_a_model_in_an_adapters_place_is_named(home, tmp_path, capsys, no_base, argv):
    names = {"ADAPTER": home / "base", "TEXT": home / "text.txt", "BASE": home / "base", "OUT": tmp_path / "out"}
    line = refusal(capsys, *(names.get(arg, arg) for arg in argv))
    assert line.startswith(
        f"lora-np: {home / 'base'}: expected an adapter's folder, with adapter_config.json, got a mod"
    )

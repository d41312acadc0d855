"""The command line where its surroundings fail: streams that are closed or full, a poor locale, no memory, Ctrl-C."""

import json
import os
import subprocess
import sys

import pytest

import lora_np as ln
from lora_np import cli
from lora_np.cli import program
from lora_np.cli.output import failure

posix = pytest.mark.skipif(os.name != "posix", reason="descriptors, signals and limits are POSIX")
full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
FROM = [
    os.path.dirname(os.path.dirname(ln.__file__)),
    *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
]
PATHS = [os.path.abspath(path) for path in FROM]
TIMEOUT = 300  # seconds: longer than anything here takes, or it hangs


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a base, a text, and the adapter that an undisturbed run makes of them."""
    pytest.importorskip("safetensors", reason="the extra `cli` is not installed")
    folder = tmp_path_factory.mktemp("home")
    config = ln.Config(256, 16, n_layer=1, n_head=1, d_model=8, d_ff=8)
    ln.save_model(folder / "base", ln.Model(config, ln.init_weights(config, seed=0)))
    (folder / "text").write_text("the quick brown fox jumps over the lazy dog; " * 9)
    assert cli.main(finetune(folder, folder / "expected")) == 0
    return folder


def finetune(home, out, *more):
    return [
        "finetune", "--data", f"{home / 'text'}", "--base", f"{home / 'base'}", "--out", f"{out}", "--window", "8",
        "--steps", "4", "--every", "2", "--r", "2", "--held-out", "0.2", "--batch", "2", *more,
    ]  # fmt: skip


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def ends(argv, *, redirect="", before="", **env):
    """The command in a shell, with its streams as `redirect` has them. -> its status, standard output and error."""
    script = f'{before}"$@" {redirect}'
    call = ["bash", "-c", script, "bash", sys.executable, "-m", "lora_np", *map(str, argv)]
    done = subprocess.run(call, capture_output=True, timeout=TIMEOUT, check=False, env={**os.environ, **env})
    return done.returncode, done.stdout.decode(), done.stderr.decode()


# --- Streams ---------------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize(
    "redirect", ["2>&-", pytest.param("2>/dev/full", marks=full), "<&- >&- 2>&-", "<&- >/dev/null 2>&-"]
)
def test_progress_that_cannot_be_shown_ends_no_run(home, tmp_path, redirect):
    status, out, err = ends(finetune(home, tmp_path / "out"), redirect=redirect)
    assert (status, err) == (0, "")
    assert files(tmp_path / "out") == files(home / "expected")
    assert ("the adapter is in" in out) == redirect.startswith("2>")


READERLESS = """
import os, sys
from lora_np.cli import main

reader, writer = os.pipe()
os.dup2(writer, 2)
os.close(reader)
sys.exit(main(sys.argv[1:]))
"""


@posix
@pytest.mark.parametrize("argv", ["finetune", "wrong"])
def test_a_reader_that_is_gone_changes_no_status(home, tmp_path, argv):
    """Neither of a run nor of what is wrong with the command line."""
    argv = finetune(home, tmp_path / "out") if argv == "finetune" else ["finetune", "--nothing"]
    done = subprocess.run([sys.executable, "-c", READERLESS, *argv], capture_output=True, timeout=TIMEOUT, check=False)
    assert done.returncode == (2 if "--nothing" in argv else 0)
    assert "--nothing" in argv or files(tmp_path / "out") == files(home / "expected")


@posix
@full
def test_a_result_that_cannot_be_written_is_an_error_and_what_was_made_is_whole(home, tmp_path):
    status, _, err = ends(finetune(home, tmp_path / "out", "--json"), redirect=">/dev/full")
    assert status == 2
    assert err.splitlines()[-1] == "lora-np: [Errno 28] No space left on device: 'standard output'"
    assert "Exception" not in err
    assert files(tmp_path / "out") == files(home / "expected")


@posix
def test_a_reader_that_has_enough_is_said_in_one_line():
    status, out, err = ends(["gradcheck"], redirect="| head -n 1; exit ${PIPESTATUS[0]}")
    assert (status, len(out.splitlines())) == (2, 1)
    assert err == "lora-np: [Errno 32] Broken pipe: 'standard output'\n"


CLOSED = """
import os, sys
from lora_np.cli import streams

os.closerange(0, 3)
streams.prepare()
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
os.write(2, b"what a library says")
sys.stderr.write("progress")
sys.exit(file <= 2)
"""


@posix
def test_no_file_gets_the_number_of_a_stream_that_was_closed(tmp_path):
    """Else what is printed would be written into it."""
    done = subprocess.run([sys.executable, "-c", CLOSED, str(tmp_path / "a")], timeout=TIMEOUT, check=False)
    assert done.returncode == 0
    assert (tmp_path / "a").read_bytes() == b""


@posix
@pytest.mark.parametrize(
    "locale",
    [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"}],
    ids=["C", "PYTHONIOENCODING"],
)
def test_text_that_the_locale_cannot_show_is_shown_as_escapes(home, locale):
    """The same text as in UTF-8, from a prompt that is UTF-8 in either."""
    argv = ["generate", "--base", home / "base", "-n", "12", "--prompt", "é€", "--seed", "1"]
    _, text, _ = ends(argv, PYTHONUTF8="1")
    assert text.startswith("é€")
    status, out, err = ends(argv, **locale)
    assert (status, err) == (0, "")
    assert out == text.encode("ascii", "backslashreplace").decode("ascii")


# --- Memory, disks, numbers ------------------------------------------------------------------------------------------


@posix
def test_too_little_memory_is_one_line(home, tmp_path):
    status, out, err = ends(finetune(home, tmp_path / "out", "--batch", "1000000000000"), before="ulimit -v 16000000; ")
    assert (status, out) == (2, "")
    assert err.startswith("lora-np: not enough memory: Unable to allocate")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert failure(MemoryError()) == (2, "not enough memory")


@posix
def test_a_file_that_may_not_grow_is_named_and_the_run_goes_on_when_it_may(home, tmp_path):
    """At each limit: the checkpoint does not fit, or the adapter does not."""
    argv, statuses = finetune(home, tmp_path / "out"), []
    for blocks in range(1, 9):
        status, _, err = ends([*argv, "--resume"], before=f"ulimit -f {blocks}; ")
        statuses.append(status)
        if status == 0:
            break
        last = [line for line in err.splitlines() if line.startswith("lora-np: ")][-1]
        assert err.endswith(f"{last}\n") or sys.version_info < (
            3,
            11,
        )  # whose zipfile says something of its own behind it
        assert str(tmp_path / "out") in last
        assert not (tmp_path / "out").exists() or files(tmp_path / "out").keys() <= {"checkpoint.npz", "task.json"}
    assert statuses == [2] * (len(statuses) - 1) + [0]
    assert len(statuses) > 2
    assert files(tmp_path / "out") == files(home / "expected")


def integers():
    """Each option that takes an integer, with its command."""
    commands = next(action for action in program._parser()._actions if action.dest == "command").choices
    for command, parser in commands.items():
        for action in parser._actions:
            if action.type is not None and action.type.__name__ in ("int", "whole", "seed"):
                yield command, action.option_strings[0]


@pytest.mark.parametrize(("command", "option"), list(integers()))
def test_a_number_beyond_all_computation_is_refused_by_name(capsys, command, option):
    for number in ("1" + "0" * 25, "1" + "0" * 400, "-1" + "0" * 400):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, f"{option}={number}"])
        assert stop.value.code == 2
        assert f"argument {option}: expected a number up to" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", ["finetune", "generate", "gradcheck"])
def test_a_negative_seed_is_refused_by_name(capsys, command):
    with pytest.raises(SystemExit):
        cli.main([command, "--seed=-1"])
    assert "argument --seed: expected an integer of at least 0, got '-1'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["reproduce", "vectors", "convert"])
def test_an_output_that_cannot_be_written_is_known_before_the_work(home, tmp_path, capsys, monkeypatch, command):
    (tmp_path / "file").write_text("")
    for work in ("reproduce.run.parts", "cli.conformance.made", "cli.convert.load_base_for"):
        monkeypatch.setattr(f"lora_np.{work}", lambda *args: pytest.fail("it works for nothing"))
    more = ["--base", f"{home / 'base'}", "--adapter", f"{home / 'expected'}"] if command == "convert" else []
    assert cli.main([command, "--out", f"{tmp_path / 'file' / 'out'}", *more]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert str(tmp_path / "file") in err


@pytest.mark.parametrize("command", ["demo", "finetune"])
@pytest.mark.parametrize(
    ("picture", "message"),
    [("file/loss.png", "file"), ("", "expected a name for the picture, got a folder"), ("loss.none", "not supported")],
)
def test_a_picture_that_cannot_be_drawn_is_known_before_the_work(
    home, tmp_path, capsys, monkeypatch, command, picture, message
):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    monkeypatch.setattr("lora_np.training.demonstration.run", lambda *args: pytest.fail("it works for nothing"))
    (tmp_path / "file").write_text("")
    argv = finetune(home, tmp_path / "out") if command == "finetune" else ["demo"]
    assert cli.main([*argv, "--plot", f"{tmp_path / picture}"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert os.listdir(tmp_path) == ["file"]


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------

NUMPY = """
import os, signal, time
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""
SCRIPT = """
import sys
from lora_np.cli import main
sys.exit(main())
"""


@posix
@pytest.mark.parametrize("how", ["-m", "the script"])
@pytest.mark.parametrize("closed", [False, True])
def test_an_interrupt_while_libraries_are_imported_is_one_line(tmp_path, how, closed):
    (tmp_path / "numpy.py").write_text(NUMPY)
    (tmp_path / "lora-np").write_text(SCRIPT)
    path = os.pathsep.join([str(tmp_path), *PATHS])
    argv = ["-m", "lora_np"] if how == "-m" else [str(tmp_path / "lora-np")]
    call = ["bash", "-c", f'"$@" {"2>&-" if closed else ""}', "bash", sys.executable, *argv, "demo"]
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(call, capture_output=True, text=True, timeout=TIMEOUT, check=False, env=env)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == ("" if closed else "lora-np: interrupted\n")


@posix
def test_an_interrupt_later_is_one_line_too(home, tmp_path):
    script = tmp_path / "lora-np"
    script.write_text(
        "import os, signal, sys\n"
        "from lora_np.cli import learn, main\n"
        "learn.load_model = lambda *args, **more: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(main())\n"
    )
    call = [sys.executable, str(script), *finetune(home, tmp_path / "out")]
    done = subprocess.run(call, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "lora-np: interrupted; nothing is half written\n"


@posix
def test_other_programs_keep_their_own_interrupts(tmp_path):
    """A program that imports the package, as a script and as a module."""
    text = (
        "import lora_np, signal, json; print(json.dumps(signal.getsignal(signal.SIGINT) is signal.default_int_handler))"
    )
    (tmp_path / "other.py").write_text(text)
    for argv in (["-m", "other"], ["other.py"], ["-c", text]):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS)}
        done = subprocess.run(
            [sys.executable, *argv], capture_output=True, timeout=TIMEOUT, cwd=tmp_path, env=env, check=True
        )
        assert json.loads(done.stdout) is True

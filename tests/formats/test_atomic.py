"""Files are there whole or not at all, whoever else writes at the same time, and a folder is one process's."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest

from lora_np.formats.files import atomic
from lora_np.formats.files.atomic import PARTIAL, discard, expect_new, new_file, new_folder, replaced_files
from lora_np.formats.files.lock import LOCK, occupied

posix = pytest.mark.skipif(os.name != "posix", reason="permissions and signals are POSIX")


def write(folder, text="ours"):
    (folder / "a").write_text(text)


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


# --- One of several that write a new thing ---------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", ["a folder with files", "a file"])
def test_a_folder_that_came_to_be_meanwhile_is_kept(tmp_path, theirs):
    """A rename over a folder that is not empty has an error of its own, and another on another system."""
    target = tmp_path / "target"

    def write_both(folder):
        write(folder)
        if theirs == "a file":
            target.write_text("theirs")
        else:
            target.mkdir()
            write(target, "theirs")

    with (
        pytest.raises(FileExistsError, match="target: exists already; it is not written over"),
        new_folder(target) as f,
    ):
        write_both(f)
    assert set(tree(tmp_path).values()) == {"theirs"}
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_came_to_be_meanwhile_is_kept(tmp_path, monkeypatch, links):
    """With links not even one that comes to be in the moment before the name is given."""
    target = tmp_path / "target"
    link = os.link

    def late(source, name):
        target.write_text("theirs")
        if not links:
            raise OSError(errno.EPERM, "no links here")
        link(source, name)

    monkeypatch.setattr(atomic.os, "link", late)
    with pytest.raises(FileExistsError, match="target: exists already"), new_file(target) as file:
        file.write_text("ours")
    assert tree(tmp_path) == {"target": "theirs"}


def test_a_file_system_without_links_gets_new_files_too(tmp_path, monkeypatch):
    def none(source, name):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(atomic.os, "link", none)
    with new_file(tmp_path / "target") as file:
        file.write_text("ours")
    assert tree(tmp_path) == {"target": "ours"}


def test_what_cannot_be_written_is_known_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file: exists already"):
        expect_new(tmp_path / "file")
    with pytest.raises(OSError, match=r"file") as caught:
        expect_new(tmp_path / "file" / "below")
    assert not isinstance(caught.value, FileExistsError) or caught.value.errno == errno.EEXIST
    expect_new(tmp_path / "new")
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_is_discarded_is_gone_at_once(tmp_path):
    (tmp_path / "old" / "sub").mkdir(parents=True)
    write(tmp_path / "old")
    discard(tmp_path / "old")
    discard(tmp_path / "old")  # as another process did it
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("writing", [new_folder, new_file, lambda path: replaced_files(path, last="a")])
def test_a_full_disk_is_said_with_the_folder(tmp_path, writing):
    with pytest.raises(OSError, match="No space left on device") as caught, writing(tmp_path / "target"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(tmp_path) in str(caught.value)


# --- Who may read it -------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077])
def test_the_umask_alone_says_who_may_read_what_is_written(tmp_path, umask):
    pytest.importorskip("safetensors", reason="the extra `cli` is not installed")
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "new") as folder:
            write(folder)
            atomic.write_tensors(folder / "t.safetensors", {"x": np.zeros(3, np.float32)})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()}
    assert modes == dict.fromkeys(("a", "t.safetensors"), 0o666 & ~umask)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o777 & ~umask


# --- A folder that one process writes in -----------------------------------------------------------------------------

HOLD = """
import pathlib, sys, time
from lora_np.formats.files.lock import occupied

with occupied(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


@posix
def test_a_folder_is_held_until_its_process_ends_however_it_does(tmp_path):
    out = tmp_path / "out"
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "held\n"
    for _ in range(2):
        with pytest.raises(BlockingIOError, match=r"out: another process is writing there; wait for it"), occupied(out):
            raise AssertionError("two at once")
    assert os.listdir(out) == [LOCK]
    owner.kill()
    owner.communicate()
    with occupied(out) as found:
        assert found == []
        write(out)
    assert os.listdir(out) == ["a"]
    with occupied(out) as found:
        assert found == ["a"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    def killed(folder):
        write(folder)
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic.shutil, "rmtree", lambda *args, **kwargs: None)  # as if it had had no time for it
        with pytest.raises(SystemExit), replaced_files(tmp_path, last="a") as folder:
            killed(folder)
    (left,) = os.listdir(tmp_path)
    assert PARTIAL.fullmatch(left)
    for other in (".new.partial", "new.12345678.partial", ".new.1234567g.partial", "a"):
        (tmp_path / other).mkdir()
    with occupied(tmp_path) as found:
        assert found == sorted([".new.partial", "new.12345678.partial", ".new.1234567g.partial", "a"])
    assert left not in os.listdir(tmp_path)


@posix
def test_what_only_has_the_name_of_a_partial_is_somebody_elses(tmp_path):
    out, theirs = tmp_path / "out", tmp_path / "theirs"
    for folder in (out, theirs):
        folder.mkdir()
    write(theirs)
    (out / ".new.0123abcd.partial").write_text("a file")
    (out / ".new.4567abcd.partial").symlink_to(theirs)
    with occupied(out) as found:
        assert found == [".new.0123abcd.partial", ".new.4567abcd.partial"]
    assert sorted(os.listdir(out)) == found
    assert tree(theirs) == {"a": "ours"}


def test_a_folder_that_stays_empty_is_gone_if_it_was_made(tmp_path):
    with occupied(tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a" / "b").exists()
    (tmp_path / "there").mkdir()
    with occupied(tmp_path / "there"):
        pass
    assert (tmp_path / "there").is_dir()


RACE = """
import os, pathlib, sys
from lora_np.formats.files.lock import occupied

folder, begun = pathlib.Path(sys.argv[1]), os.pipe()
for _ in range(4):
    if os.fork() == 0:
        os.close(begun[1])
        os.read(begun[0], 1)  # all at once, when the writing end is closed
        for _ in range(400):
            try:
                with occupied(folder):
                    os.close(os.open(folder / "alone", os.O_CREAT | os.O_EXCL))
                    os.unlink(folder / "alone")
            except BlockingIOError:
                pass
        os._exit(0)
os.close(begun[1])
sys.exit(max(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(4)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_no_two_of_many_processes_ever_hold_a_folder(tmp_path):
    """The lock's file goes each time, so that many lock one that is no longer there: that is not holding it."""
    (tmp_path / "out").mkdir()
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # a process of one thread is forked
    argv = [sys.executable, "-c", RACE, str(tmp_path / "out")]
    done = subprocess.run(argv, timeout=300, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path / "out") == []

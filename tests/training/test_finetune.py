"""From a file to an adapter: each task learns what is there to learn, and what is held out is not learned from."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import lora_np as ln
from lora_np.backend import asnumpy
from lora_np.formats.adapters.task import Task, load_task, save_task
from lora_np.formats.files import atomic
from lora_np.training import finetune, tasks
from lora_np.training.loop import Settings, TrainingError, evaluate
from lora_np.training.text import ByteTokenizer

SMALL = {"n_positions": 24, "n_layer": 2, "n_head": 2, "d_model": 16, "d_ff": 32}
RNG = np.random.default_rng(0)


def word(letters):
    return "".join(RNG.choice(list(letters), 4))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Texts of the letters abc and xyz; the letters say the label, the tag, and what follows."""
    folder = tmp_path_factory.mktemp("files")
    kinds = {"low": "abc", "high": "xyz"}
    labelled = [(word(kinds[k]), k) for k in RNG.choice(list(kinds), 120)]
    (folder / "classify").write_text("".join(f"{text} {text}\t{label}\n" for text, label in labelled))
    (folder / "tag").write_text(
        "".join(f"{text} _ {label}\n" + "\n" * (i % 3 == 2) for i, (text, label) in enumerate(labelled))
    )
    (folder / "lm").write_text("".join(f"{text}||{label[0]}\n" for text, label in labelled))
    return folder


def learn(files, name, out, *, steps=60, resume=False, report=lambda seen: None, dev=None, lr=3e-2, **settings):
    task = tasks.task_of(name, files / name, 24)
    fields = {} if name == "lm" else {"n_labels": len(task.labels)}
    config = ln.Config(256, **SMALL, head=name, causal=name != "tag", **fields)
    weights = ln.init_weights(config, seed=0)
    weights["embed.tokens"] *= 20  # letters that lie apart, as in a model that has learned to read
    model = ln.Model(config, weights)
    data = tasks.learn_from(files / name, dev, task, ByteTokenizer(), N=16, held_out=0.2, seed=0)
    targets = ("q", "v", "up", "down", *(["embed", "head"] if name == "lm" else []))
    lora = ln.LoRAConfig(r=4, targets=targets, train_head=name != "lm")
    job = finetune.Job(task, lora, Settings(steps=steps, lr=lr, **settings), every=20)
    return model, data, finetune.finetune(model, data, out, job, resume=resume, report=report)


@pytest.mark.parametrize("name", ["classify", "tag", "lm"])
def test_each_task_learns_what_its_file_has_to_teach(files, tmp_path, name):
    """The labels follow from the letters: what is held out is right in the end, about half of it at the start."""
    model, data, done = learn(files, name, tmp_path / "out")
    assert list(done.curve) == [0, 20, 40, 60]
    assert done.curve[0].accuracy < 0.8
    assert done.curve[60].accuracy > 0.95
    assert done.curve[60].loss < 0.3 * done.curve[0].loss
    assert load_task(tmp_path / "out") == tasks.task_of(name, files / name, 24)
    again = ln.load_adapter(tmp_path / "out", model)
    assert evaluate(model, again, data.held_out) == done.curve[60]


def test_stopped_and_resumed_it_ends_in_the_same_bits(files, tmp_path):
    class Stopped(Exception):
        pass

    def stop(seen):
        if seen.step == 43:
            raise Stopped

    with pytest.raises(Stopped):
        learn(files, "classify", tmp_path / "stopped", report=stop)
    assert not (tmp_path / "stopped" / "adapter_model.safetensors").exists()
    with pytest.raises(ValueError, match="settings differs"):
        learn(files, "classify", tmp_path / "stopped", resume=True, seed=5)
    _, _, resumed = learn(files, "classify", tmp_path / "stopped", resume=True, recompute=True)  # on less memory
    _, _, straight = learn(files, "classify", tmp_path / "straight")
    assert resumed.curve == straight.curve
    for key, p in straight.adapter.params.items():
        assert asnumpy(resumed.adapter.params[key]).tobytes() == asnumpy(p).tobytes()


def stopped(files, out):
    """A folder whose run was stopped after its first checkpoint, at step 20. -> the checkpoint"""

    class Stopped(Exception):
        pass

    def stop(seen):
        if seen.step == 21:
            raise Stopped

    with pytest.raises(Stopped):
        learn(files, "lm", out, report=stop)
    return out / "checkpoint.npz"


def rewrite(path, *, header=lambda text: text, arrays=None):
    """A checkpoint with another header, as text, or other arrays."""
    with np.load(path) as file:
        found = dict(file)
    text = header(found.pop("header").tobytes().decode())
    np.savez(path, header=np.frombuffer(text.encode(), np.uint8), **{**found, **(arrays or {})})


@pytest.mark.parametrize(
    ("step", "curve", "key"),
    [
        (20, '"curve": [[0, 1.0, 0.5], [20, 1e999, 0.5]]', "curve"),
        (20, '"curve": [[0, 1.0, 0.5], [1%s, 1, 1]]' % (400 * "0"), "curve"),
        (10**400, '"curve": [[0, 1.0, 0.5], [20, 1.0, 0.5]]', "step"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_checkpoint_with_numbers_that_no_float_holds_is_refused(files, tmp_path, step, curve, key):
    path = stopped(files, tmp_path / "out")

    def header(text):
        found = json.loads(text)
        del found["about"]["curve"]
        return f'{{"format": 1, "step": {step}, "about": {json.dumps(found["about"])[:-1]}, {curve}}}}}'

    rewrite(path, header=header)
    with pytest.raises(ValueError, match=rf"checkpoint\.npz: header: not valid JSON: '{key}'"):
        learn(files, "lm", tmp_path / "out", resume=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("group", ["param", "m", "v"])
def test_a_checkpoint_with_numbers_that_are_none_is_refused(files, tmp_path, group, value):
    path = stopped(files, tmp_path / "out")
    name = f"{group}/layers.1.attn.q.B"
    with np.load(path) as file:
        array = file[name]
    array[1, 1] = value
    rewrite(path, arrays={name: array})
    with pytest.raises(ValueError, match=rf"checkpoint\.npz: {name}: holds NaN or infinite"):
        learn(files, "lm", tmp_path / "out", resume=True)


def test_training_that_diverges_leaves_no_adapter(files, tmp_path):
    with np.errstate(all="ignore"), pytest.raises(TrainingError, match="too high"):
        learn(files, "lm", tmp_path / "out", lr=1e38)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def examples_of(batches):
    """Each row of batches as it was before it was filled up, as hashable values."""
    return {
        (tuple(row[mask].tolist()), np.asarray(target).tobytes())
        for batch in batches
        for row, mask, target in zip(batch["tokens"], batch["mask"], batch["targets"], strict=True)
    }


def test_what_is_held_out_is_never_trained_on(tmp_path):
    path = tmp_path / "all.tsv"
    path.write_text("".join(f"text {i}\t{i % 3}\n" for i in range(50)))
    task = tasks.task_of("classify", path, 64)
    data = tasks.learn_from(path, None, task, ByteTokenizer(), N=8, held_out=0.3, seed=1)
    trained, held_out = examples_of(data.batch(i) for i in range(data.epoch)), examples_of(data.held_out)
    assert (len(trained), len(held_out)) == (35, 15)
    assert not trained & held_out
    other = tasks.learn_from(path, None, task, ByteTokenizer(), N=8, held_out=0.3, seed=2)
    assert examples_of(other.held_out) != held_out


def test_a_file_of_its_own_is_held_out_whole(tmp_path):
    for name, n in (("train.tsv", 20), ("dev.tsv", 7)):
        (tmp_path / name).write_text("".join(f"{name} {i}\t{i % 2}\n" for i in range(n)))
    task = tasks.task_of("classify", tmp_path / "train.tsv", 64)
    data = tasks.learn_from(
        tmp_path / "train.tsv", tmp_path / "dev.tsv", task, ByteTokenizer(), N=8, held_out=0.5, seed=1
    )
    assert len(examples_of(data.held_out)) == 7
    assert len(examples_of(data.batch(i) for i in range(data.epoch))) == 20


def test_a_plain_text_gives_windows_and_holds_its_end_out(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 90 + "b" * 30)
    task = Task("lm", longest=8)
    data = tasks.learn_from(tmp_path / "a.txt", None, task, ByteTokenizer(), N=4, held_out=0.25, seed=0)
    assert data.epoch is None
    assert set(np.unique([data.batch(i)["targets"] for i in range(20)])) == {ord("a")}
    assert set(np.unique(data.held_out[0]["tokens"])) == {ord("b")}
    (tmp_path / "dev.txt").write_text("c" * 30)
    data = tasks.learn_from(tmp_path / "a.txt", tmp_path / "dev.txt", task, ByteTokenizer(), N=4, held_out=0.25, seed=0)
    assert set(np.unique([data.batch(i)["targets"] for i in range(40)])) == {ord("a"), ord("b")}
    assert set(np.unique(data.held_out[0]["tokens"])) == {ord("c")}


def test_data_that_cannot_be_learned_from_is_refused(files, tmp_path):
    task = tasks.task_of("classify", files / "classify", 24)
    (tmp_path / "dev.tsv").write_text("abc\tlow\nabc\tother\n")
    (tmp_path / "one.tsv").write_text("abc\tlow\n")
    (tmp_path / "plain.txt").write_text("a plain text " * 30)
    lm = Task("lm", longest=8)
    for call, message in [
        (
            (files / "classify", tmp_path / "dev.tsv", task, 0.1),
            r"dev.tsv: example 2: expected a label of high low, got 'other'",
        ),
        (
            (tmp_path / "one.tsv", None, task, 0.1),
            r"one.tsv: expected examples to train on and some to hold out, got 1 and 0",
        ),
        ((files / "classify", None, task, 1.0), r"held_out: expected a part between 0 and 1, got 1.0"),
        ((files / "lm", tmp_path / "plain.txt", lm, 0.1), r"plain.txt: expected examples"),
    ]:
        path, dev, of, held_out = call
        with pytest.raises(ValueError, match=message):
            tasks.learn_from(path, dev, of, ByteTokenizer(), N=8, held_out=held_out, seed=0)
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        tasks.learn_from(files / "classify", None, task, ByteTokenizer(), N=0, held_out=0.1, seed=0)


# --- A run's folder --------------------------------------------------------------------------------------------------

# Each run is a process of its own, forked where all is imported.
FORKED = """
import itertools, os, pathlib, shutil, signal, sys
import numpy as np
import lora_np as ln
from lora_np.cli import main

home = pathlib.Path(sys.argv[1])
out = home / "out"
config = ln.Config(256, 16, n_layer=1, n_head=1, d_model=8, d_ff=8)
ln.save_model(home / "base", ln.Model(config, ln.init_weights(config, seed=0)))
(home / "text").write_text("the quick brown fox jumps over the lazy dog; " * 9)
ARGV = ["finetune", "--data", f"{home / 'text'}", "--base", f"{home / 'base'}", "--window", "8", "--steps", "2",
        "--every", "1", "--r", "2", "--dropout", "0.1", "--held-out", "0.2", "--batch", "2", "--out", f"{out}"]
sys.stdout = sys.stderr = open(os.devnull, "w")

def forked(f):
    child = os.fork()
    if child == 0:
        try:
            os._exit(f())
        finally:
            os._exit(99)
    return child

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def files():
    return {path.name: path.read_bytes() for path in out.iterdir()}

straight = None
"""

KILLED = """
EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.fsync"}  # beside open, to write

def killed(at):
    seen = 0

    def happens(event, args):
        nonlocal seen
        writes = event in EVENTS or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR))
        if writes and str(args[0]).startswith(str(out)):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)

    def fsync(descriptor):
        happens("os.fsync", [out])
        sync(descriptor)

    def run():
        sys.addaudithook(happens)
        os.fsync = fsync
        return main(ARGV)

    sync = os.fsync
    return ended(forked(run))

assert ended(forked(lambda: main(ARGV))) == 0
straight = files()
assert straight.keys() == {"adapter_config.json", "adapter_model.safetensors", "task.json"}
for at in itertools.count(1):
    shutil.rmtree(out, ignore_errors=True)
    status = killed(at)
    if status == 0:
        break
    assert status == -signal.SIGKILL
    finished = (out / "adapter_config.json").exists() and not (out / "checkpoint.npz").exists()
    fresh = ended(forked(lambda: main(ARGV)))  # without --resume what there is to lose is not touched
    if fresh == 2:
        assert ended(forked(lambda: main([*ARGV, "--resume"]))) == (2 if finished else 0), at
    else:
        assert fresh == 0, at
    assert files() == straight, (at, list(files()))
assert files() == straight
print(at - 1, file=sys.__stdout__)
"""

RACED = """
for _ in range(8):
    shutil.rmtree(out, ignore_errors=True)
    reader, writer = os.pipe()

    def run(seed):
        os.close(writer)
        os.read(reader, 1)  # all begin at once, when the writing end is closed
        return main([*ARGV, "--seed", f"{seed}"])

    children = [forked(lambda: run(seed)) for seed in range(4)]
    os.close(writer)
    statuses = [ended(child) for child in children]
    assert sorted(statuses) == [0, 2, 2, 2], statuses
    raced = files()
    shutil.rmtree(out)
    assert ended(forked(lambda: main([*ARGV, "--seed", f"{statuses.index(0)}"]))) == 0
    assert raced == files()
"""


def forked(script, folder):
    pytest.importorskip("safetensors", reason="the extra `cli` is not installed")
    argv = [sys.executable, "-c", FORKED + script, str(folder)]
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # a process of one thread is forked
    done = subprocess.run(argv, capture_output=True, text=True, timeout=500, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")


@forks
def test_killed_at_any_moment_of_writing_a_run_goes_on_to_the_same_bits(tmp_path):
    """Before the first checkpoint, too: and what is left half-written is in no finished folder."""
    assert int(forked(KILLED, tmp_path)) > 40


@forks
def test_of_runs_in_one_folder_one_has_it(tmp_path):
    forked(RACED, tmp_path)


def test_a_second_run_is_refused_while_the_first_one_goes_on(files, tmp_path):
    refused = []

    def second(seen):
        for resume in (False, True):
            with pytest.raises(BlockingIOError, match="out: another process is writing there") as caught:
                learn(files, "lm", tmp_path / "out", resume=resume, steps=40)
            refused.append(str(caught.value))

    _, _, done = learn(files, "lm", tmp_path / "out", report=second, steps=40)
    assert len(refused) == 2 * 40
    assert max(done.curve) == 40
    assert sorted(os.listdir(tmp_path / "out")) == ["adapter_config.json", "adapter_model.safetensors", "task.json"]


def test_with_nothing_to_resume_a_run_starts(files, tmp_path):
    _, _, done = learn(files, "lm", tmp_path / "out", resume=True, steps=20)
    assert list(done.curve) == [0, 20]
    with pytest.raises(FileExistsError, match=r"out: the folder is not empty; .*there is no checkpoint to go on from"):
        learn(files, "lm", tmp_path / "out", resume=True, steps=20)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="other: the folder is not empty"):
        learn(files, "lm", tmp_path / "other", resume=True, steps=20)
    assert os.listdir(tmp_path / "other") == ["notes.txt"]


def test_the_task_is_on_the_disk_before_the_checkpoint_goes(files, tmp_path, monkeypatch):
    """A file's bytes, its name, and only then the end of what could make it anew."""
    happened = []
    sync, unlink = atomic._sync, type(tmp_path).unlink
    monkeypatch.setattr(atomic, "_sync", lambda path: (happened.append(path.name), sync(path)))
    monkeypatch.setattr(
        type(tmp_path), "unlink", lambda path, **more: (happened.append(f"-{path.name}"), unlink(path, **more))
    )
    learn(files, "lm", tmp_path / "out", steps=20)
    gone = happened.index("-checkpoint.npz")
    for name in ("task.json", "adapter_model.safetensors", "adapter_config.json"):
        assert name in happened[:gone]
        assert "out" in happened[happened.index(name) : gone]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"curve": None}, "curve: expected step, loss and accuracy"),
        ({"curve": []}, "curve: expected step, loss and accuracy"),
        ({"curve": [[0, 1.0]]}, "curve: expected step, loss and accuracy"),
        ({"curve": [[0, 1.0, 0.5]]}, "curve: expected step, loss and accuracy of each score up to step 20"),
        ({"curve": [[20, 1.0, 0.5]]}, "curve: expected step, loss and accuracy"),
        ({"curve": [[0, "nan", 0.5], [20, 1.0, 0.5]]}, "curve: expected step, loss and accuracy"),
        ({"curve": [[0, 1.0, 0.5], [10**400, 1.0, 0.5]]}, "curve: expected step, loss and accuracy"),
        ({"step": 10**9}, "expected at most this job's 40 steps, got 1000000000$"),
        ({"step": 10**400}, "expected at most this job's 40 steps, got 1000"),
        ({"step": 40}, "curve: expected step, loss and accuracy of each score up to step 40"),
        ({"base": "x\x1b[2K\nverified"}, r"base differs: the checkpoint has 'x\\x1b\[2K\\nverified', this job"),
        ({"param": np.nan}, "out/checkpoint.npz: param/.*: holds NaN or infinite numbers"),
        ({"m": np.inf}, "out/checkpoint.npz: m/.*: holds NaN or infinite numbers"),
    ],
)
def test_a_checkpoint_that_says_what_no_run_wrote_is_refused_in_one_line(files, tmp_path, change, message):
    class Stopped(Exception):
        pass

    def stop(seen):
        if seen.step == 20:
            raise Stopped

    path = tmp_path / "out" / "checkpoint.npz"
    with pytest.raises(Stopped):
        learn(files, "lm", tmp_path / "out", steps=40, report=stop)
    with np.load(path) as file:
        arrays = dict(file)
    header = json.loads(arrays["header"].tobytes())
    for name, value in change.items():
        if name in ("param", "m"):
            next(array for key, array in arrays.items() if key.startswith(f"{name}/")).flat[0] = value
        elif name == "step":
            header["step"] = value
        else:
            header["about"][name] = value
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    np.savez(path, **arrays)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message) as caught:
        learn(files, "lm", tmp_path / "out", steps=40, resume=True)
    assert len(str(caught.value)) < 600
    assert str(caught.value).isprintable()
    assert path.read_bytes() == before


# --- task.json -------------------------------------------------------------------------------------------------------


def test_a_task_survives_its_file(tmp_path):
    task = Task("tag", ("O", "B-ÄÖ"), 100)
    assert load_task(tmp_path) is None
    save_task(tmp_path, task)
    assert load_task(tmp_path) == task
    assert [path.name for path in tmp_path.iterdir()] == ["task.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"name": "sort"},
        {"labels": ["a", "a"]},
        {"labels": []},
        {"longest": 0},
        {"labels": "ab"},
        {"more": 1},
        {"name": 3},
    ],
)
def test_a_wrong_task_file_is_refused(tmp_path, change):
    good = {"name": "classify", "labels": ["a", "b"], "longest": 64}
    (tmp_path / "task.json").write_text(json.dumps(good | change))
    with pytest.raises(ValueError, match=r"task.json: .*Task") as caught:
        load_task(tmp_path)
    assert len(str(caught.value).splitlines()) == 1

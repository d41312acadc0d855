"""What there is to learn from in a file: batches to train on, what is held out of them, and what it lacks."""

import numpy as np
import pytest

from lora_np.formats.adapters.task import Task, load_task
from lora_np.training import tasks
from lora_np.training.text import ByteTokenizer


@pytest.mark.parametrize(
    ("name", "text", "got"),
    [
        ("classify", "a\tx\nb\tx\n", "('x',)"),
        ("classify", "\n", "()"),
        ("tag", "a x\nb x\n", "('x',)"),
        ("tag", " \n", "()"),
    ],
)
def test_labels_that_there_is_no_choice_between(tmp_path, name, text, got):
    path = tmp_path / "data.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"data\.txt: Task\.labels: expected two different names at least") as caught:
        tasks.task_of(name, path, 64)
    assert str(caught.value).endswith(f"got {got}")


@pytest.mark.parametrize("labels", ["[]", '["x"]', '["x", "x"]', '"xy"', '["x", 1]'])
def test_a_file_of_a_task_with_such_labels(tmp_path, labels):
    (tmp_path / "task.json").write_text(f'{{"name": "tag", "labels": {labels}, "longest": 64}}')
    with pytest.raises(ValueError, match=r"task\.json: Task\.labels: "):
        load_task(tmp_path)


def test_a_text_that_is_too_short_is_named(tmp_path):
    """The one that is read from, or the one that is held out."""
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text("abc")
    long.write_text("abc" * 100)
    task, tokenizer, settings = Task("lm", longest=16), ByteTokenizer(), {"N": 2, "held_out": 0.1, "seed": 0}
    with pytest.raises(ValueError, match=r"short\.txt: text: expected more than one window"):
        tasks.learn_from(short, long, task, tokenizer, **settings)
    with pytest.raises(ValueError, match=r"short\.txt: text: expected more than one window"):
        tasks.learn_from(long, short, task, tokenizer, **settings)
    with pytest.raises(ValueError, match=r"short\.txt: text: expected more than one window"):
        tasks.evaluation(short, task, tokenizer, most=4)


@pytest.mark.parametrize(
    ("name", "text", "labels"),
    [
        ("lm", "abc||x\n", ()),
        ("classify", "abc\tlow\nxyz\thigh\nabc\tlow\n", ("high", "low")),
        ("tag", "a O\nb B-X\n\nc O\n", ("B-X", "O")),
    ],
)
def test_a_task_has_the_labels_of_its_file(tmp_path, name, text, labels):
    (tmp_path / "a").write_text(text)
    task = tasks.task_of(name, tmp_path / "a", 17)
    assert (task.name, set(task.labels), len(task.labels), task.longest) == (name, set(labels), len(labels), 17)


def test_labels_are_numbered_as_the_task_has_them(tmp_path):
    """Not as the file does: a file to evaluate on may have them in another order."""
    (tmp_path / "a.tsv").write_text("abc\tlow\nxyz\thigh\n")
    for labels in (("low", "high"), ("high", "low")):
        examples, _ = tasks.read_examples(tmp_path / "a.tsv", Task("classify", labels, 64), ByteTokenizer())
        assert [labels[int(one.targets)] for one in examples] == ["low", "high"]


def test_a_file_is_evaluated_whole(tmp_path):
    """Its examples in their order, 32 to a batch; of a plain text as many windows as are let in."""
    (tmp_path / "a.tsv").write_text("".join(f"text {i}\t{i % 2}\n" for i in range(40)))
    task = tasks.task_of("classify", tmp_path / "a.tsv", 64)
    batches, read = tasks.evaluation(tmp_path / "a.tsv", task, ByteTokenizer(), most=1)
    assert (read.examples, read.labels) == (40, {"0": 20, "1": 20})
    assert [len(batch["tokens"]) for batch in batches] == [32, 8]
    assert np.concatenate([batch["targets"] for batch in batches]).tolist() == [i % 2 for i in range(40)]
    (tmp_path / "a.txt").write_text("a plain text " * 30)
    windows = {
        most: tasks.evaluation(tmp_path / "a.txt", Task("lm", longest=8), ByteTokenizer(), most=most)[0]
        for most in (3, 100)
    }
    rows = {most: np.concatenate([batch["tokens"] for batch in batches]) for most, batches in windows.items()}
    assert rows[100].shape == (48, 8)  # of 390 bytes, each window with the byte after it
    assert np.array_equal(rows[100].ravel(), np.frombuffer(b"a plain text " * 30, np.uint8)[: 48 * 8])
    assert len(rows[3]) == 3
    assert {row.tobytes() for row in rows[3]} <= {row.tobytes() for row in rows[100]}


@pytest.mark.parametrize("name", ["classify", "tag", "lm"])
def test_a_file_without_an_example_is_named(tmp_path, name):
    path = tmp_path / "a.txt"
    path.write_text("[]" if name == "lm" else "\n\n \n")
    task = Task(name, () if name == "lm" else ("a", "b"))
    with pytest.raises(ValueError, match=rf"{path.name}: expected at least one example, got none"):
        tasks.evaluation(path, task, ByteTokenizer(), most=1)


def test_the_file_that_has_nothing_to_hold_out_is_named(tmp_path):
    for name, text in (("a.tsv", "one\ta\ntwo\tb\n"), ("dev.tsv", "\n \n")):
        (tmp_path / name).write_text(text)
    task, paths = Task("classify", ("a", "b")), (tmp_path / "a.tsv", tmp_path / "dev.tsv")
    with pytest.raises(ValueError, match=r"dev\.tsv: expected examples to train on and some to hold out, got 2 and 0"):
        tasks.learn_from(*paths, task, ByteTokenizer(), N=1, held_out=0.5, seed=0)


def test_data_are_known_by_what_they_say(tmp_path):
    """The same file, split and size have one description; any other, another: a checkpoint of these is refused."""
    (tmp_path / "a.tsv").write_text("".join(f"text {i}\t{i % 2}\n" for i in range(20)))
    (tmp_path / "b.tsv").write_text("".join(f"text {i}\t{(i + (i == 7)) % 2}\n" for i in range(20)))
    task = tasks.task_of("classify", tmp_path / "a.tsv", 64)

    def about(name="a.tsv", dev=None, **changes):
        options = {"N": 4, "held_out": 0.2, "seed": 0, **changes}
        return tasks.learn_from(tmp_path / name, dev, task, ByteTokenizer(), **options).about

    assert about() == about()
    others = [about("b.tsv"), about(dev=tmp_path / "b.tsv"), about(N=5), about(held_out=0.3), about(seed=1)]
    assert all(other != about() for other in others)
    assert about(dev=tmp_path / "a.tsv") != about(dev=tmp_path / "b.tsv")


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


def test_data_that_cannot_be_learned_from_is_refused(tmp_path):
    files = tmp_path
    (files / "classify").write_text("abc\tlow\nxyz\thigh\n" * 10)
    (files / "lm").write_text("abc||x\n" * 10)
    task = tasks.task_of("classify", files / "classify", 24)
    (tmp_path / "dev.tsv").write_text("abc\tlow\nabc\tother\n")
    (tmp_path / "one.tsv").write_text("abc\tlow\n")
    (tmp_path / "plain.txt").write_text("a plain text " * 30)
    lm = Task("lm", longest=8)
    for call, message in [
        (
            (files / "classify", tmp_path / "dev.tsv", task, 0.1),
            r"dev.tsv:2: expected a label of high low, got 'other'",
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

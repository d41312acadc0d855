"""What a file has to teach: what it lacks is said with its name."""

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

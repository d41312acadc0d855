"""What is said of a file of examples: its counts, what was left out or cut, and what looks wrong."""

import json

import pytest

from lora_np.formats.adapters.task import Task
from lora_np.training.tasks import evaluation, learn_from, read_examples
from lora_np.training.text import ByteTokenizer


class Ending(ByteTokenizer):
    """Bytes, and an end of the text."""

    eos = 256


@pytest.fixture
def summary(tmp_path):
    def read(rows, task=None, tokenizer=None):
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data").write_text(text)
        return read_examples(tmp_path / "data", task or Task("lm", longest=8), tokenizer or Ending())[1]

    return read


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def test_a_files_counts_by_hand(summary):
    """Tokens: 'ab' + 'cd' + end, less the last, is 4, of which 'c', 'd' and the end are scored; and 3 of 6."""
    found = summary([pair("ab", "cd"), pair("abcd", "ef")])
    assert (found.examples, found.tokens, found.scored, found.remarks()) == (2, 4 + 6, 3 + 3, [])
    assert found.line().endswith("data: 2 prompts with completions, 10 tokens, 60 % scored")


def test_what_is_too_long_is_cut_or_left_out_and_the_run_goes_on(summary):
    """Of 8 tokens: 7 + 1 + end is whole; 7 + 2 loses its end; of 9 nothing is left to score."""
    rows = [pair("a" * 7, "b"), pair("a" * 7, "bc"), pair("a" * 8, "bcd"), pair("a" * 9, "b"), pair("a" * 99, "b")]
    found = summary(rows)
    assert (found.examples, found.cut, found.left_out) == (3, 2, 2)
    assert found.remarks() == [
        "2 longer than 8 cut, their end tokens with them",
        "2 left out: nothing to score in the first 8 tokens",
    ]


@pytest.mark.parametrize(
    ("rows", "remark"),
    [
        ([pair("a", ""), pair("b", " \n"), pair("c", "d")], "2 with an empty completion"),
        ([pair("a", "x"), pair("b", "x")], "all targets are equal"),
    ],
)
def test_what_looks_wrong_in_pairs(summary, rows, remark):
    assert summary(rows).remarks() == [remark]
    assert summary([pair("a", "x"), pair("b", "y")]).remarks() == []


def test_what_looks_wrong_in_labels(summary):
    task = Task("classify", ("a", "b", "c", "d"))
    assert summary("t\ta\nu\ta\nv\tb\nw\tb\n", task).remarks() == []
    found = summary("t\ta\nu\ta\nv\tc\nw\tb\n", task)
    assert found.remarks() == ["labels occur once: b, c"]
    assert found.as_json()["labels"] == {"a": 2, "b": 1, "c": 1}
    assert summary("t\ta\nu\ta\nv\tb\n", task).line().endswith("data: 3 texts with labels, 3 tokens, 2 labels; "
                                                              "a label occurs once: b")  # fmt: skip
    assert summary("t\ta\nu\ta\n", task).remarks() == ["all targets are equal"]
    many = Task("tag", tuple(f"x{i}" for i in range(9)))
    assert summary("".join(f"w x{i}\n" for i in range(9)), many).remarks() == [
        "labels occur once: x0, x1, x2, x3, x4 and 4 more"
    ]


def test_where_all_is_left_out_the_run_ends_and_says_why(tmp_path):
    path = tmp_path / "data"
    path.write_text("a much longer prompt||b\n" * 20)
    task = Task("lm", longest=8)
    why = r"data: expected .*: 20 left out: nothing to score in the first 8 tokens$"
    with pytest.raises(ValueError, match=why):
        learn_from(path, None, task, Ending(), N=2, held_out=0.1, seed=0)
    with pytest.raises(ValueError, match=why):
        evaluation(path, task, Ending(), most=1)


def test_a_plain_text_is_said_to_be_one(tmp_path):
    (tmp_path / "a.txt").write_text("a plain text " * 30)
    _, found = evaluation(tmp_path / "a.txt", Task("lm", longest=8), ByteTokenizer(), most=3)
    assert found.line().endswith("a.txt: plain text, 390 tokens")

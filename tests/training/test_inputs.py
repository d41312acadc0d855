"""What a model is asked, as files have it: lines, and files of examples without their answers."""

import io
import json
import sys

import pytest

from lora_np.formats.models.chat_template import Conversation
from lora_np.training.inputs import STANDARD_INPUT, read_prompts, read_sentences, read_texts

USER, OTHER, SAID = ({"role": r, "content": c} for r, c in (("user", "a"), ("user", "b"), ("assistant", "c")))


def given(tmp_path, text):
    (tmp_path / "data").write_bytes(text.encode())
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\n\n  two \r\nthree", [(1, "one"), (3, "  two "), (4, "three")]),
        ("a||b\nc||\n", [(1, "a||"), (2, "c||")]),
        ("a||b\nc\nd\n", [(1, "a||b"), (2, "c"), (3, "d")]),
        ('{"prompt": "a\\nb", "completion": "c"}\n{"prompt": "d"}', [(1, "a\nb"), (2, "d")]),
        ("question,answer\na,b\n", [(2, "a")]),
        (json.dumps([{"text": "a"}]), [(1, "a")]),
        (json.dumps({"messages": [USER, SAID, OTHER, SAID]}), [(1, Conversation([USER, SAID, OTHER]))]),
        (json.dumps({"prompt": [USER], "completion": [SAID], "tools": [{}]}), [(1, Conversation([USER], [{}]))]),
    ],
)
def test_prompts(tmp_path, text, expected):
    assert read_prompts(given(tmp_path, text)) == expected


def test_an_instruction_is_asked_as_it_is_learned(tmp_path):
    ((_, asked),) = read_prompts(given(tmp_path, '{"instruction": "Add.", "input": "1 1", "output": "2"}'))
    assert asked.endswith("### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n")


@pytest.mark.parametrize(
    ("text", "texts", "behind_tab"),
    [
        ("a b\n\nc\n", [(1, "a b"), (2, ""), (3, "c")], 0),
        ("a b\tgood\nc", [(1, "a b"), (2, "c")], 1),
        ("text,label\na,good\n", [(2, "a")], 0),
        ('{"sentence": "a\\tb", "label": 1}', [(1, "a\tb")], 0),
    ],
)
def test_texts(tmp_path, text, texts, behind_tab):
    assert read_texts(given(tmp_path, text)) == (texts, behind_tab)


@pytest.mark.parametrize(
    ("text", "format", "expected"),
    [
        ("Anna lives  in\tRome\n\nNo", None, [(1, ["Anna", "lives", "in", "Rome"]), (3, ["No"])]),
        ("Anna NNP PER\nlives O\n\nRome PER\n", None, [(1, ["Anna", "lives"]), (4, ["Rome"])]),
        ("Anna PER\nis here\n", None, [(1, ["Anna", "PER"]), (2, ["is", "here"])]),
        ("Anna\nlives\n\nRome\n", "conll", [(1, ["Anna", "lives"]), (4, ["Rome"])]),
        ("O\n", None, [(1, ["O"])]),
        ('{"words": ["New York", "is"], "tags": ["PER", "O"]}', None, [(1, ["New York", "is"])]),
    ],
)
def test_sentences(tmp_path, text, format, expected):
    assert read_sentences(given(tmp_path, text), ("O", "PER"), format) == expected


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (
            read_prompts,
            '{"messages": [{"role": "assistant", "content": "c"}]}',
            ":1: messages: expected one that the as",
        ),
        (read_prompts, '{"prompt": 1}', ":1: prompt: expected a string, got 1"),
        (read_prompts, '{"prompts": "a"}', ":1: expected an object or a header with messages, or prompt, or instruct"),
        (read_texts, '{"text": "a"}\n{"label": "a"}', ":2: expected text, got"),
        (lambda path: read_sentences(path, ("O",)), '{"tokens": "a"}', ":1: expected a list of words, got 'a'"),
        (lambda path: read_texts(path, "conll"), "a O", ": format conll is for tags of words"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(tmp_path, read, text, message):
    path = given(tmp_path, text)
    with pytest.raises(ValueError, match=r"data:?") as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}{message}")


def test_standard_input_is_read_as_a_file_is_and_named(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("﻿é\n".encode()), encoding="ascii"))
    assert read_prompts(STANDARD_INPUT) == [(1, "é")]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    with pytest.raises(ValueError, match=r"^standard input: expected UTF-8 text; byte 1 is not"):
        read_prompts(STANDARD_INPUT)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match=r"^standard input: the file is empty"):
        read_prompts(STANDARD_INPUT)

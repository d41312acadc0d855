"""Files of examples: which format they are of, what each format says, and the line that is wrong."""

import csv
import io
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_np.formats.models.chat_template import Conversation
from lora_np.training.records import FORMATS, Labelled, Pair, Tagged, find_format, label_names, read_records

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"), min_size=1, max_size=12)
NO_ENDS = "a\u2028b\u2029c\x85d\u00a0e\x0bf\x0cg\x1ch"  # str.splitlines and str.split would cut at each


@pytest.fixture
def read(tmp_path):
    """The records of a file with this text; `where` is its path."""

    def read(text, task="lm", format=None):
        path = tmp_path / "data"  # no name says what is in it
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        found = read_records(path, task, format)
        return None if found is None else found.found

    return read


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --- What each format says -------------------------------------------------------------------------------------------


def test_prompts_and_completions_of_json_lines(read):
    """Spaces are the file's own; a line separator inside a string is no new line; empty lines are none."""
    text = (
        lines({"prompt": "a ", "completion": " b"}) + "\n \t\n" + lines({"completion": NO_ENDS, "prompt": "", "id": 3})
    )
    assert read(text) == [Pair("a ", " b"), Pair("", NO_ENDS)]


JSON_ROWS = [
    ("lm", {"messages": TURNS}, Conversation(TURNS)),
    ("lm", {"messages": TURNS, "tools": [{"name": "f"}]}, Conversation(TURNS, [{"name": "f"}])),
    ("lm", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, Conversation(TURNS)),
    ("lm", {"prompt": "a", "completion": "b"}, Pair("a", "b")),
    ("lm", {"prompt": TURNS[:1], "completion": TURNS[1:]}, Conversation(TURNS, None, 1)),
    ("lm", {"prompt": [*TURNS, TURNS[0]], "completion": TURNS[1:]}, Conversation([*TURNS, *TURNS], None, 3)),
    ("lm", {"prompt": [], "response": TURNS, "tools": [{"name": "f"}]}, Conversation(TURNS, [{"name": "f"}])),
    ("lm", {"prompt": "a", "response": "b"}, Pair("a", "b")),
    ("lm", {"question": "a", "answer": "b"}, Pair("a", "b")),
    ("lm", {"text": "a"}, Pair("", "a")),
    ("classify", {"text": "a", "label": "x"}, Labelled("a", "x")),
    ("classify", {"sentence": "a", "label": 3, "idx": 0}, Labelled("a", "3")),
    ("classify", {"text": "a", "labels": -1}, Labelled("a", "-1")),
    ("tag", {"tokens": ["a", "b"], "ner_tags": [0, 7]}, Tagged(["a", "b"], ["0", "7"])),
    ("tag", {"words": ["a"], "tags": ["B-X"]}, Tagged(["a"], ["B-X"])),
    ("tag", {"id": "0", "tokens": ["a"], "labels": ["O"]}, Tagged(["a"], ["O"])),
]  # fmt: skip


@pytest.mark.parametrize(("task", "row", "expected"), JSON_ROWS, ids=lambda value: str(value)[:40])
def test_rows_of_json_in_lines_in_an_array_and_one_after_another(read, task, row, expected):
    rows = [row, row]
    for text in (
        lines(*rows),
        json.dumps(rows),
        json.dumps(rows, indent=2),
        "\n".join([json.dumps(row, indent=1)] * 2),
    ):
        assert read(text, task) == [expected] * 2
        assert read(text.replace("\n", "\r\n"), task) == [expected] * 2


def test_instructions_have_alpacas_two_prompts(read):
    """As in Taori et al.'s file of prompts: with an input, and without one, also where it is empty or null."""
    with_input = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {x}.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    without = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {x}.\n\n### Response:\n"
    )
    row = {"instruction": "Add {x}.", "output": "3"}
    found = read(
        lines({**row, "input": "1 2"}, {**row, "input": ""}, {**row, "input": None}, row, {**row, "context": "1 2"})
    )
    assert found == [Pair(prompt, "3") for prompt in (with_input, without, without, without, with_input)]


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5), st.sampled_from([",", ";"]), st.booleans())
def test_a_table_that_pythons_csv_wrote(tmp_path_factory, rows, delimiter, crlf):
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\r\n" if crlf else "\n", quoting=csv.QUOTE_ALL)
    writer.writerows([("id", "Completion", "Prompt"), *((i, b, a) for i, (a, b) in enumerate(rows))])
    path = tmp_path_factory.mktemp("table") / "data"
    path.write_bytes(b"\xef\xbb\xbf" + out.getvalue().encode())
    assert read_records(path, "lm").found == [Pair(a, b) for a, b in rows]


def test_a_quoted_field_holds_line_ends_delimiters_and_quotes(read):
    text = 'prompt,completion\n"a,\n""b""","c\r\n\nd"\n\ne,f\n'
    assert read(text) == [Pair('a,\n"b"', "c\r\n\nd"), Pair("e", "f")]


def test_tabs_part_a_table_without_quoting(read):
    """As in GLUE's files: a quotation mark is a character like others."""
    assert read('sentence\tlabel\n"a "b\t1\nc, "d\t0\n', "classify") == [Labelled('"a "b', "1"), Labelled('c, "d', "0")]


def test_a_byte_order_mark_is_no_part_of_the_first_columns_name(read):
    assert read(b"\xef\xbb\xbftext,label\na,x\n", "classify") == [Labelled("a", "x")]
    assert read(b"\xef\xbb\xbfa||b\n") == [Pair("a||", "b")]
    assert read(b'\xef\xbb\xbf[{"text": "a"}]') == [Pair("", "a")]
    assert read(b"\xef\xbb\xbfEU O\n", "tag") == [Tagged(["EU"], ["O"])]
    assert read("a\ufeffb||c\n") == [Pair("a\ufeffb||", "c")]  # elsewhere it is one


def test_prompts_and_completions_around_two_bars(read):
    found = read(f"name : X | area : Y||X is in Y . \r\n\na||b||c\n{NO_ENDS}||{NO_ENDS}\u00a0\n")
    assert found == [
        Pair("name : X | area : Y||", "X is in Y ."),
        Pair("a||", "b||c"),
        Pair(NO_ENDS + "||", NO_ENDS + "\u00a0"),
    ]


def test_texts_and_labels_of_tab_separated_lines(read):
    text = f'one string of cliches \t0\n\nit \'s "good"\tpos \r\n{NO_ENDS}\tx\u00a0y\n'
    found = read(text, "classify")
    assert found == [("one string of cliches ", "0"), ('it \'s "good"', "pos"), (NO_ENDS, "x\u00a0y")]


def test_words_and_tags_of_columns(read):
    text = f"-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects\tVBZ\tO\r\n\r\n\n# . O\n\u00a0 O\n{NO_ENDS} X O\n"
    found = read(text, "tag")
    assert found == [(["EU", "rejects"], ["B-ORG", "O"]), (["#", "\u00a0", NO_ENDS], ["O", "O", "O"])]


# --- Which format it is ----------------------------------------------------------------------------------------------

PROSE = [
    "In C, `a || b` is a or b.\nNothing else is.\nThat is all.\n",
    "{curly} braces begin this text.\nIt goes on.\nAnd on.\n",
    "[1] Hu et al., LoRA, 2021.\n[2] Vaswani et al., 2017.\n",
    "[[a wiki's link]] begins it.\n",
    "Name, prompt and completion, in that order.\nNo table.\n",
    "if (a || b) {\n    return;\n}\nelse {\n    go();\n}\n",
    "\n",
    "[" * 100_000,
]


@pytest.mark.parametrize("text", PROSE, ids=lambda text: text[:20])
def test_prose_stays_a_plain_text(read, text):
    assert read(text) is None


GOOD = {
    "bars": ["a||b"] * 80,
    "json": ['{"prompt": "a", "completion": "b"}'] * 80,
    "csv": ["prompt,completion", *["a,b"] * 79],
    "tsv": ["prompt\tcompletion", *["a\tb"] * 79],
}
WRONG = {
    "bars": ["c d", "c|d", '{"prompt": "a", "completion": "b"}'],
    "json": [
        "c d", "a||b", '{"prompt": "a"}', '{"prompt": "a", "completion": "b"', "{'prompt': 'a', 'completion': 'b'}",
        '{"prompt": "a", "completion": 3}', '{"prompt": "a", "completion": "b"} x', '["a", "b"]', '{"text": "a"}',
        '{"prompt": "a", "prompt": "b", "completion": "c"}', '{"prompt": "a", "completion": "\\ud800"}',
    ],
    "csv": ["a", "a,b,c", 'a,"b', 'a,"b"c'],
    "tsv": ["a", "a\tb\tc"],
}  # fmt: skip


@pytest.mark.parametrize("format", GOOD)
@given(data=st.data())
def test_one_wrong_line_of_many_is_named_and_no_plain_text(tmp_path_factory, format, data):
    """Today's trackers have the files that were trained on as something else, without a word."""
    found = list(GOOD[format])
    at = data.draw(st.integers(format in ("csv", "tsv"), len(found) - 1))
    found[at] = data.draw(st.sampled_from(WRONG[format]))
    if found[at] in ('{"text": "a"}', '{"prompt": "a", "completion": "b"}') and at == 0:
        at = 1  # the first is what the others are held against
    path = tmp_path_factory.mktemp("wrong") / "data.txt"
    path.write_text("\n".join(found) + "\n")
    with pytest.raises(ValueError, match=rf"data\.txt:{at + 1}: (expected|not valid|prompt:|completion:)") as caught:
        read_records(path, "lm")
    assert len(str(caught.value).splitlines()) == 1


def test_half_of_the_lines_say_what_a_file_is():
    for n in range(1, 12):
        for k in range(n + 1):
            bars = "a||b\n" * k + "c d\n" * (n - k)
            assert find_format(bars, "lm") == ("bars" if 2 * k >= n else "text")


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("lm", '{"prompt": "a", "completion": "b"}\n[1]\n', r"data:2: expected an object, got '\[1\]'"),
        ("lm", '{"prompt": "a"}\n', r"data:1: expected .* prompt and completion, or .*, got \['prompt'\]"),
        ("lm", '{"text": 3}\n', r"data:1: text: expected a string, got 3"),
        ("lm", "{\n", r"data:1: not valid JSON"),
        ("lm", '[{"a":' * 100_000, r"data:1: not valid JSON: nested too deeply"),
        ("lm", '{"a": ' + "9" * 5000 + "}", r"data:1: not valid JSON: Exceeds the limit"),
        ("lm", '[{"text": "a"},\n\n{"text": "b"}\n{"text": "c"}]', r"data:4: expected a comma or \] behind an object"),
        ("lm", '[{"text": "a"},\n {"text": "b",, }]', r"data:2: not valid JSON: .* at ', }\]'"),
        ("lm", '[{"text": "a"},\n]', r"data:2: not valid JSON"),
        ("lm", '[{"text": "a"},\n{"text": "b"}', r"data:2: expected a comma or \]"),
        ("lm", '[{"text": "a"}]\nmore', r"data:2: expected the end of the file behind the array"),
        ("lm", '["a", "b"]', r"data:1: expected an object, got '\"a\"'"),
        ("lm", lines({"messages": "a"}), r"data:1: messages: expected a list of objects"),
        ("lm", lines({"prompt": [], "completion": "a"}), r"data:1: completion: expected a list of objects"),
        ("lm", lines({"prompt": [1], "completion": TURNS}), r"data:1: prompt: expected a list of objects"),
        ("lm", lines({"prompt": TURNS, "completion": TURNS[:1]}), r"data:1: completion: expected one of the assistant"),
        ("lm", lines({"prompt": "a", "completion": TURNS}), r"data:1: completion: expected a string"),
        ("lm", lines({"messages": TURNS}, {"messages": TURNS[:1]}), r"data:2: messages: expected one of the assistant"),
        ("lm", lines({"messages": [{"role": "user"}, *TURNS]}), r"data:1: messages: expected content, or tool_calls"),
        ("lm", lines({"messages": [{"content": "a"}]}), r"data:1: messages: expected role and content"),
        ("lm", lines({"messages": TURNS, "tools": "f"}), r"data:1: tools: expected a list"),
        ("classify", "good\t1\nbad\n", r"data:2: expected a text, a tab and a label, got 'bad'"),
        ("classify", "a\tb\tc\n", r"data:1: expected a text, a tab and a label"),
        ("classify", "\t1\n", r"data:1: expected a text"),
        ("classify", "a\t \n", r"data:1: expected a text"),
        ("classify", "text,label\na,x\nb,\n", r"data:3: expected a label, got none"),
        ("classify", lines({"text": "a", "label": 1.5}), r"data:1: label: expected a string, got 1.5"),
        ("classify", lines({"text": "a", "label": None}), r"data:1: label: expected a string, got None"),
        ("classify", lines({"text": " ", "label": 1}), r"data:1: expected a text, got ' '"),
        ("tag", "EU B\n\nalone\n", r"data:3: expected a word and, in the last column, its tag"),
        ("tag", lines({"tokens": ["a", "b"], "ner_tags": [1]}), r"data:1: expected lists of as many tags as words"),
        ("tag", lines({"tokens": "ab", "ner_tags": "OO"}), r"data:1: expected lists of as many tags as words"),
        ("tag", lines({"tokens": ["a"], "ner_tags": [None]}), r"data:1: label: expected a string"),
        ("classify", "", r"data: the file is empty"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_wrong_line_is_named(read, task, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(text, task)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500


def test_a_format_that_is_named_is_not_looked_for(read):
    assert read("a||b\n" * 3, format="text") is None
    assert read('{"text": "a"}\n', format="text") is None
    assert read("a||b\nc||d\n", format="bars") == [Pair("a||", "b"), Pair("c||", "d")]
    with pytest.raises(ValueError, match="data:2: expected prompt"):
        read("a||b\nc\nd\ne\n", format="bars")
    with pytest.raises(ValueError, match="data:1: not valid JSON"):
        read("a||b\n", format="json")
    for format, task in (("bars", "tag"), ("labelled", "lm"), ("conll", "classify")):
        with pytest.raises(ValueError, match=f"format {format} is for task .*, got task {task}"):
            read("a||b\n", task, format=format)
    with pytest.raises(ValueError, match="expected records for task tag, got format text"):
        read("a b\n", "tag", format="text")


HOSTILE = [
    "[", "{", "}", "]", ",", ":", '"', "\\", '{"text": ', '"a"', "\n", "\r", "\u2028", "\ufeff", "null", "1e999", "NaN",
    "||", "\t", "prompt", "completion", "text,label", '"messages": ', "\x1b[2K", "\ud800", "[" * 5000, '{"a":' * 3000,
]  # fmt: skip


@given(
    st.lists(st.sampled_from(HOSTILE), max_size=30).map("".join), st.sampled_from(["lm", "classify", "tag"]),
    st.sampled_from([None, *FORMATS]),
)  # fmt: skip
def test_whatever_a_file_holds_it_is_read_or_refused_in_one_line(tmp_path_factory, text, task, format):
    path = tmp_path_factory.mktemp("hostile") / "data"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    message = str(path)
    try:
        read_records(path, task, format)
    except ValueError as error:
        message = str(error)
    assert message.startswith(str(path))
    assert len(message.split("\n")) == 1
    assert len(message) < 1000


# --- Labels ----------------------------------------------------------------------------------------------------------


def test_labels_are_ordered_by_size_or_by_the_alphabet():
    assert label_names(["10", "9", "10"]) == ("9", "10")
    assert label_names(["pos", "neg", "10"]) == ("10", "neg", "pos")
    assert label_names(["2", "1", "01", "٢", "001"]) == ("001", "01", "1", "2", "٢")


@pytest.mark.parametrize("seed", ["0", "5"])
def test_the_order_of_labels_is_the_same_in_every_process(tmp_path, seed):
    """Python orders a set of texts anew in each, by PYTHONHASHSEED."""
    (tmp_path / "a").write_text("".join(f"t\t{label}\n" for label in ("c", "a", "b", "d", "a")))
    script = (
        "import sys, pathlib; from lora_np.training.records import label_names; "
        "from lora_np.training.tasks import task_of; "
        "print(*label_names(['1', '01', '1', '001']), *task_of('classify', pathlib.Path(sys.argv[1]), 8).labels)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    command = [sys.executable, "-c", script, str(tmp_path / "a")]
    printed = subprocess.check_output(command, env=environment, text=True)
    assert printed.split() == ["001", "01", "1", "a", "b", "c", "d"]

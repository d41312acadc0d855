"""The sample's files: each is what its name says to the readers, and the same on every machine."""

import hashlib
import json

import pytest

from lora_np import cli
from lora_np.training.records import read_records
from lora_np.training.sample import write_sample
from lora_np.training.tasks import labels_in

KINDS = ("PER", "LOC", "ORG")
DIGESTS = {
    "chat.jsonl": "011bb365b0577815", "french.tsv": "07a9461cec3fab59",
    "pairs.txt": "e8abc05ad8458950", "reviews.tsv": "33a863d411a43fce",
    "tags.conll": "584bedbf9bd5eef9", "text.txt": "10a43fa47065fc5d",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    write_sample(tmp_path / "data")
    return tmp_path / "data"


def test_the_files_are_the_same_bytes_everywhere(folder):
    """On any Python, whatever PYTHONHASHSEED."""
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in folder.iterdir()} == DIGESTS


def test_each_file_has_what_its_task_learns_from(folder):
    assert labels_in(folder / "reviews.tsv", "classify", None) == ("bad", "good")
    assert set(labels_in(folder / "tags.conll", "tag", None)) == {"O", *(f"{p}-{k}" for p in "BI" for k in KINDS)}
    assert all(line.count("||") == 1 for line in (folder / "pairs.txt").read_text().splitlines())
    for line in (folder / "chat.jsonl").read_text().splitlines():
        roles = [message["role"] for message in json.loads(line)["messages"] if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) != []
    assert "||" not in (folder / "text.txt").read_text()
    found = read_records(folder / "french.tsv", "translate")
    assert (found.kind, len(found.found)) == ("translations", 300)


def test_the_command_says_how_to_learn_from_each_and_writes_over_nothing(tmp_path, capsys):
    assert cli.main(["sample", str(tmp_path / "my data")]) == 0
    said = capsys.readouterr().out
    for name in DIGESTS:
        assert f"--data '{tmp_path / 'my data' / name}'" in said
    assert cli.main(["sample", str(tmp_path / "my data")]) == 2
    assert "exists already; it is not written over" in capsys.readouterr().err

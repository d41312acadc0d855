"""The statements: their ids, and that the README says the same."""

import re
from itertools import groupby
from pathlib import Path

import pytest

from lora_np.spec.statements import PARTS, STATEMENTS

README = Path(__file__).parents[2] / "README.md"
ROWS = dict(re.findall(r"^\| ([LTOA]\d+) \| (.+) \|$", README.read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_ids_are_counted_through_in_each_part():
    for part, ids in groupby(STATEMENTS, key=lambda name: name[0]):
        ids = list(ids)
        assert ids == [f"{part}{n}" for n in range(1, len(ids) + 1)]
    assert list(PARTS) == list(dict.fromkeys(name[0] for name in STATEMENTS)) == ["L", "T", "O", "A"]


def test_every_statement_has_a_title_and_ends_as_a_sentence():
    for name, (title, text) in STATEMENTS.items():
        assert title, name
        assert re.search(r"[^.,:;]\.?$|\.\$\$$|[^.,:;]\$\$$", text), name


def test_the_readme_has_l1_to_l9():
    assert list(ROWS) == [name for name in STATEMENTS if name.startswith("L")]


@pytest.mark.parametrize("name", ROWS)
def test_the_readme_says_the_same(name):
    """In a cell of a table there are no paragraphs, and a row ends without a stop."""
    assert " ".join(STATEMENTS[name].text.replace("$$", "$").split()).removesuffix(".") == ROWS[name]

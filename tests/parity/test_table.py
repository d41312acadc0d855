"""The table of families in formats/README.md: which test counts for which row."""

import pytest
import table

RESULTS = """<testsuites><testsuite>
<testcase name="test_logits_and_the_gradient_of_every_weight[qwen3-tag-None]"/>
<testcase name="test_logits_and_the_gradient_of_every_weight[gemma3_text-left]"/>
<testcase name="test_logits_and_the_gradient_of_every_weight[gemma-left]"><failure/></testcase>
<testcase name="test_cached_decoding[gemma-left]"><skipped/></testcase>
<testcase name="test_a_merge[gemma-ours]"/>
<testcase name="test_a_merge[gemma-theirs]"/>
<testcase name="test_of_something_else[gemma]"/>
</testsuite></testsuites>"""


def cells(path):
    lines = [line.strip("| ").split(" | ") for line in table.table(path).splitlines()]
    return {row: dict(zip(lines[0][1:], rest, strict=True)) for row, *rest in lines[2:]}


def test_a_cell_is_how_many_tests_passed_or_that_one_did_not(tmp_path):
    (tmp_path / "results.xml").write_text(RESULTS)
    found = cells(tmp_path / "results.xml")
    assert found.keys() == table.ROWS.keys()
    assert (found["Qwen 3"]["logits"], found["Gemma 3 (text)"]["gradients"], found["Qwen 3"]["merge"]) == (
        "1",
        "1",
        "-",
    )
    gemma = found["Gemma"]
    assert (gemma["logits"], gemma["cached decoding"], gemma["merge"], gemma["verify"]) == ("no", "-", "2", "-")


def test_every_case_has_a_row():
    models = pytest.importorskip("test_models", reason="the extra peers")
    for case in models.CASES:
        assert table.row_of(case) is not None, case
    assert {table.row_of(case) for case in models.CASES} == table.ROWS.keys()


def test_the_readmes_table_has_every_row_and_none_that_failed():
    _, _, rest = table.README.read_text(encoding="utf-8").partition(table.BEGIN)
    shown = rest.partition(table.END)[0].strip().splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in shown[2:]] == [*table.ROWS]
    assert "no" not in [cell for line in shown[2:] for cell in line.strip("| ").split(" | ")]

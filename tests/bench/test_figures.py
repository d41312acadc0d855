"""Figures: kept as JSON, and one run beside another."""

import pytest

from bench import figures
from bench.figures import Figure, Run


def a_run(**values):
    """A run of figures of seconds, by their names."""
    return Run({"numpy": "2.0"}, [Figure("step", "a model", what, "s", list(v)) for what, v in values.items()])


def test_compare_finds_what_changed():
    before = a_run(slower=[1.0, 1.1, 1.2], same=[1.0, 1.1, 1.2], faster=[2.0, 2.0], gone=[1.0])
    after = a_run(slower=[1.3, 2.2, 2.5], same=[1.2, 1.3, 1.4], faster=[1.0, 1.9], new=[1.0])
    found = {change.after.what: change for change in figures.compare(before, after)}
    assert {what: change.outside for what, change in found.items()} == {"slower": True, "same": False, "faster": True}
    assert found["slower"].ratio == pytest.approx(2.0)
    text = figures.comparison(before, after._replace(environment={"numpy": "2.4"}))
    assert "numpy: 2.0 -> 2.4" in text
    assert [line.split(": ")[2].split()[0] for line in text.splitlines() if line.startswith("* step")] == [
        "slower",
        "faster",
    ]
    assert "only in the first: step: a model: gone" in text
    assert "only in the second: step: a model: new" in text


def test_a_quotient_is_taken_round_by_round():
    run = a_run(theirs=[2.0, 9.0, 4.0], ours=[1.0, 3.0, 2.0])
    ratio = run.figures[0].over(run.figures[1])
    assert (ratio.what, ratio.unit, ratio.values, ratio.median) == ("theirs / ours", "x", [2.0, 3.0, 2.0], 2.0)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"figures": [1]}')
    with pytest.raises(ValueError, match=r"other\.json: expected a file that"):
        figures.read(path)


@pytest.mark.parametrize(
    "figures_there",
    [
        "[]",
        '[{"bench": "step", "case": "a", "what": "b", "unit": "s", "values": []}]',
        '[{"bench": "step", "case": "a", "what": "b", "unit": "s", "values": [NaN]}]',
        '[{"bench": "step", "case": "a", "what": "b", "unit": "s", "values": [1.0, 0.0]}]',
        '[{"bench": "step", "case": "a", "what": "b", "unit": "s", "values": ["1"]}]',
    ],
)
def test_a_run_that_measured_nothing_is_refused(tmp_path, figures_there):
    path = tmp_path / "empty.json"
    path.write_text(f'{{"environment": {{}}, "figures": {figures_there}}}')
    with pytest.raises(ValueError, match=r"empty\.json: expected a file that"):
        figures.read(path)


def test_runs_with_no_figure_in_common_are_not_compared():
    with pytest.raises(ValueError, match="nothing to compare"):
        figures.comparison(a_run(one=[1.0]), a_run(other=[1.0]))

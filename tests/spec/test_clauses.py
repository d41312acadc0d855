"""What the document holds: everything that states something, everything that this rests on, each once."""

import json
import math

import pytest

from lora_np.spec.citations import stated
from lora_np.spec.clauses import TESTS, Clause, gather, reach, refusing
from lora_np.spec.definitions import read_package
from lora_np.vectors.derivatives import Row
from lora_np.vectors.statements import STATEMENTS

DOCUMENT = gather(None)
PRINTED = DOCUMENT.definitions


def test_a_clause_for_every_statement_in_their_order():
    assert [clause.id for clause in DOCUMENT.clauses] == list(STATEMENTS)


def test_every_definition_is_printed_once():
    lists = [clause.here for clause in DOCUMENT.clauses] + list(DOCUMENT.annex.values())
    assert sum(map(len, lists)) == len(PRINTED)


def test_what_states_ids_is_printed_under_the_first_and_named_under_the_others():
    clauses = {clause.id: clause for clause in DOCUMENT.clauses}
    stating = {d: stated(d.docstring) for module in DOCUMENT.modules.values() for d in module.definitions.values()}
    assert sum(1 for ids in stating.values() if ids) > 60
    for d, ids in stating.items():
        assert [name for name, clause in clauses.items() if d in clause.here] == list(ids[:1])
        assert sorted(name for name, clause in clauses.items() if d in clause.elsewhere) == sorted(ids[1:])


def test_nothing_printed_rests_on_what_is_not():
    missing = {
        (d.key, key)
        for d in PRINTED.values()
        for key in d.uses.values()
        if key not in PRINTED
        and key.rpartition(".")[0] in DOCUMENT.modules
        and key.rpartition(".")[2] in DOCUMENT.modules[key.rpartition(".")[0]].definitions
    }
    assert missing == set()


def test_the_annex_has_nothing_that_nothing_printed_names():
    named = {key for d in PRINTED.values() for key in d.uses.values()}
    assert {d.key for part in DOCUMENT.annex.values() for d in part} <= named


def test_measurements_stand_under_their_id():
    rows = [
        Row("T5", "gelu", "complex step", 2e-16, 1e-12),
        Row("T5", "erf", "libm", 3e-16, 1e-15),
        Row("L4", "one", "complex step", 5e-15, 1e-11),
        Row("L4", "two", "complex step", 1e-16, 1e-12),
    ]
    document = gather(rows)
    assert document.measured
    assert not DOCUMENT.measured
    assert {clause.id: clause.rows for clause in document.clauses if clause.rows} == {"L4": rows[2:], "T5": rows[:2]}
    worst = {clause.id: clause.worst for clause in document.clauses}
    assert (worst["L4"], worst["T5"], worst["L1"]) == (rows[2], rows[0], None)
    assert not any(clause.failed for clause in document.clauses)


@pytest.mark.parametrize(("error", "failed"), [(1e-12, False), (2e-12, True), (math.inf, True), (math.nan, True)])
def test_an_error_beyond_its_bound_or_no_number_fails(error, failed):
    rows = [Row("T3", "one", "complex step", 0.0, 1e-12), Row("T3", "two", "libm", error, 1e-12)]
    assert Clause("T3", STATEMENTS["T3"], [], [], [], rows).failed == failed


def test_proofs_are_those_marked_with_the_id():
    clauses = {clause.id: clause for clause in DOCUMENT.clauses}
    for name, clause in clauses.items():
        assert all(name in proof.ids for proof in clause.proofs)
    assert all(clause.proofs for clause in DOCUMENT.clauses if clause.here)


def test_a_package_without_its_tests_has_their_list(tmp_path):
    """As in a clone: each clause with the same tests, in the same order."""

    def listed(document):
        return [[(proof.path.as_posix(), proof.test, proof.ids) for proof in c.proofs] for c in document.clauses]

    assert listed(gather(None, tests=tmp_path / "tests")) == listed(DOCUMENT)


def test_each_clause_has_what_the_vectors_ask_for():
    manifest = json.loads((TESTS / "conformance" / "vectors" / "v2" / "manifest.json").read_text())
    asked = {c.id: [(part.operation.name, case.name) for part in c.asked for case in part.cases]
             for c in DOCUMENT.clauses}  # fmt: skip
    wanted = {name: [] for name in STATEMENTS}
    for case in manifest["cases"]:
        wanted[case["id"]].append((case["operation"], case["name"]))
    assert {name: sorted(cases) for name, cases in asked.items()} == {n: sorted(cases) for n, cases in wanted.items()}


def test_errors_are_found_however_far_down(tmp_path):
    (tmp_path / "low.py").write_text(
        "def deep(x): raise ValueError('deep')\n"
        "def between(x): return deep(x)\n"
        "def apart(x): raise ValueError('apart')\n"
        "class Made:\n    def __init__(self): raise TypeError('made')\n"
    )
    (tmp_path / "high.py").write_text(
        "from .low import between, apart, Made\n"
        "def top(x: apart):\n    if between(x): raise ValueError('top')\n    return Made()\n"
        "def calm(x: Made): return [apart]\n"
        "def again(x): return again(top(x))\n"
    )
    printed = {d.key: d for module in read_package(tmp_path).values() for d in module.definitions.values()}

    def below(key):
        return [d.key for d in refusing(printed[key], printed) if "." not in d.name]

    assert below("high.top") == ["low.deep", "low.Made"]
    assert below("high.calm") == []
    assert below("high.again") == ["low.deep", "low.Made", "high.top"]
    assert below("low.deep") == []


def test_reach():
    steps = {"a": "bc", "b": "d", "c": "d", "d": "a", "e": "f"}
    assert reach("b", lambda key: steps.get(key, "")) == set("abcd")
    assert reach("", lambda key: steps[key]) == set()

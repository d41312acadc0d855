"""What the page says, before it looks like anything: each statement with its source, tests and measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..vectors.derivatives import Row
from ..vectors.statements import PARTS, STATEMENTS, Statement
from .citations import Proof, proofs, read_kept, stated
from .conformance import Asked, asked
from .definitions import PACKAGE, Definition, Module, read_package

TESTS = PACKAGE.parent / "tests"  # where a clone has them; an installed package has their list alone
KEPT = Path(__file__).with_name("tests.json")  # that list; `python -m lora_np.spec` writes it


@dataclass(frozen=True, eq=False)
class Clause:
    """A statement, and what there is to it.

    here       the definitions whose docstring states this id first
    elsewhere  those that state it too, and stand in another clause
    proofs     the tests that are marked with it
    rows       the errors measured
    asked      what the test vectors ask for
    """

    id: str
    statement: Statement
    here: Sequence[Definition]
    elsewhere: Sequence[Definition]
    proofs: Sequence[Proof]
    rows: Sequence[Row]
    asked: Sequence[Asked] = ()

    @property
    def worst(self) -> Row | None:
        """The largest error of a derivative against complex steps."""
        steps = [row for row in self.rows if row.method == "complex step"]
        return max(steps, key=lambda row: row.error, default=None)

    @property
    def failed(self) -> bool:
        """Whether an error passes its bound."""
        return any(not row.error <= row.bound for row in self.rows)


@dataclass(frozen=True, eq=False)
class Document:
    """The whole specification.

    parts     by letter, with the clauses of each
    annex     by module, the definitions that the clauses' source rests on and that no clause states
    modules   those of the package; what is imported stands before what imports it
    measured  whether errors were measured
    """

    parts: Mapping[str, tuple[Statement, Sequence[Clause]]]
    annex: Mapping[str, Sequence[Definition]]
    modules: Mapping[str, Module]
    measured: bool

    @property
    def clauses(self) -> list[Clause]:
        """Those of all parts."""
        return [clause for _, clauses in self.parts.values() for clause in clauses]

    @property
    def definitions(self) -> dict[str, Definition]:
        """What stands in clauses and annex, by its key."""
        printed = [part.here for part in self.clauses] + list(self.annex.values())
        return {d.key: d for definitions in printed for d in definitions}


def gather(rows: Sequence[Row] | None, tests: Path = TESTS) -> Document:
    """The document of the package as it is. rows: of `derivatives.table`; None: not measured."""
    modules = read_package()
    every = {d.key: d for module in modules.values() for d in module.definitions.values()}
    ids = {key: stated(d.docstring) for key, d in every.items()}
    found = list(proofs(tests) if (tests / "test_ids.py").is_file() else read_kept(KEPT.read_text(encoding="utf-8")))
    vectors = asked()

    def clause(name: str) -> Clause:
        return Clause(
            name,
            STATEMENTS[name],
            [d for key, d in every.items() if ids[key][:1] == (name,)],
            [d for key, d in every.items() if name in ids[key][1:]],
            [proof for proof in found if name in (proof.ids or ())],
            [row for row in rows or () if row.id == name],
            vectors.get(name, ()),
        )

    parts = {
        letter: (part, [clause(name) for name in STATEMENTS if name.startswith(letter)])
        for letter, part in PARTS.items()
    }
    needed = reach([key for key in every if ids[key]], lambda key: every[key].uses.values() if key in every else ())
    annex = {
        name: [d for d in module.definitions.values() if d.key in needed and not ids[d.key]]
        for name, module in modules.items()
    }
    return Document(parts, {name: part for name, part in annex.items() if part}, modules, measured=rows is not None)


def refusing(definition: Definition, printed: Mapping[str, Definition]) -> list[Definition]:
    """Those that a definition calls, however far down, and that raise errors."""
    called = reach(definition.calls, lambda key: printed[key].calls if key in printed else ())
    return [d for key, d in printed.items() if key in called and d.refusals and d is not definition]


def reach(start: Iterable[str], onwards: Callable[[str], Iterable[str]]) -> set[str]:
    """Every key that is reached from `start`, and those there."""
    reached: set[str] = set()
    waiting = list(start)
    while waiting:
        key = waiting.pop()
        if key not in reached:
            reached.add(key)
            waiting += onwards(key)
    return reached

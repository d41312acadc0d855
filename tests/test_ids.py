"""Each statement of the specification has a function and a test, and each test names what it proves."""

import re
from pathlib import Path

from lora_np.spec.citations import ID, proofs, stated
from lora_np.spec.definitions import PACKAGE, read_module, read_package
from lora_np.vectors.statements import STATEMENTS

TESTS = Path(__file__).parent

# In these every test names an id, but for those of input that is refused.
FILES = (
    "lora",
    "dora",
    "ops",
    "layout",
    "binding",
    "transformer",
    "loss",
    "adapter",
    "optim",
    "parallel",
    "decode",
    "analysis",
)
MATHEMATICS = {f"test_{name}" for name in FILES}
REFUSED = re.compile(r"_(is|are)_refused$")


PROOFS = list(proofs(TESTS))
PROVED = {name for proof in PROOFS for name in proof.ids or ()}


def cited():
    """The ids in the package's docstrings, each with a place where it stands."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = read_module(path)
        for place in (module, *module.definitions.values()):
            found |= dict.fromkeys(ID.findall(place.docstring), f"{path.stem}: {place.name}")
    return found


def test_every_id_cited_has_a_test():
    assert {name: place for name, place in cited().items() if name not in PROVED} == {}


def test_every_statement_has_a_test():
    assert STATEMENTS.keys() - PROVED == set()


def test_every_statement_has_a_function():
    functions = [d for module in read_package().values() for d in module.definitions.values()]
    assert STATEMENTS.keys() - {name for d in functions for name in stated(d.docstring)} == set()


def test_every_test_names_known_ids():
    assert [(proof.test, name) for proof in PROOFS for name in proof.ids or () if name not in STATEMENTS] == []


def test_every_test_of_the_mathematics_names_an_id():
    unmarked = [
        (proof.path.stem, proof.test)
        for proof in PROOFS
        if proof.path.stem in MATHEMATICS and not proof.ids and not REFUSED.search(proof.test)
    ]
    assert unmarked == []


def test_the_mathematics_is_mirrored():
    assert {proof.path.stem for proof in PROOFS} >= {
        *MATHEMATICS,
        "test_backend",
        "test_model",
        "test_batch",
        "test_gradcheck",
    }

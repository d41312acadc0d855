"""Each statement of the specification that a docstring cites has a test, and each test names what it proves."""

import ast
import re
from pathlib import Path

import pytest
from ids import IDS

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "lora_np"
ID = re.compile(r"\b(?:L[1-9]|T1[0-6]|T[1-9]|O[1-4]|A[12])\b(?!\s*[(=])")

# In these every test names an id, but for those of input that is refused.
FILES = ("ops", "lora", "adapter", "transformer", "run", "optim", "tree", "parallel", "decode")
MATHEMATICS = {f"test_{name}" for name in FILES}
REFUSED = re.compile(r"_(is|are)_refused$")


def docstrings(path):
    """(name, docstring) of a module and of each class and function in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            yield f"{path.stem}.{getattr(node, 'name', '')}", text


def cited():
    """The ids in the package's docstrings, each with a place where it stands."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for place, text in docstrings(path):
            found |= dict.fromkeys(ID.findall(text), place)
    return found


def proofs():
    """(file, test, ids) of every test function; ids is None without a marker."""
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield path.stem, node.name, marked(node)


def marked(node):
    """The ids of @proves(...) or @pytest.mark.proves(...), which stand there as strings."""
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) in ("proves", "pytest.mark.proves"):
            return [ast.literal_eval(a) for a in decorator.args]
    return None


PROOFS = list(proofs())


def test_every_id_cited_has_a_test():
    proved = {name for _, _, ids in PROOFS for name in ids or ()}
    assert {name: place for name, place in cited().items() if name not in proved} == {}


def test_every_test_names_known_ids():
    assert [(test, name) for _, test, ids in PROOFS for name in ids or () if name not in IDS] == []
    assert set(cited()) <= set(IDS)


def test_every_test_of_the_mathematics_names_an_id():
    unmarked = [
        (file, test) for file, test, ids in PROOFS if file in MATHEMATICS and not ids and not REFUSED.search(test)
    ]
    assert unmarked == []


def test_the_mathematics_is_mirrored():
    assert {file for file, _, _ in PROOFS} >= {
        *MATHEMATICS,
        "test_backend",
        "test_model",
        "test_batch",
        "test_gradcheck",
    }


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("L4, T15: the loss", ["L4", "T15"]),
        ("(O1 to O3)", ["O1", "O3"]),
        ("T1, T10", ["T1", "T10"]),
        ("W0, B1, L10, T17, O5, A3, HTML5, layer L", []),
        ("A1(x)", []),
    ],
)
def test_what_is_an_id(text, ids):
    assert ID.findall(text) == ids

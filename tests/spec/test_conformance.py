"""The case that is written out is that of the vectors."""

import re

import numpy as np

from lora_np.formats.files.safetensors_file import open_tensors
from lora_np.spec import conformance
from lora_np.spec.clauses import TESTS
from lora_np.vectors.cases import all_cases
from lora_np.vectors.files import LAYOUT


def numbers(text):
    """The tensors of a text, by name: values, and bounds where it has them."""
    found = {}
    for part in re.split(r"^(?=\S)", text, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        name, shape = re.fullmatch(r"(\S+)  \(([\d, ]+)\)", head).groups()
        values = np.array(re.sub(r"± \S+", "", body).split(), dtype="float64")
        bounds = np.array(re.findall(r"± (\S+)", body), dtype="float64")
        sizes = tuple(int(n) for n in shape.split(",") if n.strip())
        found[name] = values.reshape(sizes), bounds.reshape(sizes) if len(bounds) else None
    return found


def test_the_case_is_the_files():
    written = conformance.written()
    inputs, expected = numbers(written.inputs), numbers(written.expected)
    case = written.case
    with open_tensors(TESTS / "conformance" / "vectors" / "v2" / f"{case.id}.safetensors") as file:
        stored = {
            name: file.read_as(name, np.dtype("float64")) for name in file.shapes if name.startswith(f"{case.name}/")
        }
    assert inputs.keys() == {name for name in stored if "/in/" in name}
    assert expected.keys() == {name for name in stored if not re.search("/in/|/float32/|/bound/", name)}
    for name, (values, _) in inputs.items():
        np.testing.assert_array_equal(values, stored[name])
    for name, (values, bounds) in expected.items():
        np.testing.assert_allclose(values, stored[name], rtol=0, atol=5.1e-10)
        np.testing.assert_allclose(bounds, stored[name.replace("/", "/bound/", 1)], rtol=0.006)


def test_the_written_case_is_right_by_the_formulas():
    """In float32, by L2 and L4 as a newcomer would write them: within the bounds that stand there."""
    written = conformance.written()
    given = {name.rpartition("/")[2]: np.float32(a) for name, (a, _) in numbers(written.inputs).items()}
    x, W0, A, B, b, g = (given[name] for name in ("x", "W0", "A", "B", "b", "dh"))
    s = np.float32(written.case.scalars["alpha"] / written.case.scalars["r"])
    got = {
        "out/h": x @ W0.T + b + s * ((x @ A.T) @ B.T),
        "grad/x": g @ W0 + s * ((g @ B) @ A),
        "grad/A": s * (g[0] @ B).T @ x[0],
        "grad/B": s * g[0].T @ (x[0] @ A.T),
    }
    expected = {name.partition("/")[2]: of for name, of in numbers(written.expected).items()}
    assert got.keys() == expected.keys()
    for name, (values, bounds) in expected.items():
        assert (np.abs(got[name] - values) <= bounds).all(), name


def test_what_is_new_in_a_version_is_said():
    text = conformance.text()
    assert "| T8 | `far`" not in text
    for case in all_cases():
        row = f"| {case.id} | `{case.name}` | "
        assert (row in text) == (case.since != "v1")


def test_the_layout_is_the_manifests():
    text = conformance.text()
    for names in LAYOUT:
        assert names == "results" or all(f"`{name}`" in text for name in names.split(", "))

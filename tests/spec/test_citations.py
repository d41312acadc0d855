"""What is an id in a text, what a docstring states, and which tests are proofs."""

import pytest

from lora_np.spec.citations import ID, Proof, kept, proofs, read_kept, stated


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("L4, T15: the loss", ["L4", "T15"]),
        ("(O1 to O3)", ["O1", "O3"]),
        ("T1, T10", ["T1", "T10"]),
        ("L8 (paper, tables 2 to 4): r (in + out)", ["L8"]),
        ("W0, B1, L13, T21, O5, A3, HTML5, layer L", []),
        ("A1(x), A1 (r, in), A2 = 3", []),
    ],
)
def test_what_is_an_id(text, ids):
    assert ID.findall(text) == ids


@pytest.mark.parametrize(
    ("docstring", "ids"),
    [
        ("T3: y = w * xhat + b", ("T3",)),
        ("T3, T4: dw", ("T3", "T4")),
        ("T3 or T4: as the configuration says.", ("T3", "T4")),
        ("T9 to T11: attention", ("T9", "T10", "T11")),
        ("T8, T10 to T12 and O1: all", ("T8", "T10", "T11", "T12", "O1")),
        ("L2 (paper 4.1, eq. 3): h = x W0^T", ("L2",)),
        ("L2 on a look-up (T1): h = E[tokens]", ("L2",)),
        ("T16, past the longest sequence: when that is full", ("T16",)),
        ("L5 on the whole model. Two things: one", ()),
        ("The update of one matrix (L1): dW", ()),
        ("T21: nothing", ()),
        ("", ()),
    ],
)
def test_what_a_docstring_states(docstring, ids):
    assert stated(docstring) == ids


def test_proofs_are_found_and_nothing_is_run(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "test_one.py").write_text(
        "raise SystemExit\n"
        "@proves('L1', 'T16')\n@given(x)\ndef test_marked(): ...\n"
        "@pytest.mark.proves('O1')\ndef test_long_hand(): ...\n"
        "def test_unmarked(): ...\n"
        "@proves('O2')\ndef no_test(): ...\n"
    )
    (tmp_path / "helper.py").write_text("@proves('L2')\ndef test_elsewhere(): ...\n")
    one = (tmp_path / "deep" / "test_one.py").relative_to(tmp_path)
    found = list(proofs(tmp_path))
    again = read_kept(kept(found))
    assert [(one.as_posix(), *rest) for one, *rest in again] == [
        (one.as_posix(), *rest) for one, *rest in found if rest[-1]
    ]
    assert found == [
        Proof(one, "test_marked", ("L1", "T16")),
        Proof(one, "test_long_hand", ("O1",)),
        Proof(one, "test_unmarked", None),
    ]

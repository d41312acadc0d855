"""Safetensors and JSON files that are damaged, or made to do damage: one clear line, and nothing read by them."""

import builtins
import json
import pickle
import re

import numpy as np
import pytest
import safetensors
from hostile import EXOTIC, hostile_texts, is_safe, raw_safetensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lora_np.formats.files.atomic import write_tensors
from lora_np.formats.files.json_file import MAX_JSON_BYTES, parse_json, read_json
from lora_np.formats.files.messages import shown
from lora_np.formats.files.safetensors_file import open_tensors, refuse_pickle

GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.safetensors"


def read_all(path, expected=None):
    with open_tensors(path) as file:
        file.check_names(file.shapes if expected is None else expected)
        return {name: file.read_finite(name) for name in file.shapes}


def refusal(path, expected=None):
    """The message of the ValueError, which is one line and names the file."""
    with pytest.raises(ValueError, match=r"x\.safetensors") as caught:
        read_all(path, expected)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_file_is_read(path):
    raw_safetensors(path, GOOD, np.array([1, 2], "<f4").tobytes())
    assert read_all(path)["a"].tolist() == [1, 2]


@pytest.mark.parametrize("length", [9, 2**31, 2**60, 2**64 - 1])
def test_a_header_longer_than_the_file(path, length):
    raw_safetensors(path, b"{}", length=length)
    assert str(length) in refusal(path)


def test_a_header_that_is_too_long_for_anyone(path):
    with open(path, "wb") as file:
        file.write((10**9).to_bytes(8, "little"))
        file.truncate(2 * 10**9)  # sparse: no such space is used
    assert "at most" in refusal(path)


@pytest.mark.parametrize("size", range(12))
def test_a_file_that_ends_early(path, size):
    raw_safetensors(path, GOOD, bytes(8))
    path.write_bytes(path.read_bytes()[:size])
    assert "truncated" in refusal(path)


@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "x.safetensors"
    save_file({"a": np.ones((3, 4), "float32"), "b": np.ones(5, "float64")}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(cut * len(whole))])
    assert "truncated" in refusal(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": GOOD["a"]},
            "b: expected its bytes from 8 on, got 0",
        ),
        (
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},
            "a: expected its bytes from 0 on, got 8",
        ),
        (
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
            r"F32 of shape \[2\] does not take -8 bytes",
        ),
        (
            {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}},
            "a: expected a shape and two offsets",
        ),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, r"a: expected a shape .*, got \[-2\] and"),
        ({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, "a: expected a known dtype, .* 'F99'"),
        ({"a": {"dtype": "F32", "shape": [2]}}, r"a: expected a shape and two offsets, got \[2\] and None"),
        ({"a": [1, 2]}, r"a: expected a known dtype, a shape and data_offsets, got \[1, 2\]"),
        ([], "expected an object"),
        (b"\x80\x04not json", "'utf-8' codec can't decode byte 0x80"),
        (b"[" * 100_000, "maximum recursion depth"),
    ],
    ids=lambda value: str(value)[:70],
)
def test_a_header_that_makes_no_sense(path, header, message):
    raw_safetensors(path, header, bytes(8))
    assert re.search(f"truncated, or not a safetensors file: .*{message}", refusal(path))


ODD = st.sampled_from([None, True, -1, 1.0, "a", [], {}, [1, 2], [0, -4], 2**64, 10**30])


@st.composite
def headers(draw):
    """A header whose tensors lie one behind the other, and which may have an entry that is odd; and their bytes."""
    header, end = {}, 0
    for name in draw(st.lists(st.sampled_from(["a", "b", "é", "x\x1b[2K"]), unique=True, max_size=3)):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        dtype, bits = draw(st.sampled_from([("F32", 32), ("BF16", 16), ("BOOL", 8), ("F8_E4M3", 8), ("F4", 4)]))
        start, end = end, end + bits * int(np.prod(shape)) // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    if header and draw(st.booleans()):
        draw(st.sampled_from(list(header.values())))[draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = draw(
            ODD
        )
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.sampled_from([{}, {"a": "b"}, {"a": 1}, [], None]))
    return header, end + draw(st.sampled_from([0, 0, 0, 1, -1]))


@given(headers())
def test_headers_are_understood_as_safetensors_itself_does(tmp_path_factory, found):
    header, size = found
    path = tmp_path_factory.mktemp("header") / "x.safetensors"
    raw_safetensors(path, header, bytes(max(0, size)))
    try:
        with safetensors.safe_open(path, framework="numpy") as theirs:
            slices = {name: theirs.get_slice(name) for name in theirs.keys()}  # noqa: SIM118 (no mapping)
            expected = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            metadata = theirs.metadata() or {}
    except safetensors.SafetensorError:
        refusal(path)
        return
    with open_tensors(path) as ours:
        assert {name: (ours.dtypes[name], ours.shapes[name]) for name in ours.shapes} == expected
        assert ours.metadata == metadata


def test_a_key_that_stands_there_twice(path):
    entry = json.dumps(GOOD["a"])
    raw_safetensors(path, f'{{"a": {entry}, "a": {entry}}}'.encode(), bytes(8))
    assert "twice" in refusal(path)


def test_a_name_that_utf8_cannot_hold(path):
    raw_safetensors(path, {"\ud800": GOOD["a"]}, bytes(8))
    refusal(path).encode()


@pytest.mark.parametrize(("dtype", "size"), [("I64", 8), ("U8", 1), ("BOOL", 1)])
def test_a_dtype_that_is_not_supported(path, dtype, size):
    raw_safetensors(path, {"a": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2 * size]}}, bytes(2 * size))
    message = refusal(path)
    assert "a: expected one of F64 F32 F16 BF16" in message
    assert dtype in message


@pytest.mark.parametrize("dtype", EXOTIC)
def test_what_is_no_float_is_not_read_as_numbers(path, dtype):
    """Whatever the file's own tensors are expected to be."""
    n = EXOTIC[dtype]
    raw_safetensors(path, {"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, n]}}, bytes(n))
    with open_tensors(path) as file, pytest.raises(ValueError, match=rf"a: expected one of F64 .*, got {dtype}$"):
        file.read_finite("a")


@pytest.mark.parametrize(("dtype", "data"), [("F16", b"\x00\x3c\x00\x40"), ("BF16", b"\x80\x3f\x00\x40")])
def test_the_short_floats_are_numbers(path, dtype, data):
    """1 and 2, in the formats' own bits."""
    if dtype == "BF16":
        pytest.importorskip("ml_dtypes", reason="bfloat16: the extra models")
    raw_safetensors(path, {"a": {"dtype": dtype, "shape": [2], "data_offsets": [0, 4]}}, data)
    with open_tensors(path) as file:
        assert file.read_finite("a").astype("float64").tolist() == [1, 2]


@given(hostile_texts(), st.sampled_from([20, 200, 4000]))
def test_what_is_shown_is_one_line_of_bounded_length(text, most):
    line = shown(text, most)
    assert is_safe(line)
    assert len(line) <= most
    assert shown(line, most) == line


@pytest.mark.parametrize("text", ["layers.0.attn.q.A", "déjà vu, 東京\u3000\u00a0", "a\tb", "👩\u200d👧", "\\x1b"])
def test_what_harms_nobody_is_shown_as_it_is(text):
    assert shown(text) == text


def test_of_a_long_text_both_ends_are_shown():
    line = shown("begin" + "x" * 1000 + "end")
    assert (line[:5], line[-3:], len(line)) == ("begin", "end", 200)


def test_a_missing_tensor_one_too_many_and_one_of_another_shape(path):
    save_file({"a": np.ones(2, "float32")}, path)
    assert "b is missing" in refusal(path, {"a": (2,), "b": (2,)})
    assert "a has no place" in refusal(path, {})
    assert "a: expected shape (3,), got (2,)" in refusal(path, {"a": (3,)})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none(path, value):
    save_file({"a": np.ones(2), "b": np.array([1, value])}, path)
    assert "b: holds NaN or infinite" in refusal(path)


class Bomb:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return builtins.open, (self.path, "w")


@pytest.mark.parametrize("name", ["w.bin", "w.pt", "w.pth", "w.pkl", "w.ckpt"])
def test_a_pickle_is_refused_and_not_run(tmp_path, name):
    sign, folder = tmp_path / "run", tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Bomb(sign)))
    for path in (folder, folder / name):
        with pytest.raises(ValueError, match="any code"):
            refuse_pickle(path, "w.safetensors")
    (folder / "w.safetensors").touch()
    refuse_pickle(folder, "w.safetensors")  # what lies beside the file that is read is nobody's business
    raw_safetensors(tmp_path / "x.safetensors", pickle.dumps(Bomb(sign)))
    assert "not a safetensors file: 'utf-8' codec can't decode" in refusal(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(pickle.dumps(Bomb(sign)))
    assert "not a safetensors file: it is" in refusal(tmp_path / "x.safetensors")
    assert not sign.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "expected a JSON object, got list"),
        (b"null", "expected a JSON object, got NoneType"),
        (b'"x"', "expected a JSON object, got str"),
        (b'{"a": NaN}', "not valid JSON: 'a': expected a number, got one that no float holds: nan"),
        (b'{"a": -Infinity}', "not valid JSON: 'a': expected a number, got one that no float holds: -inf"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[" * 10**6, "nested too deeply"),
        (b'{"a": ' + b"[" * 10**5, "nested too deeply"),
        (b'{"a\x1b": 1 2}', "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_json_that_is_no_object(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=rf"x\.json: .*{message}") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "'a' stands there twice"),
        ('{"c": [{"x\\n": 1, "x\\n": 2}]}', r"'x\n' stands there twice"),
        ('{"a": 1e999}', "'a': expected a number, got one that no float holds: inf"),
        ('{"a": {"b": [1, [2, -1e309]]}}', "'b': expected a number, got one that no float holds: -inf"),
        ('{"a": [NaN]}', "'a': expected a number, got one that no float holds: nan"),
        ('{"a": 1' + 400 * "0" + "}", "'a': expected a number, got one that no float holds: 1000"),
    ],
)
def test_json_that_readers_would_take_in_different_ways(text, said):
    with pytest.raises(ValueError, match=r"^where: ") as caught:
        parse_json(text, "where")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 250


def test_numbers_that_real_files_have_are_read():
    assert parse_json('{"a": 1000000000000000019884624838656, "b": 1e308, "c": [-0.5, true, null]}', "x") == {
        "a": 1000000000000000019884624838656, "b": 1e308, "c": [-0.5, True, None],
    }  # fmt: skip


def test_json_numbers_too_long_and_files_too_large(tmp_path):
    with pytest.raises(ValueError, match="x: not valid JSON"):
        parse_json('{"a": ' + "9" * 10**5 + "}", "x")
    path = tmp_path / "x.json"
    path.write_bytes(json.dumps({"a": "x" * MAX_JSON_BYTES}).encode())
    with pytest.raises(ValueError, match="at most"):
        read_json(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_json(tmp_path / "y.json")


@pytest.mark.parametrize("shape", [(), (1,), (2, 0), (2, 3)])
def test_what_is_written_keeps_its_shape(path, shape):
    """Also where it has no axes, or is not contiguous."""
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    write_tensors(path, {"x": array, "y": array.T})
    read = read_all(path)
    assert read["x"].shape == shape
    assert (read["x"] == array).all()
    assert (read["y"] == array.T).all()


def test_without_safetensors_files_are_read_and_the_error_says_what_writing_needs(path, monkeypatch):
    raw_safetensors(path, GOOD, np.array([1, 2], "<f4").tobytes())
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert read_all(path)["a"].tolist() == [1, 2]
    with pytest.raises(ImportError, match=r"pip install safetensors \(the extra cli\)"):
        write_tensors(path, {})

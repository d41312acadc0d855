"""Text into batches of tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_np.training import text as data


@given(st.text())
def test_the_byte_tokenizer_gives_back_every_text(text):
    assert data.decode(data.encode(text)) == text


def test_bytes_that_are_no_text_are_replaced():
    assert data.decode(np.array([65, 255, 66])) == "A�B"


@given(st.integers(2, 200), st.integers(1, 20), st.integers(1, 5), st.integers(0, 9), st.integers(0, 9))
def test_random_windows_are_stretches_of_the_text_and_depend_on_seed_and_step_alone(length, T, N, seed, step):
    text = np.arange(length)
    if length <= T:
        with pytest.raises(ValueError, match=f"more than one window of {T} tokens, got {length}"):
            data.random_windows(text, N=N, T=T, seed=seed, step=step)
        return
    windows = data.random_windows(text, N=N, T=T, seed=seed, step=step)
    assert windows.tokens.shape == windows.targets.shape == (N, T)
    assert (np.diff(windows.tokens, axis=1) == 1).all()
    assert (windows.targets == windows.tokens + 1).all()
    again = data.random_windows(text, N=N, T=T, seed=seed, step=step)
    assert (again.tokens == windows.tokens).all()


def test_the_last_window_of_a_text_can_be_drawn():
    starts = {int(data.random_windows(np.arange(5), N=1, T=3, seed=0, step=s).tokens[0, 0]) for s in range(40)}
    assert starts == {0, 1}


@given(st.integers(2, 300), st.integers(1, 20), st.integers(1, 7), st.integers(1, 12))
def test_windows_for_evaluation_never_overlap_and_are_spread_over_the_text(length, T, N, most):
    text = np.arange(length)
    if length <= T:
        with pytest.raises(ValueError, match="more than one window"):
            list(data.all_windows(text, N=N, T=T, most=most))
        return
    batches = list(data.all_windows(text, N=N, T=T, most=most))
    tokens = np.concatenate([b.tokens for b in batches])
    whole = (length - 1) // T
    assert len(tokens) == min(whole, most)
    assert all(len(b.tokens) <= N for b in batches)
    assert len(np.unique(tokens)) == tokens.size
    assert tokens[0, 0] == 0
    if most > 1:
        assert tokens[-1, 0] == T * (whole - 1)


def test_split_holds_out_the_last_part():
    train, held_out = data.split(np.arange(10), 0.3)
    assert train.tolist() == list(range(7))
    assert held_out.tolist() == [7, 8, 9]


def test_read_text_says_what_is_wrong_with_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt: no such file"):
        data.read_text(tmp_path / "none.txt")
    with pytest.raises(IsADirectoryError, match="expected a file, got a folder"):
        data.read_text(tmp_path)
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.txt: the file is empty"):
        data.read_text(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt: expected UTF-8 text; byte 2 is not"):
        data.read_text(tmp_path / "latin.txt")
    (tmp_path / "good.txt").write_bytes("naïve\r\n".encode())
    assert data.read_text(tmp_path / "good.txt") == "naïve\r\n"


def test_python_itself_brings_two_texts():
    reference, library = data.language_reference(), data.standard_library(300_000)
    assert len(reference) > 100_000
    assert "assignment" in reference
    assert len(library) >= 300_000
    assert library.count("def ") > 100

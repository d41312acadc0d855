"""Whatever a reader raises is a ValueError in one line that names its file, and names it once."""

import pytest

from lora_np.formats.files.messages import MAX_LINE, named, naming


class Special(ValueError):
    """One that a caller knows by its type."""


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (ValueError("too long"), "folder: too long"),
        (ValueError("folder/config.json: too long"), "folder/config.json: too long"),
        (ValueError("a\nb\x1b[2K"), r"folder: a\nb\x1b[2K"),
        (OverflowError("int too large"), "folder: int too large"),
        (RecursionError("too deep"), "folder: too deep"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no\nstart"), "folder: 'utf-8' codec can't decode byte 0xff"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("path", ["folder", "folder/", "./folder"])
def test_what_is_raised_names_the_file(path, raised, said):
    with pytest.raises(ValueError, match="folder") as caught, naming(path):
        raise raised
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_the_type_stays_and_the_line_is_bounded():
    with pytest.raises(Special) as caught, naming("x"):
        raise Special("y" * 10**6)
    assert str(caught.value).startswith("x: yyy")
    assert len(str(caught.value)) <= MAX_LINE


def test_what_names_its_file_already_or_is_no_fault_of_it_is_left_alone():
    for error in (FileNotFoundError("x: no such file"), KeyError("y"), TypeError("z")):
        with pytest.raises(type(error)) as caught, naming("folder"):
            raise error
        assert caught.value is error
        assert "folder" not in str(caught.value)


def test_a_reader_is_named_by_its_first_argument():
    @named
    def read(path, *, what=1):
        """Reads."""
        if what:
            raise ValueError(f"{what} is wrong")
        return path

    assert read("x", what=0) == "x"
    assert read.__doc__ == "Reads."
    with pytest.raises(ValueError, match=r"^x: 2 is wrong$"):
        read("x", what=2)

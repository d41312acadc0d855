"""Regular expressions in a file from others: what Python's re says of them, in bounded time and memory, or refused."""

import json
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_np.formats.files import bounded, expressions
from lora_np.formats.files.expressions import Expression, fitting

NAMES = ["transformer.h.0.attn.c_attn", "transformer.h.10.mlp.c_proj", "lm_head"]


def fits(text, names=NAMES, **options):
    """The names that one expression fits."""
    (found,) = fitting([Expression("key", text, **options)], names, "here").values()
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r".*\.h\.\d{1,2}\..*", NAMES[:2]),
        ("lm_head|.*c_attn", [NAMES[0], NAMES[2]]),
        (r"(?i:.*C_PROJ)", NAMES[1:2]),
        (r"transformer(?:\.\w+){4}", NAMES[:2]),
        ("lm_", []),
        ("lm_head{1", []),  # a brace as it stands
    ],
)
def test_names_that_an_expression_fits(text, expected):
    assert fits(text) == set(expected)
    assert fits(text, at_end=True) == set(expected)


def test_an_expression_at_the_end_of_a_name():
    assert fits("c_attn|mlp.c_proj", at_end=True) == set(NAMES[:2])
    assert fits("attn|_attn", at_end=True) == set()  # a part of a name is whole


def test_what_the_package_named_regex_would_read_otherwise():
    """A class of POSIX's is one of characters in Python: [ _ : a l p h, then a bracket as it stands."""
    assert fits("[_[:alpha:]]", ["_]", "h]", ":]", "_", "z"]) == {"_]", "h]", ":]"}


def test_a_file_without_expressions_starts_no_process(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    assert fitting([], NAMES, "here") == {}


def test_one_process_for_all_expressions_of_a_file(monkeypatch):
    started = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **kw: started.append(args) or run(*args, **kw))
    every = [Expression("key", f"(?:lm_head|{i})") for i in range(500)]
    assert fitting(every, NAMES, "here") == {key: {"lm_head"} for key in every}
    assert len(started) == 1


@pytest.mark.filterwarnings("ignore:Possible")
@given(text=st.text("ab.*+?()|[]^$\\{}1,-:!<=", max_size=8), at_end=st.booleans())
def test_any_short_expression_fits_what_it_fits_in_re(text, at_end):
    names = ["a", "b", "ab", "a.b", "aab", ""]
    try:
        expected = {
            name for name in names if (re.match(rf"(.*\.)?({text})$", name) if at_end else re.fullmatch(text, name))
        }
    except (re.error, OverflowError):
        with pytest.raises(ValueError, match="no regular expression that is supported"):
            fits(text, names, at_end=at_end)
    else:
        assert fits(text, names, at_end=at_end) == expected


NONE = [
    "(", "*", "(?P<a>x)(?P<a>y)", "(?V1)x", "(?R)", r"\p{L}", r"\L<x>", "(?|a|b)", r"\1", "(?<=a*)b", "(?L)x", "(?au)x",
    "a{99999999999999999999}", "a{" + "9" * 5000 + "}", "(" * 900 + ")" * 900, "\ud800(",
]  # fmt: skip


@pytest.mark.parametrize("text", NONE, ids=lambda text: ascii(text[:20]))
def test_what_is_no_expression_of_pythons_own(text):
    with pytest.raises(ValueError, match=r"^here: key: '.*: no regular expression that is supported: ") as caught:
        fits(text)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


BOMBS = [
    # that compile for ever
    "(?i)" + "[\\x00-\\U0010ffff]" * 100_000,
    "(?i:" + "[ -\uffff]" * 390_000 + ")",
    # that match for ever
    "(?:.*.*.*.*.*.*)*q",
    "(.*)*" * 300 + "q",
    "(.+)+\\1q",
    # that take all memory
    "((((.*){65000}){65000}){65000}){65000}",
    "(?:" * 12 + "a?" + "){9}" * 12,
    "((?:)){4000000000}x",
]
LIMITED = """
import resource, sys
from lora_np.formats.files import expressions
from lora_np.formats.files.expressions import Expression, fitting
expressions.SECONDS = 1.0
names = ['transformer.h.%d.attn.c_attn' % i for i in range(300)]
try:
    fitting([Expression('a', '.*'), Expression('b', sys.stdin.read()), Expression('c', '.*')], names, 'here')
except ValueError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.parametrize("text", BOMBS, ids=lambda text: ascii(text[:30]))
def test_no_expression_takes_the_memory_or_the_time(text):
    """Of three the one in the middle is at fault; the process that matched took little memory, and is gone."""
    pytest.importorskip("resource", reason="measures memory")
    found = subprocess.run(
        [sys.executable, "-c", LIMITED], input=text, capture_output=True, text=True, encoding="utf-8", timeout=120
    )
    assert (found.returncode, found.stderr) == (0, "")
    message, peak = found.stdout.splitlines()
    assert re.match(
        r"here: b: '.*: (takes too long to match: more than 1 seconds|no regular .*: MemoryError)$", message
    )
    assert int(peak) < (400 if sys.platform == "linux" else 400_000) * 1024


def test_the_time_is_for_all_names_and_expressions_together(monkeypatch):
    monkeypatch.setattr(expressions, "SECONDS", 0.5)
    every = [Expression("key", f"(?:.*.*.*.*q)|{i}") for i in range(100_000)]  # each of them takes little
    with pytest.raises(ValueError, match="takes too long"):
        fitting(every, NAMES, "here")


def test_what_matches_ends_of_itself():
    """Nobody need be there to end it: who asked may have been killed."""
    request = {"names": ["a" * 100], "expressions": [["a*", True], ["(?:.*.*.*.*.*.*)*q", True]]}
    command = bounded.command(expressions.MATCHER, 0.5, expressions.MEMORY)
    found = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (1, "[0]\n")


def test_a_python_that_does_not_start_is_no_expressions_fault(monkeypatch, tmp_path):
    (tmp_path / "none.py").write_text("import sys\nsys.exit(2)\n")
    monkeypatch.setattr(expressions, "MATCHER", tmp_path / "none.py")
    with pytest.raises(OSError, match=r"here: no expression was matched: .* ended with status 2"):
        fitting([Expression("key", "a*")], ["a"], "here")

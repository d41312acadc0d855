"""Regular expressions in a file from others: in bounded time and memory, or refused."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import lora_np as ln
from lora_np.formats.files import expressions
from lora_np.formats.files.expressions import Expressions

NAMES = ["transformer.h.0.attn.c_attn", "transformer.h.10.mlp.c_proj", "lm_head"]
needs_regex = pytest.mark.skipif(
    importlib.util.find_spec("regex") is None, reason="regular expressions need regex: pip install lora-np[models]"
)


@needs_regex
@pytest.mark.parametrize(
    ("text", "fits"),
    [
        (r".*\.h\.\d{1,2}\..*", NAMES[:2]),
        ("lm_head|.*c_attn", [NAMES[0], NAMES[2]]),
        (r"(?i:.*C_PROJ)", NAMES[1:2]),
        (r"transformer(?:\.\w+){4}", NAMES[:2]),
        ("lm_", []),
    ],
)
def test_names_that_an_expression_fits(text, fits):
    assert Expressions("here").fitting(text, NAMES) == set(fits)
    assert Expressions("here").fitting(rf"({text})$", NAMES, whole=False) == set(fits)


BOMBS = [
    "((a{1000}){1000}){1000}",
    "((((.*){65000}){65000}){65000}){65000}",
    "(?:" * 12 + "a?" + "){9}" * 12,
    "(?<=(a{1000}){1000})b",
    "a{99999999999999999999}",
    "(?:(?:|.){10}){10}" * 1 + "(?:.*.*.*.*.*.*)*q",
    "(.*)*" * 300 + "q",
    "(" * 900 + ")" * 900,
    "(?=.*" * 300 + ")" * 300,
    "(?i)" + "[\\x00-\\U0010ffff]" * 100,
    "x" * 10**6,
]
OTHERS = [  # what re refuses, warns of, or reads otherwise than regex does
    "(", "*", "(?P<a>x)(?P<a>y)", "(?V1)x", "(?R)", r"\p{L}", "(?:x){e<=1}", "x{", "[[:alpha:]]", "[a--b]", r"\L<x>",
    "(?|a|b)", r"\1", "(?<=a*)b",
]  # fmt: skip


@needs_regex
@pytest.mark.parametrize("text", OTHERS)
def test_what_is_no_expression_of_pythons_own(text):
    with pytest.raises(ValueError, match=r"^here: ") as caught:
        Expressions("here").fitting(text, NAMES)
    assert "\n" not in str(caught.value)


@needs_regex
@pytest.mark.parametrize("text", BOMBS, ids=lambda text: text[:30])
def test_no_expression_takes_the_memory_or_the_time(text):
    """In a process of its own that may take 200 MB more than it has after its imports, and a minute."""
    resource = pytest.importorskip("resource")
    assert resource.RLIMIT_AS
    code = (
        "import regex, resource, sys\n"
        "from lora_np.formats.files.expressions import Expressions\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "limit = pages * resource.getpagesize() + 200 * 2**20\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "names = ['transformer.h.%d.attn.c_attn' % i for i in range(300)]\n"
        "try:\n"
        "    Expressions('here').fitting(sys.stdin.read(), names)\n"
        "except ValueError as error:\n"
        "    assert '\\n' not in str(error) and len(str(error)) < 400\n"
    )
    if not Path("/proc/self/statm").exists():
        pytest.skip("the limit is set from /proc")
    found = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (0, "")


@needs_regex
def test_the_time_is_for_all_names_and_expressions_together(monkeypatch):
    monkeypatch.setattr(expressions, "SECONDS", 0.2)
    every = Expressions("here")

    def match_for_ever():
        for i in range(10**9):  # each of them takes little
            every.fitting(f"(?:.*.*.*.*q)|{i}", NAMES)

    with pytest.raises(ValueError, match="takes too long"):
        match_for_ever()


def test_a_list_of_names_needs_no_regex(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "regex", None)
    with pytest.raises(ImportError, match=r"lora-np\[models\]"):
        Expressions("here").fitting(".*", NAMES)
    config = ln.Config(11, 10, 1, 2, 8, 12)
    model = ln.Model(config, ln.init_weights(config, seed=0))
    adapter = ln.init_adapter(model, ln.LoRAConfig(r=1, rank_pattern={"layers.0.attn.o": 2}, targets=("o",)), seed=0)
    pytest.importorskip("safetensors")
    ln.save_adapter(tmp_path / "a", adapter, model)
    ln.load_adapter(tmp_path / "a", model)

"""Formulas, texts and source as HTML."""

import html
import re
from xml.etree import ElementTree

import pytest

pytest.importorskip("latex2mathml", reason="the page needs the extra spec")
pytest.importorskip("mdit_py_plugins", reason="the page needs the extra spec")
pytest.importorskip("pygments", reason="the page needs the extra spec")

from hypothesis import given
from hypothesis import strategies as st

from lora_np.spec import conformance, files
from lora_np.spec.definitions import read_package
from lora_np.spec.markup import docstring_html, math, source_html, statement_html
from lora_np.vectors.statements import PARTS, STATEMENTS, Statement

TEXTS = {
    **PARTS,
    **STATEMENTS,
    "conformance": Statement("", conformance.text()),
    **{title or "files": Statement(title, text) for title, text in files.sections()},
}
FORMULAS = [
    (name, block or inline, bool(block))
    for name, statement in TEXTS.items()
    for text in (statement.text, *statement.notes.values())
    for block, inline in re.findall(r"\$\$(.+?)\$\$|\$(.+?)\$", text, flags=re.DOTALL)
]
MATHML = "{http://www.w3.org/1998/Math/MathML}"

# All of MathML Core that the statements need; anything else, a browser would ignore.
DRAWN = {"math", "mrow", "mi", "mn", "mo", "mtext", "mspace", "msub", "msup", "msubsup", "mfrac", "msqrt", "mover"}
DRAWN |= {"munder"}


def nowhere(name):
    return None


@pytest.mark.parametrize(("name", "latex", "display"), FORMULAS)
def test_every_formula_is_one_that_browsers_draw(name, latex, display):
    root = ElementTree.fromstring(math(latex, {"display_mode": display}))
    assert root.get("alttext") == " ".join(latex.split())
    assert root.get("display") == ("block" if display else "inline")
    for element in root.iter():
        assert element.tag.removeprefix(MATHML) in DRAWN
        assert "\\" not in (element.text or "")  # a command that is not known stays as it is
        assert "~" not in (element.text or "")
        width = element.get("width")
        assert width is None or re.fullmatch(r"\d*\.?\d+em", width)


def test_bars_know_their_sides():
    root = ElementTree.fromstring(math(r"\lvert x \rvert^\top + \lVert g \rVert", {"display_mode": False}))
    bars = [(e.text, e.get("form")) for e in root.iter(f"{MATHML}mo") if e.get("form")]
    assert bars == [("|", "prefix"), ("|", "postfix"), ("‖", "prefix"), ("‖", "postfix")]


@pytest.mark.parametrize("name", TEXTS)
def test_no_formula_of_a_statement_is_left_as_text(name):
    text = "".join(statement_html(part, nowhere) for part in (TEXTS[name].text, *TEXTS[name].notes.values()))
    assert text.count("<math ") == sum(1 for other, *_ in FORMULAS if other == name)
    assert "$" not in re.sub(r'alttext="[^"]*"', "", text)


def test_ids_and_names_are_links_and_shapes_are_set_apart():
    text = docstring_html(
        "T3, L8 (paper 4.1): `linear` of x (..., in), `other`, A2 = 3, -> (N,T,D), (V,), (<= r,), (...), (T5, T6), "
        "(as is).",
        {"linear": "ops.linear"}.get,
    )
    assert text == (
        '<p><a href="#T3">T3</a>, <a href="#L8">L8</a> (paper 4.1): <a href="#ops.linear"><code>linear</code></a> of x '
        '<span class="shape">(..., in)</span>, <code>other</code>, A2 = 3, →\N{NO-BREAK SPACE}'
        '<span class="shape">(N,T,D)</span>, '
        '<span class="shape">(V,)</span>, <span class="shape">(&lt;= r,)</span>, <span class="shape">(...)</span>, '
        '(<a href="#T5">T5</a>, <a href="#T6">T6</a>), (as is).</p>\n'
    )


def test_a_docstring_is_not_markdown():
    """Stars are products, underscores are names, and a block that is set further in stays as it is."""
    text = docstring_html(
        "m*x) A^T, (m*x\n_one_ <two> [three](four) 1. five\n\n    a = b    (L1)\n    c\n\n# six", nowhere
    )
    assert text == (
        "<p>m*x) A^T, (m*x\n_one_ &lt;two&gt; [three](four) 1. five</p>\n"
        '<pre tabindex="0"><code>a = b    (<a href="#L1">L1</a>)\nc\n</code></pre>\n<p># six</p>\n'
    )


def test_columns_in_docstrings_are_set_further_in():
    """Else they would run together."""
    for module in read_package().values():
        if module.name in (
            "lora",
            "model",
            "ops",
            "backend",
            "optim",
            "layout",
            "binding",
            "loss",
            "batch",
            "transformer",
            "adapter",
        ):
            for d in module.definitions.values():
                assert not re.search(r"^\S.*\S {3,}\S", d.docstring, flags=re.MULTILINE), d.key


def plain(lines):
    return html.unescape(re.sub(r"<[^>]+>", "", "\n".join(lines)))


@pytest.mark.parametrize("module", read_package().values(), ids=lambda module: module.name)
def test_source_is_the_source_with_links_where_it_names_things(module):
    lines = source_html(module, lambda key: key)
    assert plain(lines) == module.text
    uses = sorted((place, key) for d in module.definitions.values() for place, key in d.uses.items())
    uses = list(dict.fromkeys(uses))  # a use in a nested function is one of the outer, too
    assert [key for line in lines for key in re.findall(r'<a href="#([^"]+)">', line)] == [key for _, key in uses]


@given(st.text(st.characters(codec="utf-8", exclude_characters="\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"), max_size=60))
def test_no_text_gets_out_of_its_element(text):
    """Whatever a docstring says, it adds no element of its own."""
    markup = docstring_html(text, nowhere)
    assert set(re.findall(r"<(/?\w+)", markup)) <= {
        "p",
        "/p",
        "pre",
        "/pre",
        "code",
        "/code",
        "a",
        "/a",
        "span",
        "/span",
    }
    assert not re.search(r"<(?!/?(p|pre|code|a|span)\b)", markup)

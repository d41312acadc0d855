"""Texts, formulas and source as HTML: Markdown by markdown-it, LaTeX as MathML by latex2mathml, Python by Pygments."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from html import escape
from typing import Any, TypeAlias

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererProtocol
from markdown_it.token import Token
from markupsafe import Markup
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import lex, token
from pygments.lexers.python import PythonLexer

from .citations import ID
from .definitions import Module

Anchor: TypeAlias = Callable[[str], str | None]  # of what a name stands for; None where the page has no such thing

# A shape in a text, escaped: (N,T,D), (..., in), (<= r,). What else stands in brackets has blanks: (paper 4.1, eq. 3).
_SIZE = r"(?:&lt;= )?[\w*+/]+"
SHAPE = re.compile(rf"\((?:\.\.\.|{_SIZE},|(?:\.\.\.|{_SIZE})(?:, ?{_SIZE})+)\)")

ARROW = re.compile(r"-&gt;\s*")  # in a text, where a line must not end within it or behind it

SHORT = 60  # characters of a formula as MathML has them, entities among them: less than a narrow line

COLOURED = {
    token.Keyword: "k", token.Operator.Word: "k", token.Name.Function: "f", token.Name.Class: "f",
    token.Name.Decorator: "f", token.String: "s", token.Number: "m", token.Comment: "c",
}  # fmt: skip

# latex2mathml writes MathML 3. In MathML Core, which browsers draw, a bar needs to be told on which side it stands (by
# \left and \right, but it need not grow), no width has a name, a derivative's d and infinity are no operators, and a
# tilde is one.
FENCES = {
    rf"\{side}{bar}": rf"\{word}\{side}{bar}"
    for side, word in (("l", "left"), ("r", "right"))
    for bar in ("vert", "Vert")
}
CORE = {
    'stretchy="true" fence="true" form="prefix">&#x0007C;': 'stretchy="false" form="prefix">&#x0007C;',
    'stretchy="true" fence="true" form="postfix">&#x0007C;': 'stretchy="false" form="postfix">&#x0007C;',
    'stretchy="true" fence="true" form="prefix">&#x02016;': 'stretchy="false" form="prefix">&#x02016;',
    'stretchy="true" fence="true" form="postfix">&#x02016;': 'stretchy="false" form="postfix">&#x02016;',
    '<mspace width="thinmathspace" />': '<mspace width="0.167em" />',
    "<mo>&#x02202;</mo>": "<mi>&#x02202;</mi>",
    "<mo>&#x0221E;</mo>": "<mi>&#x0221E;</mi>",
    "<mi>&#x0007E;</mi>": "<mo>&#x0223C;</mo>",
}


def _replaced(text: str, by: Mapping[str, str]) -> str:
    for old, new in by.items():
        text = text.replace(old, new)
    return text


def math(latex: str, options: Mapping[str, Any]) -> str:
    """A formula as MathML, which keeps its LaTeX for whoever reads without seeing."""
    display = "block" if options["display_mode"] else "inline"
    mathml = _replaced(convert(_replaced(latex, FENCES), display=display), CORE)
    return mathml.replace("<math ", f'<math alttext="{escape(" ".join(latex.split()))}" ', 1)


def _linked(text: str) -> str:
    """The ids in a text as links to their clauses."""
    return ID.sub(r'<a href="#\g<0>">\g<0></a>', text)


def _text(_: RendererProtocol, tokens: Sequence[Token], i: int, __: Any, ___: MutableMapping[str, Any]) -> str:
    """Plain text, in which an id is a link to its clause, and a shape is set apart."""

    def shape(m: re.Match[str]) -> str:
        return m[0] if ID.search(m[0]) else f'<span class="shape">{m[0]}</span>'

    text = SHAPE.sub(shape, escape(tokens[i].content, quote=False))
    return ARROW.sub("→\N{NO-BREAK SPACE}", _linked(text))


def _code(_: RendererProtocol, tokens: Sequence[Token], i: int, __: Any, env: MutableMapping[str, Any]) -> str:
    """`Code`, a link where it names something that the page has."""
    code, anchor = f"<code>{escape(tokens[i].content)}</code>", env["anchor"](tokens[i].content)
    return code if anchor is None else f'<a href="#{anchor}">{code}</a>'


def _block(_: RendererProtocol, tokens: Sequence[Token], i: int, __: Any, ___: MutableMapping[str, Any]) -> str:
    """A block that is set further in, as it stands."""
    return f'<pre tabindex="0"><code>{_linked(escape(tokens[i].content, quote=False))}</code></pre>\n'


def _kept(html: str) -> str:
    """What closes a formula in a line stays with it, unless it is long: no line begins with a comma."""

    def kept(m: re.Match[str]) -> str:
        return f'<span class="kept">{m[0]}</span>' if len(re.sub("<[^>]*>", "", m[0])) <= SHORT else m[0]

    return re.sub(r'<span class="math inline">(?:(?!<span).)*?</span>[,.;:)]+', kept, html)


def _markdown(parser: MarkdownIt) -> Callable[[str, Anchor], Markup]:
    parser.add_render_rule("text", _text)
    parser.add_render_rule("code_inline", _code)
    parser.add_render_rule("code_block", _block)
    parser.add_render_rule("fence", _block)
    parser.add_render_rule("table_open", lambda *_: '<div class="wide" tabindex="0"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return lambda text, anchor: Markup(_kept(parser.render(text, {"anchor": anchor})))


# A statement is Markdown with formulas. A docstring is plain: paragraphs, `code`, and blocks that are set further in.
statement_html = _markdown(
    MarkdownIt("commonmark", {"html": False}).enable("table").use(dollarmath_plugin, renderer=math, allow_labels=False)
)
docstring_html = _markdown(MarkdownIt("zero").enable(["backticks", "code"]))


def source_html(module: Module, anchor: Anchor) -> list[Markup]:
    """The lines of a module, coloured; a name that the page explains is a link to it. anchor takes keys."""
    places = {
        place: found
        for d in module.definitions.values()
        for place, key in d.uses.items()
        if (found := anchor(key)) is not None
    }
    lines, column = [""], 0
    for kind, text in lex(module.text, PythonLexer(stripnl=False, ensurenl=False)):
        colour = next((COLOURED[k] for k in reversed(kind.split()) if k in COLOURED), None)
        target = places.get((len(lines), column + text.startswith("@")))  # a decorator is one token with its sign
        for n, part in enumerate(text.split("\n")):
            if n:
                lines.append("")
                column = 0
            column += len(part)
            html = escape(part, quote=False)
            if html and colour:
                html = f'<span class="{colour}">{html}</span>'
            lines[-1] += f'<a href="#{target}">{html}</a>' if target else html
    return [Markup(line) for line in lines]

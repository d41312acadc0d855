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

# A shape in a text: (N,T,D), (..., in), (V,). What is in other brackets has blanks in it: (paper 4.1, eq. 3).
_SIZE = r"(?:<= )?[\w*+/]+"
SHAPE = re.compile(rf"\((?:\.\.\.|{_SIZE},|(?:\.\.\.|{_SIZE})(?:, ?{_SIZE})+)\)")

COLOURED = {
    token.Keyword: "k", token.Operator.Word: "k", token.Name.Function: "f", token.Name.Class: "f",
    token.Name.Decorator: "f", token.String: "s", token.Number: "n", token.Comment: "c",
}  # fmt: skip


def math(latex: str, options: Mapping[str, Any]) -> str:
    """A formula as MathML, which keeps its LaTeX for whoever reads without seeing."""
    mathml = convert(latex, display="block" if options["display_mode"] else "inline")
    return mathml.replace("<math ", f'<math alttext="{escape(" ".join(latex.split()))}" ', 1)


def _text(_: RendererProtocol, tokens: Sequence[Token], i: int, __: Any, ___: MutableMapping[str, Any]) -> str:
    """Plain text, in which an id is a link to its clause, and a shape is set apart."""
    text = SHAPE.sub(lambda m: f'<span class="shape">{m[0]}</span>', escape(tokens[i].content, quote=False))
    return ID.sub(lambda m: f'<a href="#{m[0]}">{m[0]}</a>', text)


def _code(_: RendererProtocol, tokens: Sequence[Token], i: int, __: Any, env: MutableMapping[str, Any]) -> str:
    """`Code`, a link where it names something that the page has."""
    code, anchor = f"<code>{escape(tokens[i].content)}</code>", env["anchor"](tokens[i].content)
    return code if anchor is None else f'<a href="#{anchor}">{code}</a>'


def _markdown(parser: MarkdownIt) -> Callable[[str, Anchor], Markup]:
    parser.add_render_rule("text", _text)
    parser.add_render_rule("code_inline", _code)
    return lambda text, anchor: Markup(parser.render(text, {"anchor": anchor}))


# A statement is Markdown with formulas. A docstring is plain text: paragraphs, `code`, and blocks that are set further in.
statement_html = _markdown(
    MarkdownIt("commonmark", {"html": False}).use(dollarmath_plugin, renderer=math, allow_labels=False)
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
        target = places.get((len(lines), column))
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

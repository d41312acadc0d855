"""The document as one page of HTML that asks for nothing else: styles, script and formulas are in it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from .. import __version__
from ..backend import backend_name
from ..formats.files.atomic import new_folder
from .clauses import Document, refusing
from .definitions import Definition
from .markup import Anchor, docstring_html, source_html, statement_html

NAME = "index.html"
HERE = Path(__file__).parent


def render(document: Document) -> str:
    """The page."""
    printed = document.definitions
    anchor = _anchors(printed)
    source = {
        name: source_html(document.modules[name], lambda key: key if key in printed else None)
        for name in {definition.module for definition in printed.values()}
    }

    def lines(definition: Definition) -> Markup:
        """A definition's source without its docstring, which stands beside it."""
        kept = [n for n in definition.lines if n not in definition.docstring_lines]
        return Markup("\n").join(source[definition.module][n - 1] for n in kept)

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {
        "docstring": lambda text: docstring_html(text, anchor),
        "statement": lambda text: statement_html(text, anchor),
        "source": lines,
        "refusing": lambda definition: refusing(definition, printed),
        "breakable": lambda name: Markup("_<wbr>").join(name.split("_")),
    }
    page = environment.get_template("page.html").render(
        document=document,
        version=__version__,
        machine=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, "
        f"NumPy {np.__version__}, {backend_name} backend",
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
    )
    return f"{page.strip()}\n"


def _anchors(printed: Mapping[str, Definition]) -> Anchor:
    """The anchor of a name as texts have it: `merge`, `LoRAConfig.scale`, `ops.linear`; None where it is not clear."""
    keys: dict[str, set[str]] = {}
    for key, definition in printed.items():
        for name in (key, definition.name, definition.name.rpartition(".")[2]):
            keys.setdefault(name, set()).add(key)
    return lambda name: min(keys[name]) if len(keys.get(name, ())) == 1 else None


def write(folder: Path, page: str) -> Path:
    """Writes the page into a new folder, whole or not at all. -> its path."""
    with new_folder(folder) as partial:
        (partial / NAME).write_text(page, encoding="utf-8")
    return folder / NAME

"""The document as pages of HTML that ask for nothing else: styles, script and formulas are in each."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from .. import __version__
from ..backend import backend_name
from ..formats.files.atomic import new_folder
from . import api, conformance, files
from .clauses import Document, refusing
from .definitions import Definition
from .markup import Anchor, docstring_html, source_html, statement_html

NAME, API = "index.html", "api.html"
SETTERS = ("jinja2", "latex2mathml", "markdown-it-py", "mdit-py-plugins", "pygments")
LONG = 72  # characters of a line of source, beside which a docstring has room
HERE = Path(__file__).parent


def pages(document: Document) -> dict[str, str]:
    """The pages by their files' names: the specification, and the public names."""
    environment = _environment(document)
    return {NAME: _rendered(environment, "page.html"), API: _across(_rendered(environment, "api.html"))}


def render(document: Document) -> str:
    """The specification's page."""
    return _rendered(_environment(document), "page.html")


def _rendered(environment: jinja2.Environment, template: str) -> str:
    return f"{environment.get_template(template).render().strip()}\n"


def _across(page: str) -> str:
    """The page with links to what it does not have itself as links to the specification."""
    own = set(re.findall(r'\bid="([^"]+)"', page))
    return re.sub(r'href="#([^"]+)"', lambda m: m[0] if m[1] in own else f'href="{NAME}#{m[1]}"', page)


def _environment(document: Document) -> jinja2.Environment:
    """The templates, and what they are filled with."""
    printed = document.definitions
    anchor = _anchors(printed)
    source = {
        name: source_html(document.modules[name], lambda key: key if key in printed else None)
        for name in {definition.module for definition in printed.values()}
    }

    def lines(definition: Definition) -> Markup:
        """A definition's source without its docstring, which stands beside it."""
        kept = [n for n in definition.lines if n not in definition.docstring_lines]
        plain = document.modules[definition.module].text.split("\n")
        return Markup("\n").join(_foldable(source[definition.module][n - 1], plain[n - 1]) for n in kept)

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
    environment.globals |= {
        "document": document,
        "printed": printed,
        "conformance": conformance.text(),
        "written": conformance.written(),
        "files": files.sections(),
        "public": api.entries(),
        "version": __version__,
        "made_by": made_by(),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, "
        f"NumPy {np.__version__}, {backend_name} backend",
        "css": Markup((HERE / "page.css").read_text(encoding="utf-8")),
        "script": Markup((HERE / "page.js").read_text(encoding="utf-8")),
    }
    return environment


def made_by() -> str:
    """The versions of what sets the text: another may set the same text in other elements."""
    return ", ".join(f"{name} {version(name)}" for name in SETTERS)


def _foldable(line: Markup, plain: str) -> Markup:
    """A line of source; a long one can be folded where there is no room, its rest set further in than it begins."""
    if len(plain) <= LONG:
        return line
    further = len(plain) - len(plain.lstrip()) + 8
    return Markup('<span class="long" style="--in:{}ch">{}</span>').format(further, line)


def _anchors(printed: Mapping[str, Definition]) -> Anchor:
    """The anchor of a name as texts have it: `merge`, `LoRAConfig.scale`, `ops.linear`; None where it is not clear."""
    keys: dict[str, set[str]] = {}
    for key, definition in printed.items():
        for name in (key, definition.name, definition.name.rpartition(".")[2]):
            keys.setdefault(name, set()).add(key)
    return lambda name: min(keys[name]) if len(keys.get(name, ())) == 1 else None


def write(folder: Path, pages: Mapping[str, str]) -> Path:
    """Writes the pages into a new folder, all or none. -> the path of the first."""
    with new_folder(folder) as partial:
        for name, page in pages.items():
            (partial / name).write_text(page, encoding="utf-8")
    return folder / next(iter(pages))

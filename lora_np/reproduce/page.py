"""The report as one page of HTML that needs nothing else: its pictures are in it."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..formats.files.extras import install
from .section import Claim, Picture, Section, Table

TITLE = "LoRA's claims, checked"
WITHOUT = f"Pictures are left out: they need matplotlib, {install('matplotlib', 'plot')}."

STYLE = """
:root { color-scheme: light dark; --ink: #22262a; --dim: #5c666e; --page: #fff; --line: #d9dee2; --soft: #f4f6f7;
  --holds: #1c6b3a; --part: #8a5a00; --fails: #a32020; --accent: #0b6e99 }
@media (prefers-color-scheme: dark) { :root { --ink: #dcdfe2; --dim: #9aa4ac; --page: #16191c; --line: #353b41;
  --soft: #1f2428; --holds: #6fcf93; --part: #e2b04a; --fails: #ff8a80; --accent: #5bb8e0 } }
* { box-sizing: border-box }
html { scroll-padding-top: 1rem; -webkit-text-size-adjust: 100% }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem } h2 { font-size: 1.25rem; margin: 3rem 0 .5rem }
a { color: var(--accent) } p { max-width: 46rem } .dim, figcaption, caption { color: var(--dim) }
ul.claims { list-style: none; padding: 0; margin: 1rem 0 }
ul.claims li { display: grid; grid-template-columns: 8.5rem 1fr; gap: 0 1rem; padding: .6rem 0;
  border-top: 1px solid var(--line) }
.verdict { font-weight: 600 } .holds { color: var(--holds) } .part { color: var(--part) } .fails { color: var(--fails) }
.unchecked { color: var(--dim) } .claim { font-weight: 600 } .source { color: var(--dim); font-size: .875rem }
.scroll { overflow-x: auto; margin: 1rem 0 } table { border-collapse: collapse; font-size: .9rem }
caption { text-align: left; padding: .25rem 0 } th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left; padding-left: 0 } thead th { border-bottom-width: 2px }
.pictures { display: flex; flex-wrap: wrap; gap: 1.5rem } figure { margin: 0; flex: 0 1 28rem; min-width: 0 }
figure img { display: block; width: 100%; height: auto } figcaption { font-size: .875rem }
nav a { margin-right: 1rem }
@media (max-width: 36rem) { ul.claims li { grid-template-columns: 1fr } }
@media print { body { max-width: none } nav { display: none } figure, ul.claims li, table { break-inside: avoid } }
"""

CLASSES = {"holds": "holds", "holds in part": "part", "does not hold": "fails", "not checked": "unchecked"}


def page(sections: Sequence[Section], environment: Mapping[str, Any], *, pictures: bool) -> str:
    """The whole page. pictures: whether there is matplotlib to draw them."""
    links = " ".join(f'<a href="#{escape(s.id)}">{_text(s.title)}</a>' for s in sections)
    about = ", ".join(f"{key} {value}" for key, value in environment.items())
    parts = [
        f"<h1>{escape(TITLE)}</h1>",
        "<p>LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), by its own measures, on models small "
        "enough for any machine. A claim that does not hold here may hold for a model a thousand times the size; each "
        "verdict is about the figure beside it.</p>",
        f"<p>{escape(tally(sections))}</p>",
        *([] if pictures else [f"<p>{escape(WITHOUT)}</p>"]),
        f"<nav>{links}</nav>",
        *(_section(section, pictures) for section in sections),
        f'<h2>Measured with</h2><p class="dim">{escape(about)}</p>',
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(TITLE)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def tally(sections: Sequence[Section]) -> str:
    """How many claims got each verdict."""
    verdicts = [claim.verdict for section in sections for claim in section.claims]
    counted = [f"{verdict}: {verdicts.count(verdict)}" for verdict in CLASSES if verdict in verdicts]
    return f"{len(verdicts)} claims. {'; '.join(counted)}."


def _text(words: str) -> str:
    """Words as HTML: W_q with its index, phi and U^T as they are printed."""
    words = re.sub(r"\bW_([qkvo])\b", r"<i>W</i><sub>\1</sub>", escape(words))
    return words.replace("phi(", "φ(").replace("^T", "<sup>T</sup>")


def _section(section: Section, pictures: bool) -> str:
    parts = [
        f'<h2 id="{escape(section.id)}">{_text(section.title)}</h2>',
        f"<p>{_text(section.about)}</p>",
        f'<ul class="claims">{"".join(map(_claim, section.claims))}</ul>',
        *map(_table, section.tables),
    ]
    if pictures and section.pictures:
        parts.append(f'<div class="pictures">{"".join(map(_picture, section.pictures))}</div>')
    return "\n".join(parts)


def _claim(claim: Claim) -> str:
    return (
        f'<li><div class="verdict {CLASSES[claim.verdict]}">{claim.verdict}</div><div>'
        f'<div class="claim">{_text(claim.claim)}</div><div class="source">{_text(claim.source)}</div>'
        f"<div>{_text(claim.figure)}</div></div></li>"
    )


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(row(cells, "td") for cells in table.rows)
    return (
        f'<div class="scroll"><table><caption>{_text(table.caption)}</caption>'
        f"<thead>{row(table.head, 'th')}</thead><tbody>{body}</tbody></table></div>"
    )


def _picture(picture: Picture) -> str:
    light, dark = (_data_uri(picture.draw(on_dark)) for on_dark in (False, True))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(picture.caption)}"></picture>'
        f"<figcaption>{_text(picture.caption)}</figcaption></figure>"
    )


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()

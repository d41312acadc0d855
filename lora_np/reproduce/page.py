"""The report as one page of HTML that needs nothing else: its pictures are in it."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from typing import Any

from ..formats.files.extras import install
from .section import Claim, Picture, Section, Table

TITLE = "LoRA's claims, checked"
QUICK_FORM = (
    "Quick form: trained for ten steps and timed once, to show that all runs. What training or timing decides has no "
    "verdict here; leave out --quick for that."
)
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
.table { margin: 1rem 0 } .table p { color: var(--dim); font-size: .9rem; margin: .25rem 0 }
.scroll { overflow-x: auto; background: linear-gradient(to right, var(--page) 60%, transparent) left,
  linear-gradient(to left, var(--page) 60%, transparent) right, linear-gradient(to right, var(--dim), transparent) left,
  linear-gradient(to left, var(--dim), transparent) right; background-repeat: no-repeat;
  background-size: 2.5rem 100%, 2.5rem 100%, .6rem 100%, .6rem 100%;
  background-attachment: local, local, scroll, scroll }
table { border-collapse: collapse; font-size: .9rem } th, td { padding: .3rem .7rem; text-align: right;
  font-variant-numeric: tabular-nums; border-bottom: 1px solid var(--line) } td { white-space: nowrap }
th { vertical-align: bottom } th:first-child, td:first-child { text-align: left; padding-left: 0 }
td:first-child { white-space: normal; min-width: 6.5rem } thead th { border-bottom-width: 2px }
code { font-size: .9em } .note { border-left: 4px solid var(--part); padding-left: .7rem }
.pictures { display: flex; flex-wrap: wrap; gap: 1.5rem } figure { margin: 0; flex: 0 1 28rem; min-width: 0 }
figure img { display: block; width: 100%; height: auto } figcaption { font-size: .875rem }
nav a { display: inline-block; margin: 0 1rem .3rem 0 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; margin: 1rem 0; font-size: .9rem }
dt { color: var(--dim) } dd { margin: 0; overflow-wrap: anywhere }
@media (max-width: 36rem) { ul.claims li { grid-template-columns: 1fr } table { font-size: .8rem }
  th, td { padding: .3rem .35rem } td:first-child { min-width: 5rem } }
@media print { body { max-width: none } nav { display: none } figure, ul.claims li, table { break-inside: avoid }
  .scroll { overflow: visible; background: none } }
"""

CLASSES = {"holds": "holds", "holds in part": "part", "does not hold": "fails", "not decided": "unchecked",
           "not checked": "unchecked"}  # fmt: skip


def page(
    sections: Sequence[Section], environment: Mapping[str, Any], *, left: Sequence[str] = (), pictures: bool
) -> str:
    """The whole page. left: what is still to be measured; pictures: whether there is matplotlib to draw them."""
    links = " ".join(f'<a href="#{escape(s.id)}">{_text(s.title)}</a>' for s in sections)
    facts = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in environment.items())
    notes = [QUICK_FORM] if environment.get("form") == "quick" else []
    if left:
        notes.append(f"Not finished. Still to be measured: {'; '.join(left)}. The same command goes on from here.")
    parts = [
        f"<h1>{escape(TITLE)}</h1>",
        "<p>LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), by its own measures, on models small "
        "enough for any machine. A claim that does not hold here may hold for a model a thousand times the size; each "
        "verdict is about the figure beside it.</p>",
        f"<dl>{facts}</dl>",
        *(f'<p class="note">{escape(note)}</p>' for note in notes),
        f"<p>{escape(tally(sections))}</p>",
        *([] if pictures else [f"<p>{escape(WITHOUT)}</p>"]),
        f"<nav>{links}</nav>",
        *(_section(section, pictures) for section in sections),
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
    """Words as HTML: W_q with its index, phi, U^T and 1e-3 as they are printed, `code` as code."""
    words = re.sub(r"\bW_([qkvo])\b", r"<i>W</i><sub>\1</sub>", escape(words))
    words = re.sub(r"`([^`]+)`", r"<code>\1</code>", words)
    words = re.sub(
        r"(?<=\d)e([+-])0*(\d+)\b", lambda m: f" · 10<sup>{m[1].replace('-', '−').strip('+')}{m[2]}</sup>", words
    )
    return words.replace("phi(", "φ(").replace("^T", "<sup>T</sup>")


@cache  # drawing takes longest, and the page is written again after each section
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
        f'<div class="table"><p>{_text(table.caption)}</p><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(table.caption)}"><table><thead>{row(table.head, "th")}</thead>'
        f"<tbody>{body}</tbody></table></div></div>"
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

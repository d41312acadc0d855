"""The page: one file that needs nothing else, in which every link leads somewhere, every id comes once."""

import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import CHROMIUM, NONE, browse

from lora_np.reproduce.counts import counts
from lora_np.reproduce.page import QUICK_FORM, WITHOUT, page, tally
from lora_np.reproduce.section import (
    Claim,
    Picture,
    Section,
    Table,
    as_quick,
    every,
    graded,
    listed,
    some,
    told,
)  # fmt: skip

VOID = {"meta", "img", "source", "br", "link"}
CLAIMS = [
    Claim("a < b & c", "paper, 1", "1 < 2", "holds"),
    Claim("d", "paper, 2", "3", "holds in part"),
    Claim("e", "paper, 3", "4", "does not hold"),
    Claim("f", "paper, 4", "5", "not checked"),
    Claim("g", "paper, 5", "6", "not decided"),
]
PICTURES = {
    "spread_curves": [{"q": [(1, 2.0, 1.9, 2.1), (8, 1.5, 1.4, 1.6)]}, {"before": 3.0}, "r", "loss"],
    "spread_points": [{"one": (1.0, 0.5, 2.0), "other": (2.0, 2.0, 2.0)}, "percent"],
    "heat_maps": [{"W_q": np.eye(3).tolist(), "by chance": np.full((3, 3), 0.5).tolist()}, "j", "i"],
}


def section(id, **fields):
    return Section(
        id, f"About {id}", "What was <done>.", CLAIMS, [Table("a & b", ["", "x"], [["row", "<1>"]])], **fields
    )


class Reader(HTMLParser):
    """Collects ids, links, sources and the text, and holds that every tag is closed in its order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.links, self.sources, self.words = [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.open += [] if tag in VOID else [tag]
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if "href" in attrs else []
        self.sources += [attrs[name] for name in ("src", "srcset") if name in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_every_link_leads_to_an_id_that_comes_once():
    read = Reader(page([section("one"), section("two")], {"cores": 2}, pictures=False))
    assert read.ids == ["one", "two"]
    assert read.links == ["#one", "#two"]


def test_everything_is_said_and_nothing_is_taken_for_markup():
    text = "".join(Reader(page([section("one")], {"cores": 2}, pictures=False)).words)
    for words in (
        "a < b & c",
        "1 < 2",
        "What was <done>.",
        "<1>",
        "a & b",
        "cores2",
        WITHOUT,
        *(c.verdict for c in CLAIMS),
    ):
        assert words in text


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_in_the_page_for_light_and_dark(name):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    picture = Picture("A caption.", name, PICTURES[name])
    text = page([section("one", pictures=[picture])], {}, pictures=True)
    dark, light = Reader(text).sources
    assert dark != light
    assert all(source.startswith("data:image/svg+xml;base64,") for source in (dark, light))
    assert WITHOUT not in text
    assert picture.draw(False) == picture.draw(False)  # the same bytes each time


def test_the_page_asks_for_nothing_from_elsewhere():
    text = page([section("one")], {}, pictures=False)
    assert not re.search(r"https?:|url\(|@import|<script", text)


@pytest.mark.skipif(CHROMIUM is None, reason=NONE)
@pytest.mark.parametrize("width", [390, 1440])
def test_in_a_browser_nothing_is_wider_than_the_window_and_what_scrolls_shows_it(tmp_path, width):
    wide = Table("A wide one", ["", *(f"column {i}" for i in range(20))], [["row", *(["0.1234 ± 0.0001"] * 20)]])
    sections = [counts(), replace(section("one"), tables=[wide])]
    text = page(sections, {"form": "quick", "date": "2026-01-31"}, pictures=False)
    (tmp_path / "harness.html").write_text(HARNESS % (width, json.dumps(text).replace("</", "<\\/")))
    elements, console = browse(tmp_path, tmp_path / "harness.html")
    assert console == []
    report = json.loads(html.unescape(re.search(r'<pre id="report">(.*?)</pre>', elements)[1]))
    assert report["width"] <= width
    assert report["scrolling"] == [False, False, True]
    assert report["shown"] == [True] * 3


HARNESS = """<!doctype html><iframe id="frame" width="%d" height="800"></iframe><pre id="report"></pre>
<script>
const frame = document.getElementById("frame");
frame.onload = () => {
  const page = frame.contentDocument, tables = [...page.querySelectorAll(".scroll")];
  document.getElementById("report").textContent = JSON.stringify({
    width: page.documentElement.scrollWidth,
    scrolling: tables.map((e) => e.scrollWidth > e.clientWidth + 1),
    shown: tables.map((e) => frame.contentWindow.getComputedStyle(e).backgroundImage !== "none" && e.tabIndex === 0),
  });
};
frame.srcdoc = %s;
</script>"""


def test_letters_of_mathematics_are_set_as_such():
    about = "phi(1, 1) of W_q, U^T W V; `a < b`, 5.7e-16 or 1.0e+03"
    text = page([replace(section("one"), about=about)], {}, pictures=False)
    assert "φ(1, 1) of <i>W</i><sub>q</sub>, U<sup>T</sup> W V; <code>a &lt; b</code>, " in text
    assert "5.7 · 10<sup>−16</sup> or 1.0 · 10<sup>3</sup>" in text


def test_the_quick_form_is_marked_at_every_table_and_picture_and_has_the_exact_verdicts_alone():
    claims = [CLAIMS[0]._replace(exact=True), *CLAIMS[1:]]
    picture = Picture("A picture.", "spread_points", PICTURES["spread_points"])
    quick = as_quick(replace(section("one", pictures=[picture, picture]), claims=claims))
    assert [claim.verdict for claim in quick.claims] == ["holds", *["not decided"] * 4]
    assert [claim.figure for claim in quick.claims] == [claim.figure for claim in claims]
    assert all(one.caption.startswith("Quick form. ") for one in (*quick.tables, *quick.pictures))
    assert quick.about.startswith("Quick form")
    text = "".join(Reader(page([quick], {"form": "quick"}, pictures=False)).words)
    assert QUICK_FORM in text
    assert text.count("Quick form. a & b") == 1
    assert QUICK_FORM not in page([section("one")], {"form": "standard"}, pictures=False)


def test_what_is_still_to_be_measured_is_said():
    text = "".join(Reader(page([section("one")], {}, left=["Two", "Three"], pictures=False)).words)
    assert "Still to be measured: Two; Three." in text
    assert "Still" not in page([section("one")], {}, pictures=False)


def test_verdicts_are_counted():
    assert tally([section("one"), section("two")]) == (
        "10 claims. holds: 2; holds in part: 2; does not hold: 2; not decided: 2; not checked: 2."
    )


def test_grades_and_lists():
    grades = {
        (True, True): "holds", (True, False): "holds", (False, True): "holds in part", (False, False): "does not hold",
        (None, True): "not decided", (None, None): "not decided", (False, None): "not decided", (True, None): "holds",
    }  # fmt: skip
    assert {of: graded(*of) for of in grades} == grades
    assert [some(f) for f in ([False, True, None], [False, None], [False], [])] == [True, None, False, False]
    assert [every(f) for f in ([True, False, None], [True, None], [True], [])] == [False, None, True, True]
    assert [told(*f) for f in ((3, 1, 2), (1, 0, 2), (-1, 0, 2), (-3, 1, 2), (0.5, 1, 0.9))] == [
        True, None, None, False, False,
    ]  # fmt: skip
    assert [listed(items) for items in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]

"""The page: one file that needs nothing else, in which every link leads somewhere, every id comes once."""

import re
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pytest

from lora_np.reproduce.page import WITHOUT, page, tally
from lora_np.reproduce.section import Claim, Picture, Section, Table, graded, listed
from lora_np.training import plot

VOID = {"meta", "img", "source", "br"}
CLAIMS = [
    Claim("a < b & c", "paper, 1", "1 < 2", "holds"),
    Claim("d", "paper, 2", "3", "holds in part"),
    Claim("e", "paper, 3", "4", "does not hold"),
    Claim("f", "paper, 4", "5", "not checked"),
]
PICTURES = {
    "curves": partial(
        plot.spread_curves, {"q": [(1, 2.0, 1.9, 2.1), (8, 1.5, 1.4, 1.6)]}, {"before": 3.0}, "r", "loss"
    ),
    "points": partial(plot.spread_points, {"one": (1.0, 0.5, 2.0), "other": (2.0, 2.0, 2.0)}, "percent"),
    "maps": partial(plot.heat_maps, {"W_q": np.eye(3), "by chance": np.full((3, 3), 0.5)}, "j", "i"),
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
        "cores 2",
        WITHOUT,
        *(c.verdict for c in CLAIMS),
    ):
        assert words in text


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_in_the_page_for_light_and_dark(name):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    picture = Picture("A caption.", PICTURES[name])
    html = page([section("one", pictures=[picture])], {}, pictures=True)
    dark, light = Reader(html).sources
    assert dark != light
    assert all(source.startswith("data:image/svg+xml;base64,") for source in (dark, light))
    assert WITHOUT not in html
    assert picture.draw(False) == picture.draw(False)  # the same bytes each time


def test_the_page_asks_for_nothing_from_elsewhere():
    html = page([section("one")], {}, pictures=False)
    assert not re.search(r"https?:|url\(|@import|<script", html)


def test_letters_of_mathematics_are_set_as_such():
    html = page([replace(section("one"), about="phi(1, 1) of W_q, U^T W V")], {}, pictures=False)
    assert "φ(1, 1) of <i>W</i><sub>q</sub>, U<sup>T</sup> W V" in html


def test_verdicts_are_counted():
    assert tally([section("one"), section("two")]) == (
        "8 claims. holds: 2; holds in part: 2; does not hold: 2; not checked: 2."
    )


def test_grades_and_lists():
    assert [graded(*g) for g in ((True, True), (True, False), (False, True), (False, False))] == [
        "holds",
        "holds",
        "holds in part",
        "does not hold",
    ]
    assert [listed(items) for items in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]

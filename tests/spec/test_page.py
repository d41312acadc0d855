"""The page as a reader gets it: whole, by itself, and without a mistake that a browser would find."""

import ast
import html
import inspect
import json
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from types import ModuleType

import pytest
from browser import CHROMIUM, NONE, browse

pytest.importorskip("jinja2", reason="the page needs the extra spec")
pytest.importorskip("latex2mathml", reason="the page needs the extra spec")
pytest.importorskip("mdit_py_plugins", reason="the page needs the extra spec")
pytest.importorskip("pygments", reason="the page needs the extra spec")

import lora_np as ln
from lora_np import adapter, lora, ops, transformer
from lora_np.spec import page
from lora_np.spec.__main__ import HTML
from lora_np.spec.citations import kept, proofs
from lora_np.spec.clauses import KEPT, TESTS, gather
from lora_np.vectors.derivatives import Row
from lora_np.vectors.statements import STATEMENTS

VOID = {"meta", "link", "input", "wbr"}
ROWS = [Row("T3", "layer_norm", "complex step", 8e-16, 1e-12), Row("L4", "one, and two", "complex step", 0.0, 1e-12)]


class Reader(HTMLParser):
    """Ids, links and the text of the elements that have an id; an assertion where tags do not pair."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads, self.open, self.texts = [], [], [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes["href"]] if tag == "a" else []
        self.loads += [
            v
            for k, v in attributes.items()
            if k in ("src", "href", "srcset", "data", "style") and tag != "a"
            if not re.fullmatch(r"--in:\d+ch", v)  # how far a folded line is set in
        ]
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag not in VOID:
            self.open.append((tag, attributes.get("id")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, name in self.open:
            if name is not None:
                self.texts[name] = self.texts.get(name, "") + data


@pytest.fixture(scope="module")
def document():
    return gather(ROWS)


@pytest.fixture(scope="module")
def text(document):
    return page.render(document)


@pytest.fixture(scope="module")
def names(document):
    return page.pages(document)[page.API]


@pytest.fixture(scope="module")
def read(text):
    return Reader(text)


def test_every_id_stands_once_and_no_anchor_is_dead(read, document):
    assert [name for name, n in Counter(read.ids).items() if n > 1] == []
    assert {link.removeprefix("#") for link in read.links} <= {*read.ids, "api.html"}
    assert set(read.ids) >= {*STATEMENTS, *document.definitions}


def test_the_contents_lead_to_every_clause(text):
    contents = text[text.index("<nav") : text.index("</nav>")]
    assert re.findall(r'href="#([LTOAP]\d+)"', contents) == list(STATEMENTS)
    assert all(f'href="#{name}"' in contents for name in ("conformance", "files", "files-1", "annex"))


def test_it_asks_for_nothing_else(text, read):
    assert read.loads == ["data:,"]  # an icon, so that no browser looks for one
    styles = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in styles
    assert "@import" not in styles
    script = text[text.index("<script>") :]
    assert not re.search(r"fetch|XMLHttpRequest|import\s*\(|https?:", script)


def test_it_is_small(text):
    assert len(text.encode()) < 1_100_000


@pytest.mark.parametrize(
    "function", [ops.attention, ops.layer_norm_backward, lora.lora_linear, transformer.sublayer, adapter.merge]
)
def test_the_source_is_the_very_source(text, function):
    """With the docstring, which stands beside it, it is what inspect gives of the function."""
    key = f"{function.__module__.removeprefix('lora_np.')}.{function.__name__}"
    start = text.index(f'<article class="definition" id="{key}"')
    article = text[start : text.index("</article>", start)]
    shown = html.unescape(re.sub(r"<[^>]+>", "", article[article.rindex("<pre") :]))  # a folded line is one line
    source = inspect.getsource(function)
    docstring = re.search(r'    """.*?"""\n', source, re.DOTALL)[0]
    assert shown.strip() == source.replace(docstring, "", 1).strip()


def test_a_name_in_a_text_is_a_link_where_it_is_clear_what_it_names(text):
    assert '<a href="#adapter.unmerge"><code>unmerge</code></a>' in text
    assert '<a href="#loss.loss"><code>loss</code></a>' in text
    assert "<code>gradcheck</code>" in text
    assert '"><code>gradcheck</code></a>' not in text


def test_each_clause_has_its_tests_and_measurements(read):
    assert "test_" in read.texts["T9"]
    assert "layer_norm" in read.texts["T3"]
    assert "8.0e-16" in read.texts["T3"]
    assert "1.0e-12" in read.texts["T3"]
    assert "8.0e-16" in read.texts["summary"]
    assert "8.0e-16" not in read.texts["T4"]
    assert re.search(r"one, and two\s+complex step\s+0\s+1.0e-12", read.texts["L4"])


def test_errors_stand_with_what_raises_them(read):
    assert re.search(r"ValueError\s+clip: expected max_norm above 0, got \{max_norm\}", read.texts["optim.clip"])
    assert re.search(r"Those\s+of\s+[\w,\s]*_check_shapes", read.texts["lora.lora_linear"])
    assert "lora_linear: expected x (..., in)" in read.texts["lora._check_shapes"]


def test_an_error_beyond_its_bound_is_seen(text):
    failed = page.render(gather([Row("T3", "layer_norm", "complex step", 2e-3, 1e-12)]))
    assert failed.count('class="failed"') == 2
    assert 'class="failed"' not in text


def test_without_measurements_it_says_so(tmp_path):
    read = Reader(page.render(gather(None, tests=tmp_path)))
    assert "nothing, in this copy" in read.texts["reading"]
    assert "test_" in read.texts["T9"]
    assert "Measured" not in "".join(read.texts.values())


def test_the_same_sources_give_the_same_bytes(text):
    code = (
        "import sys; from lora_np.spec import page; from lora_np.spec.clauses import gather, Row;"
        f"rows = [Row(*row) for row in {[tuple(row) for row in ROWS]}];"
        "sys.stdout.buffer.write(page.render(gather(rows)).encode())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
    assert done.stdout.decode() == text


def test_it_is_written_whole_and_nothing_is_written_over(tmp_path):
    path = page.write(tmp_path / "new" / "spec", {"index.html": "é", "api.html": "other"})
    assert path.read_bytes() == "é".encode()
    assert sorted(p.name for p in path.parent.iterdir()) == ["api.html", "index.html"]
    with pytest.raises(FileExistsError, match="exists already"):
        page.write(tmp_path / "new" / "spec", {"index.html": "another"})
    assert path.read_bytes() == "é".encode()


def test_no_arrow_in_a_text_can_break(text, names):
    for one in (text, names):
        prose = re.sub(r"<(pre|code|script|style)\b.*?</\1>", "", one, flags=re.DOTALL)
        assert "-&gt;" not in prose
        assert "→\N{NO-BREAK SPACE}" in prose
        assert not re.search(r"→(?!\N{NO-BREAK SPACE})", prose)


# --- The public names ----------------------------------------------------------------------------------------------


def test_every_public_name_has_its_place_and_every_link_leads_somewhere(names, read):
    there = Reader(names)
    assert {f"lora_np.{name}" for name in ln.__all__ if not isinstance(getattr(ln, name), ModuleType)} <= set(there.ids)
    assert {"lora_np.testing.check", "lora_np.gradcheck.check", "lora_np.analysis.amplification"} <= set(there.ids)
    for link in there.links:
        file, _, anchor = link.rpartition("#")
        assert file in ("", "index.html") or link == "index.html"
        assert anchor in (read.ids if file else there.ids) or link == "index.html"


def test_no_extra_is_needed_but_its_own():
    """The public modules are read, not imported: testing needs hypothesis."""
    others = ("tokenizers", "safetensors", "gguf", "ml_dtypes", "tqdm", "threadpoolctl", "matplotlib", "hypothesis")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({others}))\n"
        "from lora_np.spec import page; from lora_np.spec.clauses import gather; page.pages(gather(None))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("function", [ln.lora_linear, ln.adamw, ln.load_adapter, ln.LoRAConfig])
def test_a_signature_has_each_parameter_with_its_default(names, function):
    """Python itself reads it as it reads the source's."""
    name = function.__name__
    start = names.index(f'<article class="name" id="lora_np.{name}"')
    shown = html.unescape(re.search(r"<pre[^>]*><code>(.*?)</code>", names[start:], re.DOTALL)[1])
    read = ast.parse(f"def {shown.replace('= ...', '= None')}: pass").body[0].args
    expected = inspect.signature(function).parameters
    assert [a.arg for a in (*read.posonlyargs, *read.args, *read.kwonlyargs)] == list(expected)
    assert [a.arg for a in read.kwonlyargs] == [n for n, p in expected.items() if p.kind == p.KEYWORD_ONLY]
    given = [p for p in expected.values() if p.default is not p.empty]
    assert len(read.defaults) + sum(d is not None for d in read.kw_defaults) == len(given)


# --- What is kept beside the source --------------------------------------------------------------------------------


def test_the_list_of_tests_that_is_kept_is_that_of_the_tests():
    assert KEPT.read_text(encoding="utf-8") == kept(proofs(TESTS)), "python -m lora_np.spec writes it anew"


def test_the_pages_that_are_kept_are_those_of_this_source():
    made_by = re.search(r'<meta name="generator" content="([^"]*)">', (HTML / page.NAME).read_text(encoding="utf-8"))[1]
    if made_by != page.made_by():
        pytest.skip(f"they were set by {made_by}, whose elements may be others")
    pages = page.pages(gather(None))
    assert sorted(path.name for path in HTML.iterdir()) == sorted(pages)
    for name, text in pages.items():
        kept_text = (HTML / name).read_text(encoding="utf-8")
        differing = [line for line in text.splitlines() if line not in set(kept_text.splitlines())][:3]
        assert kept_text == text, f"{name}: python -m lora_np.spec writes it anew: {differing}"


# --- In a browser --------------------------------------------------------------------------------------------------

HARNESS = """<!doctype html><iframe id="frame" width="%d" height="800"></iframe><pre id="report"></pre><script>
const frame = document.getElementById("frame");
frame.onload = () => {
  const further = (e) => e.scrollWidth > e.clientWidth + 1;
  const page = frame.contentDocument, query = page.getElementById("query");
  const search = (text) => {
    query.value = text;
    query.dispatchEvent(new frame.contentWindow.Event("input"));
    return [...page.querySelectorAll("#found a")].map((a) => a.hash);
  };
  document.getElementById("report").textContent = JSON.stringify({
    mode: page.compatMode,
    width: page.documentElement.scrollWidth,
    dead: [...page.querySelectorAll("a")].filter((a) => a.getAttribute("href").startsWith("#"))
      .map((a) => a.hash.slice(1)).filter((id) => !page.getElementById(id)),
    flat: [...page.querySelectorAll("main math")].filter((m) => m.getBoundingClientRect().height < 5).length,
    contents: page.getElementById("contents").open,
    cut: [...page.querySelectorAll(".definition pre")].filter(further).length,
    hidden: [...page.querySelectorAll("main *")].filter(further).filter((e) => {
      const style = frame.contentWindow.getComputedStyle(e);
      return !["inline", "contents"].includes(style.display) && style.overflowX !== "visible"
        && !e.matches(".math") && (style.backgroundImage === "none" || e.tabIndex < 0);
    }).length,
    both: search("Softmax  MASK"), none: search("no such words"), empty: search(" "),
    first: ["layer norm", "L4", "lora_linear", "scale", "lora_lin", "linear_backward"].map((text) => search(text)[0]),
  });
};
frame.srcdoc = %s;
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason=NONE)
@pytest.mark.parametrize("width", [390, 1280, 1440])
def test_in_a_browser(text, tmp_path, width):
    """No console errors, no dead anchors, nothing wider than the window; formulas are drawn, and the search finds.

    Source is not cut where it stands beside its text; what can be scrolled shows it, and the keyboard reaches it.
    """
    harness = HARNESS % (width, json.dumps(text).replace("</", "<\\/"))
    (tmp_path / "harness.html").write_text(harness, encoding="utf-8")
    elements, console = browse(tmp_path, tmp_path / "harness.html")
    assert console == []
    report = json.loads(html.unescape(re.search(r'<pre id="report">(.*?)</pre>', elements)[1]))
    assert report.pop("width") <= width
    both, first, cut = report.pop("both"), report.pop("first"), report.pop("cut")
    assert report == {
        "mode": "CSS1Compat", "dead": [], "flat": 0, "contents": width > 1000, "none": [], "empty": [], "hidden": 0,
    }  # fmt: skip
    assert cut == 0 or width < 1000
    assert {"#T8", "#T9"} <= set(both)  # "masked" in the one, "the mask keeps" in the other
    assert first == [
        "#T3", "#L4", "#lora.lora_linear", "#adapter.LoRAConfig.scale", "#lora.lora_linear", "#ops.linear_backward",
    ]  # fmt: skip


@pytest.mark.skipif(CHROMIUM is None, reason=NONE)
@pytest.mark.parametrize("width", [390, 1440])
def test_the_public_names_in_a_browser(names, tmp_path, width):
    (tmp_path / "harness.html").write_text(HARNESS % (width, json.dumps(names).replace("</", "<\\/")), encoding="utf-8")
    elements, console = browse(tmp_path, tmp_path / "harness.html")
    assert console == []
    report = json.loads(html.unescape(re.search(r'<pre id="report">(.*?)</pre>', elements)[1]))
    assert report["width"] <= width
    assert (report["mode"], report["hidden"], report["first"][2]) == ("CSS1Compat", 0, "#lora_np.lora_linear")


@pytest.mark.skipif(CHROMIUM is None, reason=NONE)
def test_an_error_in_the_script_would_be_seen(text, tmp_path):
    (tmp_path / "wrong.html").write_text(text.replace('getElementById("query")', 'getElementById("queri")'))
    _, console = browse(tmp_path, tmp_path / "wrong.html")
    assert len(console) == 1
    assert "TypeError" in console[0]

"""The page as a reader gets it: whole, by itself, and without a mistake that a browser would find."""

import html
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser

import pytest

pytest.importorskip("jinja2", reason="the page needs the extra spec")
pytest.importorskip("latex2mathml", reason="the page needs the extra spec")
pytest.importorskip("mdit_py_plugins", reason="the page needs the extra spec")
pytest.importorskip("pygments", reason="the page needs the extra spec")

from lora_np import adapter, lora, ops, transformer
from lora_np.spec import page
from lora_np.spec.clauses import gather
from lora_np.spec.statements import STATEMENTS
from lora_np.vectors.derivatives import Row

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
            v for k, v in attributes.items() if k in ("src", "href", "srcset", "data", "style") and tag != "a"
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
def read(text):
    return Reader(text)


def test_every_id_stands_once_and_no_anchor_is_dead(read, document):
    assert [name for name, n in Counter(read.ids).items() if n > 1] == []
    assert {link.removeprefix("#") for link in read.links} <= set(read.ids)
    assert all(link.startswith("#") for link in read.links)
    assert set(read.ids) >= {*STATEMENTS, *document.definitions}


def test_the_contents_lead_to_every_clause(text):
    contents = text[text.index("<nav") : text.index("</nav>")]
    assert re.findall(r'href="#([LTOA]\d+)"', contents) == list(STATEMENTS)


def test_it_asks_for_nothing_else(text, read):
    assert read.loads == ["data:,"]  # an icon, so that no browser looks for one
    styles = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in styles
    assert "@import" not in styles
    script = text[text.index("<script>") :]
    assert not re.search(r"fetch|XMLHttpRequest|import\s*\(|https?:", script)


def test_it_is_small(text):
    assert len(text.encode()) < 1_500_000


@pytest.mark.parametrize(
    "function", [ops.attention, ops.layer_norm_backward, lora.lora_linear, transformer.half_block, adapter.merge]
)
def test_the_source_is_the_very_source(text, function):
    """With the docstring, which stands beside it, it is what inspect gives of the function."""
    key = f"{function.__module__.removeprefix('lora_np.')}.{function.__name__}"
    start = text.index(f'<article class="definition" id="{key}"')
    article = text[start : text.index("</article>", start)]
    shown = html.unescape(re.sub(r"<[^>]+>", "", article[article.rindex("<pre") :]))
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
    assert re.search(r"Those\s+of\s+_check_shapes", read.texts["lora.lora_linear"])
    assert "lora_linear: expected x (..., in)" in read.texts["lora._check_shapes"]


def test_an_error_beyond_its_bound_is_seen(text):
    failed = page.render(gather([Row("T3", "layer_norm", "complex step", 2e-3, 1e-12)]))
    assert failed.count('class="failed"') == 2
    assert 'class="failed"' not in text


def test_without_tests_and_measurements_it_says_so(tmp_path):
    read = Reader(page.render(gather(None, tests=tmp_path)))
    assert "installed without its tests" in " ".join(read.texts["reading"].split())
    assert "nothing, in this copy" in read.texts["reading"]
    assert "test_" not in "".join(read.texts[name] for name in STATEMENTS)
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
    path = page.write(tmp_path / "new" / "spec", "é")
    assert path.read_bytes() == "é".encode()
    assert [p.name for p in path.parent.iterdir()] == ["index.html"]
    with pytest.raises(FileExistsError, match="exists already"):
        page.write(tmp_path / "new" / "spec", "other")
    assert path.read_bytes() == "é".encode()


# --- In a browser --------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HARNESS = """<!doctype html><iframe id="frame" width="%d" height="800"></iframe><pre id="report"></pre><script>
const frame = document.getElementById("frame");
frame.onload = () => {
  const page = frame.contentDocument, query = page.getElementById("query");
  const search = (text) => {
    query.value = text;
    query.dispatchEvent(new frame.contentWindow.Event("input"));
    return [...page.querySelectorAll("#found a")].map((a) => a.hash);
  };
  document.getElementById("report").textContent = JSON.stringify({
    mode: page.compatMode,
    width: page.documentElement.scrollWidth,
    dead: [...page.querySelectorAll("a")].map((a) => a.hash.slice(1)).filter((id) => !page.getElementById(id)),
    flat: [...page.querySelectorAll("main math")].filter((m) => m.getBoundingClientRect().height < 5).length,
    contents: page.getElementById("contents").open,
    both: search("Softmax  MASK"), title: search("layer norm"), none: search("no such words"), empty: search(" "),
  });
};
frame.srcdoc = %s;
</script>"""


def browse(folder, path):
    """The page's elements as a browser has them in the end, and what it says on its console."""
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=10000 --dump-dom"
    )
    done = subprocess.run(
        [CHROMIUM, *flags.split(), f"--user-data-dir={folder / 'profile'}", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(text, tmp_path, width):
    """No console errors, no dead anchors, nothing wider than the window; formulas are drawn, and the search finds."""
    harness = HARNESS % (width, json.dumps(text).replace("</", "<\\/"))
    (tmp_path / "harness.html").write_text(harness, encoding="utf-8")
    elements, console = browse(tmp_path, tmp_path / "harness.html")
    assert console == []
    report = json.loads(html.unescape(re.search(r'<pre id="report">(.*?)</pre>', elements)[1]))
    assert report.pop("width") <= width
    both, title = report.pop("both"), report.pop("title")
    assert report == {"mode": "CSS1Compat", "dead": [], "flat": 0, "contents": width > 1000, "none": [], "empty": []}
    assert both[0] == "#T9"  # "with softmax ... the mask keeps"
    assert title[0] == "#T3"


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_an_error_in_the_script_would_be_seen(text, tmp_path):
    (tmp_path / "wrong.html").write_text(text.replace('getElementById("query")', 'getElementById("queri")'))
    _, console = browse(tmp_path, tmp_path / "wrong.html")
    assert len(console) == 1
    assert "TypeError" in console[0]

"""The README files: what they link to is there, and the first example prints what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import paste
import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
READMES = [README, *(path for part in ("bench", "lora_np", "tests") for path in (ROOT / part).rglob("README.md"))]


def prose(path):
    """A file's text without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(path):
    """What a file's headings are called in links, as GitHub does it: lower case, hyphens, no punctuation."""
    headings = re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(path):
    """The targets of a file's links and pictures, but for those elsewhere on the network."""
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)) if not link.startswith("https://")]


def missing(path):
    """The links of a file that lead nowhere."""
    broken = []
    for link in links(path):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_and_picture_is_there(path):
    assert missing(path) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(
        "# One: two\n[a](#one-two) [b](#three) ![c](c.png) [d](README.md#four) [e](https://f)\n```\n[g](h)\n```\n"
    )
    assert missing(path) == ["#three", "c.png", "README.md#four"]


def test_every_readme_is_reached_from_the_first():
    reached, left = set(), [README]
    while left:
        path = left.pop()
        if path not in reached:
            reached.add(path)
            found = [(path.parent / link.partition("#")[0]).resolve() for link in links(path)]
            left += [target for target in found if target.name == "README.md"]
    assert reached == set(READMES)


def test_the_first_example_prints_the_sentence_that_was_learned():
    _, _, rest = README.read_text(encoding="utf-8").partition("```python\n")
    example, _, _ = rest.partition("```\n")
    printed = subprocess.run([sys.executable, "-c", example], cwd=ROOT, check=True, capture_output=True, text=True)
    assert printed.stdout.strip() == "b'The capital of Atlantis is Poseidonis, a city by the sea.'"


def test_every_block_is_pasted_or_says_why_not():
    """The script names each file that has blocks, and knows what each block is in."""
    with_blocks = [path for path in READMES if paste.blocks(path.read_text(encoding="utf-8"))]
    assert set(with_blocks) <= {ROOT / name for name in paste.READMES}
    kinds = {block.kind for path in with_blocks for block in paste.blocks(path.read_text(encoding="utf-8"))}
    assert kinds == {"sh", "python"}


def test_a_script_pastes_blocks_in_order_and_leaves_out_what_is_marked_or_long(tmp_path):
    text = (
        "```sh\nx=7\necho one $x  # a second\nfalse  # 5 minutes\nfalse  # half an hour\n```\n```python\na = 2\n```\n"
        "and\n```python\nprint(a)\n```\n<!-- not pasted: needs one's GPU -->\n```sh\nfalse\n```\n"
        "```sh\necho three $x\n```\n"
    )
    short, long = ("\n".join(paste.script("R", text, long=long)) for long in (False, True))
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-euc", short], capture_output=True, text=True, cwd=tmp_path, check=True, env=env)
    assert done.stdout == "one 7\n2\nthree 7\n"
    assert done.stderr.splitlines() == [
        "== R:1", "== R:7", "== R:11", "== R:15: left out: needs one's GPU", "== R:18",
    ]  # fmt: skip
    assert subprocess.run(["bash", "-euc", long], capture_output=True, cwd=tmp_path, check=False).returncode == 1


def test_the_house_names_the_modules_of_the_reference():
    """Each module on top of the package once; what starts the package or a command is none of the reference."""
    named = re.findall(r"^\| \[(\w+\.py)\]\(lora_np/\1\)", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    modules = {path.name for path in (ROOT / "lora_np").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert sorted(named) == sorted(modules)
    assert len(modules) <= 21


def test_the_front_page_is_short_and_has_the_mathematics_first():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 192
    assert next(n for n, line in enumerate(lines, 1) if line.startswith("| L9 |")) < 80

"""All blocks of the README files, in order, as one script for bash, to run in a fresh clone: a new user, pasting.

Left out are blocks after a comment `<!-- not pasted: why -->`, and, without --long, lines whose comment counts minutes
or hours. Blocks of Python that follow each other are one program, as in one session.
"""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
READMES = [
    "README.md",
    "lora_np/formats/README.md",
    "lora_np/training/README.md",
    "lora_np/reproduce/README.md",
    "tests/README.md",
    "bench/README.md",
]
BLOCK = re.compile(r"(?:<!-- not pasted: (?P<why>.+?) -->\n+)?^```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
LONG = re.compile(r"#.*\b(minutes?|hours?)\b")
SHOWN = {"bibtex"}  # kinds of blocks that are not run


class Block(NamedTuple):
    """A block of a README: where it begins, what it is in, and why it is not pasted, if it is not."""

    line: int
    kind: str
    code: str
    why: str | None


def blocks(text: str) -> list[Block]:
    """The blocks of a file that are to be run."""
    found = [
        Block(text.count("\n", 0, m.start("kind")) + 1, m["kind"], m["code"], m["why"]) for m in BLOCK.finditer(text)
    ]
    return [block for block in found if block.kind not in SHOWN]


def script(name: str, text: str, *, long: bool) -> Iterator[str]:
    """The lines of one file's script."""
    session = ""  # the Python of the blocks just before, which is run again: the programs are short
    for line, kind, code, why in blocks(text):
        yield f"echo {shlex.quote(f'== {name}:{line}' + (f': left out: {why}' if why else ''))} >&2"
        if why:
            continue
        if kind == "python":
            session += code
            yield f"python - <<'END'\n{session}END"
        else:
            session = ""
            yield from (line for line in code.splitlines() if long or not LONG.search(line))


def main() -> None:
    """The script, on standard output; --first: of the first block alone."""
    print("set -euo pipefail")
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in READMES}
    if "--first" in sys.argv:
        print(blocks(texts[READMES[0]])[0].code)
        return
    for name, text in texts.items():
        print(*script(name, text, long="--long" in sys.argv), sep="\n")


if __name__ == "__main__":
    main()

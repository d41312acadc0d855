"""python -m bench.catalogues --language fr --out FILE.tsv: the texts of Django's message catalogues, translated.

English and another language, `source<TAB>target` under a header, as the installed package Django brings them (BSD
licence): nothing is downloaded, and nothing of it is kept here. Texts in which a tab or a line end stands are left out.
"""

from __future__ import annotations

import argparse
import struct
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from lora_np.training.records import Pair

MAGIC = 0x950412DE  # of a .mo file


class Split(NamedTuple):
    """Pairs to learn from, and pairs held out, none of whose sources is learned from."""

    train: list[Pair]
    dev: list[Pair]


def translations(language: str, longest: int) -> list[Pair]:
    """What all catalogues of a language have, each source once, of at most `longest` characters; as the sources sort.

    An ImportError without Django; a ValueError if it does not speak the language.
    """
    spec = find_spec("django")
    if spec is None or spec.origin is None:
        raise ImportError("the message catalogues are Django's: pip install Django")
    files = sorted(Path(spec.origin).parent.glob(f"**/locale/{language}/LC_MESSAGES/*.mo"))
    if not files:
        raise ValueError(f"Django has no language {language!r}")
    found: dict[str, str] = {}
    for path in files:
        for source, target in _messages(path.read_bytes()):
            if source and target and max(len(source), len(target)) <= longest and not {"\t", "\n"} & {*source, *target}:
                found.setdefault(source, target)
    return [Pair(source, target) for source, target in sorted(found.items())]


def _messages(data: bytes) -> Iterator[tuple[str, str]]:
    """The messages of a .mo file (GNU gettext's manual, 10.3): the header's is empty; of plurals, the first form."""
    order = "<" if struct.unpack("<I", data[:4])[0] == MAGIC else ">"
    _, _, n, sources, targets = struct.unpack(f"{order}5I", data[:20])
    for i in range(n):
        texts = []
        for table in (sources, targets):
            length, at = struct.unpack_from(f"{order}2I", data, table + 8 * i)
            texts.append(data[at : at + length].decode().split("\0")[0])
        yield texts[0].rpartition("\4")[2], texts[1]  # before it stands a context


def split(pairs: list[Pair]) -> Split:
    """A tenth of them held out, as their sources say: of each language the same ones."""
    out = {pair for pair in pairs if zlib.crc32(pair.prompt.encode()) % 10 == 0}
    return Split([pair for pair in pairs if pair not in out], [pair for pair in pairs if pair in out])


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench.catalogues", description=__doc__.split("\n\n")[0])
    parser.add_argument("--language", default="fr", help="as Django names it (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=120, help="characters of a text at most (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.tsv")
    args = parser.parse_args()
    pairs = translations(args.language, args.longest)
    rows = ["source\ttarget", *(f"{pair.prompt}\t{pair.completion}" for pair in pairs)]
    args.out.write_text("\n".join(rows) + "\n", encoding="utf-8", newline="\n")
    print(f"{args.out}: {len(pairs)} texts with translations")


if __name__ == "__main__":
    main()

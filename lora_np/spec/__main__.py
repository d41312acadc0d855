"""python -m lora_np.spec: writes what is kept of the specification beside its source, so that it is found unmade.

tests.json, the tests by the ids that they prove, which an installed package has in their place; and html/, the pages.
They are made from the source alone, and a test holds that they are those of this source.
"""

from __future__ import annotations

from pathlib import Path

from ..formats.files.atomic import replaced_files
from . import page
from .citations import kept, proofs
from .clauses import KEPT, TESTS, gather

HTML = Path(__file__).with_name("html")


def main() -> None:
    """Writes the files, in the place of those that are there."""
    with replaced_files(KEPT.parent, last=KEPT.name) as folder:
        (folder / KEPT.name).write_text(kept(proofs(TESTS)), encoding="utf-8")
    HTML.mkdir(exist_ok=True)
    with replaced_files(HTML, last=page.NAME) as folder:
        for name, text in page.pages(gather(None)).items():
            (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

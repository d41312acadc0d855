"""The report in its folder: index.html for people, results.json for programs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import backend_name
from ..formats.files.atomic import new_folder
from .page import page
from .section import Section

HTML, JSON = "index.html", "results.json"


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "backend": backend_name, "machine": platform.machine(), "cores": os.cpu_count(),
        "Python": platform.python_version(), "NumPy": np.__version__,
    }  # fmt: skip


def as_data(sections: Sequence[Section], about: Mapping[str, Any]) -> dict[str, Any]:
    """The report as plain data."""
    return {
        "environment": dict(about),
        "sections": [
            {
                "id": s.id, "title": s.title, "claims": [claim._asdict() for claim in s.claims],
                "tables": [table._asdict() for table in s.tables], "data": dict(s.data),
            }
            for s in sections
        ],
    }  # fmt: skip


def write(out: Path, sections: Sequence[Section], about: Mapping[str, Any], *, pictures: bool) -> None:
    """Both files, in a new folder `out`: all is written, or nothing. A FileExistsError if it is there already."""
    html = page(sections, about, pictures=pictures)
    data = json.dumps(as_data(sections, about))
    with new_folder(out) as folder:
        (folder / HTML).write_text(html, encoding="utf-8")
        (folder / JSON).write_text(data + "\n", encoding="utf-8")

"""The report in its folder: index.html for people, results.json for programs, and the parts that a run goes on from."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..backend import backend_name
from ..formats.files.atomic import replaced_files
from ..formats.files.json_file import read_json, write_json
from .kept import PARTS, Done
from .page import page
from .run import Plan
from .section import Section

HTML, JSON = "index.html", "results.json"
PACKAGE = Path(__file__).parents[1]
NOT_MEASURING = ("page.py", "report.py")  # of this folder: they say what was found, and find nothing


def today() -> str:
    """The date, as 2026-01-31."""
    return datetime.date.today().isoformat()


def environment() -> dict[str, Any]:
    """What the figures depend on, beside the plan."""
    return {
        "lora_np": __version__, "NumPy": np.__version__, "Python": platform.python_version(), "backend": backend_name,
        "processor": processor(), "cores": os.cpu_count(),
    }  # fmt: skip


def processor() -> str:
    """The processor's name, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def key(plan: Plan, real: Sequence[str] = ()) -> str:
    """What stands for all that figures depend on: the plan, the environment, this package's source, and real data.

    real: what stands for a real base and its data. -> 16 hexadecimal digits.
    """
    digest = hashlib.sha256(f"{plan} {environment()} {list(real)}".encode())
    for path in sorted(p for part in ("*.py", "training/*.py", "reproduce/*.py") for p in PACKAGE.glob(part)):
        if path.name not in NOT_MEASURING:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def expect_report(folder: Path, there: Sequence[str]) -> None:
    """A FileExistsError if there is something in a folder, and no report to go on with or to write anew."""
    if there and PARTS not in there and not _is_report(folder / JSON):
        raise FileExistsError(f"{folder}: exists already, and holds no report to go on with; it is not written over")


def _is_report(path: Path) -> bool:
    """Whether a file is the data of a report; the parts of one that is kept in a repository are not kept there."""
    try:
        return read_json(path).keys() == as_data([], {}).keys()
    except (OSError, ValueError):
        return False


def as_data(sections: Sequence[Section], about: dict[str, Any]) -> dict[str, Any]:
    """The report as plain data."""
    return {
        "environment": about,
        "sections": [
            {
                "id": s.id, "title": s.title, "claims": [claim._asdict() for claim in s.claims],
                "tables": [table._asdict() for table in s.tables], "data": dict(s.data),
            }
            for s in sections
        ],
    }  # fmt: skip


def about(plan: Plan, done: Sequence[Done]) -> dict[str, Any]:
    """The form, the days and the seconds of what is done, and what it depends on."""
    days = sorted({one.day for one in done})
    return {
        "form": plan.name, "date": " to ".join(dict.fromkeys([*days[:1], *days[-1:]])), **environment(),
        "seconds": round(sum(one.seconds for one in done)),
    }  # fmt: skip


def write(out: Path, plan: Plan, done: Sequence[Done], *, left: Sequence[str], pictures: bool) -> dict[str, Any]:
    """Both files, in the place of those that are there: whole at any time. left: titles of what is still to be done.

    -> the report as plain data.
    """
    sections, facts = [one.section for one in done], about(plan, done)
    data = as_data(sections, facts)
    (out / PARTS).mkdir(exist_ok=True)  # first: by it a folder is known as a report's
    with replaced_files(out, last=JSON) as folder:
        (folder / HTML).write_text(page(sections, facts, left=left, pictures=pictures), encoding="utf-8")
        write_json(folder / JSON, data)
    return data

"""lora-np spec: the specification as a page."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..formats.files.atomic import expect_new
from ..formats.files.extras import install
from .base import AddCommand
from .output import emit


def run_spec(args: argparse.Namespace) -> int:
    try:  # imported here, as all below: no other command needs them
        from ..spec import page
    except ModuleNotFoundError as error:
        packages = "jinja2 latex2mathml markdown-it-py mdit-py-plugins pygments"
        raise ImportError(f"spec needs {error.name}: {install(packages, 'spec')}") from error
    from ..spec.clauses import gather
    from ..vectors import derivatives

    expect_new(args.out)
    document = gather(list(derivatives.table()) if args.gradcheck else None)
    path = page.write(args.out, page.pages(document))
    failed = [clause.id for clause in document.clauses if clause.failed]
    unstated = [clause.id for clause in document.clauses if not (clause.here or clause.elsewhere)]
    result = {
        "page": str(path), "clauses": len(document.clauses), "definitions": len(document.definitions),
        "without_function": unstated, "beyond_bound": failed,
    }  # fmt: skip
    lines = [
        f"{path}: {len(document.clauses)} clauses, {len(document.definitions)} definitions",
        *([f"no function states {', '.join(unstated)}"] if unstated else []),
        *([f"FAIL: a derivative passes its bound: {', '.join(failed)}"] if failed else []),
    ]
    emit(args, result, lines)
    return 1 if failed else 0


def add_commands(command: AddCommand) -> None:
    """The command of this file, and its arguments."""
    p = command("spec", run_spec, "the specification as a page: each statement with its source, tests and errors")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder for index.html and api.html")
    p.add_argument(
        "--no-gradcheck", dest="gradcheck", action="store_false", help="leave out the errors measured here: faster"
    )

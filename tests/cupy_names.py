"""Does real CuPy have this name, and does it take this keyword? Found by introspection, which needs no GPU.

Real CuPy is always asked in a process of its own, whose path lacks the stand-in. Run as a script, this module is that
process: a JSON list of dotted names comes in, a JSON object of what CuPy says about each goes out.
"""

import ast
import importlib.machinery
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

STANDIN = Path(__file__).resolve().parent / "standin"
ANYTHING = "**"  # among a function's parameters: it takes any keyword

Use = tuple[str, frozenset[str]]  # a dotted name below cupy, and the keywords it is called with


# ---- what a package uses ----


def xp_uses(package_dir) -> set[Use]:
    """Every `xp.NAME`, `xp.linalg.NAME`, `xp.NAME.at` in a package, with the keywords of each call.

    An attribute that is not called, or is called with no keyword, has no keywords. Methods of arrays cannot be told
    from other methods by reading: those the stand-in checks as the suite runs.
    """
    uses = set()
    for path in Path(package_dir).rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (name := _below_xp(node.func)):
                uses.add((name, frozenset(keyword.arg for keyword in node.keywords if keyword.arg)))
            elif name := _below_xp(node):
                uses.add((name, frozenset()))
    return uses


def _below_xp(node) -> str | None:
    """ "linalg.svd" for the expression xp.linalg.svd or backend.xp.linalg.svd, None for any other."""
    names = []
    while isinstance(node, ast.Attribute) and node.attr != "xp":
        names.append(node.attr)
        node = node.value
    at_xp = isinstance(node, ast.Attribute) or (isinstance(node, ast.Name) and node.id == "xp")
    return ".".join(reversed(names)) if names and at_xp else None


# ---- what real CuPy has ----


def real_cupy_installed() -> bool:
    spec = importlib.machinery.PathFinder.find_spec("cupy", _path_without_standin())
    return spec is not None and spec.origin is not None


def missing_in_cupy(uses: Iterable[Use]) -> list[str]:
    """One line for each name that real CuPy lacks and each keyword that it does not take; empty if all is well."""
    uses = sorted((name, sorted(keywords)) for name, keywords in uses)
    found = ask_cupy({name for name, _ in uses})
    missing = []
    for name, keywords in uses:
        if found[name] is None:
            missing.append(f"cupy has no {name}")
            continue
        takes = found[name]["keywords"]
        missing += [f"cupy.{name} takes no {word}=" for word in keywords if word not in takes and ANYTHING not in takes]
    return list(dict.fromkeys(missing))


def ask_cupy(names: Iterable[str]) -> dict[str, dict | None]:
    """What real CuPy says of each dotted name: None, or its parameters in order, the keywords, and a ufunc's loops."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(_path_without_standin())}
    process = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(sorted(names)),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise RuntimeError(f"real CuPy could not be asked:\n{process.stderr}")
    return json.loads(process.stdout)


def _path_without_standin() -> list[str]:
    return [entry for entry in sys.path if entry and Path(entry).resolve() != STANDIN]


def _describe(cupy, dotted: str) -> dict | None:
    found = cupy
    for name in dotted.split("."):
        if not hasattr(found, name):
            return None
        found = getattr(found, name)
    positional, keywords = _parameters(found)
    loops = found.types if isinstance(found, cupy.ufunc) else []
    return {"positional": positional, "keywords": keywords, "loops": loops}


def _parameters(function) -> tuple[list[str], list[str]]:
    """The names of positional parameters in order, and those that may be given by keyword."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = _documented_parameters(inspect.getdoc(function) or "")
    kinds = {kind: [p.name for p in parameters if p.kind is kind] for kind in inspect._ParameterKind}
    positional_only, either, rest, keyword_only, any_keyword = (kinds[kind] for kind in inspect._ParameterKind)
    positional = positional_only + either + ["*"] * len(rest)
    keywords = either + keyword_only + [ANYTHING] * len(any_keyword)
    return [name for name in positional if name != "self"], [name for name in keywords if name != "self"]


def _documented_parameters(documentation: str) -> list[inspect.Parameter]:
    """From the first line of a docstring, where Cython and CuPy's ufuncs write the signature.

    >>> [p.name for p in _documented_parameters("_ndarray_base.get(self, stream=None, tuple order='C') -> ndarray")]
    ['self', 'stream', 'order']
    """
    line = documentation.partition("\n")[0].partition("->")[0]
    inside = re.search(r"\((.*)\)", line)
    parameters, keyword_only = [], False
    for piece in re.split(r",\s*(?![^()]*\))", inside[1]) if inside else []:
        piece = piece.strip().lstrip("\\")
        if piece == "/":
            parameters = [p.replace(kind=p.POSITIONAL_ONLY) for p in parameters]
        elif piece == "*":
            keyword_only = True
        elif name := re.match(r"(?P<stars>\**)(?:\w+ )?(?P<name>\w+)\s*(?:=|$)", piece):
            kind = ("KEYWORD_ONLY" if keyword_only else "POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL", "VAR_KEYWORD")
            keyword_only = keyword_only or name["stars"] == "*"
            parameters.append(inspect.Parameter(name["name"], getattr(inspect.Parameter, kind[len(name["stars"])])))
    return parameters


if __name__ == "__main__":
    import cupy as real_cupy

    json.dump({name: _describe(real_cupy, name) for name in json.load(sys.stdin)}, sys.stdout)

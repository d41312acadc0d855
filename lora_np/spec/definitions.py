"""What the package defines, read from its source; nothing is imported or run.

A definition is a class, a function, or a value that a module gives a name. Its key is its module's name and its own:
`ops.linear`, `lora.LoRAConfig.scale`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple, TypeAlias

PACKAGE = Path(__file__).parents[1]

Place: TypeAlias = tuple[int, int]  # in a file: a line, from 1, and a column, from 0
Scope: TypeAlias = Mapping[str, str]  # the keys that a module's names stand for


class Refusal(NamedTuple):
    """An error that is raised: its class, and its message, with {what is put into it}."""

    error: str
    message: str


@dataclass(frozen=True, eq=False)
class Definition:
    """What one name stands for.

    lines            those of the file that it takes; a value's with the comment above it
    docstring        as inspect.getdoc gives it; empty where there is none
    docstring_lines  those of `lines` that the docstring takes
    uses             where it names other definitions, and their keys
    calls            the keys of those that it calls
    refusals         the errors that it raises itself
    """

    module: str
    name: str
    is_value: bool
    lines: range
    docstring: str = ""
    docstring_lines: range = range(0)
    uses: Mapping[Place, str] = field(default_factory=dict)
    calls: frozenset[str] = frozenset()
    refusals: tuple[Refusal, ...] = ()

    @property
    def key(self) -> str:
        """module.name."""
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, eq=False)
class Module:
    """A file: its name below the package (`ops`, `formats.files.atomic`), its text, its definitions by their names."""

    name: str
    text: str
    docstring: str
    imports: frozenset[str]  # the names of the package's modules that it takes names from
    definitions: Mapping[str, Definition]


def read_package(root: Path = PACKAGE) -> dict[str, Module]:
    """The modules in the folder `root` and in its training/; what is imported stands before what imports it."""
    paths = [*sorted(root.glob("*.py")), *sorted(root.glob("training/*.py"))]
    modules = (read_module(path, root) for path in paths if path.stem != "__init__")
    found = {module.name: module for module in modules}
    order = TopologicalSorter({name: sorted(module.imports & found.keys()) for name, module in found.items()})
    return {name: found[name] for name in order.static_order()}


def read_module(path: Path, root: Path = PACKAGE) -> Module:
    """The file `path`, which is in the folder `root` of a package or below it."""
    text = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    name = ".".join(path.relative_to(root).with_suffix("").parts)
    taken = dict(imported(tree, name))
    nodes = list(_nodes(tree))
    scope = taken | {own: f"{name}.{own}" for own, _ in nodes if "." not in own}
    return Module(
        name, text, ast.get_docstring(tree) or "", frozenset(key.rpartition(".")[0] for key in taken.values()),
        {own: _definition(name, own, node, lines, scope) for own, node in nodes},
    )  # fmt: skip


def imported(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """The names that a module takes from others of its package, and their keys."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            parents = module.split(".")[: -node.level]
            for alias in node.names:
                yield alias.asname or alias.name, ".".join([*parents, *filter(None, [node.module]), alias.name])


def _nodes(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """The name and the node of each definition: values at the top alone, classes and functions at any depth."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield prefix + node.name, node
            yield from _nodes(node, f"{prefix}{node.name}.")
        elif isinstance(tree, ast.Module) and isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((target.id, node) for target in targets if isinstance(target, ast.Name))


def _definition(module: str, name: str, node: ast.stmt, lines: list[str], scope: Scope) -> Definition:
    first, last = node.lineno, node.end_lineno or node.lineno
    uses = dict(_uses(node, lines, scope))
    if not isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        while lines[first - 2].startswith("#"):
            first -= 1
        return Definition(module, name, True, range(first, last + 1), uses=uses)
    first = min([first, *(decorator.lineno for decorator in node.decorator_list)])
    docstring, text = ast.get_docstring(node), range(0)
    if docstring is not None:
        text = range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    return Definition(
        module, name, False, range(first, last + 1), docstring or "", text, uses,
        frozenset(_calls(node, scope)), tuple(dict.fromkeys(_refusals(node))),
    )  # fmt: skip


def _uses(node: ast.stmt, lines: list[str], scope: Scope) -> Iterator[tuple[Place, str]]:
    """Where a definition names something of the package; a name that is given a value in it is its own."""
    inside = list(ast.walk(node))
    own = {n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    own |= {n.arg for n in inside if isinstance(n, ast.arg)}
    own |= {n.name for n in inside if isinstance(n, ast.FunctionDef)}
    for n in inside:
        if isinstance(n, ast.Name) and n.id in scope and n.id not in own:
            column = len(lines[n.lineno - 1].encode()[: n.col_offset].decode())  # ast counts bytes
            yield (n.lineno, column), scope[n.id]


def _calls(node: ast.stmt, scope: Scope) -> Iterator[str]:
    for n in ast.walk(node):
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in scope:
            yield scope[n.func.id]


def _refusals(node: ast.stmt) -> Iterator[Refusal]:
    raised = [n for n in ast.walk(node) if isinstance(n, ast.Raise)]
    for n in sorted(raised, key=lambda n: n.lineno):
        if isinstance(n.exc, ast.Call):
            yield Refusal(ast.unparse(n.exc.func), "".join(map(_message, n.exc.args)))


def _message(node: ast.expr) -> str:
    """The text that an expression gives, with {...} for what is not known before it runs."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_message, node.values))
    if isinstance(node, ast.BinOp):
        return _message(node.left) + _message(node.right)
    if isinstance(node, ast.FormattedValue):
        node = node.value
    simple = isinstance(node, (ast.Name, ast.Attribute, ast.Subscript))
    return f"{{{ast.unparse(node) if simple else '...'}}}"

"""The public names, as `from lora_np import ...` has them: signatures, docstrings and errors, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import lora_np

from .definitions import PACKAGE, Definition, Module, imported, read_module

MODULES = ("analysis", "gradcheck", "testing")  # public as modules: lora_np.testing.check
WIDTH = 88  # a signature that is longer has a line for each parameter


class Entry(NamedTuple):
    """A public name: its signature, or what value it is; and where it is defined.

    parts: of a class, its own public methods and properties.
    """

    name: str
    signature: str
    definition: Definition | None
    parts: list[Definition]


def entries() -> dict[str, list[Entry]]:
    """The public names by where they are found: lora_np itself, and its public modules."""
    keys = public_keys()
    names = [*(key.rpartition(".")[0] for key in keys.values()), *MODULES]
    modules = {name: read_module(PACKAGE / f"{name.replace('.', '/')}.py") for name in dict.fromkeys(names)}
    found = {"lora_np": [_entry(name, key, modules) for name, key in sorted(keys.items(), key=lambda i: i[0].lower())]}
    for name in MODULES:
        own = [d.key for d in modules[name].definitions.values() if _is_public(d)]
        found[f"lora_np.{name}"] = [_entry(key.rpartition(".")[2], key, modules) for key in own]
    return found


def public_keys() -> dict[str, str]:
    """The names of lora_np.__all__, but for modules, and the keys of what they stand for."""
    keys = {name: f"{module}.{name}" for name, module in lora_np._LAZY.items() if name != module}
    keys |= dict(imported(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")), "__init__"))
    return {name: keys[name] for name in lora_np.__all__ if name not in MODULES}


def _is_public(definition: Definition) -> bool:
    """Whether it is a function or a class at the top of its module, and not for that alone."""
    return not definition.is_value and "." not in definition.name and not definition.name.startswith("_")


def _entry(name: str, key: str, modules: Mapping[str, Module]) -> Entry:
    where, _, own = key.rpartition(".")
    definitions = modules[where].definitions
    if own not in definitions or definitions[own].is_value:
        value = getattr(lora_np, name)
        held = f": {', '.join(sorted(value))}" if isinstance(value, Mapping) else ""
        return Entry(name, f"{name}: {type(value).__name__}{held}", None, [])
    parts = [
        d for n, d in definitions.items() if n.rpartition(".")[0] == own and not n.rpartition(".")[2].startswith("_")
    ]
    return Entry(name, _signature(name, _node(modules[where], own)), definitions[own], parts)


def _node(module: Module, name: str) -> ast.FunctionDef | ast.ClassDef:
    """The function or class of this name at the top of a module."""
    nodes = ast.parse(module.text).body
    return next(n for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name)


def _signature(name: str, node: ast.FunctionDef | ast.ClassDef) -> str:
    """name(parameters) -> result, in one line or a line each; of an exception its bases."""
    gives = ""
    if isinstance(node, ast.FunctionDef):
        parameters = list(_parameters(node.args))
        gives = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    else:
        made = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        parameters = list(_parameters(made.args))[1:] if made else list(_fields(node))
        parameters = parameters or [ast.unparse(base) for base in node.bases]
    line = f"{name}({', '.join(parameters)}){gives}"
    return line if len(line) <= WIDTH else f"{name}(\n    " + ",\n    ".join(parameters) + f",\n){gives}"


def _parameters(args: ast.arguments) -> Iterator[str]:
    """Each parameter as it stands in a call's head."""
    placed = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(placed) - len(args.defaults)) + list(args.defaults)
    yield from (_written(a.arg, a.annotation, default) for a, default in zip(placed, defaults, strict=True))
    if args.vararg:
        yield _written(f"*{args.vararg.arg}", args.vararg.annotation, None)
    elif args.kwonlyargs:
        yield "*"
    for a, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        yield _written(a.arg, a.annotation, default)
    if args.kwarg:
        yield _written(f"**{args.kwarg.arg}", args.kwarg.annotation, None)


def _fields(node: ast.ClassDef) -> Iterator[str]:
    """The fields of a dataclass or a NamedTuple, which its constructor takes in order."""
    for n in node.body:
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and not _is_apart(n.value):
            yield _written(n.target.id, n.annotation, n.value)


def _is_apart(default: ast.expr | None) -> bool:
    """Whether a field is none of the constructor's parameters: field(init=False)."""
    given = default.keywords if isinstance(default, ast.Call) else []
    return any(k.arg == "init" and isinstance(k.value, ast.Constant) and k.value.value is False for k in given)


def _written(name: str, annotation: ast.expr | None, default: ast.expr | None) -> str:
    """name: type = default; what a call makes anew each time is not written out."""
    typed = f": {ast.unparse(annotation)}" if annotation else ""
    made = isinstance(default, ast.Call)
    return f"{name}{typed} = {'...' if made else ast.unparse(default)}" if default else f"{name}{typed}"

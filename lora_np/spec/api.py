"""The public names, as `from lora_np import ...` has them: signatures, docstrings and errors, from the same source."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import lora_np

from .definitions import PACKAGE, Definition, Module, read_module

MODULES = ("analysis", "gradcheck", "testing")  # public as modules: lora_np.testing.check
WIDTH = 88  # a signature that is longer has a line for each parameter


class Entry(NamedTuple):
    """A public name: how it is written, its signature or value, and where it is defined.

    parts: of a class, its own public methods and properties.
    """

    name: str
    signature: str
    definition: Definition | None
    parts: list[Definition]


def entries() -> dict[str, list[Entry]]:
    """The public names by where they are found: lora_np itself, and its public modules."""
    modules: dict[str, Module] = {}
    found = {"lora_np": [_entry(name, getattr(lora_np, name), modules) for name in sorted(_public(), key=str.lower)]}
    for name in MODULES:
        module = getattr(lora_np, name)
        own = [n for n, value in vars(module).items() if _is_own(n, value, module)]
        found[f"lora_np.{name}"] = [_entry(n, getattr(module, n), modules) for n in own]
    return found


def _public() -> list[str]:
    return [name for name in lora_np.__all__ if not isinstance(getattr(lora_np, name), ModuleType)]


def _is_own(name: str, value: Any, module: ModuleType) -> bool:
    """Whether a module defines a public function or class of this name itself."""
    defined = inspect.isfunction(value) or inspect.isclass(value)
    return defined and not name.startswith("_") and value.__module__ == module.__name__


def _entry(name: str, value: Any, modules: dict[str, Module]) -> Entry:
    if not (inspect.isfunction(value) or inspect.isclass(value)):
        keys = f": {', '.join(sorted(value))}" if isinstance(value, Mapping) else ""
        return Entry(name, f"{name}: {type(value).__name__}{keys}", None, [])
    module = value.__module__.removeprefix("lora_np.")
    if module not in modules:
        modules[module] = read_module(PACKAGE / f"{module.replace('.', '/')}.py")
    definitions = modules[module].definitions
    prefix = f"{value.__qualname__}."
    parts = [d for n, d in definitions.items() if n.startswith(prefix) and "." not in (own := n[len(prefix) :])
             and not own.startswith("_")]  # fmt: skip
    return Entry(name, _signature(name, value), definitions[value.__qualname__], parts)


def _signature(name: str, value: Any) -> str:
    """name(parameters) -> result, in one line or a line each; of an exception its base."""
    if inspect.isclass(value) and issubclass(value, BaseException):
        return f"{name}({value.__mro__[1].__name__})"
    signature = inspect.signature(value)
    parameters, kinds = [], inspect.Parameter
    starred = False
    for p in signature.parameters.values():
        if p.kind == kinds.KEYWORD_ONLY and not starred:
            parameters.append("*")
        starred = starred or p.kind in (kinds.KEYWORD_ONLY, kinds.VAR_POSITIONAL)
        parameters.append(_parameter(p))
    gives = "" if inspect.isclass(value) or signature.return_annotation is signature.empty else (
        f" -> {_type(signature.return_annotation)}")  # fmt: skip
    line = f"{name}({', '.join(parameters)}){gives}"
    return line if len(line) <= WIDTH else f"{name}(\n    " + ",\n    ".join(parameters) + f",\n){gives}"


def _parameter(p: inspect.Parameter) -> str:
    star = "*" if p.kind == p.VAR_POSITIONAL else "**" if p.kind == p.VAR_KEYWORD else ""
    typed = "" if p.annotation is p.empty else f": {_type(p.annotation)}"
    if p.default is p.empty:
        return f"{star}{p.name}{typed}"
    made = p.default.__class__.__name__ == "_HAS_DEFAULT_FACTORY_CLASS"  # what dataclasses put there
    return f"{star}{p.name}{typed} = {'...' if made else _default(p.default)}"


def _default(value: Any) -> str:
    """A default as it is written in a call; of what has no such form its type alone."""
    text = repr(value)
    return (
        type(value).__name__ if dataclasses.is_dataclass(value) or re.search(r"\bat 0x|^mappingproxy", text) else text
    )


def _type(annotation: Any) -> str:
    """An annotation as the source has it."""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)

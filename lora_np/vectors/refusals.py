"""Refusals: adapters that no loader may take as if they were right.

Each is one of the right ones (`adapter_files`) with one thing wrong, for which there is no meaning that an adapter's
author can have had. Refusing is an error before any weight, output or text of the adapted model is given; a warning is
not enough, for nobody sees it where adapters are served.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ..backend import Array
from ..formats.files.json_file import to_json, write_json
from .adapter_files import FILES, PREFIX, file_cases, write_adapter

REFUSALS = "refusals"  # the folder of the cases, and the name of the file of results
LAYOUT = {
    "CASE": "an adapter with one thing wrong, for the base that the manifest names, a folder beside this one",
    "refusing": "an error before any weight, output or text of the adapted model is given. A warning, or an adapter "
    "that is left out, is none",
    "results": "refusals.json, an object by CASE: the error's words, or null where there was none",
}
Config: TypeAlias = dict[str, Any]
Tensors: TypeAlias = dict[str, Array]


class Refusal(NamedTuple):
    """An adapter that must be refused: its two files, and what is wrong with it.

    damage: what is done to the bytes of its tensors' file.
    """

    name: str
    why: str
    base: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Array]
    damage: Callable[[bytes], bytes] | None = None


@cache
def refusals() -> Sequence[Refusal]:
    """Every one."""
    return tuple(_cases())


def _like(name: str, why: str, change: Callable[[Config, Tensors], None], of: str = "plain") -> Refusal:
    """A right case of files, changed in place."""
    right = next(case for case in file_cases() if case.name == of)
    config, tensors = dict(right.config), {key: a.copy() for key, a in right.tensors.items()}
    change(config, tensors)
    return Refusal(name, why, right.base, config, tensors)


def _said(**changes: Any) -> Callable[[Config, Tensors], None]:
    """The configuration says this instead."""
    return lambda config, tensors: config.update(changes)


Q = f"{PREFIX}model.layers.0.self_attn.q_proj"


def _renamed(old: str, new: str) -> Callable[[Config, Tensors], None]:
    """Tensors under another name: each that has `old` in it."""

    def change(config: Config, tensors: Tensors) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def _set(key: str, f: Callable[[Array], Array]) -> Callable[[Config, Tensors], None]:
    """One tensor is another."""

    def change(config: Config, tensors: Tensors) -> None:
        tensors[key] = f(tensors[key])

    return change


def _added(key: str, a: Array) -> Callable[[Config, Tensors], None]:
    """One tensor more."""
    return lambda config, tensors: tensors.update({key: a})


def _without(part: str) -> Callable[[Config, Tensors], None]:
    """The tensors with this in their names are not there."""

    def change(config: Config, tensors: Tensors) -> None:
        for key in [key for key in tensors if part in key]:
            del tensors[key]

    return change


def _first(value: float) -> Callable[[Array], Array]:
    """The same numbers, but the first."""

    def f(a: Array) -> Array:
        a = a.copy()
        a.flat[0] = value
        return a

    return f


def _cases() -> Iterator[Refusal]:
    A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
    yield _like("rank-0", "r is 0: s divides by it", _said(r=0))
    yield _like("rank-of-another", "r is 4, its tensors have 2: which of them s is made of nobody knows", _said(r=4))
    yield _like("ranks-differ", "A has two rows, B three columns", _set(B, lambda a: np.hstack([a, a[:, :1]])))
    yield _like("nan", "NaN in A", _set(A, _first(np.nan)))
    yield _like("infinite", "an infinite number in B", _set(B, _first(np.inf)))
    yield _like("missing-B", "a module has A alone", _without(B))
    yield _like("missing-A", "a module has B alone", _without(A))
    yield _like("no-tensor", "no tensor at all", _without(""))
    yield _like("misspelt-factor", "lora_a for lora_A: a name under which nothing is found",
                _renamed(f"{Q}.lora_A", f"{Q}.lora_a"))  # fmt: skip
    yield _like("misspelt-module", "q_porj for q_proj", _renamed("q_proj", "q_porj"))
    yield _like("no-such-layer", "layer 7 of a model of two", _renamed("layers.1.", "layers.7."))
    yield _like("another-base", "A is for a base of width 16, not 8", _set(A, lambda a: np.hstack([a, a])))
    yield _like("another-base-out", "B is for a base of width 16, not 8", _set(B, lambda a: np.vstack([a, a])))
    yield _like("another-head", "a head of another width takes the place of the base's",
                _set(f"{PREFIX}lm_head.weight", lambda a: np.hstack([a, a])), "modules-to-save")  # fmt: skip
    yield _like("unmatched-rank-pattern", "rank_pattern misses the modules whose rank it is: v_porj",
                _said(rank_pattern={"layers.1.self_attn.q_proj": 1, "v_porj": 3}), "patterns")  # fmt: skip
    yield _like("unmatched-alpha-pattern", "alpha_pattern fits no module, so its alpha would be another's: v_porj",
                _said(alpha_pattern={"layers.1.self_attn.q_proj": 7, "v_porj": 5}), "patterns")  # fmt: skip
    yield _like("dora-without-magnitudes", "use_dora, and no magnitude is there", _said(use_dora=True))
    yield _like("magnitudes-without-dora", "a magnitude of DoRA's, which plain LoRA would leave out",
                _added(f"{Q}.lora_magnitude_vector", np.ones(8, "<f4")))  # fmt: skip
    yield _like("another-method", "peft_type is LOHA, whose tensors these are not", _said(peft_type="LOHA"))
    yield _like("alpha-in-words", "lora_alpha is a string", _said(lora_alpha="six"))
    right = next(case for case in file_cases() if case.name == "plain")
    yield Refusal("truncated", "the file ends before its last tensor does", right.base, right.config, right.tensors,
                  lambda data: data[:-8])  # fmt: skip


# --- Their files -----------------------------------------------------------------------------------------------------


def write_refusals(folder: Path) -> None:
    """The cases and a manifest, in a new folder; the bases are those of the folder of files."""
    for case in refusals():
        write_adapter(folder / case.name, case.config, case.tensors)
        path = folder / case.name / "adapter_model.safetensors"
        if case.damage is not None:
            path.write_bytes(case.damage(path.read_bytes()))
    entries = [{"name": c.name, "why": c.why, "base": f"../{FILES}/bases/{c.base}"} for c in refusals()]
    write_json(folder / "manifest.json", {"digest": refusals_digest(), "layout": LAYOUT, "cases": entries})


def refusals_digest() -> str:
    """SHA-256 of the cases' words and numbers."""
    total = hashlib.sha256()
    for case in refusals():
        total.update(to_json([case.name, case.base, case.config, case.damage is not None]).encode())
        for key, a in case.tensors.items():
            total.update(key.encode() + a.astype("<f4").tobytes())
    return total.hexdigest()

"""What is in an adapter's folder or file, read without its base."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...backend import Array, asnumpy, xp
from ...lora import singular_directions
from ..adapters.adapter import kind_of
from ..adapters.contents import Pair, read_contents
from ..adapters.gguf import ALPHA, TABLE, read_updates
from ..adapters.own_files import read_file
from ..adapters.peft_config import WEIGHTS
from ..adapters.targets import mistargeted
from ..files.messages import named, shown
from ..models.gguf_file import open_gguf
from .any_base import AnyBase


class Module(NamedTuple):
    """An adapted module, under the file's own name, and the Frobenius norms of its A, its B and s B A (L1).

    effective_rank: how many of B A's singular values count: e to the power of the entropy of their shares of their sum
    (Roy and Vetterli 2007); from 1 to the rank, and 0 where B A = 0.
    shares: of each singular value, the largest first, its square's share of the squared norm of s B A; none where that
    is 0. zero_directions: of the rank, those whose row of A or column of B is zero.
    Of E experts, each of this shape and rank: norms of all together, shares of all by their order, the mean effective
    rank, and the zero directions of all.
    """

    name: str
    n_out: int
    n_in: int
    rank: int
    scale: float
    norm_A: float
    norm_B: float
    norm_update: float
    effective_rank: float
    shares: list[float]
    zero_directions: int
    experts: int

    @property
    def is_dead(self) -> bool:
        """Whether it changes nothing: A, B or s is zero."""
        return 0 in (self.norm_A, self.norm_B, self.scale)

    def carrying(self, share: float) -> int:
        """How many of the leading directions carry this share of the squared norm of s B A."""
        return int(np.searchsorted(np.cumsum(self.shares), share * sum(self.shares), side="left")) + bool(self.shares)


class Survey(NamedTuple):
    """An adapter: what adapter_config.json says, its modules, and the tensors that are trained whole.

    remarks: what is wrong with the file, though it can be read
    """

    config: dict[str, Any]
    modules: list[Module]
    whole: list[str]
    remarks: list[str]

    @property
    def dead_layers(self) -> list[str]:
        """The layers of which no adapted module changes anything: names up to their first number."""
        layers: dict[str, list[bool]] = {}
        for module in self.modules:
            layers.setdefault(layer_of(module.name), []).append(module.is_dead)
        return [layer for layer, dead in layers.items() if layer and all(dead)]

    @property
    def dead_modules(self) -> list[str]:
        """The modules that change nothing, in layers where another does."""
        layers = set(self.dead_layers)
        return [m.name for m in self.modules if m.is_dead and layer_of(m.name) not in layers]


class Read(NamedTuple):
    """An adapter as its file has it: its configuration, pairs, each with its module's name, and the rest's names."""

    config: Mapping[str, Any]
    pairs: list[tuple[str, Pair]]
    whole: list[str]
    remarks: list[str]


@named
def survey(path: str | os.PathLike[str], base: AnyBase | None = None) -> Survey:
    """Reads an adapter's folder or file by the names that it has: in .gguf those of the base's tensors, in .npz ours.

    base: what it is for, where that is known: its names may stand in the configuration where the file has others.
    A FileNotFoundError or ValueError, in one line, says what is missing or damaged.
    """
    found = read_any(Path(path), base)
    modules = []
    for name, pair in found.pairs:
        module = _module(name, pair)
        if not math.isfinite(module.norm_update):
            where = Path(path) / WEIGHTS if Path(path).is_dir() else path
            raise ValueError(f"{where}: {shown(name)}: the norm of s B A is too large, with s = {module.scale:g}")
        modules.append(module)
    return Survey(dict(found.config), modules, found.whole, found.remarks)


def read_any(path: Path, base: AnyBase | None = None) -> Read:
    """An adapter's folder or file. Errors as in `survey`."""
    kind = kind_of(path)
    if kind == "gguf":
        return _read_gguf(path)
    found = read_contents(path, () if base is None else base.names) if kind == "peft" else read_file(path)
    pairs = [(name, pair) for name, several in found.pairs.items() for pair in several]
    return Read(found.raw, pairs, [*found.whole, *found.rows], [*found.remarks, *mistargeted(found)])


def _read_gguf(path: Path) -> Read:
    with open_gguf(path) as file:
        updates, alpha = read_updates(file), file.metadata.get(ALPHA)
    pairs = []
    for name, (A, B, s, *_) in updates.items():
        if name == TABLE:  # the look-up, which counts as (D, V)
            A, B = B.T, A.T
        pairs.append((name, Pair(A, B, s, len(A), is_look_up=name == TABLE)))
    targets = sorted({name.split(".")[-2] for name in updates if "." in name})
    return Read({"target_modules": targets, "lora_alpha": alpha}, pairs, [], [])


def layer_of(module: str) -> str:
    """The layer that a module stands in: its name up to the first number; "" where it has none."""
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), -1)
    return ".".join(parts[: at + 1])


def _module(name: str, pair: Pair) -> Module:
    # Of A and B of size 1, as squares of numbers that a file may hold overflow.
    (a, A), (b, B) = scaled(pair.A), scaled(pair.B)
    updates = pair._replace(A=A, B=B).updates
    sigmas = np.array([asnumpy(singular_directions(xp.asarray(u.A), xp.asarray(u.B))[1]) for u in updates])
    size = abs(pair.s) * a * b * float(np.linalg.norm(sigmas))
    squares = (sigmas * sigmas).sum(axis=0)  # (E,k) -> (k,)
    shares = (squares / squares.sum()).tolist() if squares.any() and pair.s else []
    zero = sum(int(((u.A == 0).all(axis=1) | (u.B == 0).all(axis=0)).sum()) for u in updates)
    return Module(
        name, len(B), A.shape[1], pair.r, pair.s, a * float(np.linalg.norm(A)), b * float(np.linalg.norm(B)), size,
        float(np.mean([_effective_rank(sigma) for sigma in sigmas])), shares, zero, len(updates),
    )  # fmt: skip


def scaled(matrix: Array) -> tuple[float, Array]:
    """A matrix as its largest element times another, float64."""
    matrix = matrix.astype(np.float64)
    largest = float(np.abs(matrix).max(initial=0.0)) or 1.0
    return largest, matrix / largest


def _effective_rank(sigma: Array) -> float:
    total = float(sigma.sum())
    shares = sigma[sigma > 0] / total if total > 0 else sigma[:0]
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0

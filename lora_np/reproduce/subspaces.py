"""Subspaces (A1; paper 7.2): what adapters of different ranks, seeds and tasks have in common, beside chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..adapter import Adapter
from ..analysis import random_similarity, subspace_similarity
from ..backend import Array
from .section import Claim, Picture, Section, Table, graded, listed, told
from .study import ERRORS, QV, Setting, Study, Trainings, adapter_of, standard_error

LOW = 8  # the smaller rank of figure 3
SIMILAR = 0.5  # what the paper calls significant: phi(1, 1) above it
ABOVE_CHANCE = 1.5  # times what random subspaces share, at the least
LEADING = 8  # of two seeds' directions, so many are compared


class Maps(NamedTuple):
    """phi (i, j) of one matrix in each layer, by the matrix's letter; and of random subspaces."""

    of: Mapping[str, Sequence[Array]]
    chance: Array

    def at(self, matrix: str, i: int, j: int) -> list[float]:
        """phi(i, j) in each layer."""
        return [float(phi[i - 1, j - 1]) for phi in self.of[matrix]]


def maps(one: Adapter, other: Adapter, n_layer: int, matrices: Sequence[str] = QV) -> Maps:
    """phi of two adapters."""

    def phi(layer: int, matrix: str) -> Array:
        name = f"layers.{layer}.attn.{matrix}.A"
        return subspace_similarity(one.params[name], other.params[name])

    found = {matrix: [phi(layer, matrix) for layer in range(n_layer)] for matrix in matrices}
    n_in = one.params[f"layers.0.attn.{matrices[0]}.A"].shape[1]
    return Maps(found, random_similarity(n_in, *found[matrices[0]][0].shape))


def wanted(high: int) -> list[Setting]:
    """The adapters that this needs: r = 8 and the highest rank, of two seeds."""
    return [Setting(QV, r, seed) for r in (LOW, high) for seed in (0, 1)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _by_layer(values: Sequence[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


def top_direction_claim(low: int, high: int, values: Mapping[str, Sequence[float]], chance: float) -> Claim:
    """Figure 3: the first direction is shared by a low and a high rank. values: phi(1, 1) by matrix and layer."""
    every = [value for of in values.values() for value in of]
    above = sum(value > SIMILAR for value in every)
    return Claim(
        f"the leading direction is the same at r = {low} and r = {high}: phi(1, 1) > {SIMILAR}", "paper, 7.2, figure 3",
        f"phi(1, 1) from the first layer up: {'; '.join(f'W_{m} {_by_layer(of)}' for m, of in values.items())}; "
        f"by chance {chance:.3f}",
        graded(above == len(every), above > 0),
    )  # fmt: skip


def seeds_claim(n: int, values: Mapping[str, Sequence[float]], chance: float) -> Claim:
    """Figure 4: two seeds share more of their leading directions than random matrices do. values: phi(n, n)."""
    means = {matrix: _mean(of) for matrix, of in values.items()}
    above = [matrix for matrix, mean in means.items() if mean >= ABOVE_CHANCE * chance]
    return Claim(
        "two seeds find the same leading directions, random matrices share none", "paper, 7.2, figure 4",
        f"phi({n}, {n}), mean of the layers: {listed([f'W_{m} {mean:.3f}' for m, mean in means.items()])}; "
        f"by chance {chance:.3f}",
        graded(len(above) == len(means), bool(above)),
    )  # fmt: skip


def intrinsic_rank_claim(n: int, values: Mapping[str, Sequence[float]], chance: float) -> Claim:
    """Figure 4: W_q's update has the higher intrinsic rank: more directions in common. values: phi(n, n)."""
    more = {matrix: n * (_mean(of) - chance) for matrix, of in values.items()}
    apart = [q - v for q, v in zip(values["q"], values["v"], strict=True)]  # by layer
    return Claim(
        "W_q's update has a higher intrinsic rank than W_v's: its seeds share more directions", "paper, 7.2, figure 4",
        f"of {n} directions, {more['q']:.2f} of W_q's and {more['v']:.2f} of W_v's are shared beyond chance",
        graded(more["q"] > 0 and told(_mean(apart), 0, ERRORS * standard_error(apart)), False),
    )  # fmt: skip


def tasks_claim(same: Sequence[float], other: Sequence[float], chance: float) -> Claim:
    """Different tasks need different directions. same, other: phi between seeds of one task, and between two tasks."""
    apart = [a - b for a, b in zip(same, other, strict=True)]  # by layer and matrix
    return Claim(
        "different tasks stress different directions", "often said of LoRA, after paper, 7.3",
        f"phi({LOW}, {LOW}), mean of layers and matrices: {_mean(same):.3f} between two seeds of one task, "
        f"{_mean(other):.3f} between two tasks; by chance {chance:.3f}",
        graded(told(_mean(apart), 0, ERRORS * standard_error(apart)), False),
    )  # fmt: skip


def subspaces(study: Study, trainings: Trainings, high: int, other_task: Adapter | None = None) -> Section:
    """The section of one study. other_task: an adapter of another task, of rank LOW and a seed of its own."""
    n_layer = study.model.config.n_layer

    def adapter(r: int, seed: int) -> Adapter:
        return adapter_of(trainings[Setting(QV, r, seed)])

    # Never of one seed: the smaller A would start as the first rows of the larger, and share them for no other reason.
    ranks = maps(adapter(LOW, 0), adapter(high, 1), n_layer)
    seeds = maps(adapter(high, 0), adapter(high, 1), n_layer)
    n = min(LEADING, high)
    chance = float(seeds.chance[n - 1, n - 1])
    leading = {matrix: seeds.at(matrix, n, n) for matrix in QV}
    claims = [
        top_direction_claim(LOW, high, {m: ranks.at(m, 1, 1) for m in QV}, float(ranks.chance[0, 0])),
        seeds_claim(n, leading, chance),
        intrinsic_rank_claim(n, leading, chance),
    ]
    if other_task is not None:
        same, other = (maps(adapter(LOW, 0), one, n_layer) for one in (adapter(LOW, 1), other_task))
        values = [[value for m in QV for value in found.at(m, LOW, LOW)] for found in (same, other)]
        claims.append(tasks_claim(values[0], values[1], float(same.chance[-1, -1])))
    middle = n_layer // 2
    return Section(
        f"subspaces-{study.id}", f"What updates have in common: {study.name}",
        "phi(i, j) compares the i leading right-singular directions of one A with the j leading ones of another: 1 "
        "where the smaller subspace lies in the larger, and max(i, j) / in by chance. In a narrow model chance is "
        f"high, here {float(ranks.chance[-1, -1]):.2f} at the right edge, so it is drawn beside. Adapters that are "
        "compared never have a seed in common.",
        claims,
        tables=[_table(ranks, seeds, high, n)],
        pictures=[
            _picture(ranks, middle, f"r = {LOW} against r = {high}", f"i, of r = {LOW}", f"j, of r = {high}"),
            _picture(seeds, middle, f"two seeds at r = {high}", "i, of seed 0", "j, of seed 1"),
        ],
        data={
            what: {m: [np.round(phi, 4).tolist() for phi in of] for m, of in found.of.items()}
            for what, found in (("ranks", ranks), ("seeds", seeds))
        },
    )  # fmt: skip


def _table(ranks: Maps, seeds: Maps, high: int, n: int) -> Table:
    places = [(f"r = {LOW}, r = {high}", ranks, 1, 1), (f"r = {LOW}, r = {high}", ranks, LOW, LOW)]
    places += [(f"seeds at r = {high}", seeds, 1, 1), (f"seeds at r = {high}", seeds, n, n)]
    rows = [
        [f"{what}: phi({i}, {j})", f"W_{m}", *(f"{p:.3f}" for p in (*found.at(m, i, j), found.chance[i - 1, j - 1]))]
        for what, found, i, j in places
        for m in QV
    ]
    n_layer = len(ranks.of["q"])
    return Table(
        "phi(i, j) by layer", ["", "matrix", *(f"layer {layer}" for layer in range(n_layer)), "by chance"], rows
    )


def _picture(found: Maps, layer: int, what: str, i: str, j: str) -> Picture:
    maps = {f"$W_{m}$": of[layer] for m, of in found.of.items()} | {"by chance": found.chance}
    panels = {name: np.round(phi, 4).tolist() for name, phi in maps.items()}
    return Picture(f"phi(i, j), {what}, layer {layer}.", "heat_maps", [panels, j, i])

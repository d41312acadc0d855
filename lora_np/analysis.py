"""What the paper measures of updates (section 7): which directions two of them share, and what one amplifies."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .backend import Array, asnumpy
from .checks import as_array
from .lora import singular_directions
from .storage import as_matrix, widened


def subspace_similarity(A: Array, other: Array) -> Array:
    """A1 (paper 7.2, eq. 4): phi(i, j) = norm_F(U_i^T V_j)^2 / min(i, j), from 0, nothing shared, to 1, all of it.

    U_i (in, i), V_j (in, j): the leading right-singular directions of A (r, in) and other (q, in), on whichever side.
    -> (r, q) on the host, float64: phi(i, j) at [i-1, j-1]. Where singular values are equal, which of their directions
    lead is left to rounding. A ValueError says which shape does not fit.
    """
    A, other = as_array("subspace_similarity: A", A), as_array("subspace_similarity: other", other)
    if A.ndim != 2 or other.ndim != 2 or A.shape[1] != other.shape[1]:
        raise ValueError(f"subspace_similarity: expected (r, in) and (q, in), got {A.shape} and {other.shape}")
    for factor in (A, other):
        if factor.shape[0] > factor.shape[1]:
            raise ValueError(f"subspace_similarity: expected r of at most in, got {factor.shape}")
    shared = _right_directions(A).T @ _right_directions(other)  # (r,in) (in,q) -> (r,q)
    return np.cumsum(np.cumsum(shared * shared, axis=0), axis=1) / np.minimum(*_counts(*shared.shape))


def random_similarity(n_in: int, r: int, q: int) -> Array:
    """A1: the mean of phi(i, j) over random subspaces of `n_in` dimensions: i j / in / min(i, j). -> (r, q) float64.

    Each of the i j squared cosines has the mean 1 / in, whatever the other subspace is.
    """
    return np.maximum(*_counts(r, q)) / n_in


def _right_directions(A: Array) -> Array:
    """The right-singular directions of A (r, in), the leading first. -> (in, r) float64, on the host."""
    return np.linalg.svd(asnumpy(A).astype(np.float64), full_matrices=False)[2].T


def _counts(r: int, q: int) -> tuple[Array, Array]:
    """i = 1..r and j = 1..q, to be broadcast. -> (r,1), (1,q)."""
    return np.arange(1, r + 1)[:, None], np.arange(1, q + 1)[None]


class Amplification(NamedTuple):
    """Frobenius norms of W, of its update dW, and of what W has in r directions: of dW, of W itself, and at random."""

    weight: float  # norm_F(W)
    update: float  # norm_F(dW)
    in_update: float  # norm_F(U^T W V), U, V the singular directions of dW
    in_weight: float  # the same in the r leading directions of W
    in_random: float  # the same in random ones: the root of the mean square

    @property
    def factor(self) -> float:
        """A2: norm_F(dW) / norm_F(U^T W V): how far the update amplifies what W has in its directions."""
        return self.update / self.in_update if self.in_update else math.inf


def amplification(W: Array, A: Array, B: Array, s: float) -> Amplification:
    """A2 (paper 7.3, table 7): the norms that tell which directions of W its update dW = s B A amplifies, and how far.

    W (out, in), A (r, in), B (out, r); W may be held in fewer bits. dW is not formed. U^T W V at random:
    E norm_F^2 = norm_F(W)^2 r^2 / (out in), for each of r^2 products u^T W v of random directions has the mean square
    norm_F(W)^2 / (out in).
    A ValueError says which shape does not fit, or that dW is zero, and so has no directions.
    """
    W, A, B = (as_matrix(f"amplification: {name}", a) for name, a in (("W", W), ("A", A), ("B", B)))
    if W.ndim != 2 or A.ndim != 2 or W.shape[1] != A.shape[1] or B.shape != (W.shape[0], A.shape[0]):
        raise ValueError(
            f"amplification: expected W (out, in), A (r, in), B (out, r), got {W.shape}, {A.shape}, {B.shape}"
        )
    U, sigma, V = (asnumpy(factor) for factor in singular_directions(A, B))
    update = abs(s) * float(np.linalg.norm(sigma))
    if update == 0:
        raise ValueError("amplification: expected a trained update, got s B A = 0")
    W = asnumpy(widened(W)).astype(np.float64)
    r = len(sigma)
    weight = float(np.linalg.norm(W))
    return Amplification(
        weight=weight,
        update=update,
        in_update=float(np.linalg.norm(U.T @ W @ V)),  # (r,out) (out,in) (in,r) -> (r,r)
        in_weight=float(np.linalg.norm(np.linalg.svd(W, compute_uv=False)[:r])),
        in_random=weight * r / math.sqrt(W.size),
    )

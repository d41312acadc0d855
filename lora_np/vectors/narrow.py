"""The cases in another precision than float32 (P1): those that mean something in it, on numbers that it has."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from ..backend import Array
from .cases import Case
from .precision import FORMATS, PRECISIONS, rounded

PRODUCTS = frozenset({
    "lora_update", "lora_linear", "lora_embedding", "lora_start", "merge", "per_row", "combine", "linear", "gated_mlp",
    "attention", "disentangled", "cross_attention", "model", "dora_linear", "dora_embedding", "dora_merge", "segments",
    "merge_model",
})  # fmt: skip
LOW = 2**13  # what TF32 leaves out of 24 bits

INPUTS = {
    "tf32": "floats have 24 bits, the 13 that TF32 leaves out drawn: those of each number are SHAKE-256 of "
    "tf32/ID/CASE/NAME, two bytes, the low one first, modulo 2^13; 0 stays 0",
    "bfloat16": "floats are float32's rounded to bfloat16, ties to even",
    "float16": "floats are float32's rounded to float16, ties to even",
}


def narrowed(cases: Iterable[Case], precision: str) -> tuple[list[Case], dict[str, list[str]]]:
    """The cases in a precision, and those that are left out, ID/NAME, by why. In float32 they are as they were."""
    if precision == "float32":
        return list(cases), {}
    kept: list[Case] = []
    left_out: dict[str, list[str]] = {}
    for case in cases:
        why = _why_not(case, precision)
        if why is None:
            kept.append(in_precision(case, precision))
        else:
            left_out.setdefault(why, []).append(f"{case.id}/{case.name}")
    return kept, left_out


def in_precision(case: Case, precision: str) -> Case:
    """The same case, to be computed in a precision, its numbers such as that has (INPUTS)."""
    inputs = {
        name: _as(a, precision, f"{case.id}/{case.name}/{name}") if a.dtype.kind == "f" else a
        for name, a in case.inputs.items()
    }
    return case._replace(inputs=inputs, precision=precision)


def _as(a: Array, precision: str, name: str) -> Array:
    if precision != "tf32":
        return rounded(a, PRECISIONS[precision].dtype)
    pairs = np.frombuffer(hashlib.shake_256(f"tf32/{name}".encode()).digest(2 * a.size), dtype="<u2")
    mantissa, exponent = np.frexp(a)
    high = np.trunc(np.ldexp(mantissa, 24) / LOW) * LOW
    low = np.sign(a) * (pairs.astype(np.int64).reshape(a.shape) % LOW)
    return np.ldexp(high + low, exponent - 24)


def _why_not(case: Case, precision: str) -> str | None:
    """Why a case means nothing in a precision."""
    c, dtype = case.scalars, PRECISIONS[precision].dtype
    if case.operation in ("count", "warmup_cosine"):
        return "not computed of floats"
    if case.operation in ("subspace_similarity", "amplification", "pissa") or c.get("rank") is not None:
        return "singular values are found in float32 or float64"
    if case.operation in ("quantise_nf4", "dequantise_nf4", "nf4_linear"):
        return "what stands beside four bits is in float32"
    if case.operation in ("generate", "sample"):
        return "tokens: which of two near ones is larger may be seen otherwise"
    if case.operation in ("merge", "merge_model") and c["dtype"] != dtype:
        return "its weight is of another dtype"
    if (case.id, case.name) == ("T9", "far"):
        return "scores near 110 are so far off there that exp of them says nothing"
    if precision == "tf32" and case.operation not in PRODUCTS:
        return "no product of matrices is in it: it is as in float32"
    if case.operation == "adamw" and c["eps"] < FORMATS[dtype][1]:
        return "eps is below the smallest number"
    return None

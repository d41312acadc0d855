"""What the machine can do: the speed of large products and of passes over memory, in the same rounds as the rest.

Large products: n x n x n in float32, one with a single thread on each core at once, and one product on all threads.
Passes over memory, one on each core at once: a = b + c, three arrays; and a sum of products, which only reads.
"""

from __future__ import annotations

import numpy as np

from lora_np.backend import backend_name, xp

from .figures import Figure
from .measure import Measured, Side
from .timing import Cases, cores

EACH_CORE, ALL_THREADS = "one product a core at once", "one product on all threads"
STREAM, READ = "a = b + c", "reading"


def product(n: int) -> Cases:
    """One product of two (n,n)."""
    rng = np.random.default_rng(0)
    a, b = (xp.asarray(rng.standard_normal((n, n), dtype=np.float32)) for _ in range(2))
    c = xp.empty_like(a)
    return {"product": lambda: xp.matmul(a, b, out=c)}


def peaks(n: int, length: int) -> Cases:
    """A product, and passes over arrays of `length` elements."""
    a, b, c = (xp.ones(length, dtype="float32") for _ in range(3))
    return {**product(n), STREAM: lambda: xp.add(b, c, out=a), READ: lambda: xp.dot(b, c)}


def _sizes(quick: bool) -> dict[str, int]:
    if quick:
        return {"n": 64, "length": 4096}
    return {"n": 8192 if backend_name == "cupy" else 2048, "length": 2**25}


def sides(quick: bool) -> list[Side]:
    """The processes to measure beside others; `figures` makes figures of what they give."""
    sizes = _sizes(quick)
    return [
        Side(EACH_CORE, "bench.roofline:peaks", sizes, threads=cores()),
        Side(ALL_THREADS, "bench.roofline:product", {"n": sizes["n"]}),
    ]


def figures(bench: str, measured: Measured, quick: bool) -> dict[str, Figure]:
    """Products in GFLOP/s, passes in GB/s, over all cores together."""
    (n, length), at_once = _sizes(quick).values(), cores()
    flops, element = 2.0 * n**3 / 1e9, 4.0 / 1e9

    def rate(side: str, case: str, what: str, amount: float, unit: str) -> Figure:
        return Figure(bench, "the machine", what, "s", measured[side][case].seconds).rate(amount, what, unit)

    return {
        EACH_CORE: rate(EACH_CORE, "product", f"products, {EACH_CORE}", at_once * flops, "GFLOP/s"),
        ALL_THREADS: rate(ALL_THREADS, "product", f"products, {ALL_THREADS}", flops, "GFLOP/s"),
        STREAM: rate(EACH_CORE, STREAM, f"memory, {STREAM}", at_once * 3 * length * element, "GB/s"),
        READ: rate(EACH_CORE, READ, f"memory, {READ}", at_once * 2 * length * element, "GB/s"),
    }


def best_products(found: dict[str, Figure]) -> Figure:
    """The products' roof: the faster of the two ways."""
    return max((found[EACH_CORE], found[ALL_THREADS]), key=lambda figure: figure.median)


def best_memory(found: dict[str, Figure]) -> Figure:
    """The memory's roof: the faster of the two passes."""
    return max((found[STREAM], found[READ]), key=lambda figure: figure.median)


def attainable(flops: float, moved: float, products: float, memory: float) -> float:
    """The roofline: the operations a second that `products` and `memory` allow for `flops` over `moved` bytes."""
    return min(products, memory * flops / moved)

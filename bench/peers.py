"""One adapted matrix beside PEFT's and loralib's; how long packages take to import, and their size."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

import numpy as np

import lora_np as ln
from lora_np.backend import xp

from .figures import Figure
from .measure import Side, measure
from .options import Options
from .step import OURS
from .timing import Cases

LAYER, TINY = {"M": 1024, "D": 768, "r": 8}, {"M": 8, "D": 12, "r": 2}
PEERS = {"PEFT": "bench.peft_side:layer", "loralib": "bench.peft_side:loralib_layer"}
THEIRS, TORCH_PEFT = ("torch", "peft"), "torch + peft"  # what a user imports; what these need is installed with them


def ours(M: int, D: int, r: int) -> Cases:
    """One adapted matrix (D,D), forward and backward, for M rows."""
    rng = np.random.default_rng(0)
    shapes = {"x": (M, D), "dh": (M, D), "W0": (D, D), "b": (D,), "A": (r, D), "B": (D, r)}
    x, dh, W0, b, A, B = (xp.asarray(rng.standard_normal(s, dtype=np.float32)) for s in shapes.values())

    def run() -> None:
        _, saved = ln.lora_linear(x, W0, b, A, B, 16 / r)
        ln.lora_linear_backward(dh, saved)

    return {"layer": run}


def figures(o: Options) -> Iterator[Figure]:
    """The layer, imports and sizes."""
    sizes = TINY if o.quick else LAYER
    sides = [Side(OURS, "bench.peers:ours", sizes)]
    sides += [] if o.alone else [Side(name, make, sizes) for name, make in PEERS.items()]
    measured = measure(sides, o)
    case = ", ".join(["one matrix, forward and backward", *(f"{name}={size}" for name, size in sizes.items())])
    mine, *others = (Figure("peers", case, side, "s", timing["layer"].seconds) for side, timing in measured.items())
    yield mine
    for theirs in others:
        yield from (theirs, theirs.over(mine))
    with_peers = not o.alone and all(util.find_spec(name) for name in THEIRS)
    yield from _imports(o.rounds, with_peers)
    yield from _sizes(with_peers)


def _imports(rounds: int, with_peers: bool) -> Iterator[Figure]:
    """Seconds of an import in a process that has just started; one round more warms the disk up."""
    statements = {OURS: "import lora_np", **({TORCH_PEFT: "import torch, peft"} if with_peers else {})}
    times: dict[str, list[float]] = {name: [] for name in statements}
    for round_number in range(rounds + 1):
        for name, statement in statements.items():
            code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True
            )
            if round_number:
                times[name].append(float(done.stdout.split()[-1]))
    mine, *others = (Figure("peers", "import", name, "s", seconds) for name, seconds in times.items())
    yield mine
    yield from (figure for theirs in others for figure in (theirs, theirs.over(mine)))


def _sizes(with_peers: bool) -> Iterator[Figure]:
    """Bytes of the files installed: each package with all that it requires, extras left out."""
    assert ln.__file__ is not None
    package = sum(path.stat().st_size for path in Path(ln.__file__).parent.rglob("*.py"))
    mine = Figure("peers", "installed size", OURS, "B", [package + installed_bytes(["numpy"])])
    yield mine
    if with_peers:
        theirs = Figure("peers", "installed size", TORCH_PEFT, "B", [installed_bytes(THEIRS)])
        yield from (theirs, theirs.over(mine))


def installed_bytes(names: Iterator[str] | tuple[str, ...] | list[str]) -> int:
    """The files of these distributions and of all that they require."""
    found: dict[str, metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        name = _canonical(waiting.pop())
        if name not in found:
            found[name] = metadata.distribution(name)
            waiting += _required(found[name])
    files = {Path(str(file.locate())) for distribution in found.values() for file in distribution.files or []}
    return sum(path.stat().st_size for path in files if path.is_file())


def _required(distribution: metadata.Distribution) -> list[str]:
    """The names that it requires on this machine, without extras."""
    lines = distribution.requires or []
    if not lines:
        return []
    from packaging.requirements import Requirement  # PEFT requires it

    requirements = [Requirement(line) for line in lines]
    return [one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

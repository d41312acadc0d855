"""The cases: for each id of the specification a few inputs, the edges among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np

from ..adapter import LoRAConfig, init_adapter
from ..backend import Array
from ..batch import IGNORED
from ..formats.models.presets import PRESETS
from ..model import Config, Model, init_weights
from ..ops import llama3_factors
from ..storage import DYNAMIC, LEVELS
from .derivatives import architectures
from .dyadic import UNIT, fine, integers, numbers
from .precision import FLOAT32

Arrays = Mapping[str, Array]
VERSIONS = ("v1", "v2")  # of the cases; each has all those of the one before


class Case(NamedTuple):
    """What is computed of what.

    inputs     by name: float64 (every number is exact in float32 too), int64 or bool
    gradients  the inputs whose gradients are asked for
    since      the version that it came with
    precision  what it is to be computed in, by name
    """

    id: str
    name: str
    operation: str
    title: str
    scalars: Mapping[str, Any]
    inputs: Arrays
    gradients: tuple[str, ...] = ()
    since: str = VERSIONS[0]
    precision: str = FLOAT32.name


def all_cases(version: str = VERSIONS[-1]) -> list[Case]:
    """Every case of a version, by id."""
    there = VERSIONS[: VERSIONS.index(version) + 1]
    cases = [case for part in (_lora, _primitives, _models, _optimizer, _analysis) for case in part()]
    return sorted((case for case in cases if case.since in there), key=lambda case: (case.id[0], int(case.id[1:])))


class _Names:
    """Draws tensors by name, so that each case has numbers of its own."""

    def __init__(self, id: str, name: str) -> None:
        self.stem = f"{id}/{name}"

    def __call__(self, tensor: str, *shape: int, low: float = -1.0, high: float = 1.0, **unit: float) -> Array:
        return numbers(f"{self.stem}/{tensor}", shape, low, high, **unit)

    def integers(self, tensor: str, *shape: int, low: int, high: int) -> Array:
        return integers(f"{self.stem}/{tensor}", shape, low, high)

    def keep(self, tensor: str, *shape: int) -> Array:
        """A dropout mask: three in four are kept."""
        return integers(f"{self.stem}/{tensor}", shape, 0, 3) > 0


class _FineNames(_Names):
    """Draws what products are made of, -1 to 1, in all bits of a float32."""

    def __call__(self, tensor: str, *shape: int, low: float = -1.0, high: float = 1.0, **unit: float) -> Array:
        return fine(f"{self.stem}/{tensor}", shape)


_FINE = "Inputs of 24 bits, which TF32 and float16 round: their products show"


# --- L1 to L9 ------------------------------------------------------------------------------------------------------


def _scalars(r: int, alpha: float = 4.0, *, rslora: bool = False, **more: Any) -> dict[str, Any]:
    return {"alpha": alpha, "r": r, "rslora": rslora, **more}


class _Shape(NamedTuple):
    """A matrix with its update, and what goes through it."""

    name: str
    title: str
    sizes: tuple[int, int, int, int, int]  # N, T, in, out, r
    alpha: float
    rslora: bool = False
    bias: bool = True
    dropout: bool = False
    since: str = "v1"

    def draw(self, id: str, name: str | None = None) -> _Names:
        """Its numbers in the cases of an id."""
        return (_FineNames if self.name == "fine" else _Names)(id, name or self.name)

    @property
    def scalars(self) -> dict[str, Any]:
        return _scalars(self.sizes[-1], self.alpha, rslora=self.rslora)

    def drawn(self, draw: _Names) -> dict[str, Array]:
        """x, W0, A, B and b."""
        N, T, n_in, n_out, r = self.sizes
        tensors = {
            "x": draw("x", N, T, n_in), "W0": draw("W0", n_out, n_in), "A": draw("A", r, n_in),
            "B": draw("B", n_out, r),
        }  # fmt: skip
        return {**tensors, "b": draw("b", n_out)} if self.bias else tensors


_SHAPES = {
    shape.name: shape
    for shape in (
        _Shape("plain", "No bias, no dropout", (2, 3, 6, 5, 2), 6.0, bias=False),
        _Shape("bias", "With a bias", (2, 3, 6, 5, 2), 6.0),
        _Shape("dropout", "With dropout, the mask given", (2, 3, 6, 5, 2), 6.0, bias=False, dropout=True),
        _Shape("bias-dropout", "With a bias and dropout", (2, 3, 7, 4, 3), 6.0, dropout=True),
        _Shape("square", "in = out, where a transpose goes unseen", (2, 3, 5, 5, 2), 6.0),
        _Shape("rslora", "Rank-stabilised: s = alpha / sqrt(r)", (2, 3, 6, 5, 3), 6.0, rslora=True),
        _Shape("rank-1", "r = 1", (2, 3, 6, 5, 1), 3.0),
        _Shape("rank-full", "r = min(in, out)", (2, 3, 6, 5, 5), 3.0),
        _Shape("alpha-0", "alpha = 0: the base alone", (2, 3, 6, 5, 2), 0.0),
        _Shape("one-token", "N = T = 1", (1, 1, 6, 5, 2), 6.0),
        _Shape("wide", "in = 96: sums are long", (1, 3, 96, 4, 4), 2.0),
        _Shape("fine", _FINE, (2, 3, 6, 5, 2), 6.0, bias=False, since="v2"),
    )
}


def _lora() -> Iterator[Case]:
    for name in ("plain", "square", "rslora", "rank-1", "rank-full", "alpha-0", "fine"):
        shape = _SHAPES[name]
        pair = {n: a for n, a in shape.drawn(shape.draw("L1")).items() if n in ("A", "B")}
        yield Case("L1", name, "lora_update", shape.title, shape.scalars, pair, since=shape.since)
    for shape in _SHAPES.values():
        yield _lora_linear("L2", shape)
        yield _lora_linear("L4", shape)
    for name in ("bias", "one-token", "fine"):
        yield _lora_start(_SHAPES[name])
    yield _lora_embedding()
    yield from _merges()
    for times in (1, 3):
        draw = _Names("L6", f"times-{times}")
        inputs = {"W0": draw("W0", 6, 8), "A": draw("A", 3, 8), "B": draw("B", 6, 3)}
        title = "Nothing of W0 is lost, though s = 5/3 rounds in the sum"
        yield Case("L6", f"times-{times}", "unmerge", title, _scalars(3, 5.0, times=times), inputs)
    yield from _many_adapters()
    yield from _segments()
    yield from _variants()
    yield from _four_bits()
    yield from _counts()


def _lora_linear(id: str, shape: _Shape) -> Case:
    (N, T, n_in, n_out, _), draw = shape.sizes, shape.draw(id)
    inputs, scalars = shape.drawn(draw), shape.scalars
    if shape.dropout:
        inputs["keep"] = draw.keep("keep", N, T, n_in)
        scalars["p"] = 0.25
    if id == "L2":
        return Case(id, shape.name, "lora_linear", shape.title, scalars, inputs, since=shape.since)
    inputs["dh"] = draw("dh", N, T, n_out)
    return Case(id, shape.name, "lora_linear", shape.title, scalars, inputs, ("x", "A", "B"), shape.since)


def _lora_start(shape: _Shape) -> Case:
    (N, T, _, n_out, r), draw = shape.sizes, shape.draw("L3")
    inputs = {**shape.drawn(draw), "B": np.zeros((n_out, r)), "dh": draw("dh", N, T, n_out)}
    inputs["b"] = _Names("L3", shape.name)("b", n_out)  # what is added is not rounded by TF32
    title = f"{shape.title}. h is the base's, with no tolerance; dA = 0 exactly, dB is not"
    return Case("L3", shape.name, "lora_start", title, shape.scalars, inputs, ("x", "A", "B"), shape.since)


def _lora_embedding() -> Case:
    draw = _Names("L4", "embedding")
    inputs = {
        "tokens": draw.integers("tokens", 2, 4, low=0, high=4), "E": draw("E", 5, 4), "A": draw("A", 3, 5),
        "B": draw("B", 4, 3), "dh": draw("dh", 2, 4, 4),
    }  # fmt: skip
    return Case("L4", "embedding", "lora_embedding", "A look-up", _scalars(3, 2.0), inputs, ("A", "B"))


def _merges() -> Iterator[Case]:
    """W0 in multiples of 2^-7, which bfloat16 has exactly."""
    everywhere = ("square", "wide")
    for dtype, names in (
        ("float32", ("square", "rslora", "rank-1", "rank-full", "alpha-0")), ("float16", everywhere),
        ("bfloat16", everywhere),
    ):  # fmt: skip
        for name in names:
            shape, draw = _SHAPES[name], _Names("L5", f"{dtype}-{name}")
            _, _, n_in, n_out, _ = shape.sizes
            inputs = {**shape.drawn(draw), "W0": draw("W0", n_out, n_in, unit=2.0**-7)}
            title = f"W0 in {dtype}. {shape.title}"
            yield Case("L5", f"{dtype}-{name}", "merge", title, {**shape.scalars, "dtype": dtype}, inputs)
    shape = _SHAPES["fine"]
    inputs, scalars = shape.drawn(shape.draw("L5", "float32-fine")), {**shape.scalars, "dtype": "float32"}
    yield Case("L5", "float32-fine", "merge", f"W0 in float32. {shape.title}", scalars, inputs, since=shape.since)


def _many_adapters() -> Iterator[Case]:
    draw = _Names("L7", "per-row")
    ranks = (1, 3)
    adapters = [_scalars(1, 2.0), _scalars(3, 4.0, rslora=True)]
    inputs = {
        "x": draw("x", 4, 2, 6), "W0": draw("W0", 5, 6), "b": draw("b", 5), "rows": np.array([1, -1, 0, 1]),
        **{f"A{i}": draw(f"A{i}", r, 6) for i, r in enumerate(ranks)},
        **{f"B{i}": draw(f"B{i}", 5, r) for i, r in enumerate(ranks)},
    }  # fmt: skip
    yield Case("L7", "per-row", "per_row", "Two adapters of different ranks, and none", {"adapters": adapters}, inputs)
    draw = _FineNames("L7", "fine")
    products = {n: draw(n, *a.shape) for n, a in inputs.items() if n not in ("b", "rows")}
    yield Case("L7", "fine", "per_row", _FINE, {"adapters": adapters}, {**inputs, **products}, since="v2")
    for only, i in (("first", 0), ("second", 1)):
        one = {**inputs, "rows": np.full(4, i)}
        yield Case("L7", f"switched-{only}", "per_row", f"Switched: the {only} alone", {"adapters": adapters}, one)
    for name, title, rank in (
        ("sum", "The whole sum", None), ("rank-2", "Truncated to rank 2", 2), ("rank-1", "Truncated to rank 1", 1),
        ("fine", _FINE, None),
    ):  # fmt: skip
        draw = (_FineNames if name == "fine" else _Names)("L9", name)
        parts = [{**_scalars(2, 3.0), "w": 0.75}, {**_scalars(3, 6.0, rslora=True), "w": -0.5}]
        factors = {f"A{i}": draw(f"A{i}", p["r"], 6) for i, p in enumerate(parts)}
        factors |= {f"B{i}": draw(f"B{i}", 5, p["r"]) for i, p in enumerate(parts)}
        since = "v2" if name == "fine" else "v1"
        yield Case("L9", name, "combine", title, {"adapters": parts, "rank": rank}, factors, since=since)


RANKS = (1, 8, 24, 32, 64)


def _segments() -> Iterator[Case]:
    """L7 as kernels compute it that serve many adapters at once: a number of an adapter for each row."""
    for M in (1, 17, 130):
        draw = _Names("L7", f"segments-{M}")
        index = draw.integers("index", M, low=-1, high=len(RANKS) - 1)
        if M == 1:
            index[0] = 2
        A, B = draw("A", len(RANKS), max(RANKS), 16), draw("B", len(RANKS), 8, max(RANKS))
        for i, r in enumerate(RANKS):
            A[i, r:], B[i, :, r:] = np.nan, np.nan
        inputs = {"x": draw("x", M, 16), "y": draw("y", M, 12), "index": index, "A": A, "B": B}
        scalars = {"adapters": [_scalars(r, 4.0, rslora=r == 24) for r in RANKS], "start": 3}
        title = f"{M} rows, five adapters of ranks 1 to 64 and none, unsorted, added into columns 3 to 10 of 12"
        yield Case("L7", f"segments-{M}", "segments", title, scalars, inputs, since="v2")


def _variants() -> Iterator[Case]:
    """L10: what is trained beside A and B; L12: another start."""
    for name in ("bias", "dropout", "bias-dropout", "square", "rslora", "rank-full", "one-token", "wide"):
        case, draw = _lora_linear("L10", _SHAPES[name]), _Names("L10", name)
        n_out = len(case.inputs["W0"])
        inputs = {**case.inputs, "m": draw("m", n_out, low=0.5, high=2.0)}
        if "dh" not in inputs:
            inputs["dh"] = draw("dh", *inputs["x"].shape[:2], n_out)
        yield case._replace(operation="dora_linear", inputs=inputs, gradients=("x", "A", "B", "m"), since="v2")
    embedding, draw = _lora_embedding(), _Names("L10", "embedding")
    inputs = {**embedding.inputs, "m": draw("m", 4, low=0.5, high=2.0)}
    yield embedding._replace(id="L10", operation="dora_embedding", inputs=inputs, gradients=("A", "B", "m"), since="v2")
    for name in ("square", "rslora"):
        shape, draw = _SHAPES[name], _Names("L10", f"merge-{name}")
        inputs = {n: a for n, a in shape.drawn(draw).items() if n in ("W0", "A", "B")}
        inputs["m"] = draw("m", len(inputs["W0"]), low=0.5, high=2.0)
        yield Case("L10", f"merge-{name}", "dora_merge", shape.title, shape.scalars, inputs, since="v2")
    for name, r, rslora in (("rank-2", 2, False), ("rslora", 3, True)):
        draw = _Names("L12", name)
        title = f"r = {r}: its leading directions, and the rest"
        yield Case("L12", name, "pissa", title, _scalars(r, 3.0, rslora=rslora), {"W0": draw("W0", 7, 6)}, since="v2")
    draw = _Names("L12", "converted")
    parts = [{**_scalars(2, 3.0), "w": 1.0}, {**_scalars(2, 3.0), "w": -1.0}]
    inputs = {f"{a}{i}": draw(f"{a}{i}", *shape) for i in (0, 1) for a, shape in (("A", (2, 6)), ("B", (5, 2)))}
    title = "Plain LoRA of the first base: what was trained less the start"
    yield Case("L12", "converted", "combine", title, {"adapters": parts, "rank": None}, inputs, since="v2")


def _four_bits() -> Iterator[Case]:
    """L11. Maxima are few numbers, and others at most half as large, so that no two neighbours are equally near."""
    tables = {"levels": LEVELS.astype(np.float64), "map": DYNAMIC.astype(np.float64)}
    for name, title, n_out, n_in, block, double in (
        ("whole", "Each row is one block; one is of zeros", 4, 64, 64, False),
        ("across", "Blocks go on over the ends of rows, and the last is shorter", 5, 48, 64, False),
        ("double", "Maxima are quantised too", 9, 32, 32, True),
        ("many", "257 maxima are two groups", 257, 32, 32, True),
    ):
        draw, n_blocks = _Names("L11", name), -(-n_out * n_in // block)
        scalars = {"block": block, "out": n_out, "in": n_in}
        used = {n: a for n, a in tables.items() if double or n != "map"}
        largest = draw.integers("largest", n_blocks, low=5, high=12) * 0.125
        absmax: dict[str, Array] = {"absmax": largest}
        if double:
            absmax = {"absmax": draw.integers("absmax", n_blocks, low=0, high=255), "offset": np.array(0.75)}
            absmax["outer"] = draw("outer", -(-n_blocks // 256), low=0.25, high=0.5)
        held = {"codes": draw.integers("codes", n_out * n_in // 2, low=0, high=255), **absmax, **used}
        yield Case("L11", f"dequantise-{name}", "dequantise_nf4", title, scalars, held, since="v2")
        if name == "many":
            continue
        w = draw("W", n_out * n_in, low=-0.5, high=0.5)
        w[::block] = largest * (2 * draw.integers("sign", n_blocks, low=0, high=1) - 1)
        w[:block] *= double
        inputs = {"W": w.reshape(n_out, n_in), **used}
        yield Case("L11", f"quantise-{name}", "quantise_nf4", title, scalars, inputs, since="v2")
        x, dh, b = draw("x", 2, 3, n_in), draw("dh", 2, 3, n_out), draw("b", n_out)
        inputs = {"x": x, **held, "A": draw("A", 2, n_in), "B": draw("B", n_out, 2), "b": b, "dh": dh}
        scalars = {**_scalars(2, 3.0), **scalars}
        yield Case("L11", f"linear-{name}", "nf4_linear", title, scalars, inputs, ("x", "A", "B"), "v2")


def _counts() -> Iterator[Case]:
    for preset, targets, r in (
        ("gpt3-175b", ("q", "v"), 1), ("gpt3-175b", ("q", "v"), 8), ("roberta-base", ("q", "v"), 8),
        ("deberta-v2-xxlarge", ("q", "v"), 16), ("gpt2", ("q", "k", "v", "o", "up", "down"), 4),
        ("smollm2-135m", ("k", "gate", "down"), 8),
    ):  # fmt: skip
        config = PRESETS[preset]
        shapes = [config.matrix_shapes()[f"layers.0.{'attn' if t in 'qkvo' else 'mlp'}.{t}"] for t in targets]
        inputs = {
            "matrices": np.full(len(targets), config.n_layer), "out": np.array([n for n, _ in shapes]),
            "in": np.array([n for _, n in shapes]), "r": np.full(len(targets), r),
        }  # fmt: skip
        scalars = {"preset": preset, "targets": list(targets), "r": r}
        yield Case("L8", f"{preset}-{'-'.join(targets)}-{r}", "count", f"{preset}, r = {r}", scalars, inputs)


# --- T1 to T12, T15: primitives -------------------------------------------------------------------------------------


def _primitives() -> Iterator[Case]:
    yield from _embeddings()
    yield from _linears()
    yield from _norms()
    yield from _activations()
    yield from _softmaxes()
    yield from _attentions()
    yield from _rotaries()
    yield from _by_place()
    draw = _Names("T12", "given")
    inputs = {"x": draw("x", 2, 3, 4), "keep": draw.keep("keep", 2, 3, 4), "dy": draw("dy", 2, 3, 4)}
    yield Case("T12", "given", "dropout", "p = 1/4", {"p": 0.25}, inputs, ("x",))
    yield Case("T12", "tenth", "dropout", "p = 0.1, which no float has", {"p": 0.1}, inputs, ("x",))
    yield from _losses("T15")


def _embeddings() -> Iterator[Case]:
    for name, title, T, extra in (
        ("tokens", "Tokens alone, some of them twice", 4, ()), ("all", "Tokens, positions and types", 4, (1, 2)),
        ("one-token", "T = 1", 1, (1,)), ("scaled", "Tokens times sqrt(3), positions not", 4, (1,)),
        ("fine", "Inputs of 24 bits: float32's sums show where float64 is said", 4, (1, 2)),
    ):  # fmt: skip
        draw = (_FineNames if name == "fine" else _Names)("T1", name)
        inputs = {"tokens": draw.integers("tokens", 2, T, low=0, high=4), "tokens_table": draw("tokens_table", 5, 3)}
        if 1 in extra:
            inputs |= {"positions": np.arange(2, T + 2), "positions_table": draw("positions_table", 7, 3)}
        if 2 in extra:
            inputs |= {"types": draw.integers("types", 2, T, low=0, high=1), "types_table": draw("types_table", 2, 3)}
        inputs["dx"] = draw("dx", 2, T, 3)
        tables = tuple(n for n in inputs if n.endswith("_table"))
        scalars = {"scale": 3**0.5} if name == "scaled" else {}
        yield Case("T1", name, "embedding", title, scalars, inputs, tables, "v2" if name == "fine" else "v1")


def _linears() -> Iterator[Case]:
    for name, title, T, n_in, bias in (
        ("plain", "No bias", 3, 6, False), ("bias", "With a bias", 3, 6, True), ("one-token", "T = 1", 1, 6, True),
        ("wide", "in = 96: sums are long", 2, 96, True), ("fine", _FINE, 3, 6, False),
    ):  # fmt: skip
        draw = (_FineNames if name == "fine" else _Names)("T2", name)
        inputs = {"x": draw("x", 2, T, n_in), "W": draw("W", 4, n_in), "dy": draw("dy", 2, T, 4)}
        if bias:
            inputs["b"] = draw("b", 4)
        gradients = ("x", "W", *(("b",) if bias else ()))
        yield Case("T2", name, "linear", title, {}, inputs, gradients, "v2" if name == "fine" else "v1")


def _norms() -> Iterator[Case]:
    for id, operation in (("T3", "layer_norm"), ("T4", "rms_norm")):
        for name, title, T, eps in (
            ("plain", "eps = 1e-5", 3, 1e-5), ("one-token", "T = 1, eps = 1e-12", 1, 1e-12),
            ("eps-large", "eps = 1/4: where it stands shows", 3, 0.25),
            ("far", "x near 8: the variance as E(x^2) - mean^2 cancels", 3, 1e-5),
            ("constant", "A row of equal numbers: eps alone is under the root", 2, 1e-2),
        ):  # fmt: skip
            draw = _Names(id, name)
            x = draw("x", 2, T, 6)
            if name == "far":
                x = x + 8
            if name == "constant":
                x[0] = 0.0 if id == "T4" else 0.5
            inputs = {"x": x, "w": draw("w", 6, low=0.5, high=1.5), "dy": draw("dy", 2, T, 6)}
            if id == "T3":
                inputs["b"] = draw("b", 6)
            gradients = ("x", "w", *(("b",) if id == "T3" else ()))
            yield Case(id, name, operation, title, {"eps": eps}, inputs, gradients)
    draw = _Names("T4", "one-plus")
    inputs = {"x": draw("x", 2, 3, 6), "w": draw("w", 6, low=-0.5, high=0.5), "dy": draw("dy", 2, 3, 6)}
    title = "1 + w in the place of w"
    yield Case("T4", "one-plus", "rms_norm", title, {"eps": 1e-5, "one_plus": True}, inputs, ("x", "w"))


def _activations() -> Iterator[Case]:
    for id, operation in (("T5", "gelu"), ("T6", "gelu_tanh"), ("T7", "silu"), ("T7", "relu")):
        for name, title, limit in (("near", "-2 to 2", 2.0), ("far", "-12 to 12", 12.0)):
            draw = _Names(id, f"{operation}-{name}")
            x = draw("x", 24, low=-limit, high=limit)
            x[:3] = 0.0, limit, -limit
            inputs = {"x": x, "dy": draw("dy", 24)}
            yield Case(id, f"{operation}-{name}", operation, title, {}, inputs, ("x",))
    for name, T, activation in (
        ("mlp", 3, None), ("mlp-one-token", 1, None), ("mlp-gelu-tanh", 3, "gelu_tanh"), ("mlp-fine", 3, None),
    ):  # fmt: skip
        draw = (_FineNames if name == "mlp-fine" else _Names)("T7", name)
        inputs = {
            "x": draw("x", 2, T, 4), "W_gate": draw("W_gate", 6, 4), "W_up": draw("W_up", 6, 4),
            "W_down": draw("W_down", 4, 6), "dy": draw("dy", 2, T, 4),
        }  # fmt: skip
        title, scalars = (f"T = {T}", {}) if activation is None else ("Gated by GELU", {"activation": activation})
        title, since = (_FINE, "v2") if name == "mlp-fine" else (title, "v1")
        yield Case("T7", name, "gated_mlp", title, scalars, inputs, ("x", "W_gate", "W_up", "W_down"), since)


# Of what an exponential is taken of. -64 to 0 is 65,536 values: no more are drawn.
_NEAR, _BELOW = {"low": -2.0, "high": 2.0}, {"low": -64.0, "high": -UNIT}
_FAR = {"low": -100.0, "high": 100.0, "unit": 2.0**-7}


def _softmaxes() -> Iterator[Case]:
    shape = (4, 6)
    masked = np.ones(shape, dtype=bool)
    masked[0, 3:] = masked[1, :2] = False
    one, none = np.eye(*shape, k=1, dtype=bool), np.ones(shape, dtype=bool)
    none[2] = False
    for name, title, limits, mask in (
        ("plain", "All seen", _NEAR, np.ones(shape, dtype=bool)), ("far", "-64 to 0", _BELOW, None),
        ("masked", "Some masked", _NEAR, masked), ("one-seen", "All masked but one", _NEAR, one),
        ("none-seen", "A row of nothing", _NEAR, none),
    ):  # fmt: skip
        draw = _Names("T8", name)
        inputs = {"x": draw("x", *shape, **limits), "dp": draw("dp", *shape)}
        inputs["mask"] = np.ones(shape, dtype=bool) if mask is None else mask
        yield Case("T8", name, "softmax", title, {}, inputs, ("x",))
    yield from _far_softmaxes(shape)
    draw = _Names("T8", "one")
    inputs = {"x": draw("x", 3, 1), "dp": draw("dp", 3, 1), "mask": np.ones((3, 1), dtype=bool)}
    yield Case("T8", "one", "softmax", "One place: p = 1, and no gradient", {}, inputs, ("x",))


def _far_softmaxes(shape: tuple[int, int]) -> Iterator[Case]:
    everywhere, row = np.ones(shape, dtype=bool), np.arange(shape[0])
    for name, title, limits, largest in (
        ("hundred", "-100 to 100: exp alone overflows", _FAR, 100.0),
        (
            "all-below",
            "-204 to -104: exp alone underflows, and leaves 0 / 0",
            {"low": -204.0, "high": -104.0, "unit": 2.0**-7},
            None,
        ),
        ("largest-masked", "The largest is masked, and 150 above the others", {**_FAR, "high": -50.0}, 100.0),
    ):
        draw, mask = _Names("T8", name), everywhere.copy()
        x = draw("x", *shape, **limits)
        if largest is not None:
            x[row, row], x[row, row + 1] = largest, largest - 0.75 if name == "hundred" else x[row, row + 1]
            mask[row, row] = name != "largest-masked"
        inputs = {"x": x, "dp": draw("dp", *shape), "mask": mask}
        yield Case("T8", name, "softmax", title, {}, inputs, ("x",), since="v2")


def _attentions() -> Iterator[Case]:
    padded = np.ones((2, 4), dtype=bool)
    padded[0, :2] = padded[1, 3:] = False
    one = np.zeros((2, 4), dtype=bool)
    one[0, 0] = one[1, 1] = True
    # name, title; H, G, T, S; causal, mask; a window, another scale
    for id, name, title, (H, G, T, S), causal, mask, *place in (
        ("T9", "causal", "Each query sees what stands before it", (2, 2, 4, 4), True, None),
        ("T9", "bidirectional", "All see all", (2, 2, 4, 4), False, None),
        ("T9", "padded", "Padding on the left, and on the right", (2, 2, 4, 4), False, padded),
        ("T9", "causal-padded", "Causal, and padded on the right", (2, 2, 4, 4), True, np.roll(padded, 2, axis=1)),
        ("T9", "one-seen", "All masked but one", (2, 2, 4, 4), False, one),
        ("T9", "none-seen", "Causal behind padding on the left: some queries see nothing", (2, 2, 4, 4), True, padded),
        ("T9", "one-token", "T = 1", (2, 2, 1, 1), True, None),
        ("T9", "cached", "Two queries at the end of four keys", (2, 2, 2, 4), True, None),
        ("T9", "window", "A window of two keys", (2, 2, 5, 5), True, None, 2),
        ("T9", "window-cached", "A window of two, two queries at the end of five keys", (2, 2, 2, 5), True, None, 2),
        ("T9", "scaled", "Scores times 3/4", (2, 2, 4, 4), True, None, None, 0.75),
        ("T9", "far", "Scores near 110: exp alone overflows", (2, 2, 4, 4), True, None),
        ("T9", "fine", _FINE, (2, 2, 4, 4), True, None),
        ("T10", "causal", "Four query heads, two key/value heads", (4, 2, 4, 4), True, None),
        ("T10", "one-group", "Four query heads, one key/value head", (4, 1, 3, 3), False, None),
        ("T10", "padded", "Grouped and padded", (4, 2, 4, 4), False, padded),
    ):  # fmt: skip
        draw, K = (_FineNames if name == "fine" else _Names)(id, name), 3
        of_q, of_k = ({"low": 6.0, "high": 8.0}, {"low": 8.5, "high": 9.5}) if name == "far" else (_NEAR, _NEAR)
        inputs = {
            "q": draw("q", 2, H, T, K, **of_q), "k": draw("k", 2, G, S, K, **of_k),
            "v": draw("v", 2, G, S, K), "dy": draw("dy", 2, H, T, K),
        }  # fmt: skip
        if mask is not None:
            inputs["mask"] = mask
        by_place = {n: value for n, value in zip(("window", "scale"), place, strict=False) if value is not None}
        scalars, since = {"causal": causal, **by_place}, "v2" if name in ("far", "fine") else "v1"
        yield Case(id, name, "attention", title, scalars, inputs, ("q", "k", "v"), since=since)


def _rotaries() -> Iterator[Case]:
    by_row = np.array([[0, 0, 1, 2], [0, 1, 2, 3]])
    for name, title, positions, K, theta in (
        ("plain", "Positions 0 to 3", np.arange(4), 6, 10000.0),
        ("far", "Positions from 1000", np.arange(1000, 1004), 6, 10000.0),
        ("rows", "Positions that differ by row, as padding on the left makes them", by_row, 6, 10000.0),
        ("theta", "theta = 100000", np.arange(4), 8, 100000.0),
        ("pair", "K = 2", np.arange(4), 2, 10000.0),
    ):  # fmt: skip
        draw = _Names("T11", name)
        inputs = {"x": draw("x", 2, 2, 4, K), "positions": positions, "dy": draw("dy", 2, 2, 4, K)}
        yield Case("T11", name, "rotary", title, {"theta": theta}, inputs, ("x",))
    llama3 = llama3_factors(6, 100.0, factor=8.0, low=1.0, high=4.0, original=64)
    for name, title, K, scalars in (
        ("first-p", "The first 4 of 6", 6, {"width": 4}),
        ("linear", "Every frequency over 4", 6, {"factors": [4.0]}),
        ("llama3", "Llama 3's factors for theta = 100, 8 times 64 tokens", 6, {"factors": list(llama3)}),
    ):  # fmt: skip
        draw = _Names("T11", name)
        inputs = {"x": draw("x", 2, 2, 4, K), "positions": np.arange(2, 6), "dy": draw("dy", 2, 2, 4, K)}
        yield Case("T11", name, "rotary", title, {"theta": 100.0, **scalars}, inputs, ("x",))


def _by_place() -> Iterator[Case]:
    """T17 to T20."""
    for name, title, H, K, eps in (
        ("plain", "Two heads of four", 2, 4, 1e-5), ("eps-large", "eps = 1/4: where it stands shows", 3, 2, 0.25),
    ):  # fmt: skip
        draw = _Names("T17", name)
        inputs = {
            "x": draw("x", 2, H, 4, K), "w": draw("w", K, low=0.5, high=1.5), "positions": np.arange(1, 5),
            "dy": draw("dy", 2, H, 4, K),
        }  # fmt: skip
        yield Case("T17", name, "head_norm", title, {"eps": eps, "theta": 100.0}, inputs, ("x", "w"))
    for name, title, T, B, last, causal in (
        ("causal", "Causal: distances beyond the last bucket", 24, 8, 16, True),
        ("both", "Both sides: distances beyond the last bucket", 24, 8, 16, False),
        ("short", "Shorter than the buckets that are of one distance each", 3, 8, 16, False),
    ):  # fmt: skip
        draw = _Names("T18", name)
        inputs = {"table": draw("table", B, 2), "db": draw("db", 2, T, T)}
        yield Case("T18", name, "score_bias", title, {"T": T, "causal": causal, "last": last}, inputs, ("table",))
    for name, title, T, B in (
        ("far", "Distances beyond the last bucket", 20, 8), ("near", "Shorter than the buckets of one distance", 3, 8),
    ):  # fmt: skip
        draw = _Names("T19", name)
        inputs = {n: draw(n, 2, 2, T, 3) for n in ("q", "k")} | {n: draw(n, 2, 2 * B, 3) for n in ("q_far", "k_far")}
        inputs["dz"] = draw("dz", 2, 2, T, T)
        yield Case("T19", name, "disentangled", title, {"last": 16}, inputs, ("q", "k", "q_far", "k_far"))
    for name, title, padded in (("plain", "Nothing is padding", False), ("padded", "Both sides are padded", True)):
        draw = _Names("T20", name)
        inputs = {"x": draw("x", 2, 4, 4), "X": draw("X", 2, 4, 4), "dy": draw("dy", 2, 4, 4)}
        inputs |= {f"W_{one}": draw(f"W_{one}", 4, 4) for one in "qkvo"}
        if padded:
            inputs["mask"], inputs["source_mask"] = (np.ones((2, 4), dtype=bool) for _ in range(2))
            inputs["mask"][0, 2:] = inputs["source_mask"][0, 3:] = inputs["source_mask"][1, :2] = False
        gradients = ("x", "X", "W_q", "W_k", "W_v", "W_o")
        yield Case("T20", name, "cross_attention", title, {"n_head": 2}, inputs, gradients)


def _losses(id: str, **scalars: Any) -> Iterator[Case]:
    for name, title, limits, targets in (
        ("plain", "Every target counts", _NEAR, [1, 0, 4, 2, 2]),
        ("left-out", "Two targets are left out", _NEAR, [1, IGNORED, 4, IGNORED, 2]),
        ("one-counted", "All are left out but one", _NEAR, [IGNORED, IGNORED, 3, IGNORED, IGNORED]),
        ("far", "-64 to 0", _BELOW, [1, 0, 4, 2, 2]),
    ):
        draw = _Names(id, name)
        inputs = {"logits": draw("logits", 5, 5, **limits), "targets": np.array(targets)}
        yield Case(id, name, "cross_entropy", title, scalars, inputs, ("logits",))
    for name, title, at_target in (
        ("hundred", "-100 to 100, the target near the largest: exp alone overflows", 99.25),
        ("target-below", "The target is 200 below the largest: its softmax is 0 in float32", -100.0),
    ):
        draw, row = _Names(id, name), np.arange(5)
        inputs = {"logits": draw("logits", 5, 5, **_FAR), "targets": (row + 1) % 5}
        inputs["logits"][row, row], inputs["logits"][row, inputs["targets"]] = 100.0, at_target
        yield Case(id, name, "cross_entropy", title, scalars, inputs, ("logits",), since="v2")


# --- T13, T14, T16, and LoRA in whole models ------------------------------------------------------------------------


def _config(name: str, **fields: Any) -> Config:
    """One of the small architectures of the gradient check, smaller still."""
    size = {"vocab_size": 7, "n_positions": 8, "n_layer": 1, "n_head": 2, "d_model": 4, "d_ff": 6, "rope_theta": 100.0}
    config = replace(architectures()[name], **size | fields)
    return replace(config, n_kv_head=config.kv_heads)


# Said of every architecture, whatever their defaults.
_SAID = (
    "norm", "norm_first", "positions", "activation", "causal", "tie_head", "head", "eps", "rope_theta", "n_types",
    "position_offset", "bias",
)  # fmt: skip


def _fields(config: Config) -> dict[str, Any]:
    """An architecture as scalars. Of other fields those at their default are left out: a new one changes no case."""
    defaults = {field.name: field.default for field in fields(config)}
    return {name: value for name, value in vars(config).items() if name in _SAID or value != defaults[name]}


def _weight(draw: _Names, name: str, shape: tuple[int, ...]) -> Array:
    if "norm" in name and name.endswith("weight"):
        return draw(name, *shape, low=0.5, high=1.5)
    return draw(name, *shape, low=-0.75, high=0.75)


def _batch(
    draw: _Names, config: Config, N: int, T: int, *, padded: bool, tokens: Array | None = None
) -> dict[str, Array]:  # fmt: skip
    drawn = draw.integers("tokens", N, T, low=0, high=config.vocab_size - 1)
    batch: dict[str, Array] = {"tokens": drawn if tokens is None else tokens}
    places = (N,) if config.head == "classify" else (N, T)
    batch["targets"] = draw.integers("targets", *places, low=0, high=config.head_size - 1)
    if config.head != "classify":
        batch["targets"][0, -1] = IGNORED
    if padded:
        batch["mask"] = np.ones((N, T), dtype=bool)
        batch["mask"][0, : T // 2] = batch["mask"][-1, -1] = False
        if config.head != "classify":
            batch["targets"][~batch["mask"]] = IGNORED
    if config.n_types:
        batch["token_types"] = draw.integers("token_types", N, T, low=0, high=config.n_types - 1)
    return batch


def _model_case(
    id: str, name: str, title: str, config: Config, lora: LoRAConfig | None = None, *, T: int = 4, padded: bool = False,
    tokens: Array | None = None, since: str = "v1", **scalars: Any,
) -> Case:  # fmt: skip
    draw = _Names(id, name)
    inputs = _batch(draw, config, 2, T, padded=padded, tokens=tokens)
    weights = {weight: _weight(draw, weight, shape) for weight, shape in config.weight_shapes().items()}
    trained: tuple[str, ...] = tuple(weights)
    if lora is not None:
        start = init_adapter(Model(config, init_weights(config, seed=0)), lora, seed=0).params
        trained = (*start, *(n for n in weights if ".prefix." in n))
        whole = [n for n in trained if n in weights]
        weights |= {n: _weight(draw, n, a.shape) for n, a in start.items() if n not in weights}
        scalars |= {"r": lora.r, "alpha": lora.alpha, "rslora": lora.rslora, "trained_whole": whole}
        scalars["adapted"] = list(lora.targets)
        scalars |= {"rank_pattern": lora.rank_pattern} if lora.rank_pattern else {}
    return Case(id, name, "model", title, {**_fields(config), **scalars}, {**weights, **inputs}, trained, since)


def _models() -> Iterator[Case]:
    gpt2, bert, llama = (_config(f"{n}") for n in ("GPT-2, language model", "BERT, tagger", "Llama, tied"))
    llama = replace(llama, n_kv_head=1)
    for name, lora, config in (
        ("model-q-v", LoRAConfig(r=3, alpha=2, targets=("q", "v")), gpt2),
        ("model-every-matrix", LoRAConfig(r=1, alpha=2, targets=("q", "k", "v", "o", "up", "gate", "down", "head")),
         llama),
        ("model-fused-qkv", LoRAConfig(r=3, alpha=2, targets=("qkv",), rslora=True), gpt2),
        ("model-biases", LoRAConfig(r=3, alpha=2, targets=("q", "v"), bias="lora_only"), bert),
    ):  # fmt: skip
        title = f"LoRA on {' '.join(lora.targets)} of a whole model: gradients by what is trained alone"
        yield _model_case("L4", name, title, config, lora)
    lora = LoRAConfig(r=2, alpha=3, targets=("q", "v"))
    for name, title, config, padded in (
        ("model-prefix", "Two keys and values before the text's, trained beside A and B", gpt2, False),
        ("model-prefix-padded", "The same, padded, with rotary positions, of which it has none", llama, True),
    ):
        yield _model_case("T9", name, title, replace(config, prefix=2), lora, padded=padded)
    for name, title, config, T, padded in (
        ("pre-norm", "Pre-norm, layer norm, learned positions, GELU by tanh: GPT-2", gpt2, 4, False),
        ("pre-norm-two", "Two such layers, padded on both sides", replace(gpt2, n_layer=2), 4, True),
        ("pre-norm-rms", "Pre-norm, RMS norm, rotary, gated, grouped heads: Llama", llama, 4, False),
        ("pre-norm-rms-padded", "The same, padded: rotary positions count true tokens", llama, 4, True),
        ("post-norm", "Post-norm, GELU, both directions, token types: BERT", bert, 4, False),
        ("post-norm-padded", "The same, padded", bert, 4, True),
        ("one-token", "T = 1", gpt2, 1, False),
        ("both-sides", "A norm before and one after each half", replace(llama, norm_outputs=True), 4, False),
        ("post-norm-both", "Post-norm, and one more inside", replace(bert, norm_outputs=True), 4, False),
    ):
        yield _model_case("T13", name, title, config, T=T, padded=padded)
    for name, title, config, padded in (
        ("tied", "Language model, its head the token table", gpt2, False),
        ("untied", "Language model with a head of its own", replace(gpt2, tie_head=False), False),
        ("classifier-last", "A causal classifier reads the last true token", _config("GPT-2, classifier"), True),
        ("classifier-first", "Another reads the first, through the pooler", _config("BERT, classifier"), True),
        ("tagger", "A tagger: a label each token", _config("BERT, tagger"), False),
        ("tied-scaled", "Tied, its states times 1/2", replace(gpt2, head_scale=0.5), False),
        ("pooler-relu", "A pooler of ReLU", replace(_config("BERT, classifier"), pooler="relu"), False),
        ("pooler-gelu", "A pooler of GELU", replace(_config("BERT, classifier"), pooler="gelu"), False),
    ):
        yield _model_case("T14", name, title, config, padded=padded)
    tokens = np.array([[1, 0, 5, 3], [2, 6, 4, 1]])
    title = "A causal classifier reads the last true token, and no two tokens of a text are the same"
    config = _config("GPT-2, classifier")
    yield _model_case("T14", "classifier-last-differs", title, config, padded=True, tokens=tokens, since="v2")
    title = "The first token's position is row 2, padded: RoBERTa"
    yield _model_case("T13", "position-offset", title, replace(bert, position_offset=2), padded=True, since="v2")
    yield from _second_llamas()
    yield from _merged_models(gpt2)
    yield from _generations(gpt2, llama)
    yield from _generations_with_logits(gpt2)


def _merged_models(gpt2: Config) -> Iterator[Case]:
    """L5 of whole models, in weights that every dtype has."""
    llama = replace(_second_llama(), tie_head=True, d_ff=6)
    for name, config, lora in (
        ("gpt2", gpt2, LoRAConfig(r=3, alpha=4, targets=("qkv", "down"), rslora=True)),
        ("llama", llama, LoRAConfig(r=2, alpha=3, targets=("q", "v", "gate", "head"), rank_pattern={"v": 1})),
    ):
        for dtype in ("float32", "float16", "bfloat16"):
            case = _model_case("L5", f"model-{name}-{dtype}", "", config, lora, since="v2")
            draw = _Names("L5", case.name)
            weights = {n: draw(n, *shape, unit=2.0**-7) for n, shape in config.weight_shapes().items()}
            factors = {n: a for n, a in case.inputs.items() if n.endswith((".A", ".B"))}
            unties = ", its head untied" if "head" in lora.targets else ""
            yield case._replace(
                operation="merge_model", title=f"A whole model in {dtype}{unties}", gradients=(),
                scalars={**case.scalars, "dtype": dtype}, inputs={**weights, **factors},
            )  # fmt: skip


def _second_llama() -> Config:
    """Two layers, and heads of four: pairs of rotary positions have a distance, theta shows, and a head a group."""
    return replace(
        _config("Llama, tied"), n_layer=2, n_head=4, n_kv_head=2, d_model=16, d_ff=8, rope_theta=5e5, tie_head=False
    )


def _second_llamas() -> Iterator[Case]:
    llama = _second_llama()
    title = "Two layers, K = 4, H = 4, G = 2, theta = 500000, padded"
    yield _model_case("T13", "llama-two", title, llama, padded=True, since="v2")
    every = ("q", "k", "v", "o", "up", "gate", "down")
    ranks = {"q": 1, "layers.1.mlp.down": 3}
    for name, title, lora in (
        ("model-ranks", "Two layers of a Llama, whose ranks differ by target, and one by layer",
         LoRAConfig(r=2, alpha=3, targets=every, rank_pattern=ranks)),
        ("model-ranks-rslora", "The same, rank-stabilised: each by its own rank",
         LoRAConfig(r=2, alpha=3, targets=("q", "v", "down"), rank_pattern=ranks, rslora=True)),
        ("model-fused-groups", "Two layers of a Llama, q, k, v fused: B has 4 heads' rows, then 2 and 2; theta = 100",
         LoRAConfig(r=2, alpha=3, targets=("qkv",))),
    ):  # fmt: skip
        config = replace(llama, rope_theta=100.0) if name == "model-fused-groups" else llama
        yield _model_case("L4", name, title, config, lora, since="v2")


def _generations(gpt2: Config, llama: Config) -> Iterator[Case]:
    for name, config in (("learned", gpt2), ("rotary", llama)):
        case = _model_case("T16", f"greedy-{name}", "Four tokens after each text", config)
        given = {n: a for n, a in case.inputs.items() if n != "targets"}
        yield case._replace(operation="generate", scalars={**case.scalars, "n": 4}, inputs=given, gradients=())
    for name, title, temperature, top_k, top_p in (
        ("sampled", "From all", 1.0, None, None), ("temperature", "At half the temperature", 0.5, None, None),
        ("top-k", "From the three likeliest", 1.0, 3, None), ("top-p", "From those that reach 0.7", 1.0, None, 0.7),
        ("both", "Cut to four, then to 0.8", 1.5, 4, 0.8),
    ):  # fmt: skip
        draw, scalars = _Names("T16", name), {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        inputs = {"logits": draw("logits", 8, 6, low=-2, high=2), "u": draw("u", 8, low=1 / 64, high=63 / 64)}
        yield Case("T16", name, "sample", title, scalars, inputs)
    for name, title, temperature, top_k, top_p in (
        ("draws", "64 draws: the temperature comes before top_p", 0.5, None, 0.7),
        ("draws-both", "64 draws, cut to five, then to 0.75, at one and a half times the temperature", 1.5, 5, 0.75),
    ):
        draw, scalars = _Names("T16", name), {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        inputs = {"logits": draw("logits", 64, 8, low=-2, high=2), "u": draw("u", 64, low=1 / 64, high=63 / 64)}
        yield Case("T16", name, "sample", title, scalars, inputs, since="v2")


def _generations_with_logits(gpt2: Config) -> Iterator[Case]:
    two, llama = replace(gpt2, n_layer=2, tie_head=False), _second_llama()
    left = np.array([[False, False, True, True], [True, True, True, True]])
    for name, title, config, mask in (
        ("logits-learned", "The logits that chose each token, beside it", two, None),
        ("logits-rotary", "The same, of a Llama of two layers", llama, None),
        ("left-padded-learned", "The first text is padded on the left: its first true token stands at 0", two, left),
        ("left-padded-rotary", "The same, of a Llama of two layers", llama, left),
    ):
        yield _generation(_model_case("T16", name, title, config, since="v2"), mask)
    draw = _Names("T16", "adapters")
    case = _model_case("T16", "adapters", "An adapter for each text, and none", two, since="v2")
    adapters = [{**_scalars(1, 2.0), "adapted": ["q", "v"]}, {**_scalars(3, 4.0, rslora=True), "adapted": ["o", "up"]}]
    start, inputs = Model(two, init_weights(two, seed=0)), {"rows": np.array([1, -1]), **case.inputs}
    for i, one in enumerate(adapters):
        lora = LoRAConfig(r=one["r"], alpha=one["alpha"], rslora=one["rslora"], targets=tuple(one["adapted"]))
        for name, a in init_adapter(start, lora, seed=0).params.items():
            inputs[f"adapters.{i}.{name}"] = draw(f"adapters.{i}.{name}", *a.shape)
    case = case._replace(inputs=inputs, scalars={**case.scalars, "adapters": adapters})
    yield _generation(case, None)
    both = case._replace(name="adapters-both", title="Another adapter for each text")
    yield _generation(both._replace(inputs={**inputs, "rows": np.array([0, 1])}), None)


def _generation(case: Case, mask: Array | None) -> Case:
    """A whole model's case, going on for three tokens, with their logits."""
    inputs = {name: a for name, a in case.inputs.items() if name != "targets"}
    inputs |= {} if mask is None else {"mask": mask}
    scalars = {**case.scalars, "n": 3, "logits": True}
    return case._replace(operation="generate", scalars=scalars, inputs=inputs, gradients=())


# --- O1 to O4 ------------------------------------------------------------------------------------------------------


def _optimizer() -> Iterator[Case]:
    usual = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
    dyadic = {"lr": 2.0**-4, "beta1": 0.875, "beta2": 1 - 2.0**-6, "eps": 2.0**-10, "weight_decay": 2.0**-3}
    for name, title, step, scalars in (
        ("step-1", "The first step: bias correction divides by 1 - beta", 1, usual), ("step-2", "The second", 2, usual),
        ("step-1000", "The thousandth: 1 - beta1^1000 is 1", 1000, usual),
        ("no-decay", "No weight decay", 2, {**usual, "weight_decay": 0.0}),
        ("dyadic-step-1", "Scalars that every float has: no rounding of them", 1, dyadic),
        ("dyadic-step-3", "The same, the third step", 3, dyadic),
        ("zero", "p = 0: nothing but the step shows", 2, usual), ("dyadic-zero", "The same", 3, dyadic),
    ):  # fmt: skip
        draw = _Names("O1", name)
        inputs = {"p": draw("p", 12), "g": draw("g", 12), "m": draw("m", 12), "v": draw("v", 12, low=0.0)}
        inputs["g"][0] = inputs["m"][0] = inputs["v"][0] = 0.0  # as of A at the start
        if step == 1:
            inputs["m"], inputs["v"] = np.zeros(12), np.zeros(12)
        since = "v1"
        if name.endswith("zero"):
            inputs["p"], since = np.zeros(12), "v2"
        yield Case("O1", name, "adamw", title, {"step": step, **scalars}, inputs, since=since)
    for name, warmup, total in (("usual", 4, 16), ("no-warmup", 0, 10)):
        inputs = {"steps": np.arange(total + 2)}
        title = f"warmup = {warmup}, total = {total}"
        yield Case("O2", name, "warmup_cosine", title, {"warmup": warmup, "total": total}, inputs)
    for name, title, max_norm, size in (
        ("clipped", "The norm is above max_norm", 1.0, 1.0), ("kept", "It is below: nothing changes", 100.0, 1.0),
        ("small", "Both are small: what is added to the norm shows", 2.0**-8, 2.0**-5),
    ):  # fmt: skip
        draw = _Names("O3", name)
        inputs = {"g0": draw("g0", 3, 4, low=-size, high=size), "g1": draw("g1", 5, low=-size, high=size)}
        inputs["g2"] = np.zeros(2)
        yield Case("O3", name, "clip", title, {"max_norm": max_norm}, inputs)
    yield from _losses("O4", shards=2)
    lora = LoRAConfig(r=3, alpha=2, targets=("q", "v"))
    title = "A model's batch cut into two, which have not as many targets each"
    yield _model_case("O4", "model", title, _config("GPT-2, language model"), lora, shards=2)


# --- A1, A2 --------------------------------------------------------------------------------------------------------


def _falling(draw: _Names, tensor: str, r: int, n_in: int) -> Array:
    """Rows, each about half as large as the one before: singular values apart, so that directions have an order."""
    return np.stack([draw(f"{tensor}{i}", n_in, low=-(2.0**-i), high=2.0**-i) for i in range(r)])


def _analysis() -> Iterator[Case]:
    left = np.arange(8) < 4
    for name, title, r, q in (
        ("ranks", "Ranks 2 and 4", 2, 4), ("itself", "An adapter and itself: 1 throughout", 3, 3),
        ("first-shared", "The leading direction is shared, no other: 1, 1; 1, 1/2", 2, 2),
        ("nothing-shared", "Orthogonal subspaces: 0 throughout", 2, 3),
    ):  # fmt: skip
        draw = _Names("A1", name)
        A, other = _falling(draw, "A", r, 8), _falling(draw, "other", q, 8)
        if name == "itself":
            other = A
        if name == "first-shared":
            A[0, ~left] = A[1, left] = A[1, 6:] = other[1, :6] = 0.0
            other[0] = A[0]
        if name == "nothing-shared":
            A, other = A * left, other * ~left
        yield Case("A1", name, "subspace_similarity", title, {}, {"A": A, "other": other})
    for name in ("plain", "rslora", "rank-1"):
        shape = _SHAPES[name]
        inputs = {n: a for n, a in shape.drawn(_Names("A2", name)).items() if n in ("W0", "A", "B")}
        title = shape.title.replace("No bias, no dropout", "r = 2")
        yield Case("A2", name, "amplification", title, shape.scalars, inputs)

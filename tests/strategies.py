"""Random architectures, adapters and batches, all small, for hypothesis; and the helpers that several files share.

Hypothesis draws what shapes a case: sizes, switches, seeds. The numbers in the arrays come from the seeds.
"""

import sys
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

import lora_np as ln
from lora_np import ops
from lora_np.adapter import adapted_shapes, target_of
from lora_np.backend import asnumpy, xp
from lora_np.batch import IGNORED, check_batch
from lora_np.storage import Held, narrowed, widened
from lora_np.vectors.derivatives import perturbed

ATTENTION = ("q", "k", "v", "o")
seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from(["float32", "float64"])
FLOAT64 = {"dtype": "float64"}


def device(a, dtype=None):
    """A host array on the device."""
    return xp.asarray(np.asarray(a, dtype=dtype))


def bits(a):
    """The bytes of an array, to compare to the last bit."""
    return asnumpy(a).tobytes()


def same_bits(one, other):
    """Whether two arrays, or two dicts of arrays, are equal in names, shapes, dtypes and every bit.

    A held matrix is another than an array of its numbers.
    """
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)
    if isinstance(one, Held):
        parts = zip(vars(one).values(), vars(other).values(), strict=True)
        return type(one) is type(other) and all(
            same_bits(a, b) if isinstance(a, xp.ndarray) else a == b for a, b in parts
        )
    return one.shape == other.shape and one.dtype == other.dtype and bits(one) == bits(other)


def spy(patch, module, name):
    """Notes the arguments of each call of a function, in the list that is given back."""
    calls, function = [], getattr(module, name)

    def noting(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    patch.setattr(module, name, noting)
    return calls


def spy_everywhere(patch, name):
    """`spy` on one of ops' functions in every module of the package that has it. -> one list for all calls."""
    function, calls = getattr(ops, name), []

    def noting(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] == "lora_np":
            for own, value in list(vars(module).items()):
                if value is function:
                    patch.setattr(module, own, noting)
    return calls


def deviation(got, expected):
    """The largest deviation, relative to the largest element expected."""
    got, expected = asnumpy(got), asnumpy(expected)
    assert got.shape == expected.shape
    return np.abs(got - expected).max(initial=0.0) / max(np.abs(expected).max(initial=0.0), 1e-300)


def largest(grads):
    """The largest element of a dict of gradients."""
    return max(np.abs(asnumpy(g)).max() for g in grads.values())


def gradient_scale(model, batch):
    """The largest gradient of any weight: what the roundings inside a backward are relative to."""
    return largest(ln.loss_and_grads(model, None, **batch, trainable="all")[1])


def farthest(grads, others):
    """The largest deviation between two dicts of gradients."""
    return max(np.abs(asnumpy(grads[name]) - asnumpy(others[name])).max() for name in grads)


def gamma(n, dtype="float64"):
    """n u / (1 - n u): the relative error of n roundings."""
    u = float(np.finfo(dtype).eps) / 2
    return n * u / (1 - n * u)


def whole_numbers(rng, *shape, dtype="float64", limit=4):
    """Small whole numbers: sums of their products are exact in any order, so nothing is left to a tolerance."""
    return device(rng.integers(-limit, limit + 1, shape), dtype)


# What an architecture may be made of: which fields these ask for, and which they leave to chance.
KINDS = {
    "usual": {},  # GPT-2, BERT, RoBERTa, Llama, and between them
    "window": {"causal": True, "prefix": 0},
    "score bias": {"prefix": 0},
    "disentangled": {"causal": False, "prefix": 0, "n_kv_head": None, "qk_norm": False},
    "encoder": {"causal": True, "prefix": 0, "qk_norm": False, "n_types": 0},
}
NOT_TURNED = ("disentangled", "encoder")  # of these, no positions are rotary
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "gelu_gated", "gelu_tanh_gated", "silu_gated", "relu_gated")


@st.composite
def configs(draw, *, heads=("lm", "classify", "tag", "none"), kinds=tuple(KINDS), **fields):
    """Any architecture, some with settings that no preset has. `fields` fixes some of them.

    A width of at least 4: the layer norm of two numbers is 1 and -1, or nearly, and its gradient nothing but rounding.
    kinds: of KINDS; of the first alone, what no model before Llama 3 has is at its default.
    """
    kind = draw(st.sampled_from([kind for kind in kinds if _may_be(kind, fields, heads)]))
    n_head = draw(st.sampled_from([1, 2, 4]))
    head = draw(st.sampled_from([head for head in heads if kind != "encoder" or head in ("lm", "none")]))
    offset = draw(st.sampled_from([0, 2]))
    choices = {
        "vocab_size": st.integers(3, 9),
        "n_layer": st.integers(1, 2),
        "d_ff": st.integers(2, 7),
        "norm": st.sampled_from(["layer", "rms"]),
        "norm_first": st.booleans(),
        "positions": st.sampled_from(["learned", "rotary"]),
        "activation": st.sampled_from(["gelu", "gelu_tanh", "silu_gated"]),
        "causal": st.booleans(),
        "tie_head": st.booleans(),
        "n_kv_head": st.sampled_from([None, *(n for n in (1, 2, 4) if n_head % n == 0)]),
        "n_types": st.sampled_from([0, 2]),
        "bias": st.booleans(),
        "pooler_in_head": st.booleans(),
        "prefix": st.sampled_from([0, 0, 2]),
    }
    d_model = n_head * draw(st.sampled_from([2, 4] if n_head > 1 else [4, 6]))
    if kind != "usual":
        choices |= _later(draw, kind, d_model // n_head)
    settings = {name: draw(choice) for name, choice in choices.items() if name not in {**KINDS[kind], **fields}}
    settings |= {**KINDS[kind], **fields}
    if settings["norm"] == "layer":
        settings["qk_norm"] = False
    if max(settings.get("full_layers", ()), default=0) >= settings["n_layer"]:
        settings["full_layers"] = ()
    if settings["positions"] != "rotary":
        settings.pop("window_theta", None)
    return ln.Config(
        **{
            "n_positions": 10 + offset,
            "position_offset": offset,
            "n_head": n_head,
            "d_model": d_model,
            "head": head,
            "n_labels": draw(st.integers(2, 4)) if head in ("classify", "tag") else None,
            "eps": 1e-5,
            **settings,
        }
    )


def _may_be(kind, fields, heads):
    """Whether an architecture of a kind can have these fields, and one of these heads."""
    fits = all(fields.get(name, value) == value for name, value in KINDS[kind].items())
    turned = kind in NOT_TURNED and fields.get("positions") == "rotary"
    return fits and not turned and (kind != "encoder" or bool({"lm", "none"} & {*heads}))


def _later(draw, kind, K):
    """What models have had since: the choices of fields, where K is a head's width unless one of them says."""
    d_head = draw(st.sampled_from([None, 2, 6]))
    turned = draw(st.sampled_from([None, 2]))
    half = (turned or d_head or K) // 2
    factors = st.lists(st.sampled_from([0.5, 1.0, 8.0]), min_size=half, max_size=half)
    buckets = st.sampled_from([4, 8])
    choices = {
        "norm": st.sampled_from(["layer", "rms", "rms_1p"]),
        "positions": st.sampled_from(["learned", "none"] if kind in NOT_TURNED else ["learned", "rotary", "none"]),
        "activation": st.sampled_from(ACTIVATIONS),
        "d_head": st.just(d_head),
        "rope_width": st.just(turned),
        "rope_factors": st.one_of(st.just([1.0]), st.just([4.0]), factors),
        "norm_outputs": st.booleans(),
        "embed_scale": st.sampled_from([1.0, 2.5]),
        "head_scale": st.sampled_from([1.0, 0.5]),
        "qkv_bias": st.sampled_from([None, True, False]),
        "pooler": st.sampled_from(["tanh", "gelu", "relu"]),
        "qk_norm": st.booleans(),
        "score_scale": st.sampled_from([None, 1.0]),
    }
    if kind == "window":
        choices |= {
            "window": st.integers(1, 3),
            "full_layers": st.sampled_from([(), (0,), (1,)]),
            "window_theta": st.sampled_from([None, 10.0]),
        }
    if kind in ("score bias", "disentangled"):
        choices |= {"score_buckets": buckets, "score_distance": st.just(6), "disentangled": st.just(kind[0] == "d")}
    if kind == "encoder":
        choices |= {
            "n_encoder": st.integers(1, 2), "score_buckets": st.sampled_from([0, 4, 8]), "score_distance": st.just(6)
        }  # fmt: skip
    return choices


@st.composite
def lora_configs(draw, config, *, dropout=True, whole=True, targets=None, dora=True):
    """Any LoRAConfig that fits `config`. dropout, whole, dora: whether it may have dropout or DoRA, or train anything
    whole."""
    names = [t for t in (*ATTENTION, "up", "down", "embed") if targets is None or t in targets]
    names += ["gate"] if config.gated else []
    names += ["head"] if config.head != "none" else []
    chosen = tuple(draw(st.lists(st.sampled_from(names), min_size=1, unique=True))) if targets is None else targets
    if targets is None and draw(st.booleans()) and not {"q", "k", "v"} & set(chosen):
        chosen = (*chosen, "qkv")
    adapted = {name: shape for name, shape in adapted_shapes(config).items() if target_of(name) in chosen}
    limit = {name: min(shape) for name, shape in adapted.items()}
    matrix = draw(st.sampled_from(sorted(limit)))
    target = target_of(draw(st.sampled_from(sorted(limit))))
    by_target = min(n for name, n in limit.items() if target_of(name) == target)
    ranks = {matrix: draw(st.integers(1, limit[matrix])), target: draw(st.integers(1, by_target))}
    head = "head" not in chosen and config.head != "none"
    return ln.LoRAConfig(
        r=draw(st.integers(1, min(limit.values()))),
        alpha=draw(st.sampled_from([0.5, 1, 3, 16])),
        targets=chosen,
        dropout=draw(st.sampled_from([0.0, 0.3])) if dropout else 0.0,
        bias=draw(st.sampled_from(["none", "all", "lora_only"])) if whole else "none",
        train_head=whole and head and draw(st.booleans()),
        rslora=draw(st.booleans()),
        rank_pattern=ranks if draw(st.booleans()) else {},
        alpha_pattern={target: 7.0} if draw(st.booleans()) else {},
        init=draw(st.sampled_from(["uniform", "normal"])),
        dora=dora and draw(st.booleans()),
    )


@st.composite
def masks(draw, N, T, kinds=("none", "left", "right", "holes")):
    """A mask (N,T), with at least one true token a row, or None."""
    kind = draw(st.sampled_from(kinds))
    if kind == "none":
        return None
    mask = np.ones((N, T), dtype=bool)
    for row in mask:
        padding = draw(st.integers(0, T - 1))
        if kind == "left":
            row[:padding] = False
        elif kind == "right":
            row[T - padding :] = False
        else:
            row[:] = np.random.default_rng(draw(seeds)).random(T) < 0.6
            row[draw(st.integers(0, T - 1))] = True
    return mask


@st.composite
def batches(draw, config, *, min_rows=1, padding=("none", "left", "right", "holes")):
    """The keyword arguments of `loss`: tokens, targets (some left out), mask and token_types; an encoder's source."""
    N, T = draw(st.integers(min_rows, 4)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(seeds))
    mask = draw(masks(N, T, padding))
    batch = {"tokens": rng.integers(0, config.vocab_size, (N, T)), "mask": mask}
    if config.n_types and draw(st.booleans()):
        batch["token_types"] = rng.integers(0, config.n_types, (N, T))
    if config.n_encoder:
        S = draw(st.integers(1, 6))
        batch |= {"source": rng.integers(0, config.vocab_size, (N, S)), "source_mask": draw(masks(N, S))}
    if config.head != "none":
        batch["targets"] = _targets(rng, config, N, T, mask)
    return batch


def _targets(rng, config, N, T, mask):
    """Targets of which a fifth is left out, and all where the mask is false, but at least one counts."""
    places = (N,) if config.head == "classify" else (N, T)
    targets = rng.integers(0, config.head_size, places)
    may_count = np.ones(places, dtype=bool) if mask is None or config.head == "classify" else mask
    left_out = rng.random(places) < 0.2
    left_out[tuple(np.argwhere(may_count)[0])] = False
    return np.where(left_out | ~may_count, IGNORED, targets)


def checked(config, batch):
    """The arguments of `loss` as it takes them apart: a Batch."""
    return check_batch(config, **{"mask": None, "token_types": None, **batch})


def inputs(batch):
    """A batch without its targets: the arguments of `forward`."""
    return {name: value for name, value in batch.items() if name != "targets"}


def random_model(config, *, seed, dtype="float64", scale=0.3):
    """A model whose weights are all random: larger than at the start, so that attention attends and biases count."""
    rng = np.random.default_rng(seed)
    weights = ln.init_weights(config, seed=seed, dtype="float64")
    for name, w in weights.items():
        weights[name] = (w if w.ndim == 1 else 0) + scale * rng.standard_normal(w.shape)
    return ln.Model(config, {name: w.astype(dtype) for name, w in weights.items()})


def in_bfloat16(W):
    """A float32 matrix, its numbers cut down to those of bfloat16, held so."""
    return narrowed(device((asnumpy(W).view("uint32") & 0xFFFF0000).view("float32")))


def in_fewer_bits(model, hold):
    """A float32 model whose matrices are held by `hold`. -> the model of the numbers that they are, and that one."""
    held = {name: hold(w) if w.ndim == 2 else w for name, w in model.weights.items()}
    return ln.Model(model.config, {name: widened(w) for name, w in held.items()}), ln.Model(model.config, held)


@dataclass(frozen=True, eq=False)
class Unrounded(Held):
    """A matrix as it is, read by rows as a held one is: its products have the same blocks."""

    numbers: np.ndarray
    name = "float32"

    def __getitem__(self, rows):
        return self.numbers[rows]


def trained_adapter(model, lora_config, *, seed, scale=0.3):
    """An adapter as after training: B is not zero, m is not the norm, what is trained whole is not the base's."""
    adapter = perturbed(ln.init_adapter(model, lora_config, seed=seed), seed=seed)
    rng = np.random.default_rng(seed)
    larger = {name: p * (scale / 0.02) for name, p in adapter.params.items() if name.endswith(".B")}
    moved = {name: p + device(scale * rng.standard_normal(p.shape), p.dtype) for name, p in adapter.whole.items()}
    lengths = {name: p * device(rng.uniform(0.5, 1.5, p.shape), p.dtype) for name, p in adapter.params.items()}
    moved |= {name: p for name, p in lengths.items() if name.endswith(".m")}
    return replace(adapter, params={**adapter.params, **larger, **moved})


class Case(NamedTuple):
    """A model, an adapter as after training, a batch, and the seed that they came from."""

    model: ln.Model
    adapter: ln.Adapter
    batch: dict
    seed: int


@st.composite
def cases(
    draw,
    *,
    dtype=dtypes,
    heads=("lm", "classify", "tag"),
    padding=("none", "left", "right", "holes"),
    min_rows=1,
    dropout=False,
    whole=True,
    targets=None,
    kinds=tuple(KINDS),
    dora=True,
    **fields,
):
    """A Case of any architecture, adapter and batch. The arguments narrow it down."""
    config = draw(configs(heads=heads, kinds=kinds, **fields))
    lora_config = draw(lora_configs(config, dropout=dropout, whole=whole, targets=targets, dora=dora))
    batch = draw(batches(config, min_rows=min_rows, padding=padding))
    seed = draw(seeds)
    model = random_model(config, seed=seed, dtype=draw(dtype) if isinstance(dtype, st.SearchStrategy) else dtype)
    return Case(model, trained_adapter(model, lora_config, seed=seed), batch, seed)


# --- What an adapter means, written out in full on the host --------------------------------------------------------


def scale_by_hand(config, name):
    """s of a matrix, from the fields: what a pattern says of the matrix, else of its target, else of all."""
    keys = (name, "embed" if name == "embed.tokens" else name.split(".")[-1])
    r, alpha = (
        next((pattern[key] for key in keys if key in pattern), default)
        for pattern, default in ((config.rank_pattern, config.r), (config.alpha_pattern, config.alpha))
    )
    return alpha / (r**0.5 if config.rslora else r)


def dense_updates(model, adapter):
    """What is added to each adapted matrix, in float64: s B A, or with DoRA (m / c) (W0 + s B A) - W0.

    A fused qkv gives three.
    """
    updates, K = {}, model.config.head_width
    q, kv = model.config.n_head * K, model.config.kv_heads * K
    for name in adapter.matrices:
        A, B = (asnumpy(adapter.params[f"{name}.{factor}"]).astype("float64") for factor in "AB")
        dW, m = scale_by_hand(adapter.config, name) * (B @ A), adapter.params.get(f"{name}.m")
        parts = {name: slice(None)}
        if name.endswith(".qkv"):
            stem = name.removesuffix("qkv")
            parts = {f"{stem}q": slice(q), f"{stem}k": slice(q, q + kv), f"{stem}v": slice(q + kv, None)}
        for part, rows in parts.items():
            updates[part] = dW[rows]
            if m is not None:
                W0 = frozen_matrix(model, part)
                W = W0 + dW[rows]
                updates[part] = (asnumpy(m)[rows] / np.sqrt((W * W).sum(axis=1)))[:, None] * W - W0
    return updates


def frozen_matrix(model, name):
    """W0 of a matrix (out, in), in float64."""
    if name == "embed.tokens":
        return asnumpy(model.weights[name]).astype("float64").T
    weight = f"{name}.weight" if f"{name}.weight" in model.weights else model.config.head_weight
    return asnumpy(model.weights[weight]).astype("float64")


def host_weights(model):
    """The weights as NumPy arrays that may be written."""
    return {name: asnumpy(w).copy() for name, w in model.weights.items()}


def with_updates(model, updates, whole=()):
    """The model of weights W0 + dW, and of what is trained whole, its head untied where that matters."""
    config, weights = model.config, host_weights(model)
    whole = {name: asnumpy(value) for name, value in dict(whole).items()}
    if config.head_weight == "embed.tokens" and ({"embed.tokens", "head"} & set(updates) or "head.weight" in whole):
        config = replace(config, tie_head=False)
        weights["head.weight"] = weights["embed.tokens"].copy()
    weights |= whole
    for name, dW in updates.items():
        if name == "embed.tokens":
            weights[name] = weights[name] + dW.T.astype(model.dtype)
        else:
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + dW.astype(model.dtype)
    return ln.Model(config, weights)


# --- Shared by the tests of the model and of its loss ---


def case_of(config, *, N=3, T=5, seed=0, dtype="float64", **lora_fields):
    """A Case without padding, of a given architecture."""
    rng = np.random.default_rng(seed)
    model = random_model(config, seed=seed, dtype=dtype)
    places = (N,) if config.head == "classify" else (N, T)
    batch = {"tokens": rng.integers(0, config.vocab_size, (N, T)), "targets": rng.integers(0, config.head_size, places)}
    return Case(model, trained_adapter(model, ln.LoRAConfig(**{"r": 2, **lora_fields}), seed=seed), batch, seed)


def real_logits(config, logits, mask):
    """The logits of a batch, a text at a time, without those of padding."""
    logits = asnumpy(logits)
    if config.head == "classify" or mask is None:
        return list(logits)
    return [row[real] for row, real in zip(logits, mask, strict=True)]


def rescaled(adapter, c):
    """The adapter with every alpha c times as large."""
    config = adapter.config
    patterns = {name: c * alpha for name, alpha in config.alpha_pattern.items()}
    return replace(adapter, config=replace(config, alpha=c * config.alpha, alpha_pattern=patterns))

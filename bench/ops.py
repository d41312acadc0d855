"""Each primitive, forward and backward: time, GFLOP/s, GB/s, and the share of the roofline, on all cores at once.

At the sizes of one shard of GPT-2 small (256 tokens; on a GPU a batch, 1,024), float32, as training runs them: a shard
on each core, one BLAS thread each. Operations: 2 for each multiplication and addition of a product; elementwise, one
for each arithmetic step, function or comparison in the formula; attention over all T x T scores, masked or not. Bytes:
what comes in and goes out, once. A share above 1 says that it was in the cache, as it often is in a step. The figures
are for all cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_np import lora, ops, storage
from lora_np.backend import Array, backend_name, xp

from . import roofline
from .figures import Figure
from .measure import Side, measure
from .options import Options
from .timing import Cases, cores


class Op(NamedTuple):
    """What is timed, the floating-point operations of a call, and the bytes that must move."""

    call: Callable[[], Any]
    flops: float
    moved: float


SIZES = {"M": 1024 if backend_name == "cupy" else 256, "D": 768, "F": 3072, "H": 12, "V": 50257, "R": 8}
TINY = {"M": 8, "D": 12, "F": 16, "H": 2, "V": 32, "R": 2}


def table(*, M: int, D: int, F: int, H: int, V: int, R: int) -> Mapping[str, Op]:
    """The primitives for M tokens of width D, F in the feed-forward half, H heads, V tokens in all, rank R."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return xp.asarray(rng.standard_normal(shape, dtype=np.float32))

    def op(call: Callable[[], Any], flops: float, *elements: float) -> Op:
        return Op(call, flops, 4.0 * sum(elements))

    x, dy, wide, w, b, W = normal(M, D), normal(M, D), normal(M, F), normal(D), normal(D), normal(D, D)
    A, B, logits, E = normal(R, D), normal(D, R), normal(M, V), normal(V, D)
    bits = rng.standard_normal((D, D), dtype=np.float32).view(np.uint32)
    halves = storage.BFloat16((D, D), xp.asarray((bits >> 16).astype(np.uint16)))
    four_bits = storage.quantise_nf4(W)
    q, k, v, dh = (normal(1, H, M, D // H) for _ in range(4))
    tokens, t = xp.asarray(rng.integers(0, V, M)), xp.arange(M)
    cos, sin = ops.rotary_angles(t, D // H, 1e4, "float32")
    mask = ops.dropout_mask(xp.zeros_like(t), t, D, 0.1, seed=0, stream="x", dtype="float32")
    dlosses = xp.ones(M, dtype="float32")
    layer_saved, rms_saved = ops.layer_norm(x, w, b, 1e-5)[1], ops.rms_norm(x, w, 1e-5)[1]
    dydx, p = ops.gelu_tanh(wide)[1], ops.softmax(logits)[1]
    lora_saved = lora.lora_linear(x, W, b, A, B, 2.0)[1]
    attention_saved = ops.attention(q, k, v, causal=True)[1]
    logits_lost, loss_saved = normal(M, V), ops.cross_entropy(normal(M, V), tokens)[1]  # it works in their memory
    n, wide_n, all_n, scores_n = M * D, M * F, M * V, H * M * M  # elements of x, of wide, of logits, of all scores
    product, low, scores = 2.0 * M * D * D, 4.0 * M * D * R, 4.0 * M * M * D
    return {
        "linear": op(lambda: ops.linear(x, W, b), product + n, 2 * n, D * D),
        "linear, dx": op(lambda: ops.linear_backward(dy, W), product, 2 * n, D * D),
        "linear, W in bfloat16": op(lambda: ops.linear(x, halves, b), product + n, 2 * n, D * D / 2),
        "linear, dx, W in bfloat16": op(lambda: ops.linear_backward(dy, halves), product, 2 * n, D * D / 2),
        "widened": op(lambda: storage.widened(halves), 0, 1.5 * D * D),
        "linear, W in NF4": op(lambda: ops.linear(x, four_bits, b), product + n, 2 * n, D * D / 8),
        "linear, dx, W in NF4": op(lambda: ops.linear_backward(dy, four_bits), product, 2 * n, D * D / 8),
        "widened, NF4": op(lambda: storage.widened(four_bits), D * D, 1.125 * D * D),
        "linear, dW": op(lambda: ops.linear_weight_backward(dy, x), product, 2 * n, D * D),
        "linear, db": op(lambda: ops.bias_backward(dy), n, n),
        "lora_linear": op(lambda: lora.lora_linear(x, W, b, A, B, 2.0), product + low, 2 * n, D * D, 2 * R * D),
        "lora_linear, backward": op(
            lambda: lora.lora_linear_backward(dy, lora_saved), product + 2 * low, 3 * n, D * D, 4 * R * D
        ),
        "embedding": op(lambda: ops.embedding(tokens, E), 0, 2 * n),
        "embedding, backward": op(lambda: ops.embedding_backward(dy, tokens, V), n, 2 * n, V * D),
        "pick": op(lambda: ops.pick(x, t), 0, 2 * n),
        "pick, backward": op(lambda: ops.pick_backward(dy, t, x.shape), 0, 2 * n),
        "layer_norm": op(lambda: ops.layer_norm(x, w, b, 1e-5), 7 * n, 3 * n),
        "layer_norm, backward": op(lambda: ops.layer_norm_backward(dy, layer_saved), 8 * n, 3 * n),
        "rms_norm": op(lambda: ops.rms_norm(x, w, 1e-5), 4 * n, 3 * n),
        "rms_norm, backward": op(lambda: ops.rms_norm_backward(dy, rms_saved), 6 * n, 3 * n),
        "norms, dw": op(lambda: ops.norm_weight_backward(dy, layer_saved), 2 * n, 2 * n),
        "gelu": op(lambda: ops.gelu(wide), 29 * wide_n, 3 * wide_n),
        "gelu_tanh": op(lambda: ops.gelu_tanh(wide), 17 * wide_n, 3 * wide_n),
        "silu": op(lambda: ops.silu(wide), 8 * wide_n, 3 * wide_n),
        "relu": op(lambda: ops.relu(wide), 2 * wide_n, 3 * wide_n),
        "tanh": op(lambda: ops.tanh(wide), 3 * wide_n, 3 * wide_n),
        "activations, backward": op(lambda: ops.activation_backward(wide, dydx), wide_n, 3 * wide_n),
        "softmax": op(lambda: ops.softmax(logits), 5 * all_n, 2 * all_n),
        "softmax, backward": op(lambda: ops.softmax_backward(logits, p), 4 * all_n, 3 * all_n),
        "attention": op(lambda: ops.attention(q, k, v, causal=True), scores + 7 * scores_n, 4 * n, scores_n),
        "attention, backward": op(
            lambda: ops.attention_backward(dh, attention_saved), 2 * scores + 5 * scores_n, 7 * n, scores_n
        ),
        "rotary": op(lambda: ops.rotary(q, cos, sin), 3 * n, 2 * n),
        "rotary, backward": op(lambda: ops.rotary_backward(q, (cos, sin)), 3 * n, 2 * n),
        "dropout_mask": op(
            lambda: ops.dropout_mask(xp.zeros_like(t), t, D, 0.1, seed=0, stream="x", dtype="float32"), 11 * n, n
        ),
        "dropout": op(lambda: ops.dropout(x, mask), n, 3 * n),
        "dropout, backward": op(lambda: ops.dropout_backward(dy, mask), n, 3 * n),
        "cross_entropy": op(lambda: ops.cross_entropy(logits_lost, tokens), 5 * all_n, 2 * all_n),
        "cross_entropy, backward": op(lambda: ops.cross_entropy_backward(dlosses, loss_saved), all_n, 2 * all_n),
    }


def cases(**sizes: int) -> Cases:
    """The calls alone."""
    return {name: op.call for name, op in table(**sizes).items()}


def figures(o: Options) -> Iterator[Figure]:
    """For each primitive its time, speeds and share, and before them what the machine can do."""
    sizes = TINY if o.quick else SIZES
    at_once = cores()
    sides = [Side("ops", "bench.ops:cases", sizes, threads=at_once), *roofline.sides(o.quick)]
    measured = measure(sides, o)
    found = roofline.figures("ops", measured, o.quick)
    yield from found.values()
    products, memory = found[roofline.EACH_CORE].median, roofline.best_memory(found).median
    for name, op in table(**sizes).items():
        timing = measured["ops"][name]
        seconds = Figure("ops", name, "time", "s", timing.seconds)
        yield from (seconds, *timing.asked(seconds))
        yield seconds.rate(at_once * op.moved / 1e9, "memory", "GB/s")
        if op.flops:
            speed = seconds.rate(at_once * op.flops / 1e9, "operations", "GFLOP/s")
            roof = roofline.attainable(op.flops, op.moved, products, memory)
            intensity = seconds._replace(what="operations a byte", unit="FLOP/B", values=[op.flops / op.moved])
            share = speed._replace(what="share of the roofline", unit="share", values=[v / roof for v in speed.values])
            yield from (speed, intensity, share)

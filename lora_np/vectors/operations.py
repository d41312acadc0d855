"""What the cases compute: each operation's equation, and its tensors and scalars in words.

An operation's own name is that of the function in `references`, what the package gives, and in `definitions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from . import definitions, references
from .definitions import Definition
from .references import Reference


class Operation(NamedTuple):
    """What a case of this name asks for.

    inputs, outputs, scalars   what each is, its shape first
    whole                      whether it is a whole model
    """

    name: str
    title: str
    equation: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    scalars: Mapping[str, str]
    whole: bool = False

    @property
    def reference(self) -> Reference:
        """What the package gives."""
        return getattr(references, self.name)

    @property
    def definition(self) -> Definition:
        """The formula that error bounds come from."""
        return getattr(definitions, self.name)


SCALE = {
    "alpha": "numerator of the scale",
    "r": "rank",
    "rslora": "true: s = alpha / sqrt(r); false: s = alpha / r",
}
PAIR = {"A": "(r, in)", "B": "(out, r)"}
BLOCK = {"block": "how many numbers have one absolute maximum", "out, in": "of W's shape"}
QUANTISED = {
    "codes": "(out in / 2,) integers: two k, the first in the upper half", "levels": "(16,): NF4's numbers",
    "absmax": "(blocks,): a; or integers, with a map", "map": "(256,); if absmax are its indices",
    "outer": "(blocks / 256,); with a map", "offset": "(); with a map",
}  # fmt: skip
KEEP = {"keep": "(N, T, in) booleans: the dropout mask, m = keep / (1 - p); if there is one"}
P = {"p": "dropout probability; only beside keep"}
NORM = {"x": "(N, T, D)", "w": "(D,)"}
TOKENS = {
    "tokens": "(N, T) integers",
    "mask": "(N, T) booleans, true where a token counts: attention sees these keys alone, and positions count true "
    "tokens, from 0; if there is one",
    "token_types": "(N, T) integers; if the model has a table of types",
}
WEIGHTS = {
    "WEIGHT": "each matrix (out, in), by name: embed.tokens, embed.positions, embed.types, embed.norm.weight, "
    "layers.0.attn.q.weight, layers.0.attn.q.bias, ... k v o, layers.0.mlp.up, gate, down, layers.0.norm1, norm2, "
    "norm, pooler, head; layers.0.attn.q.A (r, in) and .B (out, r) of each adapted matrix; layers.0.attn.qkv.A (r, D) "
    "and .B stand for q, k and v together, B's rows for q's, then k's, then v's; layers.0.attn.prefix.k and .v "
    "(n_kv_head, prefix, K), if there is a prefix"
}
ARCHITECTURE = {
    "n_layer, n_head, n_kv_head, d_model, d_ff, eps, rope_theta, position_offset": "as their names say; the first "
    "token's learned position is row position_offset",
    "norm": "layer or rms",
    "norm_first": "x + f(norm(x)), and a last norm before the head; else norm(x + f(x)), and one after the embedding",
    "norm_outputs": "true: f ends in a norm of its own, layers.0.norm1_out, norm2_out; false if it is not given",
    "positions": "learned: a table's rows are added; rotary: queries and keys are turned, with base rope_theta",
    "activation": "gelu (erf), gelu_tanh, or silu_gated: down(silu(gate x) * up x)",
    "causal": "whether a token sees only itself and what stands before it",
    "head": "lm (tied to embed.tokens with tie_head), tag: each token; classify: one token a text, the last true one "
    "if causal, else the first, through act(pooler x)",
    "pooler": "that act: tanh, gelu or relu; tanh if it is not given",
    "head_scale": "what the states that a head reads without a pooler are multiplied by; 1 if it is not given",
    "prefix": "how many keys and values of a layer's own stand before those of each text: every query sees them, they "
    "have no positions; none if it is not given",
    **{name: f"{text}; only with an adapter" for name, text in SCALE.items()},
    "rank_pattern": "ranks that differ, by a matrix's full name or by the last part of it, q, down, ...; s is by the "
    "matrix's own rank; none if it is not given",
}

_TABLE = (
    Operation(
        "lora_update", "The update of a matrix", "dW = s B A", PAIR,
        {"s": "() the scale", "dW": "(out, in)"}, SCALE,
    ),
    Operation(
        "lora_linear", "An adapted linear, forward and backward",
        "h = x W0^T + b + s ((m * x) A^T) B^T, m = keep / (1 - p). With g = dh: dB = s g^T ((m * x) A^T), "
        "dA = s (g B)^T (m * x), dx = g W0 + s m * ((g B) A), summed over all rows",
        {"x": "(N, T, in)", "W0": "(out, in)", "b": "(out,); if there is one", **PAIR, **KEEP,
         "dh": "(N, T, out): the gradient of the loss by h; if gradients are asked for"},
        {"h": "(N, T, out)"}, {**SCALE, **P},
    ),
    Operation(
        "lora_embedding", "An adapted look-up", "h = E[tokens] + s A^T[tokens] B^T",
        {"tokens": "(N, T) integers", "E": "(V, D)", "A": "(r, V)", "B": "(D, r)", "dh": "(N, T, D)"},
        {"h": "(N, T, D)"}, SCALE,
    ),
    Operation(
        "lora_start", "The start: B = 0", "As lora_linear. difference = h - (x W0^T + b), both computed by you, is 0",
        {"x": "(N, T, in)", "W0": "(out, in)", "b": "(out,)", **PAIR, "dh": "(N, T, out)"},
        {"h": "(N, T, out)", "difference": "(N, T, out), exactly zero"}, SCALE,
    ),
    Operation(
        "merge", "The merged matrix, and its output",
        "W = round(W0 + s B A), summed in float64 or float32, rounded to `dtype`; h = x W^T + b in your own precision. "
        "Write W widened to float32",
        {"x": "(N, T, in)", "W0": "(out, in)", "b": "(out,); if there is one", **PAIR},
        {"W": "(out, in)", "h": "(N, T, out)"},
        {**SCALE, "dtype": "float32, float16 or bfloat16: W0's, and W's"},
    ),
    Operation(
        "unmerge", "Unmerged, bit for bit", "W0, after merging `times` times and unmerging as often",
        {"W0": "(out, in)", **PAIR}, {"W0": "(out, in)"}, {**SCALE, "times": "how often"},
    ),
    Operation(
        "per_row", "Another adapter for each row", "h[n] = x[n] W0^T + b + s_i (x[n] A_i^T) B_i^T, i = rows[n]; "
        "a row of -1 has none",
        {"x": "(N, T, in)", "W0": "(out, in)", "b": "(out,)", "rows": "(N,) integers", "Ai": "(r_i, in): A0, A1, ...",
         "Bi": "(out, r_i): B0, B1, ..."},
        {"h": "(N, T, out)"}, {"adapters": "a list: alpha, r and rslora of each adapter"},
    ),
    Operation(
        "segments", "Many adapters in one batch",
        "y[m, start : start + out] += s_i (x[m] A_i^T) B_i^T, i = index[m]; of a row of -1 nothing changes. A_i is the "
        "first r_i rows of A[i], B_i the first r_i columns of B[i]: what is beyond is NaN, and is not read",
        {"x": "(M, in)", "y": "(M, columns)", "index": "(M,) integers", "A": "(n, R, in)", "B": "(n, out, R)"},
        {"y": "(M, columns)"}, {"adapters": "a list: alpha, r and rslora of each adapter", "start": "a column of y"},
    ),
    Operation(
        "count", "Trained parameters", "sum of matrices * r * (out + in)",
        {"matrices": "(n,) integers: how many of a shape", "out": "(n,)", "in": "(n,)", "r": "(n,)"},
        {"parameters": "() an integer"}, {"preset, targets, r": "where the shapes come from; not needed"},
    ),
    Operation(
        "combine", "Adapters joined", "dW = sum_i w_i s_i B_i A_i; its nearest matrix of rank `rank`, if that is given",
        {"Ai": "(r_i, in): A0, A1, ...", "Bi": "(out, r_i): B0, B1, ..."}, {"dW": "(out, in)"},
        {"adapters": "a list: w, alpha, r and rslora of each", "rank": "an integer, or null"},
    ),
    Operation(
        "dora_linear", "DoRA of a linear, forward and backward",
        "V = W0 + s B A, c_o the norm of its row o; h = (m / c) ((d * x) V^T) + (x - d * x) W0^T + b, "
        "d = keep / (1 - p), or 1. In backward c is a constant",
        {"x": "(N, T, in)", "W0": "(out, in)", "b": "(out,); if there is one", **PAIR, "m": "(out,)",
         "keep": "(N, T, in) booleans; if there is a mask", "dh": "(N, T, out)"},
        {"h": "(N, T, out)"}, {**SCALE, **P},
    ),
    Operation(
        "dora_embedding", "DoRA of a look-up", "h = (m / c) (E + s (B A)^T)[tokens], c_d the norm of column d",
        {"tokens": "(N, T) integers", "E": "(V, D)", "A": "(r, V)", "B": "(D, r)", "m": "(D,)", "dh": "(N, T, D)"},
        {"h": "(N, T, D)"}, SCALE,
    ),
    Operation(
        "dora_merge", "DoRA's merged matrix", "W = (m / c) (W0 + s B A), row by row",
        {"W0": "(out, in)", **PAIR, "m": "(out,)"}, {"W": "(out, in)"}, SCALE,
    ),
    Operation(
        "pissa", "The base in two parts", "update = s B A, the nearest matrix to W0 of rank r; residual = W0 - update",
        {"W0": "(out, in)"}, {"update": "(out, in)", "residual": "(out, in)"}, SCALE,
    ),
    Operation(
        "quantise_nf4", "A matrix in four bits",
        "row by row, each block of W has an absolute maximum a; w becomes the k whose a levels[k] is nearest, two to a "
        "byte, the first in its upper half. With a map, each 256 maxima less offset, the mean of all, have an absolute "
        "maximum outer, and become the l whose outer map[l] is nearest",
        {"W": "(out, in)", "levels": "(16,): NF4's numbers", "map": "(256,): the numbers of 8 bits; if maxima are "
         "quantised too"},
        {"codes": "(out in / 2,) integers", "absmax": "(blocks,); integers l, with a map", "outer": "(blocks / 256,); "
         "with a map", "offset": "(); with a map"}, BLOCK,
    ),
    Operation(
        "dequantise_nf4", "A matrix of four bits",
        "W = a levels[k], a = absmax, or outer map[absmax] + offset; each step is rounded to float32",
        QUANTISED, {"W": "(out, in)"}, BLOCK,
    ),
    Operation(
        "nf4_linear", "LoRA of a linear on a base in four bits",
        "W0 as in dequantise_nf4; h = x W0^T + b + s (x A^T) B^T",
        {"x": "(N, T, in)", **QUANTISED, **PAIR, "b": "(out,)", "dh": "(N, T, out)"}, {"h": "(N, T, out)"},
        {**SCALE, **BLOCK},
    ),
    Operation(
        "embedding", "Embedding", "x = scale tokens_table[tokens] + positions_table[positions] + types_table[types]",
        {"tokens": "(N, T) integers", "tokens_table": "(V, D)", "positions": "(T,) integers; if there are any",
         "positions_table": "(P, D)", "types": "(N, T) integers; if there are any", "types_table": "(2, D)",
         "dx": "(N, T, D)"},
        {"x": "(N, T, D)"}, {"scale": "a number; 1 if it is not given"},
    ),
    Operation(
        "linear", "Linear", "y = x W^T + b",
        {"x": "(N, T, in)", "W": "(out, in)", "b": "(out,); if there is one", "dy": "(N, T, out)"},
        {"y": "(N, T, out)"}, {},
    ),
    Operation(
        "layer_norm", "Layer norm", "y = w * (x - mean) / sqrt(var + eps) + b, var the mean of (x - mean)^2",
        {**NORM, "b": "(D,)", "dy": "(N, T, D)"}, {"y": "(N, T, D)"}, {"eps": "under the root"},
    ),
    Operation(
        "rms_norm", "RMS norm", "y = w * x / sqrt(mean(x^2) + eps)", {**NORM, "dy": "(N, T, D)"},
        {"y": "(N, T, D)"}, {"eps": "under the root", "one_plus": "true: 1 + w in the place of w; if given"},
    ),
    *(
        Operation(name, title, equation, {"x": "(n,)", "dy": "(n,)"}, {"y": "(n,)"}, {})
        for name, title, equation in (
            ("gelu", "GELU", "y = x (1 + erf(x / sqrt 2)) / 2"),
            ("gelu_tanh", "GELU by tanh", "y = x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2"),
            ("silu", "SiLU", "y = x / (1 + exp(-x))"),
            ("relu", "ReLU", "y = max(x, 0)"),
        )
    ),
    Operation(
        "gated_mlp", "The gated MLP", "y = (act(x W_gate^T) * (x W_up^T)) W_down^T",
        {"x": "(N, T, D)", "W_gate": "(F, D)", "W_up": "(F, D)", "W_down": "(D, F)", "dy": "(N, T, D)"},
        {"y": "(N, T, D)"}, {"activation": "gelu, gelu_tanh, silu or relu; silu if it is not given"},
    ),
    Operation(
        "softmax", "Softmax", "p = exp(x) / sum exp(x) over the last axis, where mask is true; 0 elsewhere, and 0 "
        "throughout where none is",
        {"x": "(n, S)", "mask": "(n, S) booleans", "dp": "(n, S)"}, {"p": "(n, S)"}, {},
    ),
    Operation(
        "attention", "Scaled dot-product attention",
        "y = softmax(q k^T / sqrt(K)) v, a head at a time; query head h has key/value head h div (H / G). A key counts "
        "where mask is true; causal: query t of T stands at place S - T + t of S and sees the keys up to its own, or "
        "the last `window` of these. A query that sees no key gives zeros, and its gradients are zero",
        {"q": "(N, H, T, K)", "k": "(N, G, S, K)", "v": "(N, G, S, K)", "mask": "(N, S) booleans; if there is one",
         "dy": "(N, H, T, K)"},
        {"y": "(N, H, T, K)"},
        {"causal": "true or false", "window": "how many keys a query sees at most, its own the last; if given",
         "scale": "in the place of 1 / sqrt(K); if given"},
    ),
    Operation(
        "rotary", "Rotary positions", "(y_i, y_{i + K/2}) is (x_i, x_{i + K/2}) turned by position / theta^(2i/K): "
        "y_i = x_i cos - x_{i + K/2} sin, y_{i + K/2} = x_{i + K/2} cos + x_i sin",
        {"x": "(N, H, T, K)", "positions": "(T,) or (N, T) integers", "dy": "(N, H, T, K)"}, {"y": "(N, H, T, K)"},
        {"theta": "the base", "width": "p, how many of K are turned: in all places K is p then; if given",
         "factors": "what the frequencies are divided by, one or p/2; if given"},
    ),
    Operation(
        "head_norm", "A query's or a key's norm, and its turn",
        "y = rotary(w * x / sqrt(mean(x^2) + eps)), the mean over the K of each head",
        {"x": "(N, H, T, K)", "w": "(K,)", "positions": "(T,) integers", "dy": "(N, H, T, K)"}, {"y": "(N, H, T, K)"},
        {"eps": "under the root", "theta": "the base of rotary"},
    ),
    Operation(
        "score_bias", "A bias by distance", "b[h, t, s] = table[bucket(s - t), h]; T5's buckets",
        {"table": "(B, H)", "db": "(H, T, T)"}, {"b": "(H, T, T)"},
        {"T": "queries, and keys", "causal": "true: B buckets behind the query; false: B / 2 on each side",
         "last": "the distance from which on there is one bucket"},
    ),
    Operation(
        "disentangled", "Disentangled scores",
        "z[t, s] = (q[t] . k[s] + q[t] . k_far[bucket(s - t)] + k[s] . q_far[bucket(s - t)]) / sqrt(3 K), a head at a "
        "time; DeBERTa's buckets",
        {"q": "(N, H, T, K)", "k": "(N, H, T, K)", "q_far": "(H, 2 B, K)", "k_far": "(H, 2 B, K)",
         "dz": "(N, H, T, T)"},
        {"z": "(N, H, T, T)"}, {"last": "the distance from which on there is one bucket"},
    ),
    Operation(
        "cross_attention", "The second attention", "y = attention(x W_q^T, X W_k^T, X W_v^T) W_o^T, n_head heads, not "
        "causal",
        {"x": "(N, T, D): the decoder's", "X": "(N, S, D): the encoder's states",
         **{f"W_{one}": "(D, D)" for one in "qkvo"}, "source_mask": "(N, S) booleans: the keys that count",
         "mask": "(N, T) booleans, the decoder's own: it hides nothing here", "dy": "(N, T, D)"},
        {"y": "(N, T, D)"}, {"n_head": "heads"},
    ),
    Operation(
        "dropout", "Dropout, the mask given", "y = m * x, m = keep / (1 - p)",
        {"x": "(N, T, D)", "keep": "(N, T, D) booleans", "dy": "(N, T, D)"}, {"y": "(N, T, D)"},
        {"p": "the probability"},
    ),
    Operation(
        "cross_entropy", "Cross-entropy",
        "loss = the mean of -log softmax(logits[m])[targets[m]] over the rows m whose target is not -100",
        {"logits": "(M, V)", "targets": "(M,) integers"}, {"loss": "()"},
        {"shards": "how many parts the rows may be cut into; the result is the whole's; if given"},
    ),
    Operation(
        "model", "A whole transformer",
        "x = embed.tokens[tokens], with positions and types; in each layer x = x + o(attention(q(x), k(x), v(x))), "
        "x = x + mlp(x), with norms; logits = head(x); loss = the mean cross-entropy over the targets that are not "
        "-100. Its parts are the operations linear, attention, rotary, ... here; gradients by what is trained",
        {**TOKENS, **WEIGHTS,
         "targets": "(N, T), or (N,) for a classifier: targets[n, t] is what logits[n, t] is scored against"},
        {"loss": "()", "logits": "(N, T, V), (N, T, labels) or (N, labels); not asked for where there is padding"},
        {**ARCHITECTURE, "adapted": "the adapted matrices", "trained_whole": "weights trained beside A and B",
         "shards": "how many parts the batch may be cut into; the result is the whole's; if given"}, whole=True,
    ),
    Operation(
        "merge_model", "A whole model, merged",
        "W = round(W0 + s B A) of each adapted matrix, as merge has it; all other weights as they are. A tied head "
        "that is adapted becomes head.weight, beside the token table",
        WEIGHTS, {"WEIGHT": "every weight of the merged model, widened to float32"},
        {**ARCHITECTURE, "adapted": "the adapted matrices", "trained_whole": "none",
         "dtype": "float32, float16 or bfloat16"},
    ),
    Operation(
        "generate", "Greedy generation", "n times: the token of the largest logit at the last place is added",
        {**TOKENS, **WEIGHTS, "rows": "(N,) integers: each text's adapter, -1 for none; if there are several. The "
         "matrices of adapter 0 are adapters.0.layers.0.attn.q.A, ..."},
        {"tokens": "(N, T + n) integers, the given ones first",
         "logits": "(N, n, V): those that chose each new token; if `logits` is true"},
        {**ARCHITECTURE, "n": "how many", "logits": "true or false; false if it is not given",
         "adapters": "a list: alpha, r, rslora and adapted, as above, of each adapter; if there are several"},
        whole=True,
    ),
    Operation(
        "sample", "A token drawn", "p = softmax(logits / temperature), the likeliest first; the top_k likeliest are "
        "kept, in proportion; then those before which the sum is below top_p, in proportion; the token is the first at "
        "which the running sum reaches u",
        {"logits": "(N, V)", "u": "(N,) in 0..1"}, {"tokens": "(N,) integers"},
        {"temperature, top_k, top_p": "numbers, or null for no limit"},
    ),
    Operation(
        "adamw", "One step of AdamW", "m' = beta1 m + (1 - beta1) g; v' = beta2 v + (1 - beta2) g^2; "
        "p' = p - lr (m' / (1 - beta1^step) / (sqrt(v' / (1 - beta2^step)) + eps) + weight_decay p)",
        {"p": "(n,)", "g": "(n,)", "m": "(n,) before the step", "v": "(n,) before the step"},
        {"p": "(n,)", "m": "(n,)", "v": "(n,)"},
        {"step": "which step this is, from 1", "lr, beta1, beta2, eps, weight_decay": "numbers; 1 - beta and beta^step "
         "are computed in float64"},
    ),
    Operation(
        "warmup_cosine", "Warm-up and cosine", "factor = (step + 1) / warmup while step < warmup; then "
        "(1 + cos(pi min(1, (step - warmup) / (total - warmup)))) / 2",
        {"steps": "(n,) integers, from 0"}, {"factor": "(n,)"}, {"warmup, total": "steps"},
    ),
    Operation(
        "clip", "Clipping by the joint norm",
        "norm = the 2-norm of all g together; clipped = g min(1, max_norm / norm)",
        {"gi": "g0, g1, ...: of any shape"}, {"norm": "()", "clipped_gi": "like gi"}, {"max_norm": "a number"},
    ),
    Operation(
        "subspace_similarity", "What two adapters share",
        "phi(i, j) = norm_F(U_i^T V_j)^2 / min(i, j), U_i (in, i) and V_j (in, j) the leading right-singular "
        "directions of A and of other",
        {"A": "(r, in)", "other": "(q, in)"}, {"phi": "(r, q): phi(i, j) at [i-1, j-1]"}, {},
    ),
    Operation(
        "amplification", "What an update amplifies",
        "factor = norm_F(dW) / norm_F(U^T W0 V), dW = s B A, U (out, r) and V (in, r) its singular directions",
        {"W0": "(out, in)", **PAIR},
        {"update": "() norm_F(dW)", "in_update": "() norm_F(U^T W0 V)",
         "in_weight": "() the same of the r leading singular directions of W0", "factor": "()"}, SCALE,
    ),
)  # fmt: skip

OPERATIONS: Mapping[str, Operation] = {operation.name: operation for operation in _TABLE}

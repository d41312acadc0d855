"""Some operations in plain NumPy, sharing no code with the package, in which mistakes can be planted by name."""

import math

import numpy as np

f = np.float32


def tf32(x):
    """The nearest number of 11 bits, ties to even."""
    bits = np.ascontiguousarray(x, f).view(np.uint32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFE000).view(f)


def mm(a, b, planted):
    """A product of matrices."""
    if planted == "TF32 factors":
        return tf32(a) @ tf32(b)
    if planted == "float16 factors":
        return a.astype(np.float16).astype(f) @ b.astype(np.float16).astype(f)
    return a @ b


def scale_of(c, planted):
    r, alpha = c["r"], c["alpha"]
    s = alpha / math.sqrt(r) if c["rslora"] else alpha / r
    return {
        "no alpha / r": 1.0,
        "scaled twice": s * s,
        "alpha alone": alpha,
        "rslora ignored": alpha / r,
        "rslora always": alpha / math.sqrt(r),
    }.get(planted, s)


def lora_linear(t, c, planted):
    x, W0, A, B, s = t["x"], t["W0"], t["A"], t["B"], f(scale_of(c, planted))
    b = t.get("b", f(0))
    swapped = planted == "A and B swapped" and A.shape[1] == B.shape[0]
    if swapped:
        A, B = B.T, A.T
    if planted == "fan_in_fan_out" and W0.shape[0] == W0.shape[1]:
        W0 = W0.T
    m = t["keep"] / f(1 - c["p"]) if "keep" in t else np.ones_like(x)
    if planted == "mask not scaled" and "keep" in t:
        m = t["keep"].astype(f)
    if planted == "no dropout":
        m = np.ones_like(x)
    into_base = x * m if planted == "dropout on the base" else x
    h = mm(into_base, W0.T, planted) + mm(mm(x * m, A.T, planted), B.T, planted) * s
    if planted != "no bias":
        h = h + (b + b if planted == "bias twice" else b)
    if "dh" not in t:
        return {"h": h}, {}
    g, mx = t["dh"].reshape(-1, len(W0)), (x * m).reshape(-1, x.shape[-1])
    gB = mm(g, B, planted)
    dA, dB = s * mm(gB.T, mx, planted), s * mm(g.T, mm(mx, A.T, planted), planted)
    if swapped:
        dA, dB = dB.T, dA.T
    low = s * mm(gB, A, planted)
    if planted == "dA without s":
        dA = gB.T @ mx
    if planted == "mean over rows":
        dA, dB = dA / len(g), dB / len(g)
    if planted != "dx without mask":
        low = low * m.reshape(low.shape)
    dx = mm(g, W0, planted) + (0 if planted == "dx without the branch" else low)
    if planted == "dropout on the base":
        dx = (g @ W0 + s * gB @ A) * m.reshape(low.shape)
    return {"h": h}, {"x": dx.reshape(x.shape), "A": dA, "B": dB}


def merge(t, c, planted):
    """Only float32: the others need another dtype."""
    if c["dtype"] != "float32":
        return {}, {}
    s, W0, b = scale_of(c, planted), t["W0"], t.get("b", f(0))
    A, B = (t["B"].T, t["A"].T) if planted == "A and B swapped" and W0.shape[0] == W0.shape[1] else (t["A"], t["B"])
    if planted == "subtracted":
        s = -s
    W = W0 + f(s) * mm(B, A, planted)
    if planted == "bias merged":
        W = W + np.reshape(b, (-1, 1))
    return {"W": W, "h": mm(t["x"], W.T, planted) + b}, {}


def lora_update(t, c, planted):
    s = scale_of(c, None)
    return {"s": f(s), "dW": f(s) * mm(t["B"], t["A"], planted)}, {}


def lora_start(t, c, planted):
    outputs, grads = lora_linear(t, c, planted if planted in PRECISIONS else None)
    base = mm(t["x"], t["W0"].T, planted) + np.zeros_like(outputs["h"]) + t["b"]
    return {**outputs, "difference": outputs["h"] - base}, grads


def per_row(t, c, planted):
    h = mm(t["x"], t["W0"].T, planted) + t["b"]
    for i, one in enumerate(c["adapters"]):
        low = mm(mm(t["x"], t[f"A{i}"].T, planted), t[f"B{i}"].T, planted) * f(scale_of(one, None))
        h = np.where((t["rows"] == i)[:, None, None], h + low, h)
    return {"h": h}, {}


def combine(t, c, planted):
    """Only the whole sum."""
    if c["rank"] is not None:
        return {}, {}
    ws = [one["w"] * scale_of(one, None) for one in c["adapters"]]
    return {"dW": sum(f(w) * mm(t[f"B{i}"], t[f"A{i}"], planted) for i, w in enumerate(ws))}, {}


def linear(t, c, planted):
    dy, x = t["dy"].reshape(-1, len(t["W"])), t["x"].reshape(-1, t["W"].shape[1])
    grads = {"x": mm(t["dy"], t["W"], planted), "W": mm(dy.T, x, planted), "b": dy.sum(0)}
    return {"y": mm(t["x"], t["W"].T, planted) + t.get("b", f(0))}, grads


def gated_mlp(t, c, planted):
    """Only that of SiLU."""
    if "activation" in c:
        return {}, {}
    D = len(t["W_down"])
    x, dy = t["x"].reshape(-1, D), t["dy"].reshape(-1, D)
    gate, up = mm(x, t["W_gate"].T, planted), mm(x, t["W_up"].T, planted)
    S = 1 / (1 + np.exp(-gate))
    h, dh = gate * S * up, mm(dy, t["W_down"], planted)
    d_gate, d_up = dh * up * (S + gate * S * (1 - S)), dh * gate * S
    dx = mm(d_gate, t["W_gate"], planted) + mm(d_up, t["W_up"], planted)
    grads = {"W_gate": mm(d_gate.T, x, planted), "W_up": mm(d_up.T, x, planted), "W_down": mm(dy.T, h, planted)}
    return {"y": mm(h, t["W_down"].T, planted).reshape(t["x"].shape)}, {"x": dx.reshape(t["x"].shape), **grads}


def softmax_of(x, sees, planted):
    """Over the last axis, of what is seen."""
    hidden = np.where(sees, x, f(-np.inf))
    top = (x if planted == "the largest of all" else hidden).max(-1, keepdims=True)
    if planted == "no maximum":
        top = f(0)
    e = np.where(sees, np.exp(hidden - np.where(np.isfinite(top), top, f(0))), f(0))
    return e / np.where(sees.any(-1, keepdims=True), e.sum(-1, keepdims=True), f(1))


def softmax(t, c, planted):
    p = softmax_of(t["x"], t["mask"], planted)
    return {"p": p}, {"x": p * (t["dp"] - (t["dp"] * p).sum(-1, keepdims=True))}


def sample(t, c, planted):
    tokens = []
    for logits, u in zip(t["logits"].astype(np.float64), t["u"], strict=True):
        order = np.argsort(-logits, kind="stable")
        late = planted == "temperature after top_p"
        p = np.exp((logits[order] - logits.max()) / (1 if late else c["temperature"]))
        p[c["top_k"] :] = 0 if c["top_k"] else p[c["top_k"] :]
        p /= p.sum()
        if c["top_p"]:
            p[np.cumsum(p) - p >= c["top_p"]] = 0
        p = p ** (1 / c["temperature"]) if late else p
        tokens.append(order[np.searchsorted(np.cumsum(p / p.sum()), u)])
    return {"tokens": np.array(tokens)}, {}


def layer_norm(t, c, planted):
    x, w, b, dy = t["x"], t["w"], t["b"], t["dy"]
    D = x.shape[-1]
    centred = x - x.mean(-1, keepdims=True)
    n = D - 1 if planted == "sample variance" else D
    rstd = 1 / np.sqrt((centred**2).sum(-1, keepdims=True) / n + f(c["eps"]))
    xhat, g = centred * rstd, dy * w
    dx = (g - g.mean(-1, keepdims=True) - xhat * (g * xhat).sum(-1, keepdims=True) / n) * rstd
    return {"y": xhat * w + b}, {"x": dx, "w": (dy * xhat).sum((0, 1)), "b": dy.sum((0, 1))}


def attention(t, c, planted):
    (N, H, T, K), (G, S) = t["q"].shape, t["k"].shape[1:3]
    heads = [h % G if planted == "heads interleaved" else h // (H // G) for h in range(H)]
    k, v = t["k"][:, heads], t["v"][:, heads]
    width = f(1 / c["scale"] if "scale" in c else K if planted == "divided by K" else math.sqrt(K))
    sees = np.ones((N, 1, T, S), bool)
    if c["causal"] and planted != "sees the future":
        sees &= np.tri(T, S, S - T, dtype=bool)
    if "window" in c:
        sees &= ~np.tri(T, S, S - T - c["window"], dtype=bool)
    if "mask" in t:
        sees &= t["mask"][:, None, None]
    p = softmax_of(mm(t["q"], k.swapaxes(2, 3), planted) / width, np.broadcast_to(sees, (N, H, T, S)), planted)
    dp = mm(t["dy"], v.swapaxes(2, 3), planted)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / width
    dk, dv = np.zeros_like(t["k"]), np.zeros_like(t["v"])
    for h, g in enumerate(heads):
        dk[:, g] += mm(ds[:, h].swapaxes(1, 2), t["q"][:, h], planted)
        dv[:, g] += mm(p[:, h].swapaxes(1, 2), t["dy"][:, h], planted)
    return {"y": mm(p, v, planted)}, {"q": mm(ds, k, planted), "k": dk, "v": dv}


def cross_entropy(t, c, planted):
    counts = t["targets"] != -100
    z, y = t["logits"][counts], t["targets"][counts]
    z = z if planted == "no maximum" else z - z.max(-1, keepdims=True)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    rows = np.arange(len(y))
    losses = np.log(np.exp(z).sum(-1)) - z[rows, y]
    if planted == "log of softmax":
        losses = -np.log(p[rows, y])
    n = f({"sum": 1, "mean over all": len(counts)}.get(planted, len(y)))
    d = p.copy()
    d[rows, y] -= 1
    dlogits = np.zeros_like(t["logits"])
    dlogits[counts] = d / n
    return {"loss": losses.sum() / n}, {"logits": dlogits}


def adamw(t, c, planted):
    p, g = t["p"], t["g"]
    if planted == "coupled decay":
        g = g + f(c["weight_decay"]) * p
    m = f(c["beta1"]) * t["m"] + f(1 - c["beta1"]) * g
    v = f(c["beta2"]) * t["v"] + f(1 - c["beta2"]) * g * g
    c1, c2 = (1, 1) if planted == "no bias correction" else (1 - c["beta1"] ** c["step"], 1 - c["beta2"] ** c["step"])
    by = (m / f(c1)) / (np.sqrt(v / f(c2)) + f(c["eps"]))
    decay = 0 if planted == "coupled decay" else c["weight_decay"] * (1 if planted == "decay not by lr" else c["lr"])
    return {"p": p * f(1 - decay) - f(c["lr"]) * by, "m": m, "v": v}, {}


OPERATIONS = {
    "lora_linear": lora_linear, "merge": merge, "layer_norm": layer_norm, "attention": attention,
    "cross_entropy": cross_entropy, "adamw": adamw, "lora_update": lora_update, "lora_start": lora_start,
    "per_row": per_row, "combine": combine, "linear": linear, "gated_mlp": gated_mlp, "softmax": softmax,
    "sample": sample,
}  # fmt: skip
PRECISIONS = ("TF32 factors", "float16 factors")

# The planted mistake; the ids that show it; how lora-np conform names it.
MISTAKES = [
    ("no alpha / r", ("L2", "L4", "L5"), "the scale s is left out"),
    ("scaled twice", ("L2", "L4", "L5"), "the scale s is applied twice"),
    ("alpha alone", ("L2", "L4", "L5"), "s = alpha, not divided by r"),
    ("rslora ignored", ("L2", "L4", "L5"), "s = alpha / r in a rank-stabilised case"),
    ("rslora always", ("L2", "L4", "L5"), "s = alpha / sqrt(r) in a case that is not rank-stabilised"),
    ("A and B swapped", ("L2", "L4", "L5"), "A and B are swapped"),
    ("fan_in_fan_out", ("L2", "L4"), "W0 is transposed, as fan_in_fan_out stores it"),
    ("mask not scaled", ("L2", "L4"), "the dropout mask is not divided by 1 - p"),
    ("no dropout", ("L2", "L4"), "dropout is left out"),
    ("dropout on the base", ("L2", "L4"), "dropout acts on the base's branch too"),
    ("no bias", ("L2", "L4"), "the bias is left out"),
    ("bias twice", ("L2", "L4"), "the bias is added twice"),
    ("dA without s", ("L4",), "dA lacks the scale s"),
    ("mean over rows", ("L4",), "dA and dB are means over the rows, not sums"),
    ("dx without mask", ("L4",), "dx does not go back through the dropout mask"),
    ("dx without the branch", ("L4",), "dx lacks the low-rank branch"),
    ("subtracted", ("L5",), "the update is subtracted"),
    ("bias merged", ("L5",), "the bias is merged into the weight"),
    ("sample variance", ("T3",), "the variance is over D - 1"),
    ("heads interleaved", ("T10",), "query head h has key/value head h mod G"),
    ("divided by K", ("T9", "T10"), "scores are divided by K, not sqrt(K)"),
    ("sees the future", ("T9", "T10"), "causal attention sees what comes after"),
    ("sum", ("O4", "T15"), "the loss is a sum, not a mean"),
    ("mean over all", ("O4", "T15"), "the mean is over all rows, those left out too"),
    ("coupled decay", ("O1",), "weight decay goes into the gradient, as in Adam"),
    ("no bias correction", ("O1",), "bias correction is left out"),
    ("decay not by lr", ("O1",), "weight decay is not multiplied by the learning rate"),
]

# Mistakes without a name, and the cases that show them.
UNNAMED = [
    ("no maximum", {"T8": {"hundred", "all-below", "largest-masked"}, "T9": {"far"},
                    "T15": {"hundred", "target-below"}, "O4": {"hundred", "target-below"}}),
    ("the largest of all", {"T8": {"largest-masked"}}),
    ("log of softmax", {"T15": {"target-below"}, "O4": {"target-below"}}),
    ("temperature after top_p", {"T16": {"draws", "draws-both"}}),
]  # fmt: skip

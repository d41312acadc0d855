"""Some operations in plain NumPy, sharing no code with the package, in which mistakes can be planted by name."""

import math

import numpy as np

f = np.float32


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
    h = into_base @ W0.T + ((x * m) @ A.T) @ B.T * s
    if planted != "no bias":
        h = h + (b + b if planted == "bias twice" else b)
    if "dh" not in t:
        return {"h": h}, {}
    g, mx = t["dh"].reshape(-1, len(W0)), (x * m).reshape(-1, x.shape[-1])
    dA, dB = s * (g @ B).T @ mx, s * g.T @ (mx @ A.T)
    if swapped:
        dA, dB = dB.T, dA.T
    low = s * (g @ B) @ A
    if planted == "dA without s":
        dA = (g @ B).T @ mx
    if planted == "mean over rows":
        dA, dB = dA / len(g), dB / len(g)
    if planted != "dx without mask":
        low = low * m.reshape(low.shape)
    dx = g @ W0 + (0 if planted == "dx without the branch" else low)
    if planted == "dropout on the base":
        dx = (g @ W0 + s * (g @ B) @ A) * m.reshape(low.shape)
    return {"h": h}, {"x": dx.reshape(x.shape), "A": dA, "B": dB}


def merge(t, c, planted):
    """Only float32: the others need another dtype."""
    if c["dtype"] != "float32":
        return {}, {}
    s, W0, b = scale_of(c, planted), t["W0"], t.get("b", f(0))
    A, B = (t["B"].T, t["A"].T) if planted == "A and B swapped" and W0.shape[0] == W0.shape[1] else (t["A"], t["B"])
    if planted == "subtracted":
        s = -s
    W = W0 + f(s) * (B @ A)
    if planted == "bias merged":
        W = W + np.reshape(b, (-1, 1))
    return {"W": W, "h": t["x"] @ W.T + b}, {}


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
    scores = np.where(sees, t["q"] @ k.swapaxes(2, 3) / width, -np.inf)
    top = scores.max(-1, keepdims=True)
    e = np.exp(scores - np.where(np.isfinite(top), top, 0))
    p = e / np.maximum(e.sum(-1, keepdims=True), f(1e-30))
    dp = t["dy"] @ v.swapaxes(2, 3)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / width
    dk, dv = np.zeros_like(t["k"]), np.zeros_like(t["v"])
    for h, g in enumerate(heads):
        dk[:, g] += ds[:, h].swapaxes(1, 2) @ t["q"][:, h]
        dv[:, g] += p[:, h].swapaxes(1, 2) @ t["dy"][:, h]
    return {"y": p @ v}, {"q": ds @ k, "k": dk, "v": dv}


def cross_entropy(t, c, planted):
    counts = t["targets"] != -100
    z, y = t["logits"][counts], t["targets"][counts]
    z = z - z.max(-1, keepdims=True)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    rows = np.arange(len(y))
    n = f({"sum": 1, "mean over all": len(counts)}.get(planted, len(y)))
    d = p.copy()
    d[rows, y] -= 1
    dlogits = np.zeros_like(t["logits"])
    dlogits[counts] = d / n
    return {"loss": (np.log(np.exp(z).sum(-1)) - z[rows, y]).sum() / n}, {"logits": dlogits}


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
    "cross_entropy": cross_entropy, "adamw": adamw,
}  # fmt: skip

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

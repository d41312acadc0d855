"""Some operations in plain NumPy as a machine has them that stores less than float32, or multiplies less.

Every result is stored, but for what is wide inside. It shares no code with the package.
"""

import math

import numpy as np


def cut(x, bits):
    """float32 rounded to so many bits, ties to even, in its own bits."""
    low = 24 - bits
    raw = np.array(x, dtype=np.float32, order="C").view(np.uint32)
    return ((raw + ((1 << low - 1) - 1) + (raw >> low & 1)) >> low << low).astype(np.uint32).view(np.float32)


def same(x):
    return x


class Machine:
    """store: what a result becomes. factor: what each matrix of a product becomes before it."""

    def __init__(self, dtype="float32", store=same, factor=same):
        self.dtype, self.store, self.factor = np.dtype(dtype), store, factor

    def __call__(self, x):
        """A result of the dtype that is computed in, stored."""
        return self.store(np.asarray(x, dtype=self.dtype))

    def product(self, a, b):
        return self(self.factor(a) @ self.factor(b))


MACHINES = {
    "float64": Machine("float64"),
    "float32": Machine(),
    "tf32": Machine(factor=lambda x: cut(x, 11)),
    "bfloat16": Machine(store=lambda x: cut(x, 8)),
    "float16": Machine(store=lambda x: x.astype(np.float16).astype(np.float32)),
}


def lora_linear(m, t, c, wrong):
    s = m(c["alpha"] / (math.sqrt(c["r"]) if c["rslora"] and not wrong else c["r"]))
    x, W0, A, B = t["x"], t["W0"], t["A"], t["B"]
    mask = m(t["keep"] * m(1 / (1 - c["p"]))) if "keep" in t else None
    mx = x if mask is None else m(x * mask)
    low = m.product(mx, A.T)
    h = m.product(x, W0.T)
    h = m(h + m(m.product(low, B.T) * s))
    h = m(h + t["b"]) if "b" in t else h
    if "dh" not in t:
        return {"h": h}, {}
    g, rows = t["dh"].reshape(-1, len(W0)), mx.reshape(-1, x.shape[-1])
    gB = m(m.product(g, B) * s)
    dx = m.product(gB, A).reshape(x.shape)
    dx = m(m.product(g, W0).reshape(x.shape) + (dx if mask is None else m(dx * mask)))
    return {"h": h}, {"x": dx, "A": m.product(gB.T, rows), "B": m(m.product(g.T, low.reshape(len(g), -1)) * s)}


def linear(m, t, c, wrong):
    x, W, dy = t["x"], t["W"], t["dy"].reshape(-1, len(t["W"]))
    y = m.product(x, W.T)
    grads = {"x": m.product(t["dy"], W), "W": m.product(dy.T, x.reshape(-1, x.shape[-1]))}
    if "b" not in t:
        return {"y": y}, grads
    return {"y": m(y + t["b"] * (0 if wrong else 1))}, {**grads, "b": m(dy.sum(0))}


def rms_norm(m, t, c, wrong):
    """The norm wide inside, and stored before its weight."""
    x, w = t["x"], m(t["w"] + 1) if c.get("one_plus") and not wrong else t["w"]
    eps = m.dtype.type(c["eps"])
    root = np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    xhat, g = m(x / root), m(t["dy"] * w)
    dx = m((g - xhat * (g * xhat).mean(-1, keepdims=True)) / root)
    return {"y": m(xhat * w)}, {"x": dx, "w": m(m(t["dy"] * xhat).sum((0, 1)))}


def attention(m, t, c, wrong):
    """The scores stored, softmax wide inside, and the weights stored."""
    q, (N, H, T, K), (G, S) = t["q"], t["q"].shape, t["k"].shape[1:3]
    heads = [h // (H // G) for h in range(H)]
    k, v = t["k"][:, heads], t["v"][:, heads]
    sees = np.ones((N, 1, T, S), bool)
    if c["causal"] and not wrong:
        sees &= np.tri(T, S, S - T, dtype=bool)
    if "window" in c:
        sees &= ~np.tri(T, S, S - T - c["window"], dtype=bool)
    if "mask" in t:
        sees &= t["mask"][:, None, None]
    s = m(c.get("scale", 1 / math.sqrt(K)))
    scores = np.where(sees, m(m.product(q, k.swapaxes(2, 3)) * s), -np.inf)
    e = np.exp(scores - np.where(sees.any(-1, keepdims=True), scores.max(-1, keepdims=True), 0))
    p = m(e / np.maximum(e.sum(-1, keepdims=True), 1e-30))
    dp = m.product(t["dy"], v.swapaxes(2, 3))
    ds = m(m(p * (dp - (dp * p).sum(-1, keepdims=True))) * s)
    by_head = m.product(ds.swapaxes(2, 3), q), m.product(p.swapaxes(2, 3), t["dy"])
    dk, dv = (m(d.reshape(N, G, H // G, S, K).sum(2)) for d in by_head)
    return {"y": m.product(p, v)}, {"q": m.product(ds, k), "k": dk, "v": dv}


def cross_entropy(m, t, c, wrong):
    """Wide inside."""
    counts = t["targets"] != -100
    z, y = t["logits"][counts], t["targets"][counts]
    z = z - z.max(-1, keepdims=True)
    n, rows = len(counts) if wrong else len(y), np.arange(len(y))
    d = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    d[rows, y] -= 1
    dlogits = np.zeros_like(t["logits"])
    dlogits[counts] = d / n
    return {"loss": m((np.log(np.exp(z).sum(-1)) - z[rows, y]).sum() / n)}, {"logits": m(dlogits)}


OPERATIONS = {
    "lora_linear": lora_linear, "linear": linear, "rms_norm": rms_norm, "attention": attention,
    "cross_entropy": cross_entropy,
}  # fmt: skip

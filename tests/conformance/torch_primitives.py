"""The transformer's primitives and the optimizer, as PyTorch has them."""

import math
from functools import partial

import torch
from on_torch import Masked
from torch.nn import functional as F


def embedding(t, c):
    tables = [name for name in ("tokens", "positions", "types") if name in t]
    scales = {"tokens": c.get("scale", 1.0)}
    return {"x": sum(F.embedding(t[name], t[f"{name}_table"]) * scales.get(name, 1.0) for name in tables)}


ACTIVATIONS = {
    "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu, "relu": F.relu, "tanh": torch.tanh
}  # fmt: skip


def gated_mlp(t, c):
    act = ACTIVATIONS[c.get("activation", "silu")]
    return {"y": (act(t["x"] @ t["W_gate"].T) * (t["x"] @ t["W_up"].T)) @ t["W_down"].T}


def widened(x):
    """What torch.autocast computes in float32, and transformers too: a loss, a norm."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer_norm(x, w, b, eps):
    return F.layer_norm(widened(x), w.shape, widened(w), widened(b), eps).to(x.dtype)


def rms_norm(t, c):
    w = 1 + t["w"] if c.get("one_plus") else t["w"]
    return {"y": F.rms_norm(t["x"], w.shape, w, c["eps"])}


def softmax(t, c):
    p = F.softmax(t["x"].masked_fill(~t["mask"], -math.inf), dim=-1)
    return {"p": torch.where(t["mask"].any(-1, keepdim=True), p, 0.0)}


def sees(N, T, S, causal, mask):
    """(N,1,T,S), true where a query sees a key."""
    visible = torch.ones(N, 1, T, S, dtype=torch.bool)
    if causal:
        visible &= torch.arange(S) <= torch.arange(S - T, S)[:, None]
    return visible if mask is None else visible & mask[:, None, None, :]


def attention(t, c):
    (N, _, T, _), S = t["q"].shape, t["k"].shape[2]
    visible = sees(N, T, S, c["causal"], t.get("mask"))
    if "window" in c:
        visible &= torch.arange(S) > torch.arange(S - T, S)[:, None] - c["window"]
    how = {"attn_mask": visible, "enable_gqa": True, "scale": c.get("scale")}
    return {"y": F.scaled_dot_product_attention(t["q"], t["k"], t["v"], **how)}


def rotary(t, c):
    p = c.get("width", t["x"].shape[-1])
    y = turned(t["x"][..., :p], t["positions"], c["theta"], c.get("factors", [1.0]))
    return {"y": torch.cat([y, t["x"][..., p:]], -1)}


def head_norm(t, c):
    return {"y": turned(F.rms_norm(t["x"], t["w"].shape, t["w"], c["eps"]), t["positions"], c["theta"])}


def t5_side(far, n, last):
    """Buckets of distances on one side, as T5's own code has them."""
    exact = n // 2
    large = exact + (torch.log(far.clamp(min=1) / exact) / math.log(last / exact) * (n - exact)).long()
    return torch.where(far < exact, far, large.clamp(max=n - 1))


def distances(T):
    return torch.arange(T) - torch.arange(T)[:, None]


def score_bias(t, c):
    d, B = distances(c["T"]), len(t["table"])
    if c["causal"]:
        bucket = t5_side((-d).clamp(min=0), B, c["last"])
    else:
        bucket = t5_side(d.abs(), B // 2, c["last"]) + (d > 0) * (B // 2)
    return {"b": t["table"][bucket].permute(2, 0, 1)}


def disentangled(t, c):
    """As DeBERTa-v2 gathers them: a key's scores for all distances, transposed."""
    q, k = t["q"], t["k"]
    d, B = -distances(q.shape[2]), t["k_far"].shape[1] // 2
    mid = B // 2
    log = torch.ceil(torch.log(d.abs().clamp(min=1) / mid) / math.log((c["last"] - 1) / mid) * (mid - 1)) + mid
    rows = (
        (torch.where(d.abs() <= mid, d, (log * d.sign()).long()) + B).clamp(0, 2 * B - 1).expand(*q.shape[:2], -1, -1)
    )
    to_query = (q @ t["k_far"].mT).gather(-1, rows)
    to_key = (k @ t["q_far"].mT).gather(-1, rows.mT).mT
    return {"z": (q @ k.mT + to_query + to_key) / math.sqrt(3 * q.shape[-1])}


def cross_attention(t, c):
    (N, T, D), S = t["x"].shape, t["X"].shape[1]
    q, k, v = ((t[x] @ t[f"W_{one}"].T).view(N, -1, c["n_head"], D // c["n_head"]).transpose(1, 2)
               for one, x in (("q", "x"), ("k", "X"), ("v", "X")))  # fmt: skip
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=sees(N, T, S, False, t.get("source_mask")))
    return {"y": y.transpose(1, 2).reshape(N, T, D) @ t["W_o"].T}


def turned(x, positions, theta, factors=(1.0,)):
    K, wide = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
    rates = theta ** (-torch.arange(0, K, 2, dtype=wide) / K) / torch.tensor(factors, dtype=wide)
    angles = positions[..., None] * rates
    angles = torch.cat([angles, angles], -1)
    angles = angles if positions.ndim == 1 else angles[:, None]
    half = torch.cat([-x[..., K // 2 :], x[..., : K // 2]], -1)
    return x * angles.cos().to(x.dtype) + half * angles.sin().to(x.dtype)


def dropout(t, c):
    return {"y": Masked(t["keep"], c["p"])(t["x"])}


def adamw(t, c):
    p = torch.nn.Parameter(t["p"].detach().clone())
    rates = {"lr": c["lr"], "betas": (c["beta1"], c["beta2"]), "eps": c["eps"], "weight_decay": c["weight_decay"]}
    optimizer = torch.optim.AdamW([p], **rates)
    m, v = t["m"].detach().clone(), t["v"].detach().clone()
    optimizer.state[p] = {"step": torch.tensor(c["step"] - 1.0), "exp_avg": m, "exp_avg_sq": v}
    p.grad = t["g"].detach()
    optimizer.step()
    return {"p": p, "m": m, "v": v}


def clip(t, c):
    parameters = {name: torch.nn.Parameter(torch.zeros_like(g)) for name, g in t.items()}
    for name, p in parameters.items():
        p.grad = t[name].detach().clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), c["max_norm"])
    return {"norm": norm, **{f"clipped_{name}": p.grad for name, p in parameters.items()}}


def sample(t, c):
    logits, order = t["logits"].sort(descending=True, stable=True)
    p = F.softmax(logits / c["temperature"], dim=-1)
    if c["top_k"] is not None:
        p[:, c["top_k"] :] = 0
    p = p / p.sum(-1, keepdim=True)
    if c["top_p"] is not None:
        p = torch.where(p.cumsum(-1) - p < c["top_p"], p, 0.0)
    p = p / p.sum(-1, keepdim=True)
    first = (p.cumsum(-1) < t["u"][:, None]).sum(-1, keepdim=True)
    return {"tokens": order.gather(-1, first)[:, 0]}


def singular(X, k):
    """The k leading singular directions of X, as rows, on both sides, and all singular values."""
    U, S, Vh = torch.linalg.svd(X)
    return U.T[:k], S, Vh[:k]


def subspace_similarity(t, c):
    V, other = (singular(A, len(A))[2] for A in (t["A"], t["other"]))
    i, j = (torch.arange(1, len(one) + 1) for one in (V, other))
    return {"phi": (V @ other.T).square().cumsum(0).cumsum(1) / torch.minimum(i[:, None], j)}


def amplification(dW, t, c):
    U, _, V = singular(dW, c["r"])
    norms = {"update": dW.norm(), "in_update": (U @ t["W0"] @ V.T).norm()}
    norms["in_weight"] = singular(t["W0"], 0)[1][: c["r"]].norm()
    return {**norms, "factor": norms["update"] / norms["in_update"]}


OPERATIONS = {
    "embedding": embedding, "gated_mlp": gated_mlp, "softmax": softmax, "attention": attention, "dropout": dropout,
    "linear": lambda t, c: {"y": F.linear(t["x"], t["W"], t.get("b"))},
    "layer_norm": lambda t, c: {"y": layer_norm(t["x"], t["w"], t["b"], c["eps"])},
    "rms_norm": rms_norm, "rotary": rotary, "head_norm": head_norm, "score_bias": score_bias,
    "disentangled": disentangled, "cross_attention": cross_attention, "relu": lambda t, c: {"y": F.relu(t["x"])},
    "gelu": lambda t, c: {"y": F.gelu(t["x"])}, "gelu_tanh": lambda t, c: {"y": F.gelu(t["x"], approximate="tanh")},
    "silu": lambda t, c: {"y": F.silu(t["x"])},
    "cross_entropy": lambda t, c: {"loss": F.cross_entropy(widened(t["logits"]), t["targets"])},
    "adamw": adamw, "clip": clip, "sample": sample, "subspace_similarity": subspace_similarity,
}  # fmt: skip

"""The transformer's primitives and the optimizer, as PyTorch has them."""

import math

import torch
from on_torch import Masked
from torch.nn import functional as F


def embedding(t, c):
    tables = [name for name in ("tokens", "positions", "types") if name in t]
    return {"x": sum(F.embedding(t[name], t[f"{name}_table"]) for name in tables)}


def gated_mlp(t, c):
    return {"y": (F.silu(t["x"] @ t["W_gate"].T) * (t["x"] @ t["W_up"].T)) @ t["W_down"].T}


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
    return {"y": F.scaled_dot_product_attention(t["q"], t["k"], t["v"], attn_mask=visible, enable_gqa=True)}


def turned(x, positions, theta):
    K = x.shape[-1]
    angles = positions[..., None] * (theta ** (-torch.arange(0, K, 2, dtype=x.dtype) / K))
    angles = torch.cat([angles, angles], -1)
    angles = angles if positions.ndim == 1 else angles[:, None]
    half = torch.cat([-x[..., K // 2 :], x[..., : K // 2]], -1)
    return x * angles.cos() + half * angles.sin()


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
    "layer_norm": lambda t, c: {"y": F.layer_norm(t["x"], t["w"].shape, t["w"], t["b"], c["eps"])},
    "rms_norm": lambda t, c: {"y": F.rms_norm(t["x"], t["w"].shape, t["w"], c["eps"])},
    "gelu": lambda t, c: {"y": F.gelu(t["x"])}, "gelu_tanh": lambda t, c: {"y": F.gelu(t["x"], approximate="tanh")},
    "silu": lambda t, c: {"y": F.silu(t["x"])},
    "rotary": lambda t, c: {"y": turned(t["x"], t["positions"], c["theta"])},
    "cross_entropy": lambda t, c: {"loss": F.cross_entropy(t["logits"], t["targets"])},
    "adamw": adamw, "clip": clip, "sample": sample, "subspace_similarity": subspace_similarity,
}  # fmt: skip

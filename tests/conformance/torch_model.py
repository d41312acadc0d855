"""A whole transformer in PyTorch, each adapted matrix a layer of PEFT's."""

import torch
from on_torch import linear_of
from torch.nn import functional as F
from torch_primitives import ACTIVATIONS, layer_norm, sees, turned, widened


def model(adapted, t, c):
    """adapted: makes such a layer."""

    def project(name, x):
        W = t[f"{name}.weight"] if f"{name}.weight" in t else t["embed.tokens"]
        bias = t.get(f"{name}.bias")
        stem, _, part = name.rpartition(".")
        fused = f"{stem}.qkv" if part in ("q", "k", "v") and f"{stem}.qkv.A" in t else None
        if fused or f"{name}.A" in t:
            A, B = t[f"{fused or name}.A"], t[f"{fused or name}.B"]
            layer = adapted(linear_of(W), [(A, B, {**c, "r": len(A)})])[1]
            low = layer.lora_B["0"](layer.lora_A["0"](x)) * layer.scaling["0"]
            before = {"q": "", "k": "q", "v": "qk"}[part] if fused else ""
            at = sum(len(t[f"{stem}.{one}.weight"]) for one in before)
            return F.linear(x, W, bias) + low[..., at : at + len(W)]
        return F.linear(x, W, bias)

    def norm(name, x):
        w = t[f"{name}.weight"]
        if c["norm"] == "rms":
            return F.rms_norm(x, w.shape, w, c["eps"])
        return layer_norm(x, w, t[f"{name}.bias"], c["eps"])

    def attend(name, x):
        split = lambda y, heads: y.view(N, T, heads, -1).transpose(1, 2)  # noqa: E731
        q = split(project(f"{name}.q", x), c["n_head"])
        k, v = (split(project(f"{name}.{part}", x), c["n_kv_head"]) for part in "kv")
        if c["positions"] == "rotary":
            q, k = turned(q, positions, c["rope_theta"]), turned(k, positions, c["rope_theta"])
        if P:
            own = (t[f"{name}.prefix.{part}"].expand(N, -1, -1, -1) for part in "kv")
            k, v = (torch.cat([prefix, x], 2) for prefix, x in zip(own, (k, v), strict=True))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        return project(f"{name}.o", y.transpose(1, 2).reshape(N, T, -1))

    def feed(name, x):
        up = project(f"{name}.up", x)
        if c["activation"] == "silu_gated":
            return project(f"{name}.down", F.silu(project(f"{name}.gate", x)) * up)
        return project(f"{name}.down", F.gelu(up, approximate="none" if c["activation"] == "gelu" else "tanh"))

    (N, T), mask, P = t["tokens"].shape, t.get("mask"), c.get("prefix", 0)
    positions = torch.arange(T) if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    seen = mask if mask is None else torch.cat([torch.ones(N, P, dtype=torch.bool), mask], 1)
    visible = sees(N, T, P + T, c["causal"], seen)
    x = t["embed.tokens"][t["tokens"]]
    if c["positions"] == "learned":
        x = x + t["embed.positions"][positions + c["position_offset"]]
    if "token_types" in t:
        x = x + t["embed.types"][t["token_types"]]
    x = x if c["norm_first"] else norm("embed.norm", x)
    for i in range(c["n_layer"]):
        for half, f in (("norm1", lambda x, i=i: attend(f"layers.{i}.attn", x)),
                        ("norm2", lambda x, i=i: feed(f"layers.{i}.mlp", x))):  # fmt: skip
            name = f"layers.{i}.{half}"
            y = f(norm(name, x) if c["norm_first"] else x)
            y = norm(f"{name}_out", y) if c.get("norm_outputs") else y
            x = x + y if c["norm_first"] else norm(name, x + y)
    x = norm("norm", x) if c["norm_first"] else x
    if c["head"] == "classify":
        true = torch.ones(N, T, dtype=torch.bool) if mask is None else mask
        read = [row.nonzero()[-1 if c["causal"] else 0].item() for row in true]
        x = x[torch.arange(N), read]
        x = x if c["causal"] else ACTIVATIONS[c.get("pooler", "tanh")](project("pooler", x))
    logits = project("head", x * c.get("head_scale", 1.0))
    if "targets" not in t:
        return {"logits": logits}
    return {"logits": logits, "loss": F.cross_entropy(widened(logits).flatten(0, -2), t["targets"].flatten())}


def generate(adapted, t, c):
    """A text at a time."""
    texts = [continued(adapted, *alone(t, c, n)) for n in range(len(t["tokens"]))]
    return {name: torch.cat([text[name] for text in texts]) for name in ("tokens", "logits")}


def alone(t, c, n):
    """One text, and its own adapter if there are some."""
    own = {**t, **{name: t[name][n : n + 1] for name in ("tokens", "mask") if name in t}}
    if "rows" not in t or t["rows"][n] < 0:
        return own, c
    stem = f"adapters.{t['rows'][n]}."
    own |= {name.removeprefix(stem): a for name, a in t.items() if name.startswith(stem)}
    return own, {**c, **c["adapters"][t["rows"][n]]}


def continued(adapted, t, c):
    chosen = []
    for _ in range(c["n"]):
        chosen.append(model(adapted, t, c)["logits"][:, -1:])
        t = {**t, "tokens": torch.cat([t["tokens"], chosen[-1].argmax(-1)], 1)}
        if "mask" in t:
            t["mask"] = torch.cat([t["mask"], torch.ones(1, 1, dtype=torch.bool)], 1)
    return {"tokens": t["tokens"], "logits": torch.cat(chosen, 1)}

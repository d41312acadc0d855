"""litgpt beside the vectors: its LoRA layers, merged too, and its Llama with LoRA on any matrix, forward and backward.

python with_litgpt.py VECTORS RESULTS

It has no rank-stabilised scale, keeps nothing to unmerge, and draws tokens with a generator of its own.
"""

import sys
from pathlib import Path

import litgpt.generate.base
import litgpt.model
import litgpt.utils
import torch
from litgpt import lora
from litgpt.finetune.lora import get_lr_scheduler
from llamas import is_llama
from offered import not_stabilised
from on_torch import Masked, linear_of, rates, run

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MLP = {"gate": "mlp.fc_1", "up": "mlp.fc_2", "down": "mlp.proj"}  # our names and theirs


def layer_of(t, c):
    n_out, n_in = t["W0"].shape
    layer = lora.LoRALinear(n_in, n_out, r=c["r"], lora_alpha=c["alpha"], bias="b" in t)
    layer.linear = linear_of(t["W0"], t.get("b"))
    layer.lora_A, layer.lora_B = t["A"], t["B"]
    if "keep" in t:
        layer.lora_dropout = Masked(t["keep"], c["p"])
    return layer


def lora_update(t, c):
    layer = layer_of({**t, "W0": torch.zeros(len(t["B"]), t["A"].shape[1])}, c)
    return {"dW": layer.get_lora_AB(), "s": torch.tensor(layer.scaling)}


def lora_linear(t, c):
    return {"h": layer_of(t, c)(t["x"])}


def lora_start(t, c):
    h = lora_linear(t, c)["h"]
    return {"h": h, "difference": (h - linear_of(t["W0"], t["b"])(t["x"])).detach()}


def merge(t, c):
    layer = layer_of({**t, "W0": t["W0"].detach().to(DTYPES[c["dtype"]])}, c)
    layer.merge()
    W = layer.linear.weight.detach().float()
    return {"W": W, "h": torch.nn.functional.linear(t["x"], W, t.get("b"))}


def count(t, c):
    total = 0
    for matrices, n_out, n_in, r in zip(*(t[name].tolist() for name in ("matrices", "out", "in", "r")), strict=True):
        with torch.device("meta"):
            layer = lora.LoRALinear(n_in, n_out, r=r)
        lora.mark_only_lora_as_trainable(layer)
        total += matrices * litgpt.utils.num_parameters(layer, requires_grad=True)
    return {"parameters": torch.tensor(total)}


# --- The transformer's parts ------------------------------------------------------------------------------------------


def rms_norm(t, c):
    norm = litgpt.model.RMSNorm(len(t["w"]), eps=c["eps"], add_unit_offset=c.get("one_plus", False))
    norm.weight = t["w"]
    return {"y": norm(t["x"])}


def gated_mlp(t, c):
    kind = {"silu": "LLaMAMLP", "gelu": "GemmaMLP", "gelu_tanh": "GemmaMLP"}.get(c.get("activation", "silu"))
    if kind is None:
        return None
    F, D = t["W_gate"].shape
    how = "tanh" if c.get("activation") == "gelu_tanh" else "none"
    config = lora.Config(n_embd=D, n_head=1, intermediate_size=F, bias=False, mlp_class_name=kind, gelu_approximate=how)
    own = {f"{theirs.removeprefix('mlp.')}.weight": t[f"W_{ours}"] for ours, theirs in MLP.items()}
    return {"y": torch.func.functional_call(getattr(litgpt.model, kind)(config), own, (t["x"],))}


def rotary(t, c):
    factors, p = c.get("factors"), c.get("width", t["x"].shape[-1])
    if factors and len(factors) > 1:
        return None  # it takes what such factors come from, not the factors
    scaled = {"factor": factors[0]} if factors else None
    cos, sin = (
        table[t["positions"]].view(-1, t["x"].shape[2], p)
        for table in litgpt.model.build_rope_cache(
            int(t["positions"].max()) + 1, p, base=c["theta"], extra_config=scaled
        )
    )
    return {"y": torch.cat([litgpt.model.apply_rope(t["x"][..., :p], cos, sin), t["x"][..., p:]], -1)}


def attention(t, c):
    """Its module with identities and no rotation: queries, keys and values are parts of its input."""
    (N, H, T, K), (_, G, S, _) = t["q"].shape, t["k"].shape
    if T != S:
        return None
    sizes = {"n_embd": (H + 2 * G) * K, "n_head": H, "n_query_groups": G, "head_size": K, "rotary_percentage": 0.0}
    config = lora.Config(
        **sizes, n_layer=1, bias=False, sliding_window_size=c.get("window"),
        attention_scores_scalar=c["scale"] ** -2 if "scale" in c else None,
    )  # fmt: skip
    module = litgpt.model.CausalSelfAttention(config, 0)
    module.qkv, module.proj = linear_of(torch.eye(config.n_embd)), linear_of(torch.eye(config.n_embd, H * K))
    x = torch.cat([t[name].transpose(1, 2).reshape(N, T, -1) for name in "qkv"], -1)
    visible = None
    if "mask" in t or not c["causal"]:
        visible = torch.ones(N, 1, T, S, dtype=torch.bool) if "mask" not in t else t["mask"][:, None, None, :]
        visible = visible & torch.ones(T, S, dtype=torch.bool).tril() if c["causal"] else visible.expand(N, 1, T, S)
    none = torch.zeros(1, T, 0)
    return {"y": module(x, none, none, visible)[..., : H * K].view(N, T, H, K).transpose(1, 2)}


def cross_entropy(t, c):
    return {
        "loss": litgpt.utils.chunked_cross_entropy(t["logits"], t["targets"], len(t["logits"]) // c.get("shards", 1))
    }


# --- A whole Llama ----------------------------------------------------------------------------------------------------

LORA = {"q": "query", "k": "key", "v": "value", "o": "projection", "head": "head"}


def llama(t, c):
    """The model, and its tensors by its own names. None for other architectures."""
    if not is_llama(t, c, "norm_outputs", "qkv"):
        return None
    adapted = set(c.get("adapted", ()))
    config = lora.Config(
        block_size=c["n_positions"], n_layer=c["n_layer"], n_embd=c["d_model"], padded_vocab_size=c["vocab_size"],
        vocab_size=c["vocab_size"], n_head=c["n_head"], n_query_groups=c["n_kv_head"], intermediate_size=c["d_ff"],
        head_size=c.get("d_head"), norm_class_name="RMSNorm", norm_eps=c["eps"], parallel_residual=False, bias=False,
        rotary_percentage=1.0, rope_base=c["rope_theta"], mlp_class_name="LLaMAMLP",
        post_attention_norm=c.get("norm_outputs", False), post_mlp_norm=c.get("norm_outputs", False),
        lora_r=c.get("r", 0), lora_alpha=c.get("alpha", 1), lora_mlp="gate" in adapted,
        **{f"lora_{theirs}": ours in adapted or (ours in "qkv" and "qkv" in adapted) for ours, theirs in LORA.items()},
    )  # fmt: skip
    head = t["embed.tokens"] if c["tie_head"] else t["head.weight"]
    own = {
        "transformer.wte.weight": t["embed.tokens"],
        "lm_head.linear.weight": head,
        "transformer.ln_f.weight": t["norm.weight"],
    }
    if "head" in adapted:
        own |= {"lm_head.lora_A": t["head.A"], "lm_head.lora_B": t["head.B"]}
    for i in range(c["n_layer"]):
        there, here = f"transformer.h.{i}", f"layers.{i}"
        norms = {"norm1": "norm_1", "norm2": "norm_2", "norm1_out": "post_attention_norm", "norm2_out": "post_mlp_norm"}
        own |= {
            f"{there}.{theirs}.weight": t[f"{here}.{ours}.weight"]
            for ours, theirs in norms.items()
            if f"{here}.{ours}.weight" in t
        }
        own[f"{there}.attn.qkv.linear.weight"] = torch.cat([t[f"{here}.attn.{part}.weight"] for part in "qkv"])
        if "qkv" in adapted:  # one A for all three, of which it has one each
            A, B = (t[f"{here}.attn.qkv.{X}"] for X in "AB")
            own |= {f"{there}.attn.qkv.lora_A": torch.cat([A, A, A]), f"{there}.attn.qkv.lora_B": B}
        parts = [part for part in "qkv" if part in adapted]
        if parts:
            own |= {
                f"{there}.attn.qkv.lora_{X}": torch.cat([t[f"{here}.attn.{part}.{X}"] for part in parts]) for X in "AB"
            }
        for ours, theirs in {"attn.o": "attn.proj", **{f"mlp.{name}": there for name, there in MLP.items()}}.items():
            own[f"{there}.{theirs}.linear.weight"] = t[f"{here}.{ours}.weight"]
            if f"{here}.{ours}.A" in t:
                own |= {f"{there}.{theirs}.lora_{X}": t[f"{here}.{ours}.{X}"] for X in "AB"}
    return lora.GPT(config), own


def model(t, c):
    made = llama(t, c)
    if made is None:
        return None
    logits = torch.func.functional_call(*made, (t["tokens"],))
    return {"logits": logits, "loss": litgpt.utils.chunked_cross_entropy(logits, t["targets"])}


def generate(t, c):
    made = llama(t, c)
    if made is None:
        return None
    net, own = made
    net.load_state_dict(own)
    net.eval()
    rows = []
    for row in t["tokens"]:
        net.set_kv_cache(1)
        rows.append(litgpt.generate.base.generate(net, row, len(row) + c["n"], temperature=0.0, top_p=0.0))
        net.clear_kv_cache()
    return {"tokens": torch.stack(rows)}


def warmup_cosine(t, c):
    if c["warmup"] == 0:
        return None  # by which it divides
    return rates(get_lr_scheduler, t, c)


OPERATIONS = {
    **{f.__name__: not_stabilised(f) for f in (lora_update, lora_linear, lora_start, merge)},
    **{f.__name__: f for f in (
      count, rms_norm, gated_mlp, rotary, attention, cross_entropy, model, generate, warmup_cosine)},
}  # fmt: skip

if __name__ == "__main__":
    run(OPERATIONS, Path(sys.argv[1]), Path(sys.argv[2]))

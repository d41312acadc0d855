"""transformers with PEFT beside the vectors: its GPT-2, Llama and BERT, adapted by PEFT, and their parts.

python with_transformers.py VECTORS RESULTS

LoRA on GPT-2 is on its fused c_attn. Its classifier finds padding by a token's number: what is masked becomes one more.
"""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import torch
import transformers
from llamas import is_llama
from on_torch import rates, run
from torch.func import functional_call
from torch_primitives import sees
from transformers.activations import GELUActivation, NewGELUActivation
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.models.bart.modeling_bart import BartAttention
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama as llama
from transformers.models.t5.modeling_t5 import T5Attention

NAMES = {"attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
         "attn.o": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
         "mlp.down": "mlp.down_proj", "norm1": "input_layernorm", "norm2": "post_attention_layernorm"}  # fmt: skip
BERT = {"attn.q": "attention.self.query", "attn.k": "attention.self.key", "attn.v": "attention.self.value",
        "attn.o": "attention.output.dense", "norm1": "attention.output.LayerNorm", "mlp.up": "intermediate.dense",
        "mlp.down": "output.dense", "norm2": "output.LayerNorm"}  # fmt: skip
GPT2 = {"norm1": "ln_1", "norm2": "ln_2", "attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
        "attn.qkv": "attn.c_attn"}  # fmt: skip
ENDS = ("weight", "bias", "A", "B")


def moved(t, here, there, turned=False):
    """A module's tensors under its name there; turned: (in, out), as Conv1D has a matrix."""
    ends = [end for end in ENDS if f"{here}.{end}" in t]
    return {
        f"{there}.{end}": t[f"{here}.{end}"].T if turned and end == "weight" else t[f"{here}.{end}"] for end in ends
    }


def a_llama(t, c):
    config = transformers.LlamaConfig(
        vocab_size=c["vocab_size"], hidden_size=c["d_model"], intermediate_size=c["d_ff"],
        num_hidden_layers=c["n_layer"], num_attention_heads=c["n_head"], num_key_value_heads=c["n_kv_head"],
        rms_norm_eps=c["eps"], max_position_embeddings=c["n_positions"],
        rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]},
        tie_word_embeddings=False, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    own = {"model.embed_tokens.weight": t["embed.tokens"], **moved(t, "norm", "model.norm")}
    own |= {"lm_head.weight": t["embed.tokens"], **moved(t, "head", "lm_head")}
    for i in range(c["n_layer"]):
        for ours, theirs in NAMES.items():
            own |= moved(t, f"layers.{i}.{ours}", f"model.layers.{i}.{theirs}")
    return transformers.LlamaForCausalLM(config), own


def a_gpt2(t, c):
    classifies = c["head"] == "classify"
    V = c["vocab_size"] + classifies
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=c["n_positions"], n_embd=c["d_model"], n_layer=c["n_layer"], n_head=c["n_head"],
        n_inner=c["d_ff"], layer_norm_epsilon=c["eps"], num_labels=c.get("n_labels", 2), tie_word_embeddings=False,
        pad_token_id=V - 1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    E = t["embed.tokens"]
    own = {"transformer.wte.weight": torch.cat([E, torch.zeros_like(E[:1])]) if classifies else E}
    own |= {"transformer.wpe.weight": t["embed.positions"], **moved(t, "norm", "transformer.ln_f")}
    head = "score" if classifies else "lm_head"
    own |= {f"{head}.weight": E, **moved(t, "head", head)}
    for i in range(c["n_layer"]):
        for end in ("weight", "bias"):
            fused = torch.cat([t[f"layers.{i}.attn.{part}.{end}"] for part in "qkv"])
            own[f"transformer.h.{i}.attn.c_attn.{end}"] = fused.T
        for ours, theirs in GPT2.items():
            own |= moved(t, f"layers.{i}.{ours}", f"transformer.h.{i}.{theirs}", turned="norm" not in ours)
    kind = transformers.GPT2ForSequenceClassification if classifies else transformers.GPT2LMHeadModel
    return kind(config), own


def a_bert(t, c):
    config = transformers.BertConfig(
        vocab_size=c["vocab_size"], hidden_size=c["d_model"], num_hidden_layers=c["n_layer"],
        intermediate_size=c["d_ff"], num_attention_heads=c["n_head"], max_position_embeddings=c["n_positions"],
        type_vocab_size=c["n_types"], layer_norm_eps=c["eps"], num_labels=c["n_labels"], pad_token_id=None,
    )  # fmt: skip
    table = "bert.embeddings"
    kinds = {"word": "tokens", "position": "positions", "token_type": "types"}
    own = {f"{table}.{theirs}_embeddings.weight": t[f"embed.{ours}"] for theirs, ours in kinds.items()}
    own |= {**moved(t, "embed.norm", f"{table}.LayerNorm"), **moved(t, "head", "classifier")}
    own |= moved(t, "pooler", "bert.pooler.dense")
    for i in range(c["n_layer"]):
        for ours, theirs in BERT.items():
            own |= moved(t, f"layers.{i}.{ours}", f"bert.encoder.layer.{i}.{theirs}")
    tags = c["head"] == "tag"
    return (transformers.BertForTokenClassification if tags else transformers.BertForSequenceClassification)(
        config
    ), own


def made(t, c):
    """The model, adapted by PEFT, and its tensors by its own names; None for what it cannot be."""
    beside = ("prefix", "norm_outputs", "adapters", "position_offset")
    if any(c.get(one) for one in beside) or c.get("head_scale", 1) != 1 or c.get("pooler", "tanh") != "tanh":
        return None
    shape = (c["norm"], c["norm_first"], c["activation"], c["causal"])
    if is_llama({}, c, "rslora", "split", "rank_pattern"):
        net, own = a_llama(t, c)
    elif shape == ("layer", True, "gelu_tanh", True) and not {"q", "k", "v"} & set(c.get("adapted", ())):
        net, own = a_gpt2(t, c)
    elif shape == ("layer", False, "gelu", False) and c["head"] != "lm":
        net, own = a_bert(t, c)
    else:
        return None
    net.set_attn_implementation("eager")
    adapted = [name.removesuffix(".A") for name in own if name.endswith(".A")]
    if adapted:
        how = {"r": c["r"], "lora_alpha": c["alpha"], "use_rslora": c["rslora"], "target_modules": adapted}
        ranks = {name: len(own[f"{name}.A"]) for name in adapted}
        turned = any("c_attn" in name for name in adapted)
        net = peft.get_peft_model(net, peft.LoraConfig(**how, rank_pattern=ranks, fan_in_fan_out=turned))
        inside = "base_model.model."
        for name in adapted:
            own |= {f"{name}.lora_{X}.default.weight": own.pop(f"{name}.{X}") for X in "AB"}
            own |= {f"{name}.base_layer.{end}": own.pop(f"{name}.{end}") for end in ENDS if f"{name}.{end}" in own}
        own = {inside + name: value for name, value in own.items()}
    return net.eval(), own


def model(t, c):
    got = made(t, c)
    if got is None:
        return None
    net, own = got
    tokens, how = t["tokens"], {}
    if "mask" in t:
        how = {"attention_mask": t["mask"].long(), "position_ids": (t["mask"].cumsum(1) - 1).clamp(min=0)}
        if isinstance(net, transformers.GPT2ForSequenceClassification):
            tokens = tokens.masked_fill(~t["mask"], c["vocab_size"])
    if "token_types" in t:
        how["token_type_ids"] = t["token_types"]
    logits = functional_call(net, own, (tokens,), how)["logits"]
    return {"logits": logits, "loss": fixed_cross_entropy(logits.flatten(0, -2), t["targets"].flatten())}


def generate(t, c):
    got = made(t, c)
    if got is None:
        return None
    net, own = got
    net.load_state_dict(own, strict=False)
    mask = t["mask"] if "mask" in t else torch.ones_like(t["tokens"], dtype=torch.bool)
    about = {"do_sample": False, "max_new_tokens": c["n"], "output_logits": True, "return_dict_in_generate": True}
    found = net.generate(t["tokens"], attention_mask=mask.long(), **about)
    return {"tokens": found.sequences, "logits": torch.stack(found.logits, 1)}


def merge_model(t, c):
    got = made(t, c)
    if got is None:
        return None
    net, own = got
    dtype = getattr(torch, c["dtype"])
    given = {name: (value if "lora_" in name else value.to(dtype)).detach().clone() for name, value in own.items()}
    net.load_state_dict(given, strict=False, assign=True)
    state = {name: value.float() for name, value in net.merge_and_unload().state_dict().items()}
    stem, table, layers, norm, names = (
        ("model", "embed_tokens", "layers", "norm", NAMES)
        if c["norm"] == "rms"
        else ("transformer", "wte", "h", "ln_f", GPT2)
    )
    found = {"embed.tokens": state[f"{stem}.{table}.weight"], "head.weight": state["lm_head.weight"]}
    found |= {"embed.positions": state["transformer.wpe.weight"]} if names is GPT2 else {}
    for end in ("weight", "bias"):
        places = {"norm": f"{stem}.{norm}"}
        for i in range(c["n_layer"]):
            places |= {f"layers.{i}.{ours}": f"{stem}.{layers}.{i}.{theirs}" for ours, theirs in names.items()}
        for ours, theirs in places.items():
            value = state.get(f"{theirs}.{end}")
            if value is None:
                continue
            value = value.T if names is GPT2 and value.ndim == 2 else value
            parts = zip("qkv", value.chunk(3), strict=True) if ours.endswith("qkv") else [("", value)]
            found |= {f"{ours.removesuffix('qkv')}{part}.{end}": one for part, one in parts}
    return found


# --- Their parts ------------------------------------------------------------------------------------------------------


def rms_norm(t, c):
    norm = (GemmaRMSNorm if c.get("one_plus") else llama.LlamaRMSNorm)(len(t["w"]), eps=c["eps"])
    norm.weight = t["w"]
    return {"y": norm(t["x"])}


def gated_mlp(t, c):
    F, D = t["W_gate"].shape
    act = {"gelu_tanh": "gelu_new"}.get(c.get("activation"), c.get("activation", "silu"))
    net = llama.LlamaMLP(
        transformers.LlamaConfig(hidden_size=D, intermediate_size=F, hidden_act=act, num_attention_heads=1)
    )
    own = {f"{part}_proj.weight": t[f"W_{part}"] for part in ("gate", "up", "down")}
    return {"y": functional_call(net, own, (t["x"],))}


def turned(x, positions, theta, factors=()):
    scaled = {"rope_type": "linear", "factor": factors[0]} if factors else {"rope_type": "default"}
    config = transformers.LlamaConfig(head_dim=x.shape[-1], rope_parameters={**scaled, "rope_theta": theta})
    cos, sin = llama.LlamaRotaryEmbedding(config)(x, positions.expand(len(x), -1))
    return llama.apply_rotary_pos_emb(x, x, cos, sin)[0]


def rotary(t, c):
    if len(c.get("factors", ())) > 1 or "width" in c:
        return None
    return {"y": turned(t["x"], t["positions"], c["theta"], c.get("factors", ()))}


def head_norm(t, c):
    return {"y": turned(rms_norm(t, c)["y"], t["positions"], c["theta"])}


def attention(t, c):
    (N, H, T, K), (_, G, S, _) = t["q"].shape, t["k"].shape
    visible = sees(N, T, S, c["causal"], t.get("mask"))
    if "window" in c:
        visible = visible & (torch.arange(S) > torch.arange(S - T, S)[:, None] - c["window"])
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    layer = SimpleNamespace(num_key_value_groups=H // G, training=False)
    scale = c.get("scale", 1 / math.sqrt(K))
    return {"y": llama.eager_attention_forward(layer, t["q"], t["k"], t["v"], mask, scale)[0].transpose(1, 2)}


def cross_attention(t, c):
    (N, T, D), S = t["x"].shape, t["X"].shape[1]
    config = transformers.BartConfig(attn_implementation="eager")
    net = BartAttention(D, c["n_head"], bias=False, is_decoder=True, config=config, layer_idx=0).eval()
    own = {f"{part}_proj.weight": t[f"W_{part[0]}"] for part in ("q", "k", "v", "out")}
    visible = sees(N, T, S, False, t.get("source_mask"))
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    return {"y": functional_call(net, own, (t["x"],), {"key_value_states": t["X"], "attention_mask": mask})[0]}


def score_bias(t, c):
    B, H = t["table"].shape
    config = transformers.T5Config(num_heads=H, relative_attention_num_buckets=B, is_decoder=c["causal"],
                                   relative_attention_max_distance=c["last"])  # fmt: skip
    net = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    net.relative_attention_bias.weight = t["table"]
    return {"b": net.compute_bias(c["T"], c["T"])[0]}


def cross_entropy(t, c):
    parts, counted = c.get("shards", 1), (t["targets"] != -100).sum()
    pairs = zip(t["logits"].chunk(parts), t["targets"].chunk(parts), strict=True)
    return {"loss": sum(fixed_cross_entropy(*pair, num_items_in_batch=counted) for pair in pairs)}


def sample(t, c):
    """The probabilities are theirs; of these a token is drawn by u, the likeliest first."""
    z = TemperatureLogitsWarper(c["temperature"])(None, t["logits"].detach())
    z = z if c["top_k"] is None else TopKLogitsWarper(c["top_k"])(None, z)
    z = z if c["top_p"] is None else TopPLogitsWarper(c["top_p"])(None, z)
    p, order = z.softmax(-1).sort(descending=True, stable=True)
    first = (p.cumsum(-1) < t["u"][:, None]).sum(-1, keepdim=True)
    return {"tokens": order.gather(-1, first)[:, 0]}


def warmup_cosine(t, c):
    return rates(transformers.get_cosine_schedule_with_warmup, t, c)


OPERATIONS = {
    f.__name__: f
    for f in (model, generate, merge_model, rms_norm, gated_mlp, rotary, head_norm, attention, cross_attention,
              score_bias, cross_entropy, sample, warmup_cosine)
}  # fmt: skip
OPERATIONS["gelu"] = lambda t, c: {"y": GELUActivation()(t["x"])}
OPERATIONS["gelu_tanh"] = lambda t, c: {"y": NewGELUActivation()(t["x"])}

if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    run(OPERATIONS, Path(sys.argv[1]), Path(sys.argv[2]))

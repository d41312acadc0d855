"""llama.cpp beside the vectors: Llama and GPT-2 in its files, and an adapter in its own: the loss, and greedy words.

python with_llama_cpp.py VECTORS RESULTS

Its server gives the log-probabilities of the next token, of which the loss is made here; no logits and no gradients.
It has no rank-stabilised scale, and of GPT-2 one matrix for queries, keys and values.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.append(f"{Path(__file__).parents[1] / 'parity'}")

import gguf
from llama_cpp import Runner, write_model
from llamas import is_llama
from on_arrays import run

PLAIN = {"norm": "layer", "norm_first": True, "positions": "learned", "activation": "gelu_tanh", "causal": True,
         "head": "lm", "position_offset": 0, "prefix": 0, "adapted": [], "adapters": [], "head_scale": 1.0}  # fmt: skip
END = 2  # the end of the text, which is not said while more is asked for
LLAMA = {"attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_output", "mlp.gate": "ffn_gate",
         "mlp.up": "ffn_up", "mlp.down": "ffn_down"}  # fmt: skip
GPT2 = {"norm1": "attn_norm", "attn.o": "attn_output", "norm2": "ffn_norm", "mlp.up": "ffn_up", "mlp.down": "ffn_down"}


def paired(W, heads):
    """Rows j and j + K/2 of a head as 2j and 2j + 1, which llama.cpp turns."""
    return W.reshape(heads, 2, -1, W.shape[-1]).swapaxes(1, 2).reshape(W.shape)


def llama(t, c):
    """The tensors of its file, and of its adapter's: pairs (A, B) by the tensor that they are added to."""
    base = {"token_embd": t["embed.tokens"], "output_norm": t["norm.weight"]}
    pairs = {}
    base["output"] = t["embed.tokens"] if c["tie_head"] else t["head.weight"]
    if "head.A" in t:
        pairs["output"] = t["head.A"], t["head.B"]
    for i in range(c["n_layer"]):
        for norm, there in (("norm1", "attn_norm"), ("norm2", "ffn_norm")):
            base[f"blk.{i}.{there}"] = t[f"layers.{i}.{norm}.weight"]
        for ours, theirs in LLAMA.items():
            name, heads = f"layers.{i}.{ours}", {"attn.q": c["n_head"], "attn.k": c["n_kv_head"]}.get(ours)
            turned = (lambda W, heads=heads: paired(W, heads)) if heads else (lambda W: W)
            base[f"blk.{i}.{theirs}"] = turned(t[f"{name}.weight"])
            if f"{name}.A" in t:
                pairs[f"blk.{i}.{theirs}"] = t[f"{name}.A"], turned(t[f"{name}.B"])
    return {f"{name}.weight": value for name, value in base.items()}, pairs


def gpt2(t, c):
    base = {"token_embd.weight": t["embed.tokens"], "position_embd.weight": t["embed.positions"]}
    base["output.weight"] = t["embed.tokens"] if c["tie_head"] else t["head.weight"]
    for end in ("weight", "bias"):
        base[f"output_norm.{end}"] = t[f"norm.{end}"]
        for i in range(c["n_layer"]):
            base[f"blk.{i}.attn_qkv.{end}"] = np.concatenate([t[f"layers.{i}.attn.{part}.{end}"] for part in "qkv"])
            base |= {f"blk.{i}.{there}.{end}": t[f"layers.{i}.{here}.{end}"] for here, there in GPT2.items()}
    return base, {}


def write_adapter(path, architecture, pairs, alpha):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, (A, B) in pairs.items():
        writer.add_tensor(f"{name}.weight.lora_a", np.ascontiguousarray(A))
        writer.add_tensor(f"{name}.weight.lora_b", np.ascontiguousarray(B))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def runner(folder, t, c):
    """The model with its adapter; None for what it cannot be."""
    if is_llama(t, c, "rank_pattern", "split"):
        architecture = "llama"
    elif all(c.get(name, value) == value for name, value in PLAIN.items()) and "mask" not in t:
        architecture = "gpt2"
    else:
        return None
    base, pairs = (llama if architecture == "llama" else gpt2)(t, c)
    K = c.get("d_head", c["d_model"] // c["n_head"])
    keys = {
        "block_count": c["n_layer"], "context_length": c["n_positions"], "embedding_length": c["d_model"],
        "feed_forward_length": c["d_ff"], "attention.head_count": c["n_head"], "attention.key_length": K,
        "attention.head_count_kv": c["n_kv_head"], "attention.value_length": K, "rope.dimension_count": K,
        "rope.freq_base": float(c["rope_theta"]),
        f"attention.layer_norm_{'rms_' if architecture == 'llama' else ''}epsilon": c["eps"],
    }  # fmt: skip
    write_model(folder / "base.gguf", architecture, keys, base, c["vocab_size"])
    if not pairs:
        return Runner(folder / "base.gguf")
    write_adapter(folder / "adapter.gguf", architecture, pairs, c["alpha"])
    return Runner(folder / "base.gguf", folder / "adapter.gguf")


def model(t, c):
    with tempfile.TemporaryDirectory() as folder:
        one = runner(Path(folder), t, c)
        if one is None:
            return None
        losses = [
            -one.greedy(row[: i + 1], 1, c["vocab_size"])[1][0][target]
            for row, targets in zip(t["tokens"], t["targets"], strict=True)
            for i, target in enumerate(targets)
            if target != -100
        ]
        return {"loss": np.float32(np.mean(losses))}


def generate(t, c):
    with tempfile.TemporaryDirectory() as folder:
        one = runner(Path(folder), t, c)
        if one is None:
            return None
        found = [one.greedy(row, c["n"], c["vocab_size"]) for row in t["tokens"]]
        if any((logprobs.argmax(-1) == END).any() for _, logprobs in found):
            return None
        return {"tokens": np.array([[*row, *said] for row, (said, _) in zip(t["tokens"], found, strict=True)])}


if __name__ == "__main__":
    run({"model": model, "generate": generate}, Path(sys.argv[1]), Path(sys.argv[2]), array=np.asarray)

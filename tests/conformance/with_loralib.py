"""loralib beside the vectors: its layers, forward, backward, merged and unmerged. It has no rank-stabilised scale.

python with_loralib.py VECTORS RESULTS [float64]
"""

import sys
from pathlib import Path

import loralib
import torch
from offered import not_stabilised
from on_torch import Masked, run


def layer_of(t, c):
    n_out, n_in = t["W0"].shape
    layer = loralib.Linear(n_in, n_out, r=c["r"], lora_alpha=c["alpha"], bias="b" in t, dtype=t["W0"].dtype)
    layer.weight = torch.nn.Parameter(t["W0"].detach().clone(), requires_grad=False)
    layer.lora_A, layer.lora_B = t["A"], t["B"]
    if "b" in t:
        layer.bias = t["b"]
    if "keep" in t:
        layer.lora_dropout = Masked(t["keep"], c["p"])
    return layer


def lora_update(t, c):
    W0 = torch.zeros(len(t["B"]), t["A"].shape[1], dtype=t["A"].dtype)
    layer = layer_of({**t, "W0": W0}, c)
    layer.eval()  # merges
    return {"dW": layer.weight, "s": torch.tensor(layer.scaling)}


def lora_linear(t, c):
    return {"h": layer_of(t, c)(t["x"])}


def lora_start(t, c):
    h = lora_linear(t, c)["h"]
    return {"h": h, "difference": (h - torch.nn.functional.linear(t["x"], t["W0"], t["b"])).detach()}


def lora_embedding(t, c):
    V, D = t["E"].shape
    layer = loralib.Embedding(V, D, r=c["r"], lora_alpha=c["alpha"], dtype=t["E"].dtype)
    layer.weight = torch.nn.Parameter(t["E"].detach().clone(), requires_grad=False)
    layer.lora_A, layer.lora_B = t["A"], t["B"]
    return {"h": layer(t["tokens"])}


def merge(t, c):
    dtype = getattr(torch, c["dtype"])
    layer = layer_of({**t, "W0": t["W0"] if c["dtype"] == "float32" else t["W0"].detach().to(dtype)}, c)
    layer.eval()
    W = layer.weight.detach().to(dtype).to(t["x"].dtype)
    return {"W": W, "h": torch.nn.functional.linear(t["x"], W, t.get("b"))}


def unmerge(t, c):
    layer = layer_of(t, c)
    for _ in range(c["times"]):
        layer.eval()
        layer.train()
    return {"W0": layer.weight}


OPERATIONS = {
    name: not_stabilised(f)
    for name, f in {
        "lora_update": lora_update, "lora_linear": lora_linear, "lora_start": lora_start,
        "lora_embedding": lora_embedding, "merge": merge, "unmerge": unmerge,
    }.items()
}  # fmt: skip

if __name__ == "__main__":
    run(OPERATIONS, Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])

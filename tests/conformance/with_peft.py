"""PyTorch and PEFT beside the vectors: computes every case that they can, and writes the results.

python with_peft.py VECTORS RESULTS [float64]
"""

import sys
import warnings
from functools import partial
from pathlib import Path

import torch
import torch_model
import torch_primitives
from on_torch import Masked, linear_of, run
from torch.nn import functional as F

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PEFT says about itself at import
    import peft

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def adapted(module, pairs, t=None, p=0.0):
    """PEFT around a module: an adapter named i for each (A, B, scalars)."""
    net = torch.nn.Sequential(module)
    for i, (A, B, c) in enumerate(pairs):
        fields = {"r": c["r"], "lora_alpha": c["alpha"], "use_rslora": c["rslora"]}
        config = peft.LoraConfig(**fields, use_dora="m" in (t or {}), target_modules=["0"])
        if i == 0:
            net = peft.get_peft_model(net, config, adapter_name="0")
        else:
            net.add_adapter(f"{i}", config)
        layer = net.base_model.model[0]
        if isinstance(module, torch.nn.Embedding):
            layer.lora_embedding_A["0"], layer.lora_embedding_B["0"] = A, B
        else:
            layer.lora_A[f"{i}"].weight, layer.lora_B[f"{i}"].weight = A, B
        if t and "m" in t:
            layer.lora_magnitude_vector[f"{i}"].weight = t["m"]
        if t and "keep" in t:
            layer.lora_dropout[f"{i}"] = Masked(t["keep"], p)
    return net, net.base_model.model[0]


# --- One function for each operation: tensors and scalars in, outputs out ---------------------------------------------


def lora_update(t, c):
    _, layer = adapted(linear_of(torch.zeros(len(t["B"]), t["A"].shape[1], dtype=t["A"].dtype)), [(t["A"], t["B"], c)])
    return {"dW": layer.get_delta_weight("0"), "s": torch.tensor(layer.scaling["0"])}


def lora_linear(t, c):
    _, layer = adapted(linear_of(t["W0"], t.get("b")), [(t["A"], t["B"], c)], t, c.get("p"))
    return {"h": layer(t["x"])}


def lora_start(t, c):
    h = lora_linear(t, c)["h"]
    return {"h": h, "difference": h.detach() - linear_of(t["W0"], t["b"])(t["x"]).detach()}


def lora_embedding(t, c):
    _, layer = adapted(torch.nn.Embedding(*t["E"].shape, _weight=t["E"]), [(t["A"], t["B"], c)])
    return {"h": layer(t["tokens"])}


def dora_linear(t, c):
    _, layer = adapted(linear_of(t["W0"], t.get("b")), [(t["A"], t["B"], c)], t, c.get("p"))
    return {"h": layer(t["x"])}


def dora_embedding(t, c):
    _, layer = adapted(torch.nn.Embedding(*t["E"].shape, _weight=t["E"]), [(t["A"], t["B"], c)], t)
    return {"h": layer(t["tokens"])}


def dora_merge(t, c):
    _, layer = adapted(linear_of(t["W0"].detach().clone()), [(t["A"], t["B"], c)], t)
    layer.merge()
    return {"W": layer.base_layer.weight}


def pissa(t, c):
    """PEFT's own start, of a copy, as it changes the weight in place; it refuses float64."""
    if t["W0"].dtype == torch.float64:
        return None
    config = peft.LoraConfig(
        r=c["r"], lora_alpha=c["alpha"], use_rslora=c["rslora"], target_modules=["0"], init_lora_weights="pissa"
    )
    layer = peft.get_peft_model(torch.nn.Sequential(linear_of(t["W0"].detach().clone())), config).base_model.model[0]
    return {"update": layer.get_delta_weight("default"), "residual": layer.base_layer.weight}


def merge(t, c):
    dtype = DTYPES[c["dtype"]]
    W0 = t["W0"].detach() if c["dtype"] == "float32" else t["W0"].detach().to(dtype)
    layer = adapted(linear_of(W0), [(t["A"], t["B"], c)])[1]
    layer.merge()
    W = layer.base_layer.weight.detach().to(dtype).to(t["x"].dtype)
    return {"W": W, "h": F.linear(t["x"], W, t.get("b"))}


def unmerge(t, c):
    _, layer = adapted(linear_of(t["W0"].detach().clone()), [(t["A"], t["B"], c)])
    for _ in range(c["times"]):
        layer.merge()
        layer.unmerge()
    return {"W0": layer.base_layer.weight}


def per_row(t, c):
    pairs = [(t[f"A{i}"], t[f"B{i}"], one) for i, one in enumerate(c["adapters"])]
    net, _ = adapted(linear_of(t["W0"], t["b"]), pairs)
    names = ["__base__" if i < 0 else f"{i}" for i in t["rows"].tolist()]
    return {"h": net.eval()(t["x"], adapter_names=names)}


def segments(t, c):
    """Rows of one token, each with its adapter; the module has no output of its own."""
    pairs = [
        (torch.nn.Parameter(A[: one["r"]]), torch.nn.Parameter(B[:, : one["r"]]), one)
        for A, B, one in zip(t["A"], t["B"], c["adapters"], strict=True)
    ]
    net, _ = adapted(linear_of(torch.zeros(t["B"].shape[1], t["A"].shape[2], dtype=t["x"].dtype)), pairs)
    names = ["__base__" if i < 0 else f"{i}" for i in t["index"].tolist()]
    y, low = t["y"].detach().clone(), net.eval()(t["x"], adapter_names=names).detach()
    y[:, c["start"] : c["start"] + low.shape[1]] += low
    return {"y": y}


def combine(t, c):
    pairs = [(t[f"A{i}"], t[f"B{i}"], one) for i, one in enumerate(c["adapters"])]
    n_out, n_in = t["B0"].shape[0], t["A0"].shape[1]
    net, layer = adapted(linear_of(torch.zeros(n_out, n_in, dtype=t["A0"].dtype)), pairs)
    how = {"combination_type": "cat"} if c["rank"] is None else {"combination_type": "svd", "svd_rank": c["rank"]}
    net.add_weighted_adapter(["0", "1"], [one["w"] for one in c["adapters"]], "sum", **how)
    return {"dW": layer.get_delta_weight("sum")}


OPERATIONS = {
    "lora_update": lora_update, "lora_linear": lora_linear, "lora_start": lora_start, "merge": merge,
    "lora_embedding": lora_embedding, "dora_linear": dora_linear, "dora_embedding": dora_embedding,
    "dora_merge": dora_merge, "pissa": pissa, "unmerge": unmerge, "per_row": per_row,
    "segments": segments, "combine": combine,
    "model": partial(torch_model.model, adapted), "generate": partial(torch_model.generate, adapted),
    "amplification": lambda t, c: torch_primitives.amplification(lora_update(t, c)["dW"], t, c),
    **torch_primitives.OPERATIONS,
}  # fmt: skip

if __name__ == "__main__":
    run(OPERATIONS, Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])

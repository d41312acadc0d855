"""AdapterHub's adapters beside the vectors: LoRA on one matrix of a transformers model, merged, reset and by rows.

python with_adapters.py VECTORS RESULTS

It has no rank-stabilised scale, and adapts no table.
"""

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import adapters
import adapters.composition
import torch
import transformers
from offered import not_stabilised
from on_torch import Masked, linear_of, run

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def adapted(W0, b, pairs, t=None, p=0.0, **more):
    """The model, and its one matrix with an adapter named i for each (A, B, scalars)."""
    n_out, n_in = W0.shape
    config = transformers.BertConfig(
        vocab_size=2, hidden_size=n_in, num_hidden_layers=1, num_attention_heads=1, intermediate_size=n_out
    )
    net = transformers.BertModel(config)
    adapters.init(net)
    layer = net.encoder.layer[0].intermediate.dense
    layer.weight, layer.bias = torch.nn.Parameter(W0, requires_grad=False), b
    for i, (A, B, c) in enumerate(pairs):
        how = adapters.LoRAConfig(
            r=c["r"], alpha=c["alpha"], selfattn_lora=False, intermediate_lora=True, output_lora=False, **more
        )
        net.add_adapter(f"{i}", config=how)
        lora = layer.loras[f"{i}"]
        lora.lora_A, lora.lora_B = A, B
        if t and "keep" in t:
            lora.lora_dropout = Masked(t["keep"], p)
        if t and "m" in t:
            del lora.m  # a linear of (out, 1)
            lora.m = SimpleNamespace(weight=t["m"][:, None])
    net.set_active_adapters("0")
    return net, layer


def lora_update(t, c):
    W0 = torch.zeros(len(t["B"]), t["A"].shape[1])
    net, layer = adapted(W0, None, [(t["A"], t["B"], c)])
    net.merge_adapter("0")
    return {"dW": layer.weight, "s": torch.tensor(layer.loras["0"].scaling)}


def lora_linear(t, c):
    return {"h": adapted(t["W0"], t.get("b"), [(t["A"], t["B"], c)], t, c.get("p"))[1](t["x"])}


def lora_start(t, c):
    h = lora_linear(t, c)["h"]
    return {"h": h, "difference": (h - linear_of(t["W0"], t["b"])(t["x"])).detach()}


def merge(t, c):
    net, layer = adapted(t["W0"].detach().to(DTYPES[c["dtype"]]), t.get("b"), [(t["A"], t["B"], c)])
    net.merge_adapter("0")
    W = layer.weight.detach().float()
    return {"W": W, "h": torch.nn.functional.linear(t["x"], W, t.get("b"))}


def unmerge(t, c):
    net, layer = adapted(t["W0"].detach().clone(), None, [(t["A"], t["B"], c)])
    for _ in range(c["times"]):
        net.merge_adapter("0")
        net.reset_adapter()
    return {"W0": layer.weight}


def per_row(t, c):
    """One adapter for each row, but none without."""
    rows, used = t["rows"].tolist(), sorted(set(t["rows"].tolist()))
    if -1 in used or any(c["adapters"][i]["rslora"] for i in used):
        return None
    net, layer = adapted(t["W0"], t["b"], [(t[f"A{i}"], t[f"B{i}"], c["adapters"][i]) for i in used])
    names = [f"{used.index(i)}" for i in rows]
    split = adapters.composition.BatchSplit(*names, batch_sizes=[1] * len(names))
    net.set_active_adapters(split if len(used) > 1 else names[0])
    return {"h": layer(t["x"])}


def dora_linear(t, c):
    return {"h": adapted(t["W0"], t.get("b"), [(t["A"], t["B"], c)], t, c.get("p"), use_dora=True)[1](t["x"])}


def dora_merge(t, c):
    net, layer = adapted(t["W0"], None, [(t["A"], t["B"], c)], t, use_dora=True)
    net.merge_adapter("0")
    return {"W": layer.weight}


OPERATIONS = {
    **{f.__name__: not_stabilised(f) for f in (lora_update, lora_linear, lora_start, merge, unmerge, dora_linear,
                                         dora_merge)},
    "per_row": per_row,
}  # fmt: skip

if __name__ == "__main__":
    logging.disable(logging.WARNING)  # an adapter is merged before it is active
    run(OPERATIONS, Path(sys.argv[1]), Path(sys.argv[2]))

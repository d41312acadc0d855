"""Which of the vectors' models are a Llama, as most packages have one."""

LLAMA = {"norm": "rms", "norm_first": True, "positions": "rotary", "activation": "silu_gated", "head": "lm",
         "causal": True, "bias": False}  # fmt: skip
BESIDE = ("prefix", "norm_outputs", "head_scale", "rslora", "rank_pattern", "adapters")
MLP = {"gate", "up", "down"}


def is_llama(t, c, *offered):
    """Whether a case is one, without padding and with nothing beside it but what is offered.

    offered: of BESIDE; "qkv", one A for queries, keys and values; "split", LoRA on some of the MLP's matrices only
    """
    adapted = set(c.get("adapted", ()))
    beside = [one for one in BESIDE if c.get(one)]
    beside += ["qkv"] if "qkv" in adapted else []
    beside += ["split"] if adapted & MLP not in (set(), MLP) else []
    return all(c[name] == value for name, value in LLAMA.items()) and "mask" not in t and set(beside) <= set(offered)

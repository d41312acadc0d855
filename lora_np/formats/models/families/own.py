"""The package's own names: of every model that is no other family's."""

from ..family import Family

_LAYER = "norm1 attn.q attn.k attn.v attn.qkv attn.o norm2 mlp.gate mlp.up mlp.down"

OWN = Family(
    name="lora_np",
    classes={},
    keys={},
    activations={},
    fixed={},
    neutral={},
    modules={
        name: name
        for name in (
            "embed.tokens",
            "embed.norm",
            *(f"layers.{{i}}.{part}" for part in _LAYER.split()),
            "norm",
            "pooler",
        )
    },
    trunk="",
    heads={head: {"head": "head"} for head in ("lm", "classify", "tag")},
    left_out="",
)

"""The package's own names: of every model that is no other family's."""

from ....model import ENCODER
from ..family import Family

_TOP = ("embed.norm", "embed.positions", "embed.types", "embed.score_bias", "embed.distances", "embed.distances_norm")
_LAYER = (
    "norm1", "attn.q", "attn.k", "attn.v", "attn.qkv", "attn.o", "attn.q_norm", "attn.k_norm", "norm1_out",
    "norm2", "mlp.gate", "mlp.up", "mlp.down", "norm2_out",
)  # fmt: skip
_CROSS = ("norm_cross", "cross.q", "cross.k", "cross.v", "cross.o", "norm_cross_out")
_STACK = (*_TOP, *(f"layers.{{i}}.{part}" for part in _LAYER), "norm")

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
            *(ENCODER + name for name in _STACK),
            *_STACK,
            *(f"layers.{{i}}.{part}" for part in _CROSS),
            "pooler",
        )
    },
    trunk="",
    heads={head: {"head": "head"} for head in ("lm", "classify", "tag")},
    left_out="",
)

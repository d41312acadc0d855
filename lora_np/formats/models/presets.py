"""Configurations of published models, by name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ...model import Config
from ...ops import llama3_factors


def _gpt2(n_layer: int, n_head: int, d_model: int, n_positions: int = 1024) -> Config:
    return Config(50257, n_positions, n_layer, n_head, d_model, 4 * d_model)


def _encoder(vocab_size: int, n_layer: int, n_head: int, d_model: int, **fields: Any) -> Config:
    bert: dict[str, Any] = {
        "n_positions": 512, "norm_first": False, "activation": "gelu", "causal": False, "head": "none",
        "tie_head": False, "n_types": 2, "eps": 1e-12,
    }  # fmt: skip
    return Config(vocab_size, n_layer=n_layer, n_head=n_head, d_model=d_model, d_ff=4 * d_model, **bert | fields)


_ROBERTA: dict[str, Any] = {
    "n_positions": 514, "n_types": 1, "position_offset": 2, "eps": 1e-5, "pooler_in_head": True,
}  # fmt: skip
_DEBERTA: dict[str, Any] = {
    "n_types": 0, "eps": 1e-7, "positions": "none", "pooler": "gelu", "disentangled": True, "score_buckets": 256,
    "score_distance": 512, "pooler_in_head": True, "family": "deberta-v2",
}  # fmt: skip
_LLAMA: dict[str, Any] = {"norm": "rms", "positions": "rotary", "activation": "silu_gated", "bias": False}
_T5 = Config(
    32128, 512, 6, 8, 512, 2048, norm="rms", positions="none", activation="relu", bias=False, eps=1e-6,
    score_scale=1.0, score_buckets=32, n_encoder=6, head_scale=512**-0.5, family="t5",
)  # fmt: skip


class _Presets(dict[str, Config]):
    """Configurations by name; for another name a KeyError says the nearest ones, or all."""

    def __missing__(self, name: object) -> Config:
        near = difflib.get_close_matches(str(name).lower(), self, cutoff=0.4)
        hint = f"nearest are {', '.join(near)}" if near else f"there are {', '.join(self)}"
        raise KeyError(f"PRESETS: no {name!r}; {hint}")


PRESETS: Mapping[str, Config] = MappingProxyType(
    _Presets({
        "gpt2": _gpt2(12, 12, 768),
        "gpt2-medium": _gpt2(24, 16, 1024),
        "gpt2-large": _gpt2(36, 20, 1280),
        "gpt2-xl": _gpt2(48, 25, 1600),
        "gpt3-175b": _gpt2(96, 96, 12288, n_positions=2048),
        "bert-base": _encoder(30522, 12, 12, 768),
        "roberta-base": _encoder(50265, 12, 12, 768, **_ROBERTA),
        "roberta-large": _encoder(50265, 24, 16, 1024, **_ROBERTA),
        "deberta-v3-base": _encoder(128100, 12, 12, 768, **_DEBERTA),
        "deberta-v2-xxlarge": _encoder(128100, 48, 24, 1536, **_DEBERTA),
        "smollm2-135m": Config(49152, 8192, 30, 9, 576, 1536, n_kv_head=3, rope_theta=1e5, **_LLAMA),
        "llama-2-7b": Config(32000, 4096, 32, 32, 4096, 11008, tie_head=False, **_LLAMA),
        "llama-3.2-1b": Config(
            128256, 131072, 16, 32, 2048, 8192, n_kv_head=8, rope_theta=5e5,
            rope_factors=llama3_factors(64, 5e5, factor=32, low=1, high=4, original=8192), **_LLAMA,
        ),
        "mistral-7b": Config(
            32000, 32768, 32, 32, 4096, 14336, n_kv_head=8, window=4096, tie_head=False, family="mistral", **_LLAMA
        ),
        "qwen2.5-0.5b": Config(
            151936, 32768, 24, 14, 896, 4864, n_kv_head=2, rope_theta=1e6, eps=1e-6, qkv_bias=True, family="qwen2",
            **_LLAMA,
        ),
        "qwen3-0.6b": Config(
            151936, 40960, 28, 16, 1024, 3072, n_kv_head=8, d_head=128, rope_theta=1e6, eps=1e-6, qk_norm=True,
            family="qwen3", **_LLAMA,
        ),
        "gemma-3-270m": Config(
            262144, 32768, 18, 4, 640, 2048, n_kv_head=1, d_head=256, rope_theta=1e6, eps=1e-6, qk_norm=True,
            norm_outputs=True, embed_scale=math.sqrt(640), window=512, full_layers=(5, 11, 17), window_theta=1e4,
            family="gemma3_text", **{**_LLAMA, "norm": "rms_1p", "activation": "gelu_tanh_gated"},
        ),
        "t5-small": _T5,
        "flan-t5-base": replace(
            _T5, n_layer=12, n_encoder=12, n_head=12, d_model=768, activation="gelu_tanh_gated", tie_head=False,
            head_scale=1.0,
        ),
    })
)  # fmt: skip

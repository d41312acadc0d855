"""PEFT's folder, written from A and B by the base's module names, whatever the architecture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...backend import Array
from ..files.atomic import new_folder, write_tensors
from ..files.json_file import write_json
from ..files.messages import shown
from .contents import Pair
from .keys import PREFIX
from .peft_config import CONFIG, WEIGHTS, most_common

NAME = r"[\w.-]+"  # that no regular expression reads as another


def write_peft(
    folder: Path,
    raw: Mapping[str, Any],
    pairs: Mapping[str, Sequence[Pair]],
    whole: Mapping[str, Array],
    rows: Mapping[str, tuple[list[int], Array]],
) -> None:
    """Writes an adapter as a new folder: `raw` as its configuration, and its tensors, each in its own dtype.

    pairs, whole, rows: as `Contents` has them. All is written, or nothing; a FileExistsError if there is anything at
    `folder`.
    """
    tensors: dict[str, Array] = {}
    for module, several in pairs.items():
        for depth, pair in enumerate(reversed(several)):  # the innermost is first, and has most wrappers around it
            stem = f"{PREFIX}{module}{'.base_layer' * depth}.lora_"
            ends = ("embedding_A", "embedding_B") if pair.is_look_up else ("A.weight", "B.weight")
            tensors |= {f"{stem}{ends[0]}": pair.A, f"{stem}{ends[1]}": pair.B}
            if pair.m is not None:
                tensors[f"{stem}magnitude_vector"] = pair.m
            if pair.bias is not None:
                tensors[f"{stem}B.bias"] = pair.bias
    tensors |= {f"{PREFIX}{name}": value for name, value in whole.items()}
    for module, (_, values) in rows.items():
        tensors[f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"] = values
    with new_folder(folder) as new:
        write_tensors(new / WEIGHTS, tensors, {"format": "pt"})
        write_json(new / CONFIG, raw)


def config_of(pairs: Mapping[str, Pair], **more: Any) -> dict[str, Any]:
    """adapter_config.json for exactly these modules, by their full names, with s = 1: alpha = r. more: other keys.

    A ValueError names a module whose name PEFT's patterns cannot hold.
    """
    for name in pairs:
        if not re.fullmatch(NAME, name):
            raise ValueError(f"{shown(name)}: expected a module's name of letters, digits, dots, - and _")
    ranks = {name: pair.r for name, pair in pairs.items()}
    r = most_common(ranks.values(), 1)
    differing = {f"^{name}": n for name, n in ranks.items() if n != r}  # ^: not another that ends so
    return {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True, "r": r,
        "lora_alpha": r, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "rank_pattern": differing,
        "alpha_pattern": dict(differing), "target_modules": sorted(pairs), "fan_in_fan_out": False,
        "use_dora": any(pair.m is not None for pair in pairs.values()), "init_lora_weights": True, **more,
    }  # fmt: skip

"""The keys of an adapter's tensors: the module that each belongs to, by the base's own name, and its part of it.

PEFT's keys are base_model.model.MODULE.lora_A.weight and the like. Programs that wrap a model put names of their own
between these, or leave some out: PEFT then finds no tensor, and the adapter does nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from ..files.messages import shown

PREFIX = "base_model.model."  # PEFT's wrapper, and the tuner inside it
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Each part by its name in a key, and what may stand behind that; * is an adapter's name.
PARTS = {
    "lora_A": ("A", ("weight",)), "lora_B": ("B", ("weight", "bias")),
    "lora_embedding_A": ("embedding_A", ("",)), "lora_embedding_B": ("embedding_B", ("",)),
    "trainable_tokens_delta": ("tokens", ("",)),
}  # fmt: skip
# What belongs to methods that are not LoRA's, by their own names.
OTHERS = {
    "lora_magnitude_vector": "DoRA", "lora_E": "AdaLoRA", "ranknum": "AdaLoRA", "vera_lambda_b": "VeRA",
    "vera_lambda_d": "VeRA", "hada_w1_a": "LoHa", "lokr_w1": "LoKr", "lokr_w1_a": "LoKr", "ia3_l": "IA3",
}  # fmt: skip


class Key(NamedTuple):
    """What a key says.

    module   the module's name; of what is trained whole, the tensor's
    part     A, B, bias (of B), embedding_A, embedding_B, tokens; "" for a tensor that is trained whole
    depth    how many wrappers of PEFT's lie between the module and this pair: of several parameters of one module
    proper   the key that PEFT gives it
    """

    module: str
    part: str
    depth: int
    proper: str

    @property
    def alone(self) -> str:
        """The key that PEFT gives it where no other pair lies around the module."""
        return self.proper.replace(".base_layer.lora_", ".lora_")


def read_key(key: str) -> Key | None:
    """What a key says; None for a copy that PEFT keeps of what it replaced. A ValueError if it is another method's."""
    names = [name for name in key.split(".") if name not in WRAPPERS]
    for name in names:
        if name in OTHERS:
            raise ValueError(f"{shown(key)}: a tensor of {OTHERS[name]}, which is not supported; LoRA is")
    if names[:2] == ["base_model", "model"]:
        names = names[2:]
    at = next((i for i, name in enumerate(names) if name in PARTS), None)
    return _whole(names) if at is None else _factor(key, names, at)


def _factor(key: str, names: list[str], at: int) -> Key:
    """The key of a factor, or of tokens' rows: names[at] says which."""
    part, ends = PARTS[names[at]]
    module, tail = names[:at], names[at + 1 :]
    end = tail[-1] if tail and tail[-1] in ends else ""
    if end not in ends or len(tail) > 1 + (end != ""):
        raise ValueError(f"{shown(key)}: expected {' or '.join(filter(None, ends)) or 'nothing'} behind {names[at]}")
    depth = next((i for i, name in enumerate(reversed(module)) if name != "base_layer"), len(module))
    module = module[: len(module) - depth]
    if part == "tokens":
        module = module[:-1] if module[-1:] == ["token_adapter"] else module
        middle = [*module, "token_adapter"]
    else:
        middle = [*module, *["base_layer"] * depth]
    proper = PREFIX + ".".join([*middle, names[at], *([end] if end else [])])
    return Key(".".join(module), "bias" if end == "bias" else part, depth, proper)


def _whole(names: list[str]) -> Key | None:
    """The key of a tensor that is trained whole, or of the base's own beside an update (base_layer)."""
    if "original_module" in names:
        return None
    proper = PREFIX + ".".join(names)
    if "modules_to_save" in names:
        at = names.index("modules_to_save")
        names = names[:at] + names[at + 1 + (names[at + 1 : at + 2] == ["default"]) :]  # PEFT's name of an adapter
    return Key(".".join(name for name in names if name not in ("base_layer", "token_adapter")), "", 0, proper)

"""The keys of an adapter's tensors: the module that each belongs to, by the base's own name, and its part of it.

PEFT's keys are base_model.model.MODULE.lora_A.weight and the like. Programs that wrap a model put names of their own
between these, or leave some out: PEFT then finds no tensor, and the adapter does nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from ..files.messages import shown

PREFIX = "base_model.model."  # PEFT's wrapper, and the tuner inside it
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Each part by its name in a key, and what may stand at its end; between the two may stand an adapter's name.
PARTS = {
    "lora_A": ("A", ("weight",)), "lora_B": ("B", ("weight", "bias")),
    "lora_embedding_A": ("embedding_A", ("",)), "lora_embedding_B": ("embedding_B", ("",)),
    "lora_magnitude_vector": ("m", ("", "weight")),
    "trainable_tokens_delta": ("tokens", ("",)),
}  # fmt: skip
# What belongs to methods that are not LoRA's: how the names of their tensors begin.
OTHERS = {
    "lora_E": "AdaLoRA", "ranknum": "AdaLoRA", "vera_lambda_": "VeRA",
    "pvera_lambda_": "PVeRA", "hada_w": "LoHa", "hada_t": "LoHa", "lokr_": "LoKr", "ia3_l": "IA3", "oft_R": "OFT",
    "oft_embedding_R": "OFT", "boft_": "BOFT", "adamss_": "AdaMSS", "beft_bias": "BEFT", "c3a_kernel": "C3A",
    "deft_": "DEFT", "delora_": "DeLoRA", "fourierft_": "FourierFT", "frod_": "FRoD", "glora_": "GLoRA",
    "gralora_": "GraLoRA", "hira_": "HiRA", "hra_u": "HRA", "lily_": "Lily", "ln_tuning_": "LN tuning",
    "miss_block": "MiSS", "bone_": "Bone", "osf_": "OSF", "peanut_": "PEANuT", "poly_lora_": "Poly",
    "poly_router": "Poly", "psoft_": "PSOFT", "randlora_": "RandLoRA", "road_theta": "RoAd", "road_alpha": "RoAd",
    "shadow_": "Shadow", "shira_": "SHiRA", "supertuning_": "Supertuning", "tinylora_": "TinyLoRA",
    "unilora_": "UniLoRA", "vblora_": "VB-LoRA", "waveft_": "WaveFT", "prompt_embeddings": "prompt tuning",
    "adaption_": "LLaMA-Adapter",
}  # fmt: skip
MAX_KEY = 1000  # characters
DEFAULT = "default"  # PEFT's own name of an adapter


class Key(NamedTuple):
    """What a key says.

    module   the module's name; of what is trained whole, the tensor's
    part     A, B, bias (of B), embedding_A, embedding_B, m (DoRA's), tokens; "" for a tensor that is trained whole;
             original for the copy that PEFT keeps of what that replaced
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
        return self.proper.replace(".base_layer" * self.depth + ".lora_", ".lora_")


def adapter_names(keys: Iterable[str]) -> set[str]:
    """The names of adapters in a file's keys: what stands behind lora_A, or behind modules_to_save.

    Behind that may stand a submodule's name too: an adapter's is one with which a copy of the original is told apart.
    """
    found = {DEFAULT}
    saved: set[tuple[str, str]] = set()
    originals: set[str] = set()
    for key in keys:
        names = key.split(".") if len(key) <= MAX_KEY else []
        for i, name in enumerate(names):
            if name in PARTS and len(names) - i > 1 + ("" not in PARTS[name][1]) and names[i + 1] not in PARTS[name][1]:
                found.add(names[i + 1])
            if name == "modules_to_save" and len(names) > i + 2:
                saved.add((names[i + 1], ".".join([*names[:i], *names[i + 2 :]])))
            if name == "original_module":
                originals.add(".".join([*names[:i], *names[i + 1 :]]))
    return found | {name for name, rest in saved if rest in originals}


def read_key(key: str, adapters: Collection[str] = (DEFAULT,)) -> Key:
    """What a key says. A ValueError if it is another method's.

    adapters: the names of adapters, as `adapter_names` finds them.
    """
    if len(key) > MAX_KEY:
        raise ValueError(f"{shown(key)}: expected a tensor's name of at most {MAX_KEY} characters, got {len(key)}")
    names = [name for name in key.split(".") if name not in WRAPPERS]
    for name in names:
        method = next((OTHERS[start] for start in OTHERS if name.startswith(start)), None)
        if method is not None:
            raise ValueError(f"{shown(key)}: a tensor of {method}, which is not supported; LoRA is")
    while names[:2] == ["base_model", "model"]:
        names = names[2:]
    at = next((i for i, name in enumerate(names) if name in PARTS), None)
    return _whole(names, adapters) if at is None else _factor(key, names, at)


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


def _whole(names: list[str], adapters: Collection[str]) -> Key:
    """The key of a tensor that is trained whole, or of the base's own beside an update (base_layer)."""
    proper = PREFIX + ".".join(names)
    if "original_module" in names:
        return Key(".".join(name for name in names if name != "original_module"), "original", 0, proper)
    if "modules_to_save" in names:
        at = names.index("modules_to_save")
        has_name = len(names) > at + 2 and names[at + 1] in adapters
        names = names[:at] + names[at + 1 + has_name :]
    return Key(".".join(name for name in names if name not in ("base_layer", "token_adapter")), "", 0, proper)

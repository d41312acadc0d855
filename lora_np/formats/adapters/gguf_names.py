"""llama.cpp's names of a transformers model's matrices, by the gguf package's own tables.

Of these architectures a matrix stands in llama.cpp's files as in transformers', but that llama's q and k have the rows
of each head in pairs. Others are put together otherwise (Falcon's and GPT-NeoX's q, k and v), and are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..models.gguf_file import GGUFFile, import_gguf

# By transformers' model_type: llama.cpp's name.
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma",
    "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3",
}  # fmt: skip
IN_PAIRS = ("llama",)  # those whose q and k have the rows of each head in pairs


class Naming(NamedTuple):
    """What names and rows depend on: llama.cpp's architecture, its layers, and its heads of q and of k."""

    architecture: str
    n_layer: int
    n_head: int
    n_kv_head: int

    def names(self, modules: Iterable[str]) -> dict[str, str]:
        """The tensor in which each module's matrix stands, of those that have one."""
        gguf = import_gguf()
        known = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        if self.architecture not in known:
            raise ImportError(f"{self.architecture} needs a newer gguf: pip install --upgrade gguf")
        table = gguf.get_tensor_name_map(known[self.architecture], self.n_layer)
        found = {module: table.get_name(f"{module}.weight", try_suffixes=(".weight",)) for module in modules}
        return {module: str(name) for module, name in found.items() if name is not None and "_exps" not in name}

    def heads(self, tensor: str) -> int:
        """How many heads have their rows in pairs in a tensor; 0: none."""
        part = tensor.split(".")[-2]
        if self.architecture not in IN_PAIRS or part not in ("attn_q", "attn_k"):
            return 0
        return self.n_head if part == "attn_q" else self.n_kv_head


def naming_of(raw: Mapping[str, Any], n_tensors: int, where: str) -> Naming:
    """Of a model with this config.json; a ValueError if it is of none of these architectures, or says no sizes."""
    model_type = raw.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"{where}: model_type: {model_type!r:.60} is not supported in llama.cpp's files; "
            f"{' '.join(sorted(ARCHITECTURES))} are"
        )
    sizes = [raw.get(key) for key in ("num_hidden_layers", "num_attention_heads")]
    return _checked(ARCHITECTURES[model_type], [*sizes, raw.get("num_key_value_heads") or sizes[1]], n_tensors, where)


def naming_in(file: GGUFFile) -> Naming:
    """Of the model in a .gguf file; a ValueError if it is of none of these architectures, or says no sizes."""
    found = file.get("general.architecture", str)
    if found not in ARCHITECTURES.values():
        raise ValueError(
            f"{file.path}: architecture {found!r:.60}: only adapters in .gguf can be merged onto it, by the names of "
            f"its tensors; onto {' '.join(sorted(set(ARCHITECTURES.values())))} others too"
        )
    keys = ("block_count", "attention.head_count")
    sizes = [file.get(f"{found}.{key}", int) for key in keys]
    kv = file.get(f"{found}.attention.head_count_kv", int, sizes[1])
    return _checked(found, [*sizes, kv], len(file.tensors), str(file.path))


def _checked(architecture: str, sizes: list[Any], n_tensors: int, where: str) -> Naming:
    if not all(type(n) is int and n > 0 for n in sizes) or sizes[0] > n_tensors:
        raise ValueError(
            f"{where}: expected numbers of layers and of heads, and tensors of each layer, got {sizes!r:.60} and "
            f"{n_tensors} tensors"
        )
    return Naming(architecture, *sizes)

"""Files for the tests of formats: small models, raw safetensors written by hand, and what goes wrong with them."""

import json
from dataclasses import replace
from pathlib import Path

from safetensors.numpy import load_file, save_file

import lora_np as ln

GPT2 = replace(ln.PRESETS["gpt2"], vocab_size=11, n_positions=10, n_layer=2, n_head=2, d_model=8, d_ff=12)
LLAMA = replace(
    ln.PRESETS["smollm2-135m"], vocab_size=11, n_positions=10, n_layer=2, n_head=2, n_kv_head=1, d_model=8, d_ff=12
)
OWN = replace(LLAMA, bias=True)  # nobody else's architecture
# The fields that make a random Config GPT-2's architecture.
GPT2_FIELDS = {
    "norm": "layer", "norm_first": True, "positions": "learned", "position_offset": 0, "activation": "gelu_tanh",
    "causal": True, "n_types": 0, "bias": True, "n_kv_head": None,
}  # fmt: skip


def raw_safetensors(path, header, data=b"", length=None):
    """A file with this header (an object, or bytes as they are), which says that it is `length` bytes long."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    Path(path).write_bytes(size.to_bytes(8, "little") + text + data)


def tensors_and_metadata(path):
    """The tensors of a safetensors file, and its metadata."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return load_file(path), header.get("__metadata__")


def edit_tensors(path, change):
    """Rewrites a safetensors file after change(tensors), its metadata kept."""
    tensors, metadata = tensors_and_metadata(path)
    change(tensors)
    save_file(tensors, path, metadata)


def edit_json(path, **values):
    """Sets keys of a JSON file."""
    path = Path(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def contents(folder):
    """Every file of a folder, by name, in bytes."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}

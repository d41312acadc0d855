"""GGUF files for the tests of formats: random models of the llama architecture, and files written by hand."""

import struct
from dataclasses import replace
from typing import NamedTuple

import gguf
import numpy as np

import lora_np as ln
from lora_np.formats.models import gguf_file
from lora_np.formats.models.gguf import file_name

ENCODED = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")  # by the package
KNOWN = gguf.GGMLQuantizationType.__members__  # older versions lack the newest
KINDS = {kind.name: KNOWN[kind.name] for kind in gguf_file.TENSOR_TYPES.values() if kind.name in KNOWN}

# Rows of 256 elements fill the blocks of every type; 8 heads share 2 keys.
WIDE = replace(
    ln.PRESETS["smollm2-135m"], vocab_size=7, n_positions=16, n_layer=2, n_head=8, n_kv_head=2, d_model=256, d_ff=512
)
SMALL = replace(WIDE, n_layer=1, n_head=4, n_kv_head=2, d_model=32, d_ff=32)
KEYS = {
    "block_count": "n_layer", "context_length": "n_positions", "embedding_length": "d_model",
    "feed_forward_length": "d_ff", "attention.head_count": "n_head", "attention.head_count_kv": "kv_heads",
    "attention.layer_norm_rms_epsilon": "eps", "rope.freq_base": "rope_theta", "vocab_size": "vocab_size",
}  # fmt: skip


def encoded(rng, shape, kind, most=4):
    """Random numbers as a tensor type has them: (rows, bytes) or, for F32 and F16, the numbers.

    Types that the package does not encode are random blocks, of which none has a number of `most` or more.
    """
    if kind.name in ENCODED:
        return gguf.quants.quantize(rng.standard_normal(shape).astype(np.float32), kind)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (4096, size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        small = np.flatnonzero(np.abs(gguf.quants.dequantize(blocks, kind)).max(axis=1) < most)
    return blocks[rng.choice(small, shape[0] * shape[1] // elements)].reshape(shape[0], -1)


def write(path, config, kind="F32", *, seed=0, keys=None, tensors=None):
    """A random model's file. keys, tensors: more of the metadata, and of the tensors, or others."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    metadata = {key: getattr(config, field) for key, field in KEYS.items()} | (keys or {})
    for key, value in metadata.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        if key == "general.alignment" and value is not None:
            writer.add_custom_alignment(value)
        elif value is not None:
            add[type(value)](key if "." in key and key.startswith("general") else f"llama.{key}", value)
    data = {}
    for name, shape in config.weight_shapes().items():
        its_kind = KINDS[kind] if len(shape) > 1 else KINDS["F32"]
        data[file_name(name)] = (encoded(rng, shape, its_kind), its_kind)
    for name, value in (data | (tensors or {})).items():
        if value is not None:
            writer.add_tensor(name, value[0], raw_dtype=value[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: gguf.quants.dequantize(*value) for name, value in data.items()}


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def info(name, dims, kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def raw(path, *parts, magic=b"GGUF", version=3, n_tensors=None, n_keys=0):
    """A file by hand: its header's numbers, then these bytes."""
    count = len(parts) - n_keys if n_tensors is None else n_tensors
    path.write_bytes(magic + struct.pack("<IQQ", version, count, n_keys) + b"".join(parts))


class Reading:
    """A file's bytes, taken one after another: the format, read by hand."""

    def __init__(self, path):
        self.data, self.at = path.read_bytes(), 4

    def number(self, code):
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def text(self):
        length = self.number("Q")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def value(self, kind):
        if kind == 8:
            return self.text()
        if kind == 9:
            kind = self.number("I")
            return [self.value(kind) for _ in range(self.number("Q"))]
        return self.number(gguf_file.SCALARS[kind])


class Placed(NamedTuple):
    """A tensor: its values, decoded, and where its bytes stand."""

    values: np.ndarray
    offset: int
    size: int


def in_file(path):
    """-> the metadata by key, with the version as GGUF.version; the tensors by name, in the header's order"""
    file = Reading(path)
    fields = {"GGUF.version": file.number("I")}
    n_tensors, n_keys = file.number("Q"), file.number("Q")
    for _ in range(n_keys):
        key = file.text()
        fields[key] = file.value(file.number("I"))
    entries = []
    for _ in range(n_tensors):
        name = file.text()
        shape = [file.number("Q") for _ in range(file.number("I"))][::-1]
        entries.append((name, shape, gguf.GGMLQuantizationType(file.number("I")), file.number("Q")))
    alignment = fields.get("general.alignment", 32)
    start = -(-file.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in entries:
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        row = shape[-1] // elements * size
        raw = np.frombuffer(file.data, np.uint8, row * int(np.prod(shape[:-1])), start + offset).reshape(-1, row)
        tensors[name] = Placed(gguf.quants.dequantize(raw, kind).reshape(shape), start + offset, raw.size)
    return fields, tensors

"""Files for the tests of formats: small models, raw safetensors written by hand, and what goes wrong with them."""

import json
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
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
    "causal": True, "n_types": 0, "bias": True, "n_kv_head": None, "kinds": ("usual",),
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


def gpt2_shapes(config):
    """The tensors of a GPT-2 of transformers', by hand, with no trunk's name in front: Conv1D's are (in, out)."""
    D, F = config.d_model, config.d_ff
    shapes = {"wte.weight": (config.vocab_size, D), "wpe.weight": (config.n_positions, D)}
    for i in range(config.n_layer):
        matrices = {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, F), "mlp.c_proj": (F, D)}
        for name, shape in matrices.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[1:]}
        shapes |= {f"h.{i}.{norm}.{part}": (D,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    return shapes | {"ln_f.weight": (D,), "ln_f.bias": (D,)}


def write_gpt2(folder, config, *, dtype="float32", seed=0, prefix="transformer.", metadata=None):
    """A GPT-2's folder as transformers would write it, by hand. -> its tensors"""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    shapes = gpt2_shapes(config)
    tensors = {prefix + n: rng.standard_normal(s, "float32").astype(dtype) for n, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata)
    about = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": config.vocab_size,
        "n_positions": config.n_positions, "n_layer": config.n_layer, "n_head": config.n_head,
        "n_embd": config.d_model, "n_inner": config.d_ff,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(about))
    return tensors


def write_peft(folder, factors, *, r, alpha, **settings):
    """An adapter of PEFT's own, by hand. factors: A (r, in) and B (out, r) by the module's name."""
    folder.mkdir(parents=True)
    tensors = {}
    for name, (A, B) in factors.items():
        key = f"base_model.model.{name}"
        tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    about = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": sorted(factors), **settings}
    (folder / "adapter_config.json").write_text(json.dumps(about))


# --- What others may write into a name, a text or a configuration -----------------------------------------------------

PARTS = [
    "a",
    "\n",
    "\r",
    "\x1b[2K",
    "\x1b[1A",
    "\x1b]0;x\x07",
    "\x9b2K",
    "\x08",
    "\u2028",
    "\u202e",
    "\u2066",
    "\x85",
    "\0",
]


def hostile_texts():
    """Texts that move a cursor, end a line, turn its direction, are no characters, or are long."""
    return st.one_of(
        st.lists(st.sampled_from(PARTS), max_size=8).map("".join), st.text(st.characters(), max_size=40),
        st.sampled_from(["\ud800", "\udcff\n", "x" * 10**5, "\x1b" * 10**5]),
    )  # fmt: skip


def is_safe(line):
    """Whether a text is one line that shows as it stands."""
    categories = {unicodedata.category(c) for c in line if c != "\t"}
    return not categories & {"Cc", "Cs", "Zl", "Zp"} and not set(line) & set(
        "\u202a\u202b\u202d\u202e\u2066\u2067\u2068"
    )


HOSTILE_VALUES = [
    "-3.5", "0", "-1", "1e999", "-1e999", "1e308", "5e-324", "NaN", "-Infinity", "1" + 400 * "0", "9" * 5000,
    "1000000000", "18446744073709551616", "null", "true", '"abc"', '""', "[]", "{}", "[[[]]]", '{"a": 1, "a": 2}',
    3000 * "[" + 3000 * "]", json.dumps("x\x1b[2K\nyes"), '["\\ud800"]', '{"x\\u001b[2K": 1}',
]  # fmt: skip


def hostile_json(text):
    """Variants of a JSON object, in bytes: another value, a key more, a key twice, nesting, other encodings, cuts."""
    found = json.loads(text)
    one = st.tuples(st.sampled_from(list(found)), st.sampled_from(HOSTILE_VALUES))

    def with_value(key_and_value):
        key, value = key_and_value
        parts = {name: json.dumps(given) for name, given in found.items()} | {key: value}
        return "{" + ", ".join(f"{json.dumps(name)}: {given}" for name, given in parts.items()) + "}"

    def with_more(key_and_value):
        return text.rstrip()[:-1] + f", {json.dumps(key_and_value[0])}: {key_and_value[1]}}}"

    unknown = st.tuples(hostile_texts(), st.sampled_from(HOSTILE_VALUES))
    return st.one_of(
        one.map(with_value), one.map(with_more), unknown.map(with_more),
        st.integers(0, len(text)).map(lambda n: text[:n]),
    ).map(str.encode) | st.sampled_from(
        [b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16"), text.encode() + b"\xff", b"[" * 10**5]
    )  # fmt: skip


# The format's dtypes that are no numbers to compute with, and their bits.
EXOTIC = {
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F4": 4,
}  # fmt: skip


def many_tensors(n):
    """The header of n tensors without a number in them."""
    return {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(n)}


def steps_of(function):
    """How many lines of the package a call runs, however it ends: its time, but the same on every machine."""
    count = 0

    def trace(frame, event, _argument):
        nonlocal count
        count += event == "line"
        return trace if "lora_np" in frame.f_code.co_filename else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except ValueError:
        pass
    finally:
        sys.settrace(before)
    return count


def contents(folder):
    """Every file of a folder, by name, in bytes."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}

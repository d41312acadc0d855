"""Files: a tiny base, an adapter in PEFT's two files, and what it adds to each tensor of the base.

What is expected is algebra in float64 from the numbers and scales written here: no reader of files has a part in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array
from ..formats.files.atomic import write_tensors
from ..formats.files.json_file import to_json, write_json
from .answers import Answer, errors
from .cases import Case
from .definitions import scale
from .dyadic import numbers
from .precision import U

FILES = "files"  # the folder of the cases, and the name of the file of results
PREFIX = "base_model.model."
LAYOUT = {
    "bases/BASE": "a model as transformers saves it: config.json, model.safetensors (F32)",
    "CASE": "an adapter as PEFT saves it, adapter_config.json and adapter_model.safetensors; and expected.safetensors",
    "expected.safetensors: dW/TENSOR": "F64: what is added to a tensor of the base, in its shape as the base stores "
    "it; a tied head that is adapted alone is lm_head.weight, and the table stays as it is",
    "expected.safetensors: bound/TENSOR": "F32: the most by which each element may differ if computed in float32. In "
    "float64: 2^-28 of it",
    "expected.safetensors: W/TENSOR": "F32: what takes the place of a tensor of the base, exactly",
    "results": "files.safetensors with CASE/dW/TENSOR, or CASE/W/TENSOR, the sum with the base's in its place (which "
    "may differ by one rounding more), of every tensor that is expected. Others of a case must be zero, or the base's",
}


class Base(NamedTuple):
    """A tiny model: its config.json, and its tensors, float64."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Array]
    turned: bool = False  # whether its matrices, but no table, are stored (in, out)


class FileCase(NamedTuple):
    """An adapter, and what it does to its base.

    config, tensors  its two files
    added            dW by the base's tensor, with a bound, in its shape as the base stores it
    replaced         what takes the place of a tensor of the base
    """

    name: str
    title: str
    base: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Array]
    added: Mapping[str, Answer]
    replaced: Mapping[str, Array]


# --- The bases -------------------------------------------------------------------------------------------------------


def _filled(name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    return {key: numbers(f"files/{name}/{key}", shape) for key, shape in shapes.items()}


_SIZES = {
    "vocab_size": 10, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
_NORMS = {f"{name}.weight": (8,) for name in ("input_layernorm", "post_attention_layernorm")}
_LAYER = {
    "self_attn.q_proj.weight": (8, 8), "self_attn.k_proj.weight": (4, 8), "self_attn.v_proj.weight": (4, 8),
    "self_attn.o_proj.weight": (8, 8), "mlp.gate_proj.weight": (12, 8), "mlp.up_proj.weight": (12, 8),
    "mlp.down_proj.weight": (8, 12), **_NORMS,
}  # fmt: skip
_FUSED = {
    "self_attn.qkv_proj.weight": (16, 8), "self_attn.o_proj.weight": (8, 8), "mlp.gate_up_proj.weight": (24, 8),
    "mlp.down_proj.weight": (8, 12), **_NORMS,
}  # fmt: skip
_TRUNK = {"model.embed_tokens.weight": (10, 8), "model.norm.weight": (8,)}
_GPT2 = {
    "wte.weight": (10, 8), "wpe.weight": (16, 8), "ln_f.weight": (8,), "ln_f.bias": (8,),
    **{
        f"h.0.{name}": shape
        for name, shape in {
            "ln_1.weight": (8,), "ln_1.bias": (8,), "attn.c_attn.weight": (8, 24), "attn.c_attn.bias": (24,),
            "attn.c_proj.weight": (8, 8), "attn.c_proj.bias": (8,), "ln_2.weight": (8,), "ln_2.bias": (8,),
            "mlp.c_fc.weight": (8, 12), "mlp.c_fc.bias": (12,), "mlp.c_proj.weight": (12, 8), "mlp.c_proj.bias": (8,),
        }.items()
    },
}  # fmt: skip


@cache
def bases() -> Mapping[str, Base]:
    """The models that the adapters are for, by name."""
    llama = {**_TRUNK, **{f"model.layers.{i}.{key}": shape for i in range(2) for key, shape in _LAYER.items()}}
    fused = {**_TRUNK, **{f"model.layers.0.{key}": shape for key, shape in _FUSED.items()}}
    head = {"lm_head.weight": (10, 8)}
    of_llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, **_SIZES}
    of_phi3 = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "num_hidden_layers": 1, **_SIZES}
    of_gpt2 = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 10, "n_positions": 16, "n_embd": 8,
        "n_layer": 1, "n_head": 2, "n_inner": 12, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    untied, tied = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
    return {
        "llama": Base({**of_llama, **untied}, _filled("llama", llama | head)),
        "llama-tied": Base({**of_llama, **tied}, _filled("llama-tied", llama)),
        "phi3": Base({**of_phi3, **untied}, _filled("phi3", fused | head)),
        "gpt2": Base(
            {**of_gpt2, **tied}, _filled("gpt2", {f"transformer.{k}": shape for k, shape in _GPT2.items()}), turned=True
        ),
    }


TABLES = ("model.embed_tokens", "transformer.wte")


def base_tensor(base: Base, key: str) -> Array | None:
    """A tensor of a base; a tied head's is the table's."""
    table = next(f"{name}.weight" for name in TABLES if f"{name}.weight" in base.tensors)
    return base.tensors.get(table if key == "lm_head.weight" and key not in base.tensors else key)


# --- The cases -------------------------------------------------------------------------------------------------------


def _case(
    name: str, title: str, base: str, scales: Mapping[str, tuple[int, float]], config: Mapping[str, Any],
    *, replaced: Mapping[str, str] | None = None, bias: bool = False, dtype: str = "<f4",
) -> FileCase:  # fmt: skip
    """An adapter of these modules, each of rank r and alpha as they are to come out.

    replaced: by the base's tensor the key in the adapter's file of what takes its place. bias: lora_bias, of each.
    """
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, **config}
    tensors: dict[str, Array] = {}
    added: dict[str, Answer] = {}
    rslora = bool(config.get("use_rslora"))
    for module, (r, alpha) in scales.items():
        W, is_table = base_tensor(bases()[base], f"{module}.weight"), module in TABLES
        assert W is not None
        turned = is_table or bases()[base].turned
        n_out, n_in = W.shape[::-1] if turned else W.shape
        A, B = (numbers(f"files/{name}/{module}/{one}", shape) for one, shape in (("A", (r, n_in)), ("B", (n_out, r))))
        ends = ("lora_embedding_A", "lora_embedding_B") if is_table else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{PREFIX}{module}.{end}": a for end, a in zip(ends, (A, B), strict=True)}
        if config.get("use_dora"):
            m = tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = _magnitudes(f"{name}/{module}", n_out)
            dW = _dora(W.T if turned else W, A, B, m, alpha, rslora)
        else:
            dW = _update(A, B, alpha, rslora)
        added[f"{module}.weight"] = Answer(dW.value.T, dW.bound.T) if turned else dW
        if bias:
            b = numbers(f"files/{name}/{module}/bias", (n_out,))
            tensors[f"{PREFIX}{module}.lora_B.bias"] = b
            s = scale({"alpha": alpha, "r": r, "rslora": rslora})
            value, bound = _update(np.ones((1, 1)), b[:, None], s, False)
            added[f"{module}.bias"] = Answer(value[:, 0], bound[:, 0])
    whole = {}
    for key, stored in (replaced or {}).items():
        W = base_tensor(bases()[base], key)
        assert W is not None
        whole[key] = tensors[f"{PREFIX}{stored}"] = numbers(f"files/{name}/{key}", W.shape)
    return FileCase(name, title, base, config, {k: a.astype(dtype) for k, a in tensors.items()}, added, whole)


def _update(A: Array, B: Array, alpha: float, rslora: bool) -> Answer:
    """L1: s B A, with its bound."""
    scalars = {"alpha": alpha, "r": len(A), "rslora": rslora}
    value, bound = errors(Case("L1", "", "lora_update", "", scalars, {"A": A, "B": B}))["out/dW"]
    return Answer(value, bound)


def _magnitudes(name: str, n_out: int) -> Array:
    return numbers(f"files/{name}/m", (n_out,), 0.5, 2.0)


def _dora(W0: Array, A: Array, B: Array, m: Array, alpha: float, rslora: bool) -> Answer:
    """L10: (m / c) (W0 + s B A) - W0, with its bound."""
    scalars = {"alpha": alpha, "r": len(A), "rslora": rslora}
    inputs = {"W0": W0, "A": A, "B": B, "m": m}
    value, bound = errors(Case("L10", "", "dora_merge", "", scalars, inputs))["out/W"]
    return Answer(value - W0, bound + U * (np.abs(value - W0) + bound))


def _layers(ends: Mapping[str, tuple[int, float]], layers: Sequence[int] = (0, 1)) -> dict[str, tuple[int, float]]:
    return {f"model.layers.{i}.{end}": scale for i in layers for end, scale in ends.items()}


Q, K, V, OUT = (f"self_attn.{one}_proj" for one in "qkvo")
UP, DOWN = "mlp.up_proj", "mlp.down_proj"


@cache
def file_cases() -> Sequence[FileCase]:
    """Every one."""
    return tuple(_cases())


def _cases() -> Iterator[FileCase]:
    qv = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    plain = _layers({Q: (2, 6), V: (2, 6)})
    yield _case("plain", "s = lora_alpha / r", "llama", plain, qv)
    yield _case("float16", "Factors kept in float16, in which they are exact", "llama", plain, qv, dtype="<f2")
    three = _layers({Q: (3, 6), V: (3, 6)})
    yield _case("rslora", "use_rslora: s = lora_alpha / sqrt(r)", "llama", three, {**qv, "r": 3, "use_rslora": True})
    yield _case("no-alpha", "No lora_alpha: it is 8", "llama", _layers({OUT: (2, 8)}),
                {"r": 2, "target_modules": ["o_proj"]})  # fmt: skip
    yield _case(
        "patterns", "rank_pattern and alpha_pattern by the end of a name, the first that fits", "llama",
        {**_layers({Q: (2, 4), V: (3, 5)}, [0]), **_layers({Q: (1, 7), V: (3, 5)}, [1])},
        {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"],
         "rank_pattern": {"layers.1.self_attn.q_proj": 1, "v_proj": 3},
         "alpha_pattern": {"layers.1.self_attn.q_proj": 7, "v_proj": 5}},
    )  # fmt: skip
    yield _case(
        "pattern-order", "Of two patterns that fit the first counts, though the second is nearer", "llama",
        _layers({V: (2, 5)}),
        {"r": 2, "lora_alpha": 4, "target_modules": ["v_proj"],
         "alpha_pattern": {"v_proj": 5, "layers.1.self_attn.v_proj": 9}},
    )  # fmt: skip
    yield _case(
        "patterns-rslora", "The same with use_rslora: the root is of each module's own rank", "llama",
        _layers({Q: (2, 4), V: (4, 5)}),
        {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True,
         "rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 5}},
    )  # fmt: skip
    yield _case(
        "pattern-expression", "Patterns are regular expressions", "llama",
        {**_layers({UP: (2, 4), DOWN: (2, 4)}, [0]), **_layers({UP: (3, 9), DOWN: (3, 9)}, [1])},
        {"r": 2, "lora_alpha": 4, "target_modules": ["up_proj", "down_proj"],
         "rank_pattern": {r"layers\.1\.mlp\.(up|down)_proj": 3}, "alpha_pattern": {r"layers\.1\.mlp\..*": 9}},
    )  # fmt: skip
    yield _case(
        "layers",
        "layers_to_transform: one layer of two",
        "llama",
        _layers({Q: (2, 6), V: (2, 6)}, [1]),
        {**qv, "layers_to_transform": [1]},
    )
    yield _case(
        "target-expression",
        "target_modules is one regular expression",
        "llama",
        _layers({K: (2, 6), OUT: (2, 6)}),
        {**qv, "target_modules": r".*\.self_attn\.(k|o)_proj"},
    )
    yield _case("dora", "use_dora: each row of W0 + s B A has the length m", "llama", plain, {**qv, "use_dora": True})
    yield _case("dora-rslora", "The same with use_rslora", "llama", three,
                {**qv, "r": 3, "use_dora": True, "use_rslora": True})  # fmt: skip
    yield _case("fused", "Fused modules, q over k over v, gate over up: one pair each", "phi3",
                _layers({"self_attn.qkv_proj": (3, 6), "mlp.gate_up_proj": (3, 6)}, [0]),
                {"r": 3, "lora_alpha": 6, "target_modules": ["qkv_proj", "gate_up_proj"]})  # fmt: skip
    h = "transformer.h.0."
    conv = {"r": 2, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    modules = {f"{h}{name}": (2, 6.0) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")}
    yield _case("conv1d", "Conv1D stores (in, out): dW is turned, in a square matrix too", "gpt2", modules, conv)
    unsaid = {key: value for key, value in conv.items() if key != "fan_in_fan_out"}
    yield _case("conv1d-unsaid", "fan_in_fan_out is not said: a square Conv1D is one still", "gpt2", modules, unsaid)
    yield _case(
        "conv1d-denied", "fan_in_fan_out is false: the same", "gpt2", modules, {**conv, "fan_in_fan_out": False}
    )
    yield _case("conv1d-nowhere", "fan_in_fan_out is true of square matrices that are stored (out, in)", "llama",
                _layers({Q: (2, 6), OUT: (2, 6)}),
                {**qv, "target_modules": ["q_proj", "o_proj"], "fan_in_fan_out": True})  # fmt: skip
    yield _case("conv1d-dora", "use_dora: of (in, out) each column has the length m", "gpt2", modules,
                {**conv, "use_dora": True})  # fmt: skip
    yield _case("conv1d-lora-bias", "lora_bias: s times B's own bias is added to the module's", "gpt2",
                {f"{h}attn.c_attn": (2, 6)}, {**conv, "target_modules": ["c_attn"], "lora_bias": True},
                bias=True)  # fmt: skip
    yield _case(
        "bias", "bias all: biases take the place of the base's", "gpt2", {f"{h}attn.c_attn": (2, 6)},
        {**conv, "target_modules": ["c_attn"], "bias": "all"},
        replaced={f"{h}attn.c_attn.bias": f"{h}attn.c_attn.base_layer.bias", f"{h}mlp.c_fc.bias": f"{h}mlp.c_fc.bias",
                  f"{h}ln_1.bias": f"{h}ln_1.bias"},
    )  # fmt: skip
    ends = {"r": 2, "lora_alpha": 6, "target_modules": ["embed_tokens", "lm_head"]}
    table, head = {"model.embed_tokens": (2, 6)}, {"lm_head": (2, 6)}
    yield _case("embedding", "A table's A is (r, V), its B (D, r): (B A)^T is added; and a head", "llama",
                {**table, **head}, ends)  # fmt: skip
    yield _case("tied-head", "A head that is tied: the table that it was tied to stays as it is", "llama-tied", head,
                {**ends, "target_modules": ["lm_head"]})  # fmt: skip
    yield _case("tied-table", "A table that is tied: the head that it was tied to stays as it is", "llama-tied", table,
                {**ends, "target_modules": ["embed_tokens"]})  # fmt: skip
    yield _case(
        "modules-to-save",
        "modules_to_save takes the place of the base's",
        "llama",
        plain,
        {**qv, "modules_to_save": ["lm_head", "model.norm"]},
        replaced={"lm_head.weight": "lm_head.weight", "model.norm.weight": "model.norm.weight"},
    )


# --- Their files -----------------------------------------------------------------------------------------------------


def write_base(folder: Path, base: Base) -> None:
    """A model's folder, as transformers saves one."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", base.config)
    tensors = {key: a.astype("<f4") for key, a in base.tensors.items()}
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
    """An adapter's folder, as PEFT saves one."""
    folder.mkdir(parents=True)
    write_json(folder / "adapter_config.json", config)
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})


def write_file_cases(folder: Path) -> None:
    """The bases, the cases, and a manifest, in a new folder."""
    for name, base in bases().items():
        write_base(folder / "bases" / name, base)
    for case in file_cases():
        write_adapter(folder / case.name, case.config, case.tensors)
        expected = {f"dW/{key}": answer.value for key, answer in case.added.items()}
        expected |= {f"bound/{key}": answer.bound for key, answer in case.added.items()}
        expected |= {f"W/{key}": a.astype("<f4") for key, a in case.replaced.items()}
        write_tensors(folder / case.name / "expected.safetensors", expected)
    cases = [_entry(case) for case in file_cases()]
    write_json(folder / "manifest.json", {"digest": files_digest(), "layout": LAYOUT, "cases": cases})


def _entry(case: FileCase) -> dict[str, Any]:
    expected = [f"dW/{key}" for key in case.added] + [f"W/{key}" for key in case.replaced]
    return {"name": case.name, "title": case.title, "base": f"bases/{case.base}", "expected": expected}


def files_digest() -> str:
    """SHA-256 of the cases: of their files' words and numbers, and of what is expected by name."""
    total = hashlib.sha256()
    for base in bases().values():
        _add(total, [base.config], base.tensors)
    for case in file_cases():
        _add(total, [_entry(case)["expected"], case.name, case.base, case.config], {**case.tensors, **case.replaced})
    return total.hexdigest()


def _add(total: Any, words: Sequence[Any], tensors: Mapping[str, Array]) -> None:
    total.update(to_json(words).encode())
    for key, a in tensors.items():
        total.update(key.encode() + a.astype("<f4").tobytes())

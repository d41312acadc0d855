"""Adapters in llama.cpp's GGUF: what stands in the file, by hand; what is refused, by name; damaged files."""

import json
import math
import struct
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import same_bits

import lora_np as ln
from lora_np.adapter import fused_parts
from lora_np.cli import main
from lora_np.formats.merged.norms import base_norms
from lora_np.formats.merged.survey import survey

gguf = pytest.importorskip("gguf", reason="reads GGUF files: the extra models")
from gguf_files import KINDS, SMALL, entry, in_file, info, raw, text, write  # noqa: E402

LLAMA = replace(SMALL, vocab_size=11, n_layer=2, tie_head=False)
SIZES = {"vocab_size": 11, "n_positions": 16, "n_layer": 2, "n_head": 4, "d_model": 32, "d_ff": 24}
GPT2 = replace(ln.PRESETS["gpt2"], **SIZES)
BERT = replace(ln.PRESETS["bert-base"], **SIZES)
OWN = replace(LLAMA, bias=True)  # nobody else's architecture
ROBERTA = replace(ln.PRESETS["roberta-base"], **SIZES)
MODELS = {
    name: ln.Model(config, ln.init_weights(config, seed=0))
    for name, config in {"llama": LLAMA, "gpt2": GPT2, "bert": BERT}.items()
}
TARGETS = {
    "llama": ("q", "k", "v", "o", "gate", "up", "down", "embed", "head"),
    "gpt2": ("q", "k", "v", "o", "up", "down"),
    "bert": ("q", "k", "v", "o", "up", "down", "embed"),
}
# What llama.cpp calls the matrices of a layer.
THEIRS = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate",
    "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


def trained(model, **fields):
    """An adapter of random A and B."""
    config, rng = ln.LoRAConfig(**fields), np.random.default_rng(0)
    adapter = ln.init_adapter(model, config, seed=0)
    return ln.Adapter(
        config,
        {name: rng.standard_normal(value.shape).astype(value.dtype) for name, value in adapter.params.items()},
    )


def updates(path):
    """(alpha / r) B A of each tensor that is adapted, in float64, as llama.cpp would have it."""
    fields, tensors = in_file(path)
    result = {}
    for name in {name[: -len(".lora_a")] for name in tensors}:
        a, b = (tensors[f"{name}.lora_{end}"].values.astype(np.float64) for end in "ab")
        product = a @ b.T if name == "token_embd.weight" else b @ a
        result[name] = fields["adapter.lora.alpha"] / b.shape[1] * product
    return result


def in_pairs(rows, heads):
    """Rows of each head as llama.cpp's q and k have them: 2j is j's, 2j + 1 is that of j + K/2."""
    K = len(rows) // heads
    return rows[[h * K + half * (K // 2) + j for h in range(heads) for j in range(K // 2) for half in (0, 1)]]


def expected(model, adapter):
    """s B A of each tensor, in float64, in the order of llama.cpp's rows."""
    config, result = model.config, {}
    for name in adapter.matrices:
        A, B = (ln.asnumpy(adapter.params[f"{name}.{factor}"]).astype(np.float64) for factor in "AB")
        update, target = adapter.config.scale(name) * (B @ A), name.split(".")[-1]
        if not name.startswith("layers."):
            result["output.weight" if name == "head" else "token_embd.weight"] = update if name == "head" else update.T
            continue
        layer = f"blk.{name.split('.')[1]}."
        if target in ("q", "k", "v", "qkv") and config.positions == "learned" and config.causal:  # GPT-2's are one
            D = config.d_model
            whole = result.setdefault(f"{layer}attn_qkv.weight", np.zeros((3 * D, D)))
            whole["qkv".index(target) * D :][: len(update)] += update
            continue
        for part, rows in fused_parts(config, name).items():
            end = part.split(".")[-1]
            heads = {"q": config.n_head, "k": config.kv_heads}.get(end, 0) if config.positions == "rotary" else 0
            result[f"{layer}{THEIRS[end]}.weight"] = in_pairs(update[rows], heads) if heads else update[rows]
    return result


@st.composite
def adapters(draw):
    """One of the three architectures, and a LoRAConfig's fields with ranks and alphas of all kinds."""
    kind = draw(st.sampled_from(list(MODELS)))
    targets = draw(st.lists(st.sampled_from(TARGETS[kind]), min_size=1, unique=True))
    if draw(st.booleans()):
        targets = ["qkv", *(target for target in targets if target not in "qkv")]
    alphas = st.sampled_from([1, 7, 16, 0.3, -2, 1e-3, 100])
    patterns = st.sampled_from(targets)
    return kind, {
        "targets": tuple(targets), "r": draw(st.integers(1, 6)), "alpha": draw(alphas), "rslora": draw(st.booleans()),
        "rank_pattern": draw(st.dictionaries(patterns, st.integers(1, 6))),
        "alpha_pattern": draw(st.dictionaries(patterns, alphas)),
    }  # fmt: skip


@pytest.mark.proves("L1")
@given(case=adapters())
def test_the_file_says_s_B_A(tmp_path_factory, case):
    model = MODELS[case[0]]
    adapter = trained(model, **case[1])
    path = tmp_path_factory.mktemp("x") / "x.gguf"
    ln.save_adapter(path, adapter, model)
    found, due = updates(path), expected(model, adapter)
    assert found.keys() == due.keys()
    for name, update in due.items():
        np.testing.assert_allclose(found[name], update, rtol=0, atol=4e-7 * np.abs(update).max(), err_msg=name)


@given(case=adapters())
def test_it_comes_back(tmp_path_factory, case):
    """The configuration is the same, A to the bit, and B too, or within the rounding of a product and a quotient."""
    model = MODELS[case[0]]
    adapter = trained(model, **case[1])
    path = tmp_path_factory.mktemp("x") / "x.gguf"
    ln.save_adapter(path, adapter, model)
    found = ln.load_adapter(path, model)
    assert found.config == adapter.config
    assert found.params.keys() == adapter.params.keys()
    for name, value in found.params.items():
        if name.endswith(".A"):
            assert same_bits(value, adapter.params[name])
        else:
            np.testing.assert_allclose(ln.asnumpy(value), ln.asnumpy(adapter.params[name]), rtol=2**-23)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {"targets": TARGETS["llama"], "r": 3, "alpha": 7}),
        ("llama", {"targets": ("qkv", "o"), "rslora": True}),
        ("llama", {"targets": ("q", "v", "up"), "alpha_pattern": {"v": 4, "up": 64}}),
        ("gpt2", {"targets": ("q", "v", "o"), "r": 5, "alpha": 3, "dropout": 0.1, "init": "normal"}),
        ("bert", {"targets": ("q", "embed"), "layers": (1,)}),
    ],
)
def test_bit_for_bit_where_ratios_are_powers_of_two(tmp_path, kind, fields):
    adapter = trained(MODELS[kind], **fields)
    ln.save_adapter(tmp_path / "x.gguf", adapter, MODELS[kind])
    found = ln.load_adapter(tmp_path / "x.gguf", MODELS[kind])
    assert found.config == adapter.config
    assert same_bits(dict(found.params), dict(adapter.params))


@pytest.mark.parametrize("r", range(1, 12))
def test_one_scale_for_all_leaves_B_as_it_is(tmp_path, r):
    """Also where it is no quotient that float32 holds: alpha is rounded, B is not."""
    adapter = trained(MODELS["llama"], targets=("v", "down"), r=r, alpha=0.7, rslora=True)
    ln.save_adapter(tmp_path / "x.gguf", adapter, MODELS["llama"])
    _, found = in_file(tmp_path / "x.gguf")
    assert same_bits(found["blk.0.attn_v.weight.lora_b"].values, ln.asnumpy(adapter.params["layers.0.attn.v.B"]))
    assert same_bits(found["blk.1.ffn_down.weight.lora_b"].values, ln.asnumpy(adapter.params["layers.1.mlp.down.B"]))


def test_what_llama_cpp_asks_of_a_file(tmp_path):
    ln.save_adapter(tmp_path / "x.gguf", trained(MODELS["llama"], targets=("k", "embed"), alpha=12), MODELS["llama"])
    fields, tensors = in_file(tmp_path / "x.gguf")
    asked = {
        "general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora", "adapter.lora.alpha": 12.0,
    }  # fmt: skip
    assert fields.items() >= asked.items()
    assert fields["GGUF.version"] == 3
    assert {name: (found.values.shape, found.size // found.values.size) for name, found in tensors.items()} == {
        "token_embd.weight.lora_a": ((11, 8), 4), "token_embd.weight.lora_b": ((32, 8), 4),
        "blk.0.attn_k.weight.lora_a": ((8, 32), 4), "blk.0.attn_k.weight.lora_b": ((16, 8), 4),
        "blk.1.attn_k.weight.lora_a": ((8, 32), 4), "blk.1.attn_k.weight.lora_b": ((16, 8), 4),
    }  # fmt: skip


def test_a_float64_model_takes_it_widened(tmp_path):
    adapter = trained(MODELS["llama"], targets=("q", "down"))
    ln.save_adapter(tmp_path / "x.gguf", adapter, MODELS["llama"])
    wide = ln.Model(LLAMA, {name: value.astype("float64") for name, value in MODELS["llama"].weights.items()})
    for name, value in ln.load_adapter(tmp_path / "x.gguf", wide).params.items():
        assert value.dtype == np.float64
        np.testing.assert_array_equal(ln.asnumpy(value), ln.asnumpy(adapter.params[name]))


# --- What is not written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (replace(LLAMA, tie_head=True), {"targets": ("embed",)}, "embed.tokens: the head is tied"),
        (replace(LLAMA, tie_head=True), {"targets": ("head",)}, "head: the head is tied"),
        (GPT2, {"targets": ("embed",)}, "embed.tokens: the head is tied"),
        (GPT2, {"targets": ("q",), "bias": "lora_only"}, "layers.0.attn.q.bias is trained whole"),
        (LLAMA, {"targets": ("q",), "train_head": True}, "head.weight is trained whole"),
        (LLAMA, {"targets": ("q",), "alpha": 0}, "layers.0.attn.q: its scale is 0, which llama.cpp takes for 1"),
        (LLAMA, {"targets": ("q", "v"), "alpha_pattern": {"v": 0}}, "layers.0.attn.v: its scale is 0"),
        (LLAMA, {"targets": ("q",), "alpha": 1e-60}, "expected a scale that float32 holds"),
        (LLAMA, {"targets": ("q",), "alpha": 1e60}, "expected a scale that float32 holds"),
        (
            LLAMA,
            {"targets": ("q", "v"), "alpha_pattern": {"v": 1e-300}},
            "attn.v: its scale is 6.25e-302 times that of",
        ),
        (LLAMA, {"targets": ("q", "v"), "alpha_pattern": {"v": 1e300}}, "attn.v: its scale is 6.25e+298 times"),
        (OWN, {"targets": ("q",)}, "this architecture is not supported"),
        (ROBERTA, {"targets": ("q",)}, "this architecture is not supported"),
        (replace(LLAMA, head="classify", n_labels=3), {"targets": ("q",)}, "a model with head 'classify' is not supp"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_llama_cpp_has_no_place_for(tmp_path, config, fields, message):
    model = ln.Model(config, ln.init_weights(config, seed=0))
    with pytest.raises(ValueError, match=r"x\.gguf") as caught:
        ln.save_adapter(tmp_path / "x.gguf", trained(model, **fields), model)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_B_that_overflows(tmp_path):
    adapter = trained(MODELS["llama"], targets=("q", "v"), alpha_pattern={"v": 1600})
    large = {name: np.full_like(ln.asnumpy(value), 1e37) for name, value in adapter.params.items()}
    with pytest.raises(ValueError, match=r"layers.0.attn.v.B: too large for float32 when it is multiplied by 100"):
        ln.save_adapter(tmp_path / "x.gguf", ln.Adapter(adapter.config, large), MODELS["llama"])


def test_float64_is_not_rounded(tmp_path):
    model = ln.Model(LLAMA, ln.init_weights(LLAMA, seed=0, dtype="float64"))
    with pytest.raises(TypeError, match=r"llama.cpp's adapters hold no float64"):
        ln.save_adapter(tmp_path / "x.gguf", trained(model, targets=("q",)), model)


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "x.gguf").write_text("here")
    with pytest.raises(FileExistsError, match=r"x\.gguf: exists already"):
        ln.save_adapter(tmp_path / "x.gguf", trained(MODELS["llama"], targets=("q",)), MODELS["llama"])
    assert (tmp_path / "x.gguf").read_text() == "here"


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    with pytest.raises(ImportError, match=r"pip install gguf \(the extra models\)"):
        ln.save_adapter(tmp_path / "x.gguf", trained(MODELS["llama"], targets=("q",)), MODELS["llama"])
    assert not list(tmp_path.iterdir())


# --- Files of llama.cpp's own ----------------------------------------------------------------------------------------


ASKED = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 6.0}


def write_theirs(path, tensors, keys=None, architecture="llama", kind="F32"):
    """A file as llama.cpp's converter writes it. keys: more of them, or others; None: left out."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (ASKED | (keys or {})).items():
        add = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        if value is not None:
            add[type(value)](key, value)
    for name, value in tensors.items():
        encoded = gguf.quants.quantize(np.asarray(value, np.float32), KINDS[kind])
        writer.add_tensor(name, encoded, raw_dtype=KINDS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pair(name, n_out, n_in, r=2, seed=0):
    """lora_a and lora_b of one tensor, of numbers that every type holds."""
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(-8, 9, shape) / 8 for shape in ((r, n_in), (n_out, r)))
    return {f"{name}.lora_a": a, f"{name}.lora_b": b}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_a_file_of_their_own(tmp_path, kind):
    """The ranks are those of its tensors, the alpha is one; q's rows are put in our order."""
    q, down = pair("blk.1.attn_q.weight", 32, 32, r=4), pair("blk.0.ffn_down.weight", 32, 32, r=2)
    write_theirs(tmp_path / "x.gguf", q | down, kind=kind)
    adapter = ln.load_adapter(tmp_path / "x.gguf", MODELS["llama"])
    assert sorted(adapter.matrices) == ["layers.0.mlp.down", "layers.1.attn.q"]
    assert [adapter.config.scale(name) for name in ("layers.0.mlp.down", "layers.1.attn.q")] == [3.0, 1.5]
    B = ln.asnumpy(adapter.params["layers.1.attn.q.B"])
    np.testing.assert_array_equal(in_pairs(B, 4), q["blk.1.attn_q.weight.lora_b"])
    np.testing.assert_array_equal(ln.asnumpy(adapter.params["layers.1.attn.q.A"]), q["blk.1.attn_q.weight.lora_a"])
    np.testing.assert_array_equal(
        ln.asnumpy(adapter.params["layers.0.mlp.down.B"]), down["blk.0.ffn_down.weight.lora_b"]
    )


def test_a_table_of_their_own(tmp_path):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((11, 2)).astype("f4"), rng.standard_normal((32, 2)).astype("f4")
    write_theirs(tmp_path / "x.gguf", {"token_embd.weight.lora_a": a, "token_embd.weight.lora_b": b})
    adapter = ln.load_adapter(tmp_path / "x.gguf", MODELS["llama"])
    np.testing.assert_array_equal(ln.asnumpy(adapter.params["embed.tokens.A"]), a.T)
    np.testing.assert_array_equal(ln.asnumpy(adapter.params["embed.tokens.B"]), b)


def test_gpt2s_fused_update_of_their_own(tmp_path):
    tensors = pair("blk.0.attn_qkv.weight", 96, 32)
    write_theirs(tmp_path / "x.gguf", tensors, architecture="gpt2")
    adapter = ln.load_adapter(tmp_path / "x.gguf", MODELS["gpt2"])
    assert adapter.matrices == ["layers.0.attn.qkv"]
    np.testing.assert_array_equal(
        ln.asnumpy(adapter.params["layers.0.attn.qkv.B"]), tensors["blk.0.attn_qkv.weight.lora_b"]
    )


@pytest.mark.parametrize("alpha", [0.0, None])
def test_an_alpha_of_0_is_a_scale_of_1(tmp_path, alpha):
    """As llama.cpp has it: alpha ? alpha / r : 1."""
    tensors = pair("blk.0.attn_v.weight", 16, 32, r=3) | pair("blk.0.ffn_up.weight", 32, 32, r=2)
    write_theirs(tmp_path / "x.gguf", tensors, {"adapter.lora.alpha": alpha})
    adapter = ln.load_adapter(tmp_path / "x.gguf", MODELS["llama"])
    assert {adapter.config.scale(name) for name in adapter.matrices} == {1.0}


Q = pair("blk.0.attn_q.weight", 32, 32)
Q_A, Q_B = Q
NAN = np.where(np.arange(64).reshape(32, 2) == 5, np.nan, 0)


@pytest.mark.parametrize(
    ("tensors", "keys", "message"),
    [
        (Q, {"general.type": "model"}, "general.type: expected adapter, got 'model'"),
        (Q, {"general.type": None}, "general.type: expected adapter, got 'none'"),
        (Q, {"general.type": 3}, "general.type: expected str, got 3"),
        (Q, {"adapter.type": "vera"}, "adapter.type: expected lora, got 'vera'"),
        (Q, {"adapter.type": "x\x1b[2K\ny"}, r"adapter.type: expected lora, got 'x\x1b[2K\ny'"),
        (Q, {"adapter.alora.invocation_tokens": [1, 2]}, "an activated LoRA (aLoRA) is not supported"),
        (Q, {"adapter.lora.alpha": 6}, "adapter.lora.alpha: expected float, got 6"),
        (Q, {"adapter.lora.alpha": math.nan}, "adapter.lora.alpha: expected a finite number"),
        (Q, {"adapter.lora.alpha": math.inf}, "adapter.lora.alpha: expected a finite number"),
        ({Q_A: Q[Q_A]}, {}, "attn_q.weight.lora_a stands alone: blk.0.attn_q.weight.lora_b is missing"),
        ({Q_B: Q[Q_B]}, {}, "attn_q.weight.lora_b stands alone: blk.0.attn_q.weight.lora_a is missing"),
        ({}, {}, "expected lora_a and lora_b of some tensor, got none"),
        (Q | {"blk.0.attn_norm.weight": np.ones(32)}, {}, "blk.0.attn_norm.weight: expected a name that ends in"),
        (Q | {".lora_a": np.ones((2, 2)), ".lora_b": np.ones((2, 2))}, {}, "the tensor .lora_a has no place"),
        (pair("blk.2.attn_q.weight", 32, 32), {}, "the tensor blk.2.attn_q.weight.lora_a has no place in this model"),
        (pair("blk.0.attn_qkv.weight", 64, 32) | Q, {}, "qkv stands for q, k and v together"),
        (pair("blk.0.attn_q.weight", 32, 31), {}, "lora_a: expected shape (2, 32), got (2, 31)"),
        (pair("blk.0.attn_q.weight", 30, 32), {}, "lora_b: expected shape (32, 2), got (30, 2)"),
        (Q | {Q_A: np.ones((3, 32))}, {}, "lora_a: expected shape (2, 32), got (3, 32)"),
        (Q | {Q_A: np.ones(32)}, {}, "lora_a: expected shape (2, 32), got (32,)"),
        (Q | {Q_B: np.ones((1, 32, 2))}, {}, "lora_b: expected shape (32, 2), got (1, 32, 2)"),
        (Q | {Q_A: np.ones((0, 32)), Q_B: np.ones((32, 0))}, {}, "expected a shape without 0"),
        (Q | {Q_B: NAN}, {}, "lora_b: holds NaN or infinite numbers"),
        (Q, {"lora_np": "{"}, "lora_np"),
        (Q, {"lora_np": 5}, "lora_np: expected str, got 5"),
        (Q, {"lora_np": "{}"}, "lora_np: format: expected 1, got None"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_wrong_with_a_file(tmp_path, tensors, keys, message):
    write_theirs(tmp_path / "x.gguf", tensors, keys)
    assert message in refusal(tmp_path / "x.gguf")


def refusal(path, model=MODELS["llama"]):
    """The message of the ValueError, which is one line and names the file."""
    with pytest.raises(ValueError, match=r"x\.gguf") as caught:
        ln.load_adapter(path, model)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_another_architecture_or_no_adapter(tmp_path):
    write_theirs(tmp_path / "x.gguf", Q, architecture="qwen2")
    assert "its architecture is 'qwen2', this is llama" in refusal(tmp_path / "x.gguf")
    write(tmp_path / "model.gguf", SMALL)
    (tmp_path / "model.gguf").rename(tmp_path / "m.x.gguf")
    assert "general.type: expected adapter, got 'none'" in refusal(tmp_path / "m.x.gguf")


def test_it_fits_its_base_in_any_type(tmp_path):
    """Unlike the files that record a hash of it."""
    for kind in ("F32", "F16", "Q8_0"):
        write(tmp_path / f"{kind}.gguf", SMALL, kind)
    model = ln.load_model(tmp_path / "F32.gguf")
    adapter = trained(model, targets=("q",))
    ln.save_adapter(tmp_path / "x.gguf", adapter, model)
    for kind in ("F16", "Q8_0"):
        found = ln.load_adapter(tmp_path / "x.gguf", ln.load_model(tmp_path / f"{kind}.gguf"))
        assert same_bits(dict(found.params), dict(adapter.params))


def test_a_file_of_ours_that_was_edited(tmp_path):
    """Its alpha, or what stands in B between q's and v's."""
    ln.save_adapter(tmp_path / "x.gguf", trained(MODELS["gpt2"], targets=("q", "v")), MODELS["gpt2"])
    fields, found = in_file(tmp_path / "x.gguf")
    tensors = {name: tensor.values for name, tensor in found.items()}
    (tmp_path / "x.gguf").unlink()
    header = {"lora_np": fields["lora_np"], "adapter.lora.alpha": fields["adapter.lora.alpha"]}
    write_theirs(tmp_path / "x.gguf", tensors, header | {"adapter.lora.alpha": 5.0}, "gpt2")
    assert "adapter.lora.alpha: expected 32, as lora_np has it, got 5" in refusal(tmp_path / "x.gguf", MODELS["gpt2"])
    (tmp_path / "x.gguf").unlink()
    changed = {name: np.where(value == 0, 1, value) for name, value in tensors.items()}
    write_theirs(tmp_path / "x.gguf", changed, header, "gpt2")
    assert "attn_qkv.weight.lora_b: expected" in refusal(tmp_path / "x.gguf", MODELS["gpt2"])
    (tmp_path / "x.gguf").unlink()
    write_theirs(tmp_path / "x.gguf", dict(list(tensors.items())[:2]), header, "gpt2")
    assert "is missing" in refusal(tmp_path / "x.gguf", MODELS["gpt2"])
    (tmp_path / "x.gguf").unlink()
    config = json.loads(fields["lora_np"])
    config["config"]["alpha"] = 0
    write_theirs(tmp_path / "x.gguf", tensors, header | {"lora_np": json.dumps(config)}, "gpt2")
    message = refusal(tmp_path / "x.gguf", MODELS["gpt2"])
    config["config"] |= {"alpha": 16, "alpha_pattern": {"v": 5e-324}}
    write_theirs(tmp_path / "y.x.gguf", tensors, header | {"lora_np": json.dumps(config)}, "gpt2")
    assert "layers.0.attn.v: its scale is 0" in refusal(tmp_path / "y.x.gguf", MODELS["gpt2"])
    assert message == f"{tmp_path / 'x.gguf'}: lora_np: layers.0.attn.q: its scale is 0, which llama.cpp takes for 1"


# --- A look inside, and does it fit -----------------------------------------------------------------------------------


@pytest.mark.proves("L1")
def test_a_look_inside(tmp_path):
    """By llama.cpp's names; norms as they are by the model's own."""
    adapter = trained(MODELS["llama"], targets=("q", "embed"), r=2, alpha=3, layers=(1,))
    ln.save_adapter(tmp_path / "x.gguf", adapter, MODELS["llama"])
    found = {module.name: module for module in survey(tmp_path / "x.gguf").modules}
    assert found.keys() == {"token_embd.weight", "blk.1.attn_q.weight"}
    for theirs, ours in (("token_embd.weight", "embed.tokens"), ("blk.1.attn_q.weight", "layers.1.attn.q")):
        A, B = (ln.asnumpy(adapter.params[f"{ours}.{factor}"]).astype("f8") for factor in "AB")
        module = found[theirs]
        assert (module.rank, module.scale) == (2, 1.5)
        assert module.norm_update == pytest.approx(1.5 * np.linalg.norm(B @ A), rel=1e-12)
    table = found["token_embd.weight"]
    assert (table.n_out, table.n_in) == (32, 11)
    ln.save_model(tmp_path / "base", MODELS["llama"])
    norms = base_norms(tmp_path / "base", tmp_path / "x.gguf", list(found.values()))
    for module, norm in zip(found.values(), norms, strict=True):
        ours = "embed.tokens" if module is table else "layers.1.attn.q.weight"
        assert norm == pytest.approx(np.linalg.norm(ln.asnumpy(MODELS["llama"].weights[ours]).astype("f8")), rel=1e-12)


def test_commands_that_look(tmp_path, capsys):
    write(tmp_path / "base.gguf", SMALL)
    model = ln.load_model(tmp_path / "base.gguf")
    ln.save_adapter(tmp_path / "x.gguf", trained(model, targets=("q", "down"), r=2), model)
    write_theirs(tmp_path / "y.gguf", Q)
    base, x, y = (str(tmp_path / f"{name}.gguf") for name in ("base", "x", "y"))
    assert main(["inspect", x]) == 0
    out = capsys.readouterr().out
    assert "B is not zero" in out
    assert "blk.0.ffn_down.weight" in out
    assert main(["verify", "--base", base, "--adapter", x]) == 0
    assert "fits: yes (names and shapes; the file records no hash" in capsys.readouterr().out
    assert main(["verify", "--base", base, "--adapter", y]) == 0
    assert "the file records no hash of its base" in capsys.readouterr().out
    assert main(["verify", "--base", base, "--adapter", x, "--merged", str(tmp_path)]) == 2
    assert "--merged: expected a folder where the base is one" in capsys.readouterr().err
    assert main(["inspect", base]) == 2
    assert "general.type: expected adapter" in capsys.readouterr().err


# --- Hostile bytes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["ours", "theirs"])
def good(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "x.gguf"
    if request.param == "ours":
        ln.save_adapter(path, trained(MODELS["llama"], targets=("q", "embed"), r=2), MODELS["llama"])
    else:
        write_theirs(path, pair("output.weight", 11, 32) | Q, kind="F16")  # the last tensor fills its place
    return path.read_bytes()


@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere(tmp_path_factory, good, cut):
    path = tmp_path_factory.mktemp("cut") / "x.gguf"
    path.write_bytes(good[: int(cut * len(good))])
    refusal(path)


@given(data=st.data())
def test_bytes_changed(tmp_path_factory, good, data):
    """Anywhere: the header's mostly. What still reads is an adapter of finite numbers."""
    path = tmp_path_factory.mktemp("flip") / "x.gguf"
    place = st.integers(0, len(good) - 1) | st.integers(0, 400)
    changed = bytearray(good)
    for at, value in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=6)):
        changed[at] = value
    path.write_bytes(changed)
    message, params = "x.gguf", {}
    try:
        params = ln.load_adapter(path, MODELS["llama"]).params
    except ValueError as error:
        message = str(error)
    assert "x.gguf" in message
    assert message.isprintable()
    assert all(np.isfinite(ln.asnumpy(value)).all() for value in params.values())


HEAD = [entry(key, 8, text(value)) for key, value in ASKED.items() if isinstance(value, str)]


@pytest.mark.parametrize(
    ("dims", "offset"), [((32, 2**40), 0), ((2**32, 2**32), 0), ((32, 2), 2**60), ((2**63, 2**63, 2), 0)]
)
def test_shapes_that_are_not_true_cost_nothing(tmp_path, dims, offset):
    path = tmp_path / "x.gguf"
    keys = [entry("general.architecture", 8, text("llama")), *HEAD]
    raw(path, *keys, info(Q_A, dims, 0, offset), info(Q_B, (2, 32), 0, 256), bytes(1024), n_tensors=2, n_keys=len(keys))
    tracemalloc.start()
    assert "truncated" in refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20


def test_memory_is_the_adapters(tmp_path):
    """What is read is held once, and one tensor more as it stands in the file."""
    config = replace(LLAMA, vocab_size=20000)
    model = ln.Model(config, ln.init_weights(config, seed=0))
    write_theirs(tmp_path / "x.gguf", pair("output.weight", 20000, 32, r=16))
    ln.load_adapter(tmp_path / "x.gguf", model)  # imports
    size = (tmp_path / "x.gguf").stat().st_size
    tracemalloc.start()
    ln.load_adapter(tmp_path / "x.gguf", model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * size + 4 * 2**20


def test_a_header_that_is_cut_within_a_number(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQ", 3, 2))
    assert "truncated" in refusal(tmp_path / "x.gguf")

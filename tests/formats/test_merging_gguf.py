"""Merging onto a GGUF file: each number the sum rounded once, every other byte the base's; what is refused, by name."""

import re
import tracemalloc
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import same_bits, seeds

import lora_np as ln
from lora_np.cli import main

gguf = pytest.importorskip("gguf", reason="reads GGUF files: the extra models")
pytest.importorskip("ml_dtypes", reason="bfloat16 in NumPy: the extra models")
from gguf_files import KINDS, SMALL, WIDE, in_file, write  # noqa: E402

from lora_np.formats.merged.gguf import merge_gguf  # noqa: E402
from lora_np.formats.merged.gguf_comparison import compare_gguf  # noqa: E402
from lora_np.formats.merged.mistakes import explained  # noqa: E402
from lora_np.formats.models.gguf_file import open_gguf  # noqa: E402

EVERY = ("q", "k", "v", "o", "gate", "up", "down")
BITS = {"F32": 24, "F16": 11, "BF16": 8}


def trained(model, seed=0, **fields):
    """An adapter of random A and B."""
    config, rng = ln.LoRAConfig(**{"r": 2, "alpha": 3, **fields}), np.random.default_rng(seed)
    params = ln.init_adapter(model, config, seed=0).params
    return ln.Adapter(config, {n: rng.standard_normal(value.shape).astype(value.dtype) for n, value in params.items()})


def saved(path, model, **fields):
    """An adapter's file, and the adapter."""
    adapter = trained(model, **fields)
    ln.save_adapter(path, adapter, model)
    return adapter


def tensors(path):
    """By name: the values, where they lie, and how many bytes they are."""
    return in_file(path)[1]


def nearest(value, kind):
    """The number of a format with so many bits that is nearest to a fraction, ties to even; no subnormals here."""
    if value == 0:
        return Fraction(0)
    exponent = 0
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - BITS[kind] + 1)
    return round(value / unit) * unit


@pytest.mark.proves("L5")
@pytest.mark.parametrize("kind", BITS)
@given(seed=seeds)
def test_each_number_is_the_sum_rounded_once(tmp_path_factory, kind, seed):
    """A and B of few bits, so that float64 holds the sums exactly; the rounding by fractions."""
    folder = tmp_path_factory.mktemp("x")
    write(folder / "base.gguf", SMALL, kind, seed=seed)
    model = ln.load_model(folder / "base.gguf")
    adapter = trained(model, seed, targets=("v",), r=2, alpha=2)
    rng = np.random.default_rng(seed)
    few = {name: (rng.integers(-99, 100, p.shape) / 64).astype(p.dtype) for name, p in adapter.params.items()}
    ln.save_adapter(folder / "ad", ln.Adapter(adapter.config, few), model)
    merge_gguf(folder / "base.gguf", [folder / "ad"], [1.0], folder / "m.gguf")
    W0, found = (tensors(folder / name)["blk.0.attn_v.weight"][0] for name in ("base.gguf", "m.gguf"))
    update = few["layers.0.attn.v.B"].astype("f8") @ few["layers.0.attn.v.A"].astype("f8")
    for i in range(16):
        for j in range(0, 32, 5):
            assert Fraction(float(found[i, j])) == nearest(Fraction(float(W0[i, j])) + Fraction(update[i, j]), kind)


@pytest.mark.proves("L5")
@pytest.mark.parametrize(("kind", "ulp"), [("F16", 2.0**-10), ("BF16", 2.0**-7)])
def test_just_above_a_tie(tmp_path, kind, ulp):
    """1 + ulp/2 + 2^-40 goes up; by way of float32 it would be the tie, and go down to 1."""
    ones = np.ones((16, 32), np.float32)
    tensors_of_1 = {"blk.0.attn_v.weight": (gguf.quants.quantize(ones, KINDS[kind]), KINDS[kind])}
    write(tmp_path / "base.gguf", SMALL, kind, tensors=tensors_of_1)
    model = ln.load_model(tmp_path / "base.gguf")
    adapter = trained(model, targets=("v",), r=2, alpha=2)
    B = np.tile(np.array([ulp / 2, 2.0**-40], np.float32), (16, 1))
    params = {"layers.0.attn.v.A": np.ones((2, 32), np.float32), "layers.0.attn.v.B": B}
    ln.save_adapter(tmp_path / "ad", ln.Adapter(adapter.config, params), model)
    merge_gguf(tmp_path / "base.gguf", [tmp_path / "ad"], [1.0], tmp_path / "m.gguf")
    assert (tensors(tmp_path / "m.gguf")["blk.0.attn_v.weight"][0] == 1 + ulp).all()


@pytest.mark.proves("L5", "L10", "T11")
@pytest.mark.parametrize("suffix", ["", ".npz"])
@pytest.mark.parametrize("targets", [EVERY, ("qkv", "embed"), ("embed", "head")], ids=str)
def test_dora_is_the_merge_in_memory(tmp_path, targets, suffix):
    """m stands in the order of q's and k's rows; in the table norms are of columns. And it is judged right."""
    write(tmp_path / "base.gguf", replace(SMALL, tie_head=False))
    model = ln.load_model(tmp_path / "base.gguf")
    adapter = saved(tmp_path / f"ad{suffix}", model, targets=targets, dora=True)
    paths = tmp_path / "base.gguf", [tmp_path / f"ad{suffix}"]
    merge_gguf(*paths, [1.0], tmp_path / "m.gguf")
    merged, expected = ln.load_model(tmp_path / "m.gguf"), ln.merge(model, adapter)
    for name, value in expected.weights.items():
        np.testing.assert_array_equal(ln.asnumpy(merged.weights[name]), ln.asnumpy(value), err_msg=name)
    assert compare_gguf(*paths, tmp_path / "m.gguf", 1).holds
    plain = ln.Adapter(replace(adapter.config, dora=False), {n: p for n, p in adapter.params.items() if n[-2:] != ".m"})
    ln.save_adapter(tmp_path / "plain", plain, model)
    merge_gguf(paths[0], [tmp_path / "plain"], [1.0], tmp_path / "wrong.gguf")
    found = compare_gguf(*paths, tmp_path / "wrong.gguf", 1)
    assert not found.holds
    assert explained(found, {}) == "the magnitudes are left out"


def test_dora_that_gguf_has_no_place_for(tmp_path):
    write(tmp_path / "base.gguf", SMALL)
    model = ln.load_model(tmp_path / "base.gguf")
    adapter = trained(model, targets=("v",), dora=True)
    with pytest.raises(ValueError, match=r"llama\.cpp's adapters have no place for DoRA's magnitudes"):
        ln.save_adapter(tmp_path / "ad.gguf", adapter, model)
    ln.save_adapter(tmp_path / "ad", adapter, model)
    with pytest.raises(ValueError, match=r"DoRA scales the rows of W0 \+ s B A, which is no sum"):
        merge_gguf(tmp_path / "base.gguf", [tmp_path / "ad"], [0.5], tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.proves("L5", "T11")
@pytest.mark.parametrize("suffix", ["", ".npz", ".safetensors", ".gguf"])
@pytest.mark.parametrize("tie_head", [True, False])
def test_it_is_the_merge_in_memory(tmp_path, tie_head, suffix):
    """From any format of adapters; q's and k's rows in their order."""
    write(tmp_path / "base.gguf", replace(SMALL, tie_head=tie_head))
    model = ln.load_model(tmp_path / "base.gguf")
    adapter = saved(tmp_path / f"ad{suffix}", model, targets=EVERY)
    done = merge_gguf(tmp_path / "base.gguf", [tmp_path / f"ad{suffix}"], [1.0], tmp_path / "m.gguf")
    merged, expected = ln.load_model(tmp_path / "m.gguf"), ln.merge(model, adapter)
    assert merged.config == expected.config
    for name, value in expected.weights.items():
        np.testing.assert_array_equal(ln.asnumpy(merged.weights[name]), ln.asnumpy(value), err_msg=name)
    assert done == (7, len(model.weights) - 7)


@pytest.mark.proves("L5", "T14")
@pytest.mark.parametrize("targets", [("embed",), ("head",), ("embed", "head", "q")], ids=" ".join)
@pytest.mark.parametrize("kind", BITS)
def test_a_tied_head_gets_a_tensor_of_its_own(tmp_path, targets, kind):
    """It comes last, the table's type and all; entries and data in front of it are the base's."""
    write(tmp_path / "base.gguf", replace(SMALL, tie_head=True), kind)
    model = ln.load_model(tmp_path / "base.gguf")
    adapter = saved(tmp_path / "ad", model, targets=targets)
    merge_gguf(tmp_path / "base.gguf", [tmp_path / "ad"], [1.0], tmp_path / "m.gguf")
    before, after = tensors(tmp_path / "base.gguf"), tensors(tmp_path / "m.gguf")
    assert list(after) == [*before, "output.weight"]
    merged, expected = ln.load_model(tmp_path / "m.gguf"), ln.merge(model, adapter)
    assert merged.config == expected.config
    for name, value in expected.weights.items():
        close = {"F32": 0, "F16": 2**-11, "BF16": 2**-8}[kind]
        np.testing.assert_allclose(ln.asnumpy(merged.weights[name]), ln.asnumpy(value), rtol=close, err_msg=name)
    if "embed" not in targets:
        np.testing.assert_array_equal(after["token_embd.weight"][0], before["token_embd.weight"][0])
    if "head" not in targets:
        np.testing.assert_array_equal(after["output.weight"][0], before["token_embd.weight"][0])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
@pytest.mark.parametrize("alignment", [None, 64])
def test_every_other_byte_is_the_bases(tmp_path, kind, alignment):
    """Tensors that no adapter touches may be quantised; the header's very bytes, and the padding's."""
    rng = np.random.default_rng(0)
    plain = {f"blk.{i}.attn_k.weight": (rng.standard_normal((64, 256)).astype("f2"), KINDS["F16"]) for i in (0, 1)}
    keys = {"general.alignment": alignment, "general.tags": ["a", "b"], "general.name": "x"}
    write(tmp_path / "base.gguf", WIDE, kind, keys=keys, tensors=plain)
    data, before = bytearray((tmp_path / "base.gguf").read_bytes()), tensors(tmp_path / "base.gguf")
    with open_gguf(tmp_path / "base.gguf") as file:
        end, start = len(file.header), file.data_start
    assert start == min(offset for _, offset, _ in before.values()) > end
    data[end:start] = b"\x55" * (start - end)
    (tmp_path / "base.gguf").write_bytes(data)
    model = ln.load_model(tmp_path / "base.gguf")
    saved(tmp_path / "ad", model, targets=("k",))
    merge_gguf(tmp_path / "base.gguf", [tmp_path / "ad"], [1.0], tmp_path / "m.gguf")
    merged = (tmp_path / "m.gguf").read_bytes()
    assert len(merged) == len(data)
    for name in plain:
        _, offset, size = before[name]
        assert merged[offset : offset + size] != data[offset : offset + size]
        data[offset : offset + size] = merged[offset : offset + size]
    assert merged == data


def test_a_new_head_behind_a_file_that_ends_early(tmp_path):
    """The last tensor fills no whole place, and no padding follows it; the version is 2, and stays so."""
    config = replace(SMALL, tie_head=True, d_model=40)
    write(tmp_path / "base.gguf", config, keys={"general.alignment": 64})
    end = max(offset + size for _, offset, size in tensors(tmp_path / "base.gguf").values())
    assert end % 64
    data = (tmp_path / "base.gguf").read_bytes()[:end]
    (tmp_path / "base.gguf").write_bytes(data[:4] + b"\2" + data[5:])
    model = ln.load_model(tmp_path / "base.gguf")
    adapter = saved(tmp_path / "ad", model, targets=("head",))
    merge_gguf(tmp_path / "base.gguf", [tmp_path / "ad"], [1.0], tmp_path / "m.gguf")
    expected = ln.merge(model, adapter)
    for name, value in ln.load_model(tmp_path / "m.gguf").weights.items():
        np.testing.assert_array_equal(ln.asnumpy(value), ln.asnumpy(expected.weights[name]))
    assert (tmp_path / "m.gguf").read_bytes()[4] == 2


@pytest.mark.parametrize("alpha", [0.0, None])
def test_an_alpha_of_0_is_a_scale_of_1(tmp_path, alpha):
    base = write_other(tmp_path / "base.gguf", "qwen2", {"a": (6, 5)})
    keys = {key: value for key, value in (ADAPTER | {"adapter.lora.alpha": alpha}).items() if value is not None}
    lora = write_other(tmp_path / "x.gguf", "qwen2", {"a.lora_a": (2, 5), "a.lora_b": (6, 2)}, keys)
    merge_gguf(tmp_path / "base.gguf", [tmp_path / "x.gguf"], [1.0], tmp_path / "m.gguf")
    due = base["a"] + lora["a.lora_b"] @ lora["a.lora_a"]
    np.testing.assert_allclose(tensors(tmp_path / "m.gguf")["a"][0], due, rtol=1e-5, atol=1e-6)


@pytest.mark.proves("L5", "L9")
def test_several_adapters_with_weights(tmp_path):
    write(tmp_path / "base.gguf", SMALL)
    model = ln.load_model(tmp_path / "base.gguf")
    one = saved(tmp_path / "one", model, targets=("q", "o"))
    other = saved(tmp_path / "other.gguf", model, targets=("q",), seed=1, alpha=5)
    merge_gguf(tmp_path / "base.gguf", [tmp_path / "one", tmp_path / "other.gguf"], [0.5, -2.0], tmp_path / "m.gguf")
    merged = ln.load_model(tmp_path / "m.gguf")
    expected = ln.asnumpy(model.weights["layers.0.attn.q.weight"]).astype("f8")
    for w, adapter in ((0.5, one), (-2.0, other)):
        A, B = (ln.asnumpy(adapter.params[f"layers.0.attn.q.{factor}"]).astype("f8") for factor in "AB")
        expected = expected + w * adapter.config.scale("layers.0.attn.q") * (B @ A)
    np.testing.assert_allclose(ln.asnumpy(merged.weights["layers.0.attn.q.weight"]), expected, rtol=1e-6, atol=1e-6)


def write_other(path, architecture, shapes, keys=()):
    """A file of any architecture, whose tensors are random; keys: strings."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in dict(keys).items():
        writer.add_float32(key, value) if isinstance(value, float) else writer.add_string(key, value)
    found = {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    for name, value in found.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


ADAPTER = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 3.0}


@pytest.mark.proves("L1", "L5")
def test_any_architecture_by_the_names_of_its_tensors(tmp_path):
    """llama.cpp's adapter says which tensor each update is for, and its rows stand as that one's do."""
    base = {"a.weight": (6, 5), "token_embd.weight": (7, 4), "b": (3,)}
    write_other(tmp_path / "tied.gguf", "falcon", base)
    head = write_other(tmp_path / "base.gguf", "falcon", {**base, "output.weight": (7, 4)})
    shapes = {
        "a.weight.lora_a": (2, 5), "a.weight.lora_b": (6, 2),
        "token_embd.weight.lora_a": (7, 3), "token_embd.weight.lora_b": (4, 3),
    }  # fmt: skip
    lora = write_other(tmp_path / "x.gguf", "falcon", shapes, ADAPTER)
    merge_gguf(tmp_path / "base.gguf", [tmp_path / "x.gguf"], [1.0], tmp_path / "m.gguf")
    found = {name: value for name, (value, _, _) in tensors(tmp_path / "m.gguf").items()}
    due = {
        **head,
        "a.weight": head["a.weight"] + 3 / 2 * lora["a.weight.lora_b"] @ lora["a.weight.lora_a"],
        "token_embd.weight": head["token_embd.weight"]
        + 3 / 3 * lora["token_embd.weight.lora_a"] @ lora["token_embd.weight.lora_b"].T,
    }
    assert found.keys() == due.keys()
    for name, value in due.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"tied.gguf: token_embd.weight: there is no output.weight.*'falcon'"):
        merge_gguf(tmp_path / "tied.gguf", [tmp_path / "x.gguf"], [1.0], tmp_path / "n.gguf")


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path):
    """A quantised base, one in float32, and adapters of it."""
    write(tmp_path / "q8.gguf", SMALL, "Q8_0")
    write(tmp_path / "f32.gguf", SMALL)
    for name in ("q8", "f32"):
        model = ln.load_model(tmp_path / f"{name}.gguf")
        saved(tmp_path / f"{name}-ad", model, targets=("q",))
        saved(tmp_path / f"{name}-ad.gguf", model, targets=("q",))
    ln.save_adapter(tmp_path / "whole", trained(model, targets=("q",), train_head=True), model)
    pairs = {
        "wide": ("blk.0.attn_q.weight", (2, 31), (32, 2)), "deep": ("blk.7.attn_q.weight", (2, 32), (32, 2)),
        "ranks": ("blk.0.attn_q.weight", (3, 32), (32, 2)), "three": ("a", (2, 3, 4), (2, 4, 3)),
        "vector": ("blk.0.attn_norm.weight", (2, 32), (1, 2)),
    }  # fmt: skip
    for name, (tensor, a, b) in pairs.items():
        write_other(tmp_path / f"{name}.gguf", "llama", {f"{tensor}.lora_a": a, f"{tensor}.lora_b": b}, ADAPTER)
    write_other(tmp_path / "qwen.gguf", "qwen2", {"a.lora_a": (2, 4), "a.lora_b": (4, 2)}, ADAPTER)
    write_other(tmp_path / "other.gguf", "falcon", {"a": (4, 4)})
    write_other(tmp_path / "bert.gguf", "bert", {"token_embd.weight": (4, 4)})
    head = {"output.weight.lora_a": (2, 4), "output.weight.lora_b": (4, 2)}
    write_other(tmp_path / "bert-ad.gguf", "bert", head, ADAPTER)
    return tmp_path


@pytest.mark.parametrize(
    ("base", "adapter", "out", "message"),
    [
        ("q8.gguf", "q8-ad", "m.gguf", "blk.0.attn_q.weight: quantised (Q8_0): the merged tensor would have to be"),
        ("q8.gguf", "q8-ad.gguf", "m.gguf", "blk.0.attn_q.weight: quantised (Q8_0)"),
        ("f32.gguf", "q8-ad", "m.gguf", "made for another base"),
        ("f32.gguf", "f32-ad", "m", "m: expected a name that ends in .gguf"),
        ("f32.gguf", "f32-ad", "q8.gguf", "q8.gguf: exists already"),
        ("f32.gguf", "none", "m.gguf", "none"),
        ("f32.gguf", "none.gguf", "m.gguf", "none.gguf: no such file"),
        ("none.gguf", "f32-ad", "m.gguf", "none.gguf: no such file"),
        ("f32.gguf", "q8.gguf", "m.gguf", "q8.gguf: general.type: expected adapter, got 'none'"),
        ("f32.gguf", "whole", "m.gguf", "whole: head.weight is trained whole: only A and B can be merged"),
        ("f32.gguf", "wide.gguf", "m.gguf", "attn_q.weight: expected shape (32, 31), as the adapter has it, got (32"),
        ("f32.gguf", "deep.gguf", "m.gguf", "the adapter is for a tensor that is not there: blk.7.attn_q.weight"),
        ("f32.gguf", "ranks.gguf", "m.gguf", "lora_a (3, 32) and lora_b (32, 2) have different ranks"),
        ("f32.gguf", "three.gguf", "m.gguf", "a: expected matrices, got lora_a (2, 3, 4)"),
        ("f32.gguf", "vector.gguf", "m.gguf", "blk.0.attn_norm.weight: expected shape (1, 32)"),
        ("f32.gguf", "qwen.gguf", "m.gguf", "qwen.gguf: made for another base: its architecture is 'qwen2'"),
        ("bert.gguf", "bert-ad.gguf", "m.gguf", "the adapter is for a tensor that is not there: output.weight"),
        ("other.gguf", "f32-ad", "m.gguf", "architecture 'falcon': only adapters in .gguf can be merged onto it"),
    ],
)  # fmt: skip
def test_what_is_refused(home, base, adapter, out, message):
    before = sorted(home.iterdir())
    with pytest.raises((ValueError, FileNotFoundError, FileExistsError)) as caught:
        merge_gguf(home / base, [home / adapter], [1.0], home / out)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()
    assert sorted(home.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "truncated"), (lambda data: data[:300], "truncated"),
        (lambda data: data.replace(b"split.xxxxx", b"split.count"), "split.count: a model in several files"),
    ],
)  # fmt: skip
def test_a_base_that_is_damaged_or_in_parts(tmp_path, change, message):
    write_other(tmp_path / "base.gguf", "qwen2", {"b": (4, 8), "a": (4, 8)}, {"split.xxxxx": "2"})
    write_other(tmp_path / "x.gguf", "qwen2", {"b.lora_a": (2, 8), "b.lora_b": (4, 2)}, ADAPTER)
    (tmp_path / "base.gguf").write_bytes(change((tmp_path / "base.gguf").read_bytes()))
    with pytest.raises(ValueError, match=r"base\.gguf") as caught:
        merge_gguf(tmp_path / "base.gguf", [tmp_path / "x.gguf"], [1.0], tmp_path / "m.gguf")
    assert message in str(caught.value)
    assert not (tmp_path / "m.gguf").exists()


def test_a_sum_that_is_too_large(tmp_path):
    write(tmp_path / "base.gguf", SMALL, "F16")
    model = ln.load_model(tmp_path / "base.gguf")
    saved(tmp_path / "ad", model, targets=("q",), alpha=1e6)
    with pytest.raises(ValueError, match=r"blk.0.attn_q.weight: a merged weight is NaN, infinite, or too large for fl"):
        merge_gguf(tmp_path / "base.gguf", [tmp_path / "ad"], [1.0], tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@given(data=st.data())
def test_damaged_adapters_give_one_line_or_a_file(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("x")
    write(folder / "base.gguf", SMALL)
    saved(folder / "good.gguf", ln.load_model(folder / "base.gguf"), targets=("q", "down"))
    changed = bytearray((folder / "good.gguf").read_bytes())
    place = st.integers(0, len(changed) - 1) | st.integers(0, 300)
    for at, value in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=6)):
        changed[at] = value
    (folder / "x.gguf").write_bytes(changed[: data.draw(st.integers(0, len(changed)) | st.just(len(changed)))])
    message = "x.gguf"
    try:
        merge_gguf(folder / "base.gguf", [folder / "x.gguf"], [1.0], folder / "m.gguf")
    except ValueError as error:
        message = str(error)
    assert re.search(r"(x|base)\.gguf", message)
    assert message.isprintable()


def test_memory_is_the_adapter_and_one_tensor(tmp_path):
    config = replace(WIDE, vocab_size=40000, n_layer=1)
    write(tmp_path / "base.gguf", config, "F16")
    model = ln.load_model(tmp_path / "base.gguf")
    saved(tmp_path / "ad.gguf", model, targets=("down",))
    args = tmp_path / "base.gguf", [tmp_path / "ad.gguf"], [1.0]
    merge_gguf(*args, tmp_path / "first.gguf")  # imports
    tracemalloc.start()
    merge_gguf(*args, tmp_path / "m.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 2**20 < (tmp_path / "base.gguf").stat().st_size


# --- Is a file the merge? --------------------------------------------------------------------------------------------


def rewritten(path, changes, kind="F32", keys=None):
    """The tensors of a file, some of them others, as another file of the small model. changes: by name; None: none."""
    encoded: dict = {}
    for name, value in ({name: found.values for name, found in tensors(path).items()} | changes).items():
        its_kind = KINDS[kind if value is not None and value.ndim == 2 else "F32"]
        encoded[name] = None if value is None else (gguf.quants.quantize(value.astype("f4"), its_kind), its_kind)
    write(path.with_name("other.gguf"), SMALL, tensors=encoded, keys=keys)
    return path.with_name("other.gguf")


def judged(base, adapter, merged, ulps=1):
    found = compare_gguf(base, [adapter], merged, ulps)
    return found, explained(found, {})


@pytest.fixture
def merge_of(tmp_path):
    """A base, an adapter of some of its tensors, and their merge."""
    base, adapter, merged = (tmp_path / f"{name}.gguf" for name in ("base", "ad", "m"))
    write(base, SMALL)
    saved(adapter, ln.load_model(base), targets=("q", "down"), r=2, alpha=3)
    merge_gguf(base, [adapter], [1.0], merged)
    return base, adapter, merged


@pytest.mark.proves("L5")
def test_a_merge_is_known(merge_of):
    found, looks_like = judged(*merge_of)
    assert found.holds
    assert looks_like is None
    assert {one.tensor: one.differing for one in found.changed} == {
        "blk.0.attn_q.weight": 0, "blk.0.ffn_down.weight": 0,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_a_merge_in_another_type_is_known(merge_of, kind):
    base, adapter, merged = merge_of
    found, looks_like = judged(base, adapter, rewritten(merged, {}, kind))
    assert found.holds
    assert looks_like is None
    assert not judged(base, adapter, rewritten(base, {}, kind))[0].holds


def test_other_merges_are_known_too(merge_of):
    base, adapter, merged = merge_of
    before, after = ({name: t.values for name, t in tensors(path).items()} for path in (base, merged))
    updates = {
        name: after[name].astype("f8") - before[name] for name in ("blk.0.attn_q.weight", "blk.0.ffn_down.weight")
    }
    for factor, text in (
        (2.0, "merged twice"),
        (-1.0, "subtracted"),
        (2 / 3, "alpha / r is missing"),
        (2.0, "r is missing"),
    ):
        changes = {name: before[name] + factor * update for name, update in updates.items()}
        found, looks_like = judged(base, adapter, rewritten(base, changes))
        assert not found.holds
        assert text in looks_like


def test_what_is_not_the_merge(merge_of):
    base, adapter, merged = merge_of
    after = {name: t.values for name, t in tensors(merged).items()}
    unpaired = after["blk.0.attn_q.weight"].reshape(4, 4, 2, 32).swapaxes(1, 2).reshape(32, 32)
    assert not judged(base, adapter, rewritten(merged, {"blk.0.attn_q.weight": unpaired}))[0].holds
    norm = after["output_norm.weight"].copy()
    norm[3] = np.nextafter(norm[3], np.float32(9))
    found, _ = judged(base, adapter, rewritten(merged, {"output_norm.weight": norm}))
    assert (found.altered, found.holds) == (["output_norm.weight"], False)
    found, _ = judged(base, adapter, rewritten(merged, {"blk.0.attn_k.weight": None, "new": norm}))
    assert (found.missing, found.extra, found.loads) == (["blk.0.attn_k.weight"], ["new"], False)
    found, _ = judged(base, adapter, rewritten(merged, {"blk.0.attn_q.weight": after["blk.0.attn_q.weight"][:16]}))
    assert (found.misshapen, found.loads) == (["blk.0.attn_q.weight"], False)


def test_a_merge_that_was_quantised_or_cut(merge_of):
    """A quantised tensor holds no weights to compare, an adapted one or another; a file cut short is none."""
    base, adapter, merged = merge_of
    found, _ = judged(base, adapter, rewritten(merged, {}, "Q8_0"))
    assert found.misshapen == ["blk.0.attn_q.weight", "blk.0.ffn_down.weight"]
    assert {"blk.0.attn_k.weight", "token_embd.weight"} < set(found.altered)
    assert not found.holds
    merged.write_bytes(merged.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"m\.gguf: \S+: truncated"):
        compare_gguf(base, [adapter], merged, 1)


def test_a_file_that_says_another_model(merge_of):
    """What it is called is no part of that."""
    base, adapter, merged = merge_of
    assert judged(base, adapter, rewritten(merged, {}, keys={"general.name": "merged"}))[0].holds
    found, _ = judged(base, adapter, rewritten(merged, {}, keys={"rope.freq_base": 5e5}))
    assert (found.same_config, found.holds) == (False, False)


def test_an_untied_head_is_known(tmp_path):
    write(tmp_path / "base.gguf", replace(SMALL, tie_head=True))
    saved(tmp_path / "ad", ln.load_model(tmp_path / "base.gguf"), targets=("embed",))
    merge_gguf(tmp_path / "base.gguf", [tmp_path / "ad"], [1.0], tmp_path / "m.gguf")
    assert judged(tmp_path / "base.gguf", tmp_path / "ad", tmp_path / "m.gguf")[0].holds
    found, _ = judged(tmp_path / "base.gguf", tmp_path / "ad", tmp_path / "base.gguf")
    assert (found.missing, found.holds) == (["output.weight"], False)


# --- The commands ----------------------------------------------------------------------------------------------------


def test_the_commands(tmp_path, capsys):
    write(tmp_path / "base.gguf", SMALL)
    model = ln.load_model(tmp_path / "base.gguf")
    adapter = saved(tmp_path / "ad", model, targets=("q", "down"))
    base, x = str(tmp_path / "base.gguf"), str(tmp_path / "x.gguf")
    assert main(["convert", "--base", base, "--adapter", str(tmp_path / "ad"), "--out", x]) == 0
    assert "gguf's format, from peft's" in capsys.readouterr().out
    assert main(["convert", "--base", base, "--adapter", x, "--out", str(tmp_path / "back.npz")]) == 0
    found = ln.load_adapter(tmp_path / "back.npz", model)
    assert same_bits(dict(found.params), dict(adapter.params))
    assert main(["merge", "--base", base, "--adapter", x, "--out", str(tmp_path / "m.gguf")]) == 0
    assert "2 tensors are new, 9 are the base's bytes" in capsys.readouterr().out
    merged = str(tmp_path / "m.gguf")
    assert main(["verify", "--base", base, "--adapter", x, "--merged", merged]) == 0
    assert "merged: yes, exactly" in capsys.readouterr().out
    assert main(["verify", "--base", base, "--adapter", x, "--merged", base]) == 1
    assert "it looks like the base: nothing was merged" in capsys.readouterr().out
    ln.save_model(tmp_path / "folder", model)
    assert main(["merge", "--base", str(tmp_path / "folder"), "--adapter", x, "--out", str(tmp_path / "m")]) == 0
    one, other = ln.load_model(tmp_path / "m"), ln.load_model(tmp_path / "m.gguf")
    for name, value in one.weights.items():
        np.testing.assert_array_equal(ln.asnumpy(value), ln.asnumpy(other.weights[name]))
    assert main(["merge", "--base", base, "--adapter", x, "--out", str(tmp_path / "m.gguf")]) != 0
    assert "exists already" in capsys.readouterr().err
